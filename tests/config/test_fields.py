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
    "checkpoint_segment", "keep_attention", "tile_tokens", "memory", "heaviest_batch_first",
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
    assert theirs - set(KEYS) - set(REFUSED) == set()
    assert set(KEYS) & set(REFUSED) == set()
    assert set(KEYS) - theirs == OURS


# Keys whose only value is what burnish does anyway: checked when a configuration is made, and read by nothing else.
SETTLED = {"report_to", "padding_free", "gradient_checkpointing_kwargs"}


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
        ("lora_target_modules", ("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
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
        ({"report_to": "wandb"}, "report_to 'wandb' is not taken"),
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
