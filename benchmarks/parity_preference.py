"""The preference objectives beside TRL's: rows that both read alike, a small model, and every loss that TRL ships.

Three things of TRL 1.16 decide which rows these are.

CPO and ORPO tokenize by themselves: they render the template to text, put a BOS token before a prompt that lacks one
and an EOS token after a completion that doesn't end in one (after the newline with which many templates end a turn). So
they get plain text, rendered here, that starts with the BOS text where there is one and ends in the EOS text.

KTO's mismatched completion is that of the row before, also where both answer the same question; here rows have
questions of their own, and then it is burnish's choice too. Desirable and undesirable take turns, so that a micro-batch
has both.

Reward models find a sequence's last token as the last one that is not the padding token: where padding is EOS, the rows
must not end in EOS. Rows of messages end in the template's newline.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from workers import Job

SHORT = 260  # most characters of a prompt and its completion: sums over short rows are rounded less, and run faster
ROWS = 24  # a multiple of every micro-batch below
STEPS = {"max_steps": 8}

# forward_kl and sppo_hard grow with the log-ratio's exponential and square, discopop divides it by tau (if nothing is
# said, 0.05): what float32 rounds off would grow with them beyond the limit.
GENTLE = {"learning_rate": 3e-5}
MIX = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}

DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, accumulation 2": {"gradient_accumulation_steps": 2},
    "sigmoid, cut to 80 tokens": {"max_length": 80},
    "sigmoid, cut to the last 64 tokens": {"max_length": 64, "truncation_mode": "keep_end"},
    "sigmoid, cached reference": {"precompute_ref_log_probs": True},
    "sigmoid, moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "sigmoid, forward_kl": {"f_divergence_type": "forward_kl", "max_length": 80, **GENTLE},
    "sigmoid, js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid, alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "sigmoid, ld_alpha": {"ld_alpha": 0.5},
    "sigmoid, use_weighting": {"use_weighting": True},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "ipo, js_divergence, cut to 80": {"loss_type": "ipo", "f_divergence_type": "js_divergence", "max_length": 80},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.001},
    "nca_pair": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard", **GENTLE},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1, "per_device_train_batch_size": 4},
    "aot_unpaired": {"loss_type": "aot_unpaired", "per_device_train_batch_size": 4},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.5},
    "sft": {"loss_type": "sft"},
    "weighted list": MIX,
}
CPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "cpo_alpha": 0.5},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
    "simpo with likelihood": {"loss_type": "simpo"},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.1},
}
KTO: dict[str, dict[str, Any]] = {
    "kto": {"per_device_train_batch_size": 4},
    "kto, weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "kto, cached reference": {"precompute_ref_log_probs": True},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
REWARD: dict[str, dict[str, Any]] = {"plain": {}, "margin, centred": {"center_rewards_coefficient": 0.01}}


def _read(path: Path) -> Iterator[dict]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _write(rows: Iterable[dict], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _short(row: dict) -> bool:
    sides = [row[side][-1]["content"] for side in ("chosen", "rejected", "completion") if side in row]
    return len(row["prompt"][-1]["content"]) + max(map(len, sides)) <= SHORT


def pairs(path: Path, count: int) -> list[dict]:
    """The first `count` short pairs."""
    rows = [row for row in _read(path) if _short(row)][:count]
    assert len(rows) == count, f"only {len(rows)} such rows"
    return rows


def alternating(path: Path, count: int) -> list[dict]:
    """`count` short rated rows with questions of their own, desirable and undesirable in turn."""
    chosen: dict[str, dict] = {}
    for row in _read(path):
        question = json.dumps(row["prompt"])
        if len(chosen) < count and question not in chosen and _short(row) and row["label"] == (len(chosen) % 2 == 0):
            chosen[question] = row
    assert len(chosen) == count, f"only {len(chosen)} such rows"
    return list(chosen.values())


def as_text(row: dict, tokenizer: Any) -> dict:
    """A pair of messages as plain text with the template's marks, each side ending in EOS."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    start = tokenizer.bos_token or ""
    sides = {side: row[side][-1]["content"] + tokenizer.eos_token for side in ("chosen", "rejected")}
    return {"prompt": start + prompt.removeprefix(start), **sides}


def small_models(source: str, folder: Path) -> tuple[str, str]:
    """Folders of a random Llama of 12 million weights with the tokenizer of `source`, and of a classifier like it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1  # of the classifier
    for name, family in (("lm", LlamaForCausalLM), ("scorer", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        family(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "lm"), str(folder / "scorer")


def paired_cases(path: Path, folder: Path, model: str) -> dict[str, Job]:
    """DPO, CPO, ORPO and reward models."""
    from transformers import AutoTokenizer

    lm, scorer = small_models(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = pairs(path, ROWS)
    chats = _write(rows, folder / "pairs.jsonl")
    texts = _write((as_text(row, tokenizer) for row in rows), folder / "texts.jsonl")
    margins = _write(({**row, "margin": i % 3 / 2} for i, row in enumerate(rows)), folder / "margins.jsonl")
    cases = {f"DPO {name}": Job("DPO", STEPS | given, lm, chats) for name, given in DPO.items()}
    cases |= {f"CPO {name}": Job("CPO", STEPS | given, lm, texts) for name, given in CPO.items()}
    cases["ORPO"] = Job("ORPO", STEPS | {"beta": 0.5}, lm, texts)
    for (name, given), data in zip(REWARD.items(), (chats, margins), strict=True):
        cases[f"Reward {name}"] = Job("Reward", STEPS | given, scorer, data)
    return cases


def unpaired_cases(path: Path, folder: Path, model: str) -> dict[str, Job]:
    """KTO."""
    lm, _ = small_models(model, folder)
    rows = _write(alternating(path, ROWS), folder / "rated.jsonl")
    return {f"KTO {name}": Job("KTO", STEPS | given, lm, rows) for name, given in KTO.items()}
