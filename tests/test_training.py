"""Whole runs on a tiny model: what comes out loads, resumes bit for bit, and nothing is overwritten or silent."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from burnish import SFTConfig, SFTTrainer, UserError
from burnish.run import train

BASE = {
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 8,
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def settings(folder, **given) -> SFTConfig:
    return SFTConfig(str(folder), **{**BASE, **given})


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(Path(folder).glob("*model.safetensors")))


def test_a_run_leaves_a_model_that_loads_and_knows_the_data(tmp_path, tiny_model, chat_file, chat_rows):
    config = settings(
        tmp_path / "run",
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        max_steps=60,
        packing=True,
        assistant_only_loss=True,
        test_split_size=10,
        eval_strategy="steps",
        eval_steps=30,
    )
    result = train(config)
    logged = [record for record in records(tmp_path / "run") if "loss" in record]
    assert result.global_step == len(logged) == 60
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    evaluations = [record["eval_loss"] for record in records(tmp_path / "run") if "eval_loss" in record]
    assert evaluations[0] > 0 and result.metrics["eval_loss"] == evaluations[-2 if len(evaluations) > 2 else -1]
    for name in ("entropy", "mean_token_accuracy", "tok_s", "tok_s_trained", "mem_gib", "data_wait", "num_tokens"):
        assert math.isfinite(logged[-1][name]), name

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer.apply_chat_template(
        chat_rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert "burnish" not in (tmp_path / "run" / "config.json").read_text()


RESUMABLE = {
    "float32": {},
    "bfloat16 with float32 masters": {"bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "pure bfloat16": {"dtype": "bfloat16"},
    "adapter with dropout": {"use_peft": True, "lora_dropout": 0.2, "lora_target_modules": "all-linear"},
    "adafactor, accumulation": {"optim": "adafactor", "gradient_accumulation_steps": 2},
    "packed, checkpointed, sgd": {"packing": True, "optim": "sgd", "gradient_checkpointing": True},
    "token budget": {"max_tokens_per_batch": 128},
}


@pytest.mark.parametrize("given", RESUMABLE.values(), ids=RESUMABLE)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path, tiny_model, chat_file, given):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "max_steps": 9, **given}
    train(settings(tmp_path / "whole", save_strategy="no", **common))
    train(settings(tmp_path / "parts", save_strategy="steps", save_steps=4, **common))
    trainer = SFTTrainer(args=settings(tmp_path / "parts", **common))
    for path in (tmp_path / "parts").glob("checkpoint-[89]"):
        path.rename(path.with_name(f"gone-{path.name}"))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(tmp_path / "resumed"))
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    pairs = [(r["step"], r["loss"], r["learning_rate"]) for r in whole if "loss" in r]
    assert pairs == [(r["step"], r["loss"], r["learning_rate"]) for r in parts if "loss" in r]


def start(folder, tiny_model, chat_file, **extra) -> subprocess.Popen:
    words = {"output_dir": folder, "model_name_or_path": tiny_model, "dataset_name": chat_file, **BASE, **extra}
    command = [sys.executable, "-m", "burnish", "sft", *(f"{key}={value}" for key, value in words.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_run_resumed_ends_like_one_that_was_not(tmp_path, tiny_model, chat_file):
    extra = {"save_strategy": "steps", "save_steps": 3, "max_steps": 400}
    whole = start(tmp_path / "whole", tiny_model, chat_file, max_steps=400)
    killed = start(tmp_path / "killed", tiny_model, chat_file, **extra)
    path = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.time() + 120
    wanted = 20 + int.from_bytes(os.urandom(1)) % 40  # a random moment: any must do
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") > wanted):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "killed too late to prove anything"
    resumed = start(tmp_path / "killed", tiny_model, chat_file, **extra, resume_from_checkpoint="true")
    assert resumed.wait() == 0, resumed.stdout.read()
    assert whole.wait() == 0, whole.stdout.read()
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    steps = [record["step"] for record in records(tmp_path / "killed") if "loss" in record]
    assert steps == list(range(1, 401)), "every step is logged once"


def test_an_existing_run_is_not_overwritten(tmp_path, tiny_model, chat_file):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "max_steps": 1}
    train(settings(tmp_path / "run", **common))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="already holds a run or a model"):
        train(settings(tmp_path / "run", **common))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    train(settings(tmp_path / "run", overwrite_output_dir=True, **common))


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path, tiny_model, chat_file):
    config = settings(
        tmp_path,
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        test_split_size=0.2,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # turned round, so that the best checkpoint is not the last one
    )
    train(config)
    evaluated = {r["step"]: r["eval_loss"] for r in records(tmp_path) if "eval_loss" in r and "train_loss" not in r}
    best = max(evaluated, key=evaluated.__getitem__)
    assert best != 12, "the loss falls"
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-12"}
    stored, final = weights(tmp_path / f"checkpoint-{best}"), weights(tmp_path)
    assert all(torch.equal(stored[name], final[name]) for name in stored)


def test_resuming_with_other_data_is_refused(tmp_path, tiny_model, chat_file):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "save_strategy": "steps", "save_steps": 2}
    train(settings(tmp_path / "run", **common))
    for other in ({"per_device_train_batch_size": 3}, {"seed": 7}, {"learning_rate": 1e-9}, {"loss_type": "dft"}):
        with pytest.raises(UserError, match=f"{next(iter(other))} .*differ from the run that wrote"):
            train(settings(tmp_path / "run", resume_from_checkpoint=True, **{**common, **other}))
    rows = tmp_path / "other.jsonl"
    rows.write_text("".join(reversed(Path(chat_file).read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="the rows differ from the run that wrote"):
        train(settings(tmp_path / "run", resume_from_checkpoint=True, **{**common, "dataset_name": str(rows)}))
    train(settings(tmp_path / "run", resume_from_checkpoint=True, **{**common, "logging_steps": 3}))


def test_nothing_of_anothers_is_overwritten(tmp_path, tiny_model, chat_file):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    common = {"dataset_name": chat_file, "max_steps": 1, "overwrite_output_dir": True}
    with pytest.raises(UserError, match="the folder of the model"):
        train(settings(tmp_path / "model", model_name_or_path=str(tmp_path / "model"), **common))
    with pytest.raises(UserError, match="a run or a model"):
        other = settings(tmp_path / "model", model_name_or_path=tiny_model, **{**common, "overwrite_output_dir": False})
        train(other)
    both = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "save_strategy": "steps", "save_steps": 1}
    train(settings(tmp_path / "a", **{**both, "max_steps": 2}))
    train(settings(tmp_path / "b", **{**both, "max_steps": 1}))
    before = (tmp_path / "b" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="a run or a model"):
        train(settings(tmp_path / "b", **both, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")))
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == before


def test_a_failing_start_deletes_nothing(tmp_path, tiny_model, chat_file):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "max_steps": 1, "save_strategy": "steps"}
    train(settings(tmp_path / "run", **common))
    with pytest.raises(UserError, match="warmup_stable_decay can't be made"):
        train(settings(tmp_path / "run", overwrite_output_dir=True, lr_scheduler_type="warmup_stable_decay", **common))
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").is_file()


def test_a_mistyped_metric_is_an_error_before_training(tmp_path, tiny_model, chat_file):
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "acuracy"}
    with pytest.raises(UserError, match="eval_acuracy is not among"):
        train(
            settings(
                tmp_path / "run", model_name_or_path=tiny_model, dataset_name=chat_file, test_split_size=4, **given
            )
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_callers_optimizer_trains(tmp_path, tiny_model, chat_rows):
    """Under bfloat16 too: no float32 masters may come between the optimizer and the parameters that it holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    args = settings(tmp_path, bf16=True, max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = SFTTrainer(
        model, args, train_dataset=chat_rows, processing_class=tokenizer, optimizers=(optimizer, schedule)
    )
    trainer.train()
    assert all(not torch.equal(p.float(), before[name]) for name, p in model.named_parameters())


def test_attention_dropout_is_refused_before_training(tmp_path, tiny_model, chat_rows):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.1)
    with pytest.raises(UserError, match="attention dropout"):
        SFTTrainer(
            model,
            settings(tmp_path),
            train_dataset=chat_rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": None}, "no data"),
        ({"model_name_or_path": None}, "no model"),
        ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"dataset_name": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl"),
        ({"eval_strategy": "steps"}, "without evaluation data"),
        ({"resume_from_checkpoint": True}, "no whole checkpoint"),
        ({"resume_from_checkpoint": "/nowhere/checkpoint-1"}, "no such checkpoint"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, tiny_model, chat_file, given, message):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file}
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path / "run", **{**common, **given}))
    assert not (tmp_path / "run").exists()


def test_objects_of_a_script_do_as_well_as_names(tmp_path, tiny_model, chat_file, chat_rows):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    events = []

    class Listener:
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                events.append((state.global_step, logs["loss"]))
                control.should_training_stop = state.global_step == 5

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        settings(tmp_path / "objects", bf16=False),
        train_dataset=Dataset.from_list(chat_rows),
        eval_dataset=chat_rows[:8],
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[Listener()],
    )
    before = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    assert result.global_step == 5 and [step for step, _ in events] == [1, 2, 3, 4, 5]
    assert trainer.evaluate()["eval_loss"] < before
    saved = trainer.save_model()
    assert {path.name for path in saved.glob("*.safetensors")} == {"adapter_model.safetensors"}
    named = train(settings(tmp_path / "named", model_name_or_path=tiny_model, dataset_name=chat_file, max_steps=1))
    same = SFTTrainer(tiny_model, settings(tmp_path / "same", max_steps=1), train_dataset=chat_rows).train()
    assert named.metrics["train_loss"] == same.metrics["train_loss"]


def test_a_stream_trains_and_resumes_like_stored_rows(tmp_path, tiny_model, chat_rows):
    from datasets import Dataset

    common = {"max_steps": 6, "per_device_train_batch_size": 5, "train_sampling_strategy": "sequential"}
    stored = SFTTrainer(tiny_model, settings(tmp_path / "stored", **common), train_dataset=chat_rows)
    stored.train()
    stream = Dataset.from_list(chat_rows).to_iterable_dataset()
    args = settings(tmp_path / "stream", save_strategy="steps", save_steps=2, **common)
    streamed = SFTTrainer(tiny_model, args, train_dataset=stream)
    streamed.train()
    resumed = SFTTrainer(tiny_model, args, train_dataset=stream)
    resumed.train(str(tmp_path / "stream" / "checkpoint-4"))
    for name, expected in stored.model.state_dict().items():
        assert torch.equal(streamed.model.state_dict()[name], expected), name
        assert torch.equal(resumed.model.state_dict()[name], expected), name


def test_ids_outside_the_vocabulary_are_named_by_row(tmp_path, tiny_model):
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 400, 7]}]
    with pytest.raises(UserError, match=r"row 1.*400|400.*row 1"):
        SFTTrainer(tiny_model, settings(tmp_path), train_dataset=rows)
