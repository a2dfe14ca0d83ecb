"""Whole runs with the optimizers that leave room: resumed, killed, with adapters, and what they save."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from burnish import SFTConfig, SFTTrainer, UserError
from burnish.loop.gate import NonFinite
from burnish.optim.in_backward import InBackward
from burnish.run import train

BASE = {
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 8,
    "gradient_checkpointing": False,
    "bf16": True,
}
INSIDE = {"optimizer_in_bwd": True, "max_grad_norm": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def settings(folder, **given) -> SFTConfig:
    return SFTConfig(str(folder), **{**BASE, **given})


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def same(one, other) -> bool:
    expected, got = weights(one), weights(other)
    return expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def losses(folder) -> list[tuple]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in records if "loss" in r]


RESUMABLE = {
    "masters in halves": {"optim": "adamw_bf16", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "stochastic": {"optim": "adamw_bf16_sr", "gradient_accumulation_steps": 2},
    "inside backward, checkpointed": {"optim": "adamw_bf16", "gradient_checkpointing": True, **INSIDE},
    "inside backward, float32": {"bf16": False, **INSIDE},
    "adapters on a bfloat16 base": {"optim": "adamw_bf16", "dtype": "bfloat16", "use_peft": True},
}


@pytest.mark.parametrize("given", RESUMABLE.values(), ids=RESUMABLE)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path, tiny_model, chat_file, given):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, **given}
    train(settings(tmp_path / "whole", **common))
    train(settings(tmp_path / "parts", **{**common, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}))
    for path in (tmp_path / "parts").glob("checkpoint-[678]"):
        path.rename(path.with_name(f"gone-{path.name}"))
    trainer = SFTTrainer(args=settings(tmp_path / "parts", **common))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(tmp_path / "resumed"))
    assert same(tmp_path / "whole", tmp_path / "resumed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_killed_run_resumed_ends_like_one_that_was_not(tmp_path, tiny_model, chat_file):
    """The step inside backward leaves a model half updated when it is killed: the checkpoint must not see that."""
    given = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "optim": "adamw_bf16", **INSIDE}
    given |= {"max_steps": 60}
    train(settings(tmp_path / "whole", **given))
    words = {**BASE, **given, "output_dir": tmp_path / "killed", "save_strategy": "steps", "save_steps": 3}
    command = [sys.executable, "-m", "burnish", "sft", *(f"{key}={value}" for key, value in words.items())]
    scene = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=scene, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path, deadline, wanted = tmp_path / "killed" / "metrics.jsonl", time.time() + 120, 5 + os.urandom(1)[0] % 40
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") > wanted):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "killed too late to prove anything"
    train(settings(tmp_path / "killed", **given, save_strategy="steps", save_steps=3, resume_from_checkpoint=True))
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_run_inside_backward_is_the_run_after_it(tmp_path, tiny_model, chat_file):
    """The same weights, losses and gradient norms, with the reported kernels and with the plain definitions."""
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "optim": "adamw_bf16", "max_grad_norm": 0}
    for kernels in ("auto", "reference"):
        after, inside = tmp_path / f"after-{kernels}", tmp_path / f"inside-{kernels}"
        train(settings(after, kernels=kernels, **common))
        train(settings(inside, kernels=kernels, **common, optimizer_in_bwd=True))
        assert same(after, inside) and losses(after) == losses(inside)
    assert len(losses(inside)) == 8 and all(norm > 0 for _, _, norm, _ in losses(inside))


def test_what_is_saved_is_bfloat16_and_loads(tmp_path, tiny_model, chat_file):
    from transformers import AutoModelForCausalLM

    given = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "optim": "adamw_bf16", "max_steps": 30}
    train(settings(tmp_path / "run", save_strategy="steps", save_steps=30, **given))
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}
    stored = load_file(tmp_path / "run" / "checkpoint-30" / "optimizer.safetensors")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in stored.items()}
    assert kinds == {"low": torch.int16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert model.dtype == torch.bfloat16
    seen = losses(tmp_path / "run")
    assert seen[-1][1] < 0.8 * seen[0][1]


def test_a_trainer_that_trains_twice_steps_once_a_gradient(tmp_path, tiny_model, chat_file, monkeypatch):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "max_steps": 2, "overwrite_output_dir": True}
    calls, plain = [], InBackward.step

    def counted(self, parameter):
        calls.append(parameter)
        plain(self, parameter)

    monkeypatch.setattr(InBackward, "step", counted)
    trainer = SFTTrainer(args=settings(tmp_path / "run", optim="adamw_bf16_sr", **INSIDE, **common))
    trainer.train()
    once = len(calls)
    trainer.state.global_step = 0
    trainer.train()
    assert once > 0 and len(calls) == 2 * once


def test_a_gradient_that_is_infinite_inside_backward_stops_the_run(tmp_path, tiny_model, chat_file):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "optim": "adamw_bf16", "max_steps": 3}
    trainer = SFTTrainer(args=settings(tmp_path / "run", **INSIDE, **common))
    poisoned = next(p for name, p in trainer.model.named_parameters() if "layers.0.mlp.down_proj" in name)
    poisoned.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    with pytest.raises(NonFinite, match="gradient norm nan"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_refusals_come_before_anything_is_written(tmp_path, tiny_model, chat_file, monkeypatch):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file}
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    for given, message in (
        ({"optim": "adamw_bf16", "bf16": False}, "Set bf16: true"),
        ({"optim": "adamw_8bit"}, "pip install bitsandbytes"),
    ):
        with pytest.raises(UserError, match=message):
            train(settings(tmp_path / "run", **common, **given))
    assert not (tmp_path / "run").exists()
