"""`burnish preview run.yaml`: the rows as the model will see them, before any weight is loaded.

Tokens in runs of three kinds: context (seen, not trained on), trained, and special tokens of either. A packed batch is
shown with the borders where positions start again at 0, a preference pair with the prompt that its two sides share.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.data.batch import Batch, Batches
from burnish.run.rows import read_batches, read_tokenizer
from burnish.verbs.report import PAGE

CONTEXT, TRAINED = "context", "trained"
COLOURS = {CONTEXT: "\x1b[2m", TRAINED: "\x1b[32m", "special": "\x1b[33m", "end": "\x1b[0m"}
STYLE = """
.context { opacity: .6; } .trained { color: var(--first); } .special { color: var(--second); font-weight: 600; }
pre { white-space: pre-wrap; } .bar { background: var(--first); height: .8em; display: inline-block; }
"""
BARS = 10


@dataclass
class Run:
    """Neighbouring tokens of one kind, as text."""

    kind: str
    special: bool
    text: str


@dataclass
class Sequence:
    """One sequence of a batch: where it lies in the packed row, which source row it is, what it is to its pair."""

    row: int
    start: int
    stop: int
    trained: int
    role: str  # "", "chosen" or "rejected"
    shared: int  # tokens of prompt that chosen and rejected share
    runs: list[Run]

    @property
    def title(self) -> str:
        parts = [f"row {self.row}"] + [self.role] * bool(self.role)
        parts += [f"tokens {self.start}-{self.stop - 1}", f"{self.trained} of {self.stop - self.start} trained"]
        return "  ".join(parts + [f"{self.shared} shared with the chosen"] * (self.role == "rejected"))


@dataclass
class Shown:
    """A micro-batch: its tokens and sequences, and those of them that are shown."""

    tokens: int
    count: int
    sequences: list[Sequence]

    @property
    def title(self) -> str:
        return f"{self.tokens:,} tokens in {self.count} sequences, positions start again at each"


def preview(config: Any, count: int) -> tuple[list[Shown], np.ndarray]:
    """The first micro-batches that hold `count` sequences, sequence by sequence; and the lengths [R] of all rows."""
    tokenizer, batches = read_tokenizer(config), read_batches(config)
    if not isinstance(batches, Batches):
        raise UserError("a stream can't be previewed", where="dataset_name", mend="Name a file or a folder")
    shown, total = [], 0
    for batch in batches.epoch(0):
        sequences = list(_sequences(batch, tokenizer))
        shown.append(Shown(len(batch.input_ids), len(sequences), sequences[: count - total]))
        total += len(sequences)
        if total >= count:
            break
    return shown, batches.examples.lengths


def _sequences(batch: Batch, tokenizer: Any) -> Iterator[Sequence]:
    ids, labels, borders = batch.input_ids.numpy(), batch.labels.numpy(), batch.cu_seqlens.tolist()
    target = np.concatenate([[False], labels[:-1] != -100])  # position t predicts token t + 1
    target[borders[:-1]] = False
    roles, partner = _roles(batch)
    special = np.array(sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}), dtype=np.int64)
    for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        mine = ids[start:stop]
        other = partner.get(number)
        shared = 0 if other is None else _common(mine, ids[borders[other] : borders[other + 1]])
        runs = _runs(mine, target[start:stop], np.isin(mine, special), tokenizer)
        trained = int(target[start:stop].sum())
        row = batch.rows[number] if number < len(batch.rows) else -1
        yield Sequence(row, start, stop, trained, roles.get(number, ""), shared, runs)


def _roles(batch: Batch) -> tuple[dict[int, str], dict[int, int]]:
    """{sequence: role} and {rejected: its chosen}."""
    if batch.chosen is None or batch.rejected is None:
        return {}, {}
    chosen, rejected = batch.chosen.tolist(), batch.rejected.tolist()
    roles = dict.fromkeys(chosen, "chosen") | dict.fromkeys(rejected, "rejected")
    return roles, dict(zip(rejected, chosen, strict=True))


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences start with alike."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if len(differs) else size


def _runs(ids: np.ndarray, target: np.ndarray, special: np.ndarray, tokenizer: Any) -> list[Run]:
    change = np.flatnonzero((target[1:] != target[:-1]) | (special[1:] != special[:-1])) + 1
    edges = [0, *change.tolist(), len(ids)]
    return [
        Run(TRAINED if target[a] else CONTEXT, bool(special[a]), tokenizer.decode(ids[a:b], skip_special_tokens=False))
        for a, b in zip(edges, edges[1:], strict=False)
    ]


# ---- on the screen


def as_text(shown: list[Shown], lengths: np.ndarray, colour: bool) -> str:
    """The preview for a terminal; without colour each run has a line of its own, with its kind before it."""
    lines = []
    for number, batch in enumerate(shown):
        lines.append(f"batch {number}: {batch.title}")
        for sequence in batch.sequences:
            lines += [f"| {sequence.title}", _coloured(sequence) if colour else _marked(sequence), ""]
    return "\n".join([*lines, *(f"{label}  {'#' * round(40 * share):<40}  {n:,}" for label, share, n in bars(lengths))])


def _coloured(sequence: Sequence) -> str:
    parts = []
    for run in sequence.runs:
        parts.append(COLOURS[run.kind] + COLOURS["special"] * run.special + run.text + COLOURS["end"])
    return "".join(parts)


def _marked(sequence: Sequence) -> str:
    return "\n".join(f"  {run.kind} {'special' if run.special else '       '} {run.text!r}" for run in sequence.runs)


def bars(lengths: np.ndarray) -> list[tuple[str, float, int]]:
    """(tokens from-to, share of the largest bar, rows) of a histogram of the rows' lengths."""
    counts, edges = np.histogram(lengths, bins=min(BARS, len(np.unique(lengths))))
    width = len(f"{int(lengths.max()):,}")
    labels = [
        f"{int(np.ceil(a)):>{width},}-{int(np.ceil(b)) - 1:>{width},}" for a, b in zip(edges, edges[1:], strict=False)
    ]
    labels[-1] = f"{int(np.ceil(edges[-2])):>{width},}-{int(edges[-1]):>{width},}"
    return [(f"{label} tokens", n / max(counts.max(), 1), int(n)) for label, n in zip(labels, counts, strict=True)]


def wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# ---- as a page


def as_html(shown: list[Shown], lengths: np.ndarray, title: str) -> str:
    body = [f"<h1>{escape(title)}</h1>"]
    legend = '<span class="trained">trained</span>, <span class="context">context</span>, '
    body.append(f'<p>{legend}<span class="special">special tokens</span></p>')
    for number, batch in enumerate(shown):
        body.append(f"<h2>Batch {number}</h2><p>{batch.title}</p>")
        for sequence in batch.sequences:
            words = "".join(
                f'<span class="{run.kind}{" special" * run.special}">{escape(run.text)}</span>' for run in sequence.runs
            )
            body.append(f"<p>{escape(sequence.title)}</p><pre>{words}</pre>")
    rows = "".join(
        f'<tr><td>{label}</td><td><span class="bar" style="width:{round(300 * share)}px"></span> {n:,}</td></tr>'
        for label, share, n in bars(lengths)
    )
    body.append(f"<h2>Lengths of the rows</h2><table>{rows}</table>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{PAGE}{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def write_page(text: str, path: Path) -> Path:
    """Raises UserError where a file that is no page of ours is in the way."""
    if path.exists() and "<!doctype html>" not in path.read_text(encoding="utf-8", errors="replace")[:20]:
        raise UserError("is there and not a page", where=str(path), mend="Name another file: html=FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
