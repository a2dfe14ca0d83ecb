"""What is wrong with a run before its model is loaded: findings about its rows, its lengths and its rates.

`burnish check` shows all of them. Every training makes the same checks: an error stops it, a warning is said.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.config.preference import BCOConfig, KTOConfig
from burnish.data.batch import Examples
from burnish.data.report import DataReport, name_rows
from burnish.metrics import Log

LOST = 0.05  # share of the trained tokens that cutting to max_length may take
HIGHEST_RATE = {"sgd": 10.0}  # learning rates above these are slips (1e4 for 1e-4); of the others, 0.01


@dataclass(frozen=True)
class Finding:
    """What is wrong, where (file:line or rows), why it matters, and the edit to make.

    error  the run would not be what was meant, so it is not started
    said   the `data` lines of a run say it already
    """

    where: str
    what: str
    why: str
    mend: str
    error: bool = False
    said: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + f": {self.why}" * bool(self.why) + f". {self.mend}" * bool(self.mend)


def as_finding(error: UserError) -> Finding:
    return Finding(error.where or "run", error.what, "", error.mend, error=True)


def settle(found: list[Finding], log: Log) -> None:
    """Say the warnings. Raises UserError for the errors, the first one's place and mend before the others."""
    for finding in found:
        if not (finding.error or finding.said or log.quiet):
            log.warn(str(finding))
    errors = [finding for finding in found if finding.error]
    if errors:
        first, *others = errors
        mend = " ".join([first.mend, *(f"Also {other}" for other in others)])
        raise UserError(f"{first.what}: {first.why}", where=first.where, mend=mend)


def of_rows(config: Any, report: DataReport, train: bool = True) -> Iterator[Finding]:
    """What the report of a split says, as far as there is something to mend in it."""
    name = report.source

    def rows(numbers: list[int]) -> str:
        return f"{name} {name_rows(numbers)}"

    for reason, numbers in report.dropped_by_reason().items():
        what = f"{len(numbers):,} of {report.rows_read:,} {report.unit}s are left out ({reason})"
        yield Finding(rows(numbers), what, "nothing of them is trained on", "Mend or delete them", said=True)
    yield from _of_lengths(config, report, rows, train)
    unended = report.rows - report.stopped_rows - len(report.cut_rows) * (2 if report.unit == "pair" else 1)
    if unended > 0:
        what = f"{unended:,} of {report.rows:,} sequences don't end in a token that ends a reply"
        mend = "Set eos_token to what the template ends replies with, or mend the template"
        if report.format == "input_ids":
            mend = "Put EOS at the end of each row's input_ids, and train on it"
        yield Finding(name, what, "a model trained on them doesn't learn to stop", mend, said=True)
    if report.doubled_bos:
        what = f"{report.doubled_bos:,} rows begin with BOS, which the tokenizer writes too"
        yield Finding(name, what, "one of the two was removed", "Take BOS out of the rows", said=True)
    if report.unanswered:
        what = f"{len(report.unanswered):,} conversations don't go from question to reply and end in a reply"
        yield Finding(rows(report.unanswered), what, "turns of one role in a row, or no last reply", "Mend the turns")
    if report.spelled_replies:
        what = f"{len(report.spelled_replies):,} replies spell special tokens"
        why = "the model learns to write these tokens"
        yield Finding(rows(report.spelled_replies), what, why, "Take them out, unless it should", said=True)
    if report.spelled_rows:
        what = f"{len(report.spelled_rows):,} rows have messages that spell special tokens"
        why = "they stay text, unlike where other tools ask the model"
        yield Finding(rows(report.spelled_rows), what, why, "Take them out, unless they are meant", said=True)
    if report.equal_rows:
        every = len(report.equal_rows) == report.units
        what = f"chosen and rejected are the same in {len(report.equal_rows):,} of {report.units:,} pairs"
        why = "there is nothing to prefer"
        yield Finding(rows(report.equal_rows), what, why, "Delete them", error=every and train, said=True)
    if isinstance(config, (KTOConfig, BCOConfig)) and report.desirable in (0, report.units):
        what = f"all {report.units:,} completions are {'' if report.desirable else 'un'}desirable"
        yield Finding(name, what, "there is nothing to tell apart", "Give rows of both labels", error=train)


def _of_lengths(config: Any, report: DataReport, rows: Any, train: bool) -> Iterator[Finding]:
    """What cutting to length takes of what would be trained on, rows of which nothing is left among them."""
    lost = report.trained_lost + report.trained_dropped
    if not lost:
        return
    share = lost / (lost + report.trained_tokens)
    parts = {name: values["max"] for name, values in report.lengths.items()}
    longest = parts.pop("prompt", 0) + max(parts.values()) if parts else report.quantiles["max"]
    what = f"cutting to {report.cut_to} takes {share:.1%} of the trained tokens"
    wrapped = getattr(config, "packing", False) and config.packing_strategy != "wrapped"
    mend = "packing_strategy: wrapped, as ConstantLengthDataset packs, or " if wrapped else ""
    mend += f"max_length: {longest} keeps all; or set allow_truncation: true"
    too_much = train and share > LOST and not config.allow_truncation
    place = rows(report.cut_rows) if report.cut_rows else report.source
    yield Finding(place, what, "what is cut off is not learned, the ends of replies first", mend, too_much, True)


def of_setup(config: Any, positions: int | None, vocabulary: int, tokenizer: Any, longest: int) -> Iterator[Finding]:
    """What can be told from the configuration, the model's sizes and the longest sequence.

    positions  that the model was made for, None where that isn't known; vocabulary: token ids that it embeds
    """
    rate, most = config.learning_rate, HIGHEST_RATE.get(config.optim, 0.01)
    place = config.origins["learning_rate"]
    if rate > most:
        why = f"steps of {config.optim} this long undo what the model has learned"
        yield Finding(place, f"learning_rate {rate:g} is above {most:g}", why, "Was 1e-4 or so meant?")
    if rate == 0:
        yield Finding(place, "learning_rate is 0", "no weight changes", "Delete it for the default")
    longer = (config.model_init_kwargs or {}).keys() & {"max_position_embeddings", "rope_scaling", "rope_parameters"}
    if positions and longest > positions and not longer:
        what = f"sequences have up to {longest:,} tokens, and the model was made for {positions:,}"
        mend = f"Set max_length: {positions}, or extend it by model_init_kwargs: {{rope_scaling: ...}}"
        yield Finding(config.origins["max_length"], what, "it has never seen the positions after that", mend)
    if len(tokenizer) > vocabulary:
        what = f"the tokenizer has {len(tokenizer):,} tokens, the model embeds {vocabulary:,}"
        mend = "Use the model's own tokenizer, or enlarge the model first (model.resize_token_embeddings)"
        yield Finding(config.model_name_or_path or "tokenizer", what, "the others have no embedding", mend, error=True)


def of_copies(train: Examples, held_out: Examples, name: str) -> Iterator[Finding]:
    """Evaluation rows that are training rows, token for token."""
    known = set(_digests(train))
    copies = [row for row, digest in zip(held_out.rows.tolist(), _digests(held_out), strict=True) if digest in known]
    if copies:
        numbers = list(dict.fromkeys(copies))
        what = f"{len(copies):,} of {len(held_out):,} sequences to evaluate on are trained on as well"
        mend = "Delete them from one side, or hold rows out with test_split_size"
        yield Finding(f"{name} {name_rows(numbers)}", what, "their loss says nothing about other texts", mend)


def _digests(examples: Examples) -> Iterator[bytes]:
    ids, edges = np.ascontiguousarray(examples.ids), examples.offsets.tolist()
    for start, stop in zip(edges, edges[1:], strict=False):
        yield hashlib.blake2b(ids[start:stop].data, digest_size=16).digest()
