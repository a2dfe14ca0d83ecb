"""One split of preference data: pairs for DPO, CPO, ORPO and reward models, rated completions for KTO and BCO.

Rows go through the tokenizer, the cache and the report as those of `prepare` do. The tokens of a sequence are those of
prompt and completion tokenized as one; the prompt is what the prompt's own tokens start alike with, for a pair with
both of its sequences. Lengths: of a prompt longer than max_prompt_length the end stays, of a completion longer than
max_completion_length the start, of the two together what `truncation_mode` says; sequences that are only scored are
never cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.data.batch import Examples
from burnish.data.pairs import Parts, Task, row_format, take_apart
from burnish.data.prepare import cached, check_length, quantiles, template_name
from burnish.data.read import Row, Source, is_stream, open_source
from burnish.data.report import DataReport, name_rows
from burnish.data.tokenize import RowTokenizer, TokenizeSettings, Tokens

_BLOCK = 1024  # rows tokenized per call
_UNITS: dict[Task, str] = {"pairs": "pair", "scored": "pair", "unpaired": "row"}


@dataclass(frozen=True)
class Limits:
    """Most tokens of a sequence, of its prompt and of its completion; None: no limit."""

    whole: int | None
    prompt: int | None
    completion: int | None
    mode: str  # keep_start or keep_end, for `whole`

    def cut(self, length: int, prompt: int) -> tuple[int, int]:
        """(start, stop) of what stays of a sequence of `length` tokens, the first `prompt` of which are its prompt."""
        start = max(prompt - self.prompt, 0) if self.prompt is not None else 0
        stop = min(length, prompt + self.completion) if self.completion is not None else length
        if self.whole is not None and stop - start > self.whole:
            if self.mode == "keep_start":
                return start, start + self.whole
            return stop - self.whole, stop
        return start, stop


@dataclass
class _Sequence:
    """A sequence before cutting, how many of its tokens are its prompt, and what stays of it."""

    tokens: Tokens
    prompt: int
    start: int
    stop: int

    @property
    def ids(self) -> np.ndarray:
        return self.tokens.ids[self.start : self.stop]

    @property
    def prompt_left(self) -> int:
        return min(max(self.prompt - self.start, 0), self.stop - self.start)


def prepare_pairs(
    source: Any,
    tokenizer: Any,
    config: Any,
    *,
    scored: bool = False,
    split: str = "train",
    config_name: str | None = None,
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> tuple[Examples, DataReport]:
    """Pairs of a split: row 2p of the store is the chosen and row 2p + 1 the rejected of pair p.

    source  a path, hub id, `datasets.Dataset` or list of dicts, as for `prepare`, as are the arguments not named here
    scored  for reward models: sequences have no prompt and no targets, and a pair with one longer than max_length is
            left out instead of cut

    Rows that can't be used are in the report with the reason, equal pairs are kept and named there. Raises UserError
    for rows of other formats, streams, and where no row can be used.
    """
    task: Task = "scored" if scored else "pairs"
    return _prepare(source, tokenizer, config, task, split, config_name, cache_dir, vocab_size)


def prepare_unpaired(
    source: Any,
    tokenizer: Any,
    config: Any,
    *,
    split: str = "train",
    config_name: str | None = None,
    cache_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> tuple[Examples, DataReport]:
    """Rated completions of a split, one to a row of the store. Pairs are two: the chosen desirable, the rejected not.
    Everything else as for `prepare_pairs`."""
    return _prepare(source, tokenizer, config, "unpaired", split, config_name, cache_dir, vocab_size)


def _prepare(
    source: Any,
    tokenizer: Any,
    config: Any,
    task: Task,
    split: str,
    config_name: str | None,
    cache_dir: str | Path | None,
    vocab_size: int | None,
) -> tuple[Examples, DataReport]:
    started = time.perf_counter()
    if is_stream(source):
        raise UserError(
            "preference rows that can only be iterated are not supported", mend="Load the split whole, not streaming"
        )
    check_length(config)
    limits = Limits(
        config.max_length,
        getattr(config, "max_prompt_length", None),
        getattr(config, "max_completion_length", None),
        getattr(config, "truncation_mode", "keep_start"),
    )
    opened = open_source(source, config_name=config_name, split=split)
    tokenize = TokenizeSettings(completion_only=None if task == "scored" else True, vocab_size=vocab_size)
    settings = {"task": task, "limits": asdict(limits), "settings": asdict(tokenize)}

    def build() -> tuple[Examples, DataReport]:
        collector = _Collector(task, limits)
        for number, parts, tokens in _tokenized(opened, tokenizer, task, tokenize, collector.report):
            collector.add(number, parts, tokens)
        return collector.finish(), collector.report

    examples, report = cached(opened, tokenizer, settings, cache_dir, build)
    report.template = template_name(config, report.format)
    named = {"max_length": limits.whole, "max_prompt_length": limits.prompt, "max_completion_length": limits.completion}
    report.cut_to = ", ".join(f"{name} {value:,}" for name, value in named.items() if value is not None)
    report.seconds = time.perf_counter() - started
    return examples, report


def _tokenized(
    source: Source, tokenizer: Any, task: Task, settings: TokenizeSettings, report: DataReport
) -> Iterator[tuple[int, Parts, dict[str, Tokens]]]:
    """Every row's number, what it holds, and the tokens of each of its usable sides."""
    report.source = source.name
    rows: RowTokenizer | None = None
    first = 0
    for block in source.blocks(_BLOCK):
        sides: list[Row] = []
        where: list[str] = []
        taken = [take_apart(row, task, f"{source.name} row {first + i}") for i, row in enumerate(block)]
        for i, parts in enumerate(taken):
            place = f"{source.name} row {first + i}"
            if parts.kind is None:
                continue
            format = row_format(parts.kind, task)
            if rows is None:
                rows = RowTokenizer(tokenizer, format, settings, name=source.name, arrow=source.arrow)
                present = {key for key, value in block[i].items() if value is not None}
                columns = ["prompt"] * ("prompt" in present) + list(parts.sides)
                report.format = f"{' + '.join(columns)} {parts.kind}"
                report.unused_columns = sorted(present - parts.used)
            elif rows.format != format:
                raise UserError(
                    f"this row is {parts.kind}, the rows before it are not", where=place, mend="Give all rows one form"
                )
            usable = [side for side in parts.sides.values() if not isinstance(side, str)]
            sides += usable
            where += [place] * len(usable)
        made = iter(rows.tokens(sides, where) if rows is not None else [])
        for i, parts in enumerate(taken):
            tokens = {name: next(made) for name, side in parts.sides.items() if not isinstance(side, str)}
            for one in tokens.values():
                one.stopped = rows is not None and rows.stops_well(one)
            yield first + i, parts, tokens
        first += len(block)
    if first == 0:
        raise UserError("the data set is empty", where=source.name)


class _Collector:
    """Cuts sequences to length, leaves out what can't be used, counts both, and lays the rest end to end."""

    def __init__(self, task: Task, limits: Limits):
        self.report = DataReport(unit=_UNITS[task])
        self._task, self._limits = task, limits
        self._ids: list[np.ndarray] = []
        self._prompts: list[int] = []
        self._rows: list[int] = []
        self._margins: list[float | None] = []
        self._desirable: list[bool] = []
        self._question: list[int] = []
        self._questions: dict[str, int] = {}
        self._lengths: dict[str, list[int]] = {}

    def add(self, row: int, parts: Parts, tokens: dict[str, Tokens]) -> None:
        """Take in one row of the source."""
        self.report.rows_read += 1
        self.report.boundary_moved += any(one.boundary_moved for one in tokens.values())
        self.report.doubled_bos += any(one.doubled_bos for one in tokens.values())
        self.report.spelled_rows += [row] * any(one.spelled for one in tokens.values())
        self.report.spelled_replies += [row] * any(one.spelled_reply for one in tokens.values())
        self.report.unanswered += [row] * any(one.unanswered for one in tokens.values())
        reasons = [side for side in parts.sides.values() if isinstance(side, str)]
        if self._task != "unpaired":
            if reasons:
                self.report.dropped.append((row, ", ".join(dict.fromkeys(reasons))))
            else:
                self._pair(row, parts, tokens)
            return
        self.report.dropped += [(row, reason) for reason in reasons]
        for name, one in tokens.items():
            self._rated(row, parts, name, one)

    def _pair(self, row: int, parts: Parts, tokens: dict[str, Tokens]) -> None:
        prompt = 0 if self._task == "scored" else min(_prompt_of(one) for one in tokens.values())
        self._note("prompt", prompt)
        pair = [self._measured(name, one, prompt) for name, one in tokens.items()]
        reasons = [reason for reason, _ in pair if reason]
        if reasons:
            self.report.dropped.append((row, ", ".join(dict.fromkeys(reasons))))
            return
        if np.array_equal(pair[0][1].ids, pair[1][1].ids):
            self.report.equal_rows.append(row)
        if self._margins and (self._margins[-1] is None) != (parts.margin is None):
            raise UserError(
                "some rows have a margin and some have none",
                where=f"{self.report.source} row {row}",
                mend="Give every row one, or none",
            )
        self._margins.append(parts.margin)
        self._keep(row, [sequence for _, sequence in pair])

    def _rated(self, row: int, parts: Parts, name: str, tokens: Tokens) -> None:
        prompt = _prompt_of(tokens)
        self._note("prompt", prompt)
        reason, sequence = self._measured(name, tokens, prompt)
        if reason:
            self.report.dropped.append((row, reason))
            return
        label = name == "chosen" if parts.label is None else parts.label
        self._desirable.append(label)
        self._question.append(self._questions.setdefault(repr(parts.question), len(self._questions)))
        self._keep(row, [sequence])

    def _note(self, name: str, length: int) -> None:
        self._lengths.setdefault(name, []).append(length)

    def _measured(self, name: str, tokens: Tokens, prompt: int) -> tuple[str, _Sequence]:
        """Why a sequence can't be used (or nothing), and what cutting leaves of it."""
        full, limit = len(tokens.ids), self._limits.whole
        self._note(name, full - prompt)
        if tokens.missing:
            return tokens.missing, _Sequence(tokens, prompt, 0, full)
        if self._task == "scored":
            long = limit is not None and full > limit
            return (f"longer than max_length {limit}" if long else ""), _Sequence(tokens, 0, 0, full)
        sequence = _Sequence(tokens, prompt, *self._limits.cut(full, prompt))
        kept = sequence.stop - sequence.start
        if full <= max(prompt, 1):
            return f"empty {name}", sequence
        if kept <= sequence.prompt_left or kept == 1:
            self.report.trained_dropped += full - max(prompt, 1)
        if kept <= sequence.prompt_left:
            return f"prompt fills max_length {limit}", sequence
        return (f"{name} cut to nothing" if kept == 1 else ""), sequence

    def _keep(self, row: int, sequences: list[_Sequence]) -> None:
        """Lay down the sequences of a unit."""
        report = self.report
        report.units += 1
        lost = [len(sequence.tokens.ids) - len(sequence.ids) for sequence in sequences]
        if any(lost):
            report.cut_rows.append(row)
        for sequence, lost_ in zip(sequences, lost, strict=True):
            left, ids = sequence.prompt_left, sequence.ids
            report.rows += 1
            report.tokens += len(ids)
            report.tokens_lost += lost_
            report.stopped_rows += sequence.tokens.stopped and sequence.stop == len(sequence.tokens.ids)
            if self._task != "scored":
                trained = len(ids) - max(left, 1)
                report.trained_tokens += trained
                report.trained_lost += len(sequence.tokens.ids) - max(sequence.prompt, 1) - trained
            self._ids.append(ids)
            self._prompts.append(left)
            self._rows.append(row)

    def finish(self) -> Examples:
        """All units kept. Raises UserError where there are none."""
        report, task = self.report, self._task
        if not self._ids:
            reasons = "; ".join(f"{reason}: {name_rows(rows)}" for reason, rows in report.dropped_by_reason().items())
            raise UserError(f"no {report.unit} can be used ({reasons})", where=report.source)
        report.lengths = {name: quantiles(lengths) for name, lengths in self._lengths.items()}
        if task == "scored":
            del report.lengths["prompt"]
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        prompt = np.array(self._prompts, dtype=np.int64)
        trained = np.zeros(int(offsets[-1]), dtype=bool)
        if task != "scored":
            place = np.arange(len(trained)) - np.repeat(offsets[:-1], lengths)
            trained = place >= np.repeat(prompt, lengths)
        examples = Examples(np.concatenate(self._ids), trained, offsets, np.array(self._rows, dtype=np.int64))
        if task == "unpaired":
            examples.prompt = prompt
            examples.desirable = np.array(self._desirable, dtype=bool)
            examples.question = np.array(self._question, dtype=np.int64)
            report.desirable = int(examples.desirable.sum())
            return examples
        examples.paired = True
        if task == "pairs":
            examples.prompt = prompt
        if self._margins[0] is not None:
            examples.margin = np.array(self._margins, dtype=np.float32)
        return examples


def _prompt_of(tokens: Tokens) -> int:
    """Tokens before the completion, which is what is trained on and goes to the end."""
    return len(tokens.trained) - int(np.count_nonzero(tokens.trained))
