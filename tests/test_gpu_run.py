"""Whole runs on a GPU in bfloat16: SFT and DPO learn and resume, every objective steps. The CPU runs the same code."""

import json
import random
from pathlib import Path

import pytest
import torch

import burnish

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])]
BASE = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 12,
    "bf16": True,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """The chosen reply is of words that the rejected one never has."""
    rng = random.Random(3)
    good, bad = "the fox over and ten cats a".split(), "quick brown jumps lazy counts seven watch".split()
    return [
        {
            "prompt": [{"role": "user", "content": f"case {number} {rng.choice(good)} {rng.choice(bad)}"}],
            "chosen": [{"role": "assistant", "content": " ".join(rng.choices(good, k=rng.randint(2, 9)))}],
            "rejected": [{"role": "assistant", "content": " ".join(rng.choices(bad, k=rng.randint(2, 9)))}],
        }
        for number in range(16)
    ]


def run(name, folder, model, rows, device, resume=None, **given):
    config = getattr(burnish, f"{name}Config")(str(folder), **{**BASE, "use_cpu": device == "cpu", **given})
    trainer = getattr(burnish, f"{name}Trainer")(model, args=config, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(Path(folder).glob("*model.safetensors")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_learns_and_a_resumed_run_is_the_same_run(name, device, tmp_path, tiny_model, chat_rows, pairs):
    """12 steps at once, and 12 steps of which the last 6 come after a restart: bit for bit the same weights."""
    rows = chat_rows if name == "SFT" else pairs
    whole = run(name, tmp_path / "whole", tiny_model, rows, device, save_strategy="steps", save_steps=6)
    found = losses(whole)
    assert len(found) == 12 and min(found[-4:]) < 0.9 * found[0]
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "half" / "checkpoint-6")
    again = run(name, tmp_path / "half", tiny_model, rows, device, resume=True, save_strategy="steps", save_steps=6)
    assert losses(again)[-6:] == found[-6:]
    first, second = (weights(tmp_path / folder / "checkpoint-12") for folder in ("whole", "half"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 0 for record in logged if "loss" in record)


OBJECTIVES = [
    ("SFT", {"packing": True}),
    ("SFT", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ("DPO", {}),
    ("DPO", {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    ("ORPO", {}),
    ("KTO", {}),
    ("BCO", {}),
    ("Reward", {}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "given"), OBJECTIVES, ids=str)
def test_every_objective_steps_in_bfloat16(name, given, device, tmp_path, tiny_model, chat_rows, pairs):
    rows = chat_rows if name == "SFT" else pairs
    trainer = run(name, tmp_path / "run", tiny_model, rows, device, max_steps=3, **given)
    found = losses(trainer)
    assert len(found) == 3 and all(torch.isfinite(torch.tensor(found)))
    model = trainer.model
    place = {parameter.device.type for parameter in model.parameters()}
    assert place == {device}
    before = weights(tiny_model)
    moved = [
        key
        for key, value in model.state_dict().items()
        if key in before and not torch.equal(value.cpu().float(), before[key].to(value.dtype).float())
    ]
    assert moved, "no weight changed"
