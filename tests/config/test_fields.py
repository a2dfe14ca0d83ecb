"""Every key TRL or transformers has is honoured or refused with a reason; defaults are theirs; values are checked."""

import copy
import dataclasses
import enum
import importlib
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import burnish.config
from burnish.config.aliases import HINTS, OLDER
from burnish.config.errors import UserError
from burnish.config.fields import SCHEDULES, SFTConfig, TrainConfig, in_steps
from burnish.config.refused import REFUSED

KEYS = {field.name: field for field in dataclasses.fields(SFTConfig)}
# TRL 1.16's own fields with their defaults, written down because TRL is not installed here.
TRL_SFT = {
    "learning_rate": 2e-5, "bf16": None, "gradient_checkpointing": True, "logging_steps": 10, "model_init_kwargs": None,
    "trust_remote_code": False, "router_aux_loss_coef": None, "chat_template_path": None, "dataset_text_field": "text",
    "dataset_kwargs": None, "dataset_num_proc": None, "eos_token": None, "max_length": 1024,
    "truncation_mode": "keep_start", "shuffle_dataset": False, "packing": False, "packing_strategy": "bfd",
    "padding_free": False, "pad_to_multiple_of": "auto", "eval_packing": None, "completion_only_loss": None,
    "assistant_only_loss": False, "loss_type": "nll", "activation_offloading": False, "pad_token": None,
}  # fmt: skip
TRL_MODEL = {
    "model_name_or_path": None, "model_revision": "main", "dtype": "float32", "attn_implementation": None,
    "use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": None,
    "lora_target_parameters": None, "lora_modules_to_save": None, "lora_task_type": "CAUSAL_LM", "use_rslora": False,
    "use_dora": False, "load_in_8bit": False, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": None,
}  # fmt: skip
TRL_SCRIPT = {
    "dataset_name": None, "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test",
    "dataset_streaming": False, "ignore_bias_buffers": False,
}  # fmt: skip
OURS = {
    "eval_dataset_name", "test_split_size", "max_tokens_per_batch", "kernels", "strict_patch", "optimizer_in_bwd",
    "checkpoint_segment", "keep_attention", "tile_tokens", "memory", "heaviest_batch_first", "allow_truncation",
    "nproc", "parallel", "sequence_parallel", "max_restarts", "async_save",
    "warmup_ratio", "overwrite_output_dir",  # transformers' until version 5
}  # fmt: skip
# Where burnish's default is not the one of that name elsewhere, and why.
OTHER_DEFAULTS = {
    "padding_free",  # burnish is always padding-free
    "dataset_test_split",  # a split named `test` is not evaluated on unless asked for
    "output_dir",  # transformers' None means trainer_output as well
}


@pytest.fixture(scope="module")
def transformers_defaults():
    from transformers import TrainingArguments

    return {field.name: field.default for field in dataclasses.fields(TrainingArguments)}


def test_every_field_of_transformers_and_trl_is_honoured_or_refused(transformers_defaults):
    theirs = {*transformers_defaults, *TRL_SFT, *TRL_MODEL, *TRL_SCRIPT}
    assert theirs - set(KEYS) - set(REFUSED) - set(HINTS) - set(OLDER) == set()
    assert len({*KEYS, *REFUSED, *HINTS, *OLDER}) == len(KEYS) + len(REFUSED) + len(HINTS) + len(OLDER)
    assert set(KEYS) - theirs == OURS


# Keys whose only value is what burnish does anyway: checked when a configuration is made, and read by nothing else.
SETTLED = {"padding_free", "gradient_checkpointing_kwargs"}


def test_every_key_is_read_by_some_code():
    """A key that nothing reads would be ignored silently."""
    engine = Path(__file__).resolve().parent.parent.parent / "engine"
    source = "\n".join(path.read_text() for path in engine.rglob("*.py") if path.parent.name not in ("config", "verbs"))
    unread = {name for name in KEYS if not re.search(rf"\bconfig\.{name}\b|, \"{name}\"", source)}
    assert unread == SETTLED


def test_defaults_are_trls(transformers_defaults):
    theirs = transformers_defaults | TRL_SFT | TRL_MODEL | TRL_SCRIPT
    plain = {name: getattr(value, "value", value) for name, value in theirs.items()}
    ours = dataclasses.asdict(SFTConfig())
    different = {name for name in set(KEYS) & set(plain) if ours[name] != plain[name]}
    assert different == OTHER_DEFAULTS


def test_schedules_are_names_transformers_knows():
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULES) <= {schedule.value for schedule in SchedulerType}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_says_why_and_what_instead(name):
    with pytest.raises(UserError) as error:
        SFTConfig(**{name: 1})
    why, mend = REFUSED[name]
    assert str(error.value) == f"SFTConfig({name}=...): {name} is not taken: {why}. {mend}"
    assert mend.startswith(("Use ", "Delete it", "Set ", "Upload ", "Read "))


def every_key() -> set[str]:
    """The keys of every objective's configuration."""
    for module in pkgutil.iter_modules(burnish.config.__path__):
        importlib.import_module(f"burnish.config.{module.name}")
    classes, found = [TrainConfig], set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found |= {field.name for field in dataclasses.fields(cls)}
    return found


# What TRL 0.7 to 0.12 and transformers 4.36 to 4.46 had beside today's names, from their pages.
OF_OLD = {
    "max_seq_length", "evaluation_strategy", "torch_dtype", "no_cuda", "per_gpu_train_batch_size", "adafactor",
    "per_gpu_eval_batch_size", "logging_dir", "save_safetensors", "use_mps_device", "jit_mode_eval", "use_ipex",
    "fp16_opt_level", "fp16_backend", "half_precision_backend", "tpu_num_cores", "tpu_metrics_debug", "past_index",
    "mp_parameters", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "dispatch_batches", "split_batches",
    "ray_scope", "use_legacy_prediction_loop", "include_inputs_for_metrics", "include_tokens_per_second",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "group_by_length", "num_of_sequences",
    "chars_per_token", "dataset_batch_size", "infinite", "use_liger", "torchdynamo", "max_target_length",
}  # fmt: skip


def test_older_names_are_known():
    assert OF_OLD - set(KEYS) - set(REFUSED) - set(HINTS) - set(OLDER) == set()
    assert set(OLDER.values()) <= every_key()


@pytest.mark.parametrize("name", sorted(set(OLDER) - {"max_target_length"}))
def test_an_older_name_stands_for_todays(name):
    value = {"evaluation_strategy": "epoch", "torch_dtype": torch.bfloat16, "activation_checkpointing_kwargs": {}}
    value = value.get(name, 7 if "size" in name or "length" in name else True)
    config, key = SFTConfig(**{name: value}), OLDER[name]
    assert config == SFTConfig(**{key: value}) and config.notes == [f"{name} is called {key} here"]
    assert not SFTConfig(**{name: None}).notes, "None was the default of all of them"
    later = SFTConfig()
    setattr(later, name, value)
    later.__post_init__()
    assert later == config and later.notes == config.notes
    with pytest.raises(UserError, match=f"{name} is an older name of {key}, which is given as well. Keep one"):
        SFTConfig(**{name: value, key: value})


@pytest.mark.parametrize("name", sorted(HINTS))
def test_a_hint_is_taken_and_noted(name):
    config = SFTConfig(**{name: 3})
    assert config == SFTConfig() and config.notes == [f"{name} changes nothing here: {HINTS[name]}"]
    assert not SFTConfig(**{name: None}).notes


def test_values_that_ask_for_nothing_are_taken(transformers_defaults):
    """TRL's files and TrainingArguments hold them: the defaults of keys that are refused, and of those of old."""
    theirs = transformers_defaults | TRL_SFT | TRL_MODEL | TRL_SCRIPT
    taken = {name: theirs[name] for name in REFUSED if name in theirs and theirs[name] is not dataclasses.MISSING}
    refused = {}
    for name, value in taken.items():
        try:
            SFTConfig(**{name: value})
        except UserError as error:
            refused[name] = (value, str(error))
    assert set(refused) <= {"ddp_timeout"}, refused
    for name, value in {"average_tokens_across_devices": False, "fp16": True, "local_rank": 1, "tf32": True}.items():
        with pytest.raises(UserError, match=f"{name} is not taken"):
            SFTConfig(**{name: value})


def test_a_name_set_afterwards_is_no_way_round():
    config = SFTConfig()
    config.remove_unused_columns = False  # asks for nothing
    config.use_liger = True
    assert config.notes == [f"use_liger changes nothing here: {HINTS['use_liger']}"]
    with pytest.raises(UserError, match="SFTConfig.learning_rte: unknown key learning_rte. Did you mean learning_rate"):
        config.learning_rte = 1
    with pytest.raises(UserError, match="SFTConfig.fp16: fp16 is not taken"):
        config.fp16 = True


def test_loading_arguments_get_todays_names():
    given = {"torch_dtype": torch.bfloat16, "attn_implementation": "flash_attention_2", "revision": "v2"}
    config = SFTConfig(model_init_kwargs=given)
    assert config.model_init_kwargs == {"dtype": "bfloat16", "revision": "v2"} and len(config.notes) == 2
    assert given["torch_dtype"] is torch.bfloat16, "the caller's own dict stays as it is"
    assert SFTConfig(model_init_kwargs={"torch_dtype": None, "attn_implementation": None}).model_init_kwargs is None
    with pytest.raises(UserError, match="torch_dtype and dtype are both given"):
        SFTConfig(model_init_kwargs={"torch_dtype": "bfloat16", "dtype": "float32"})


UNREAD = {
    "lora_r": (4, {"use_peft": True}),
    "lora_target_modules": (["q_proj"], {"use_peft": True}),
    "use_dora": (True, {"use_peft": True}),
    "adam_beta2": (0.95, {"optim": "adamw_torch"}),
    "packing_strategy": ("wrapped", {"eval_packing": True}),
    "eval_steps": (5, {"eval_strategy": "steps"}),
    "save_steps": (5, {"save_strategy": "steps"}),
    "save_total_limit": (5, {"save_strategy": "epoch"}),
    "metric_for_best_model": ("loss", {"eval_strategy": "epoch"}),
    "checkpoint_segment": (2, {"gradient_checkpointing": True}),
    "warmup_ratio": (0.03, {"lr_scheduler_type": "constant_with_warmup"}),
    "dataset_config": ("en", {"dataset_name": "org/rows"}),
}
NOBODY = {"optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "gradient_checkpointing": False}


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_a_key_that_nothing_would_read_is_an_error(name):
    value, reader = UNREAD[name]
    with pytest.raises(UserError, match=rf"^SFTConfig\({name}=...\): {name} is only read with .*\. Delete {name}$"):
        SFTConfig(**NOBODY, **{name: value})
    assert getattr(SFTConfig(**{**NOBODY, **reader, name: value}), name) == value
    default = KEYS[name].default
    assert getattr(SFTConfig(**NOBODY, **{name: default}), name) == default, "files hold every key"


def test_callbacks_find_what_they_read_in_training_arguments():
    config = SFTConfig("out", learning_rate=1e-4)
    assert config.to_dict()["learning_rate"] == 1e-4 and '"output_dir": "out"' in config.to_json_string()
    assert all(isinstance(value, (bool, int, float, str)) for value in config.to_sanitized_dict().values())
    assert (config.process_index, config.world_size, config.should_save, config.logging_strategy) == (
        0,
        1,
        True,
        "steps",
    )


def test_what_a_refusal_says_to_use_exists():
    keys = every_key()
    for name, (_, mend) in REFUSED.items():
        words = mend.replace(",", " ").replace(":", " ").split()
        named = [word for word in words if "_" in word and word.islower()]
        for word in named:
            assert word in keys or "/" in word, f"{name}: {mend}"


def test_every_key_has_one_line_of_help():
    for name, field in KEYS.items():
        assert 5 < len(field.metadata["doc"]) < 110 and not field.metadata["doc"].endswith("."), name
    common = [name for name, field in KEYS.items() if field.metadata["common"]]
    assert 20 <= len(common) <= 32


def test_unknown_name_from_python_gets_the_near_one():
    with pytest.raises(
        UserError, match=r"^SFTConfig\(learning_rte=...\): unknown key learning_rte. Did you mean learning_rate"
    ):
        SFTConfig(output_dir="x", learning_rte=1)


def test_output_dir_may_come_first_and_nothing_else_may():
    assert SFTConfig("runs/a").output_dir == "runs/a"
    with pytest.raises(TypeError):
        SFTConfig("runs/a", "model")


class Schedule(str, enum.Enum):  # noqa: UP042  # as transformers' enums are
    COSINE = "cosine"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("learning_rate", "1e-4", 1e-4),  # PyYAML reads 1e-4 as text
        ("learning_rate", 1, 1),
        ("max_steps", 1e3, 1000),
        ("max_steps", "2e2", 200),
        ("seed", 2**60 + 1, 2**60 + 1),  # exact beyond float64
        ("lr_scheduler_type", Schedule.COSINE, "cosine"),
        ("eval_strategy", False, "no"),  # YAML reads a bare `no` as false
        ("dtype", torch.bfloat16, "bfloat16"),
        ("resume_from_checkpoint", True, True),
        ("resume_from_checkpoint", "out/checkpoint-3", "out/checkpoint-3"),
        ("report_to", ("none",), ["none"]),
        ("max_length", None, None),
        ("model_init_kwargs", {"revision": "v2"}, {"revision": "v2"}),
    ],
)
def test_values_are_read_by_the_fields_type(name, given, expected):
    value = getattr(SFTConfig(**{name: given}), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be number, got 'fast'"),
        ({"learning_rate": -1e-5}, "learning_rate must be at least 0, got -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate must be number, got nan"),
        ({"learning_rate": True}, "learning_rate must be number, got True"),
        ({"max_steps": 1.5}, "max_steps must be whole number, got 1.5"),
        ({"max_steps": 0}, "max_steps 0 would train nothing"),
        ({"packing": "yes please"}, "packing must be true | false, got 'yes please'"),
        ({"packing": 1}, "packing must be true | false, got 1"),
        ({"pad_token": 2024}, "pad_token must be text | null, got 2024 (quote it to make it text)"),
        ({"lora_target_modules": ["a", 1]}, "lora_target_modules must be list of texts | text | null, got ['a', 1]"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, auto, got 'float16'"),
        ({"lr_scheduler_type": "linaer"}, "lr_scheduler_type must be one of linear, cosine"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be at most 1, got 1.5"),
        ({"adam_epsilon": 0}, "adam_epsilon must be above 0, got 0"),
        ({"max_length": None, "packing": True}, "packing needs max_length"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both set"),
        ({"max_tokens_per_batch": 512}, "a row of max_length 1024 would not fit max_tokens_per_batch 512"),
        ({"test_split_size": 0.1, "eval_dataset_name": "x"}, "test_split_size and eval_dataset_name are both set"),
        ({"test_split_size": 1.5}, "test_split_size must be a share below 1 or a whole number of rows"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "{'use_reentrant': True} can't be honoured"),
        ({"report_to": "mlflow"}, "report_to 'mlflow' is not taken"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"save_strategy": "best"}, "save_strategy needs evaluations"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "save_strategy steps and eval_strategy epoch"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 30, "save_steps": 100},
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps, got 100 and 30",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_an_error_that_names_the_key(given, message):
    with pytest.raises(UserError) as error:
        SFTConfig(**given)
    assert message in str(error.value)
    assert any(f"SFTConfig({name}=...)" in error.value.where for name in given)


def test_pairs_that_go_together_are_taken():
    SFTConfig(load_best_model_at_end=True, eval_strategy="steps", eval_steps=50, save_steps=100)
    SFTConfig(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    SFTConfig(save_strategy="best", eval_strategy="steps")
    SFTConfig(gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=["none"], test_split_size=100)


def test_origins_say_what_was_given_and_survive_copies():
    config = SFTConfig("out", learning_rate=1e-4)
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert same.origins["learning_rate"] == "SFTConfig(learning_rate=...)"
        assert same.origins["output_dir"] == "SFTConfig(...)"
        assert same.origins["seed"] == "default"
    assert TrainConfig.origins == {}, "origins belong to one configuration"


def test_replace_checks_again():
    with pytest.raises(UserError, match="packing needs max_length"):
        dataclasses.replace(SFTConfig(packing=True), max_length=None)


@pytest.mark.parametrize(
    ("value", "total", "expected"), [(10, 7, 10), (0, 7, 0), (0.1, 95, 10), (0.5, 7, 4), (1, 7, 1)]
)
def test_in_steps_counts_as_transformers_does(value, total, expected):
    assert in_steps(value, total) == expected


@pytest.mark.parametrize(
    "name", ["SFTConfig", "DPOConfig", "CPOConfig", "ORPOConfig", "KTOConfig", "BCOConfig", "RewardConfig"]
)
def test_transformers_parser_of_the_command_line_reads_a_configuration(name, capsys):
    """As TRL's documentation has it; and what is not on the command line counts as not given, before and after."""
    from transformers import HfArgumentParser

    import burnish

    kind = getattr(burnish, name)
    before = kind("out", max_length=None, resume_from_checkpoint=True)
    words = ["--output_dir", "out", "--learning_rate", "1e-3", "--resume_from_checkpoint", "true", "--use_peft"]
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(words)
    plain = kind(output_dir="out", learning_rate=1e-3, resume_from_checkpoint=True, use_peft=True)
    assert dataclasses.asdict(parsed) == dataclasses.asdict(plain) and parsed.origins == plain.origins
    assert dataclasses.asdict(kind("out", max_length=None, resume_from_checkpoint=True)) == dataclasses.asdict(before)
    with pytest.raises(SystemExit):
        HfArgumentParser(kind).parse_args_into_dataclasses(["--help"])
    assert "--learning_rate" in capsys.readouterr().out
