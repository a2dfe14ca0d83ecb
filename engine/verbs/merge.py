"""`burnish merge RUN`: the adapter of a run into its base model, proved on rows the run was trained on.

The log-probs of the merged model are held against those of base and adapter, token by token, before anything is
written. What merging changes is rounding: W + BA is rounded to the base's dtype once, where the adapter's path adds two
products.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import burnish
from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.config.load import load
from burnish.data.batch import Batch, Batches
from burnish.logprobs import hidden_states
from burnish.model.adapters import adapter_base, load_adapter
from burnish.model.head import evaluating, head_logits, read_head
from burnish.model.load import load_model, load_tokenizer
from burnish.objectives.reward import sequence_scores
from burnish.run.device import device_for
from burnish.run.rows import tokens

ROWS = 32
LIMIT_KL = 1e-3  # nats a token, mean over the tokens; rounding a bfloat16 base gives some 1e-5
LIMIT_SCORE = 5e-2  # of a reward model's scores
CHUNK = 256  # rows of logits at a time


@dataclass
class Difference:
    """What the rows said: `largest` over the trained tokens' log-probs (or sequences' scores), `kl` None for scores."""

    rows: int
    tokens: int
    largest: float
    kl: float | None

    @property
    def too_much(self) -> bool:
        worst, limit = (self.largest, LIMIT_SCORE) if self.kl is None else (self.kl, LIMIT_KL)
        return not worst <= limit  # also where it is not a number

    def __str__(self) -> str:
        if self.kl is None:
            return f"{self.rows} rows, max |Δscore| {self.largest:.2g} (limit {LIMIT_SCORE:g})"
        return (
            f"{self.rows} rows, {self.tokens:,} tokens, max |Δlogp| {self.largest:.2g}, "
            f"mean KL {self.kl:.2g} (limit {LIMIT_KL:g})"
        )


def merge(folder: str, words: list[str]) -> tuple[Path, Difference]:
    """Write RUN/merged, a model that from_pretrained reads, and say what the check found.

    words   `key=value`, over the run's own config.yaml: dataset_name=FILE where the rows have moved

    Raises UserError where RUN holds no adapter or no configuration, where RUN/merged is there already, and, with
    nothing written, where the merged model does not say what the adapter said.
    """
    run, target = Path(folder), Path(folder) / "merged"
    base_name = adapter_base(run)
    if base_name is None:
        raise UserError("holds no adapter (adapter_config.json)", where=folder, mend="A full model needs no merging")
    if target.exists():
        raise UserError("is there already", where=str(target), mend="Delete it to merge again")
    config = run_config(run, words)
    device, scores = device_for(config), isinstance(config, burnish.RewardConfig)
    base = load_model(base_name, dtype="auto", device=device, scores=scores, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder)
    adapted = load_adapter(base, run)
    batches = checked_rows(config, tokenizer, base, device)
    with torch.no_grad(), evaluating(adapted):
        before = [outputs(adapted, batch, scores) for batch in batches]
    merged = adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]  # refuses NaN
    with torch.no_grad(), evaluating(merged):
        after = [outputs(merged, batch, scores) for batch in batches]
        found = difference(merged, batches, before, after, scores)
    if found.too_much:
        raise UserError(f"the merged model differs from base and adapter: {found}", where=folder, mend="Nothing saved")
    aside = run / ".writing-merged"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    disk.save_model(merged, tokenizer, aside)
    os.rename(aside, target)
    return target, found


def run_config(run: Path, words: list[str]) -> Any:
    """The configuration that the run wrote, with `words` over it."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError("holds no config.yaml", where=str(run), mend="Name the output_dir of a run")
    return load(config_class(run), path, words)


def config_class(run: Path) -> type:
    """Of the objective that log.txt names, SFT where it names none."""
    log = run / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    verb = next((line.split()[1] for line in lines if line.startswith("verb ")), "sft")
    name = "Reward" if verb == "reward" else verb.upper()
    return getattr(burnish, f"{name}Config")


def checked_rows(config: Any, tokenizer: Any, model: nn.Module, device: torch.device) -> list[Batch]:
    """The first rows of the run's training set, as it packed them."""
    if config.dataset_name is None:
        raise UserError(
            "the run's rows came from a script", where="dataset_name", mend="Name a file: dataset_name=rows.jsonl"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    examples, _ = tokens(config, tokenizer, vocabulary, config.dataset_name, config.dataset_train_split, True, None)
    chosen, rows = [], 0
    for batch in Batches(examples, config, train=False).epoch(0):
        chosen.append(batch.to(device))
        rows += len(batch.cu_seqlens) - 1
        if rows >= ROWS:
            break
    return chosen


def outputs(model: nn.Module, batch: Batch, scores: bool) -> Tensor:
    """Hidden states of the trained positions [N, H], or a reward model's scores [S]."""
    return sequence_scores(model, batch) if scores else hidden_states(model, batch)[batch.valid]


def difference(
    model: nn.Module, batches: list[Batch], before: list[Tensor], after: list[Tensor], scores: bool
) -> Difference:
    """`before` and `after`: outputs per batch. The head is `model`'s: adapters don't reach it."""
    rows = sum(len(batch.cu_seqlens) - 1 for batch in batches)
    if scores:
        largest = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
        return Difference(rows, 0, largest, None)
    head, largest, kl, count = read_head(model), 0.0, 0.0, 0
    for batch, first, second in zip(batches, before, after, strict=True):
        labels = batch.labels[batch.valid]
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            p, q = (head_logits(head, hidden[part]).float().log_softmax(-1) for hidden in (first, second))  # [n, V]
            own = labels[part, None]
            largest = max(largest, float((p.gather(1, own) - q.gather(1, own)).abs().max()))
            kl += float((p.exp() * (p - q)).sum())
            count += len(own)
    return Difference(rows, count, largest, kl / max(count, 1))
