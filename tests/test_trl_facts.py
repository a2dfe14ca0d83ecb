"""Where TRL 1.16 is wrong, and what is right: whole runs against plain transformers, without TRL.

Its figures beside burnish's, on rows that both mean alike: `benchmarks/parity_trl.py`.
"""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import burnish
from burnish import UserError

BASE = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "allow_truncation": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 3,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs() -> list[dict]:
    rng = random.Random(5)
    words = "the quick brown fox jumps over lazy dogs".split()

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    return [{"prompt": f"{i} {text(6)}:", "chosen": " " + text(9), "rejected": " " + text(9)} for i in range(12)]


def trained(name, folder, model, rows, **given):
    config = getattr(burnish, f"{name}Config")(str(folder), **{**BASE, **given})
    run = getattr(burnish, f"{name}Trainer")(model, args=config, train_dataset=rows)
    run.train()
    return run, [record for record in run.state.log_history if "loss" in record]


def log_prob(model, tokenizer, prompt: str, completion: str) -> float:
    """Of a completion and the end of sequence after its prompt, by a forward pass of its own."""
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_smooths_labels(tmp_path, tiny_model, pairs, smoothing):
    """TRL 1.16 takes label_smoothing with loss_type sigmoid and leaves it out: its loss is that of 0.0."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    losses = []
    for row in pairs[:4]:
        sides = (log_prob(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        z = 0.1 * (next(sides) - next(sides))
        losses.append((1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z)))
    _, records = trained(
        "DPO", tmp_path / "run", tiny_model, pairs, reference_free=True, label_smoothing=smoothing, max_steps=1
    )
    assert records[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_kto_sees_both_kinds_in_every_step_of_pairs(tmp_path, tiny_model, pairs):
    """TRL 1.16 makes rated rows of 1000 pairs at a time, all chosen before all rejected, and must keep that order."""
    _, records = trained("KTO", tmp_path / "run", tiny_model, pairs, max_steps=-1, num_train_epochs=2)
    assert len(records) == 12
    for record in records:
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= record.keys()


UNFIT = [("ORPO", {}), ("CPO", {"loss_type": "simpo"}), ("CPO", {"loss_type": "ipo"}), ("CPO", {})]


@pytest.mark.parametrize(("name", "given"), UNFIT, ids=str)
def test_a_prompt_that_fills_max_length_is_named_and_left_out(tmp_path, tiny_model, pairs, capsys, name, given):
    """TRL 1.16 averages over its 0 tokens, but in losses of sums: a gradient of nan, beside which it logs a loss of 0,
    and then nothing but nan for weights."""
    rows = [*pairs[:3], {**pairs[3], "prompt": "the quick brown fox " * 40}, *pairs[4:]]
    run, records = trained(name, tmp_path / "run", tiny_model, rows, **given)
    assert "dropped 1: prompt fills max_length 64 (row 3)" in capsys.readouterr().out
    without, expected = trained(name, tmp_path / "without", tiny_model, [*rows[:3], *rows[4:]], **given)
    for got, want in zip(records, expected, strict=True):
        assert math.isfinite(got["loss"]) and got["loss"] == want["loss"] and got["grad_norm"] == want["grad_norm"]
    for ours, theirs in zip(run.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="no pair can be used .prompt fills max_length 64: row 0"):
        trained(name, tmp_path / "none", tiny_model, [rows[3]], **given)


@pytest.mark.parametrize("name", ["DPO", "CPO", "ORPO", "Reward"])
def test_pairs_are_never_padded(tmp_path, tiny_model, pairs, name):
    """TRL 1.16 takes padding_free in DPO and pads all the same, as its other preference objectives do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    run, records = trained(name, tmp_path / "run", tiny_model, pairs)
    texts = [row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")]
    every = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
    lengths = [every[start : start + 8] for start in (0, 8, 16)]
    assert all(len(set(step)) > 1 for step in lengths), "padding would show"
    batches = list(run.run.batches.epoch(0))
    assert [len(batch.input_ids) for batch in batches] == [sum(step) for step in lengths]
    assert [batch.cu_seqlens.diff().tolist() for batch in batches] == lengths
    assert [record["num_tokens"] for record in records] == [sum(every[: 8 * step]) for step in (1, 2, 3)]
