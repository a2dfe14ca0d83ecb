"""Micro-batches from rows that can only be iterated: tokenized on the way, packed in windows of bounded look-ahead.

The stream's order is kept (shuffling is the stream's own business: `IterableDataset.shuffle`), nothing is cached, and a
resumed run reads and skips what it has seen. Everything else, formats, masks, cutting, packing, is as in `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.data.batch import Batch, Examples, collate
from burnish.data.completion import Templates
from burnish.data.packing import pack, whole_rows
from burnish.data.prepare import (
    Collector,
    FormattingFunc,
    cut_length,
    formatted,
    packs_split,
    tokenize_settings,
    tokenized,
)
from burnish.data.read import Source
from burnish.data.report import DataReport
from burnish.data.share import Share, Window, share

_WINDOW = 1000  # rows read ahead and packed together


@dataclass
class _Sequence:
    ids: np.ndarray
    trained: np.ndarray
    row: int
    start: int  # in its row


class StreamBatches:
    """What `Batches` is for stored rows. In training, "an epoch" is the whole run of max_steps updates, over as many
    passes of the stream as that takes; in evaluation it is one pass. `report` counts what has been read so far."""

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        config: Any,
        *,
        train: bool = True,
        formatting_func: FormattingFunc | None = None,
        vocab_size: int | None = None,
        templates: Templates | None = None,
    ):
        if train and not config.max_steps > 0:
            raise UserError("a stream has no known end", where="max_steps", mend="Set max_steps")
        self.report = DataReport()
        self._source, self._tokenizer, self._config, self._train = source, tokenizer, config, train
        self._formatting_func = formatting_func
        self._settings = tokenize_settings(config, vocab_size, templates)
        self._limit = cut_length(config, train)

    def __len__(self) -> int:
        """Micro-batches in the run. Only training knows it."""
        if not self._train:
            raise TypeError("a stream's evaluation pass has no known length")
        return self._config.max_steps * getattr(self._config, "gradient_accumulation_steps", 1)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The micro-batches, from number `skip` on. Skipped ones are read and tokenized, but not built."""
        for sequences in self._numbered(epoch, skip):
            yield _collate(sequences)

    def shares(
        self, epoch: int, skip: int, size: int, *, ranks: int, rank: int, cost: tuple[float, float]
    ) -> Iterator[Share]:
        """As `Batches.shares`, over `ranks` times as many micro-batches. Every rank reads them all.

        No micro-batch has more tokens than the largest of its window: what follows isn't known.
        """
        groups = self._numbered(epoch, skip, ranks)
        while window := list(islice(groups, size)):
            sequences = [sequence for group in window for sequence in group]
            units = Window(
                lengths=np.array([[len(sequence.ids)] for sequence in sequences]),
                names=np.array([(sequence.row, sequence.start) for sequence in sequences]),
                home=np.repeat(np.arange(len(window)), [len(group) for group in window]),
            )

            def build(numbers: np.ndarray, sequences: list[_Sequence] = sequences) -> Batch:
                return _collate([sequences[number] for number in numbers.tolist()])

            yield share(units, units.largest, build, ranks=ranks, rank=rank, cost=cost)

    def _numbered(self, epoch: int, skip: int, ranks: int = 1) -> Iterator[list[_Sequence]]:
        """The sequences of the micro-batches of a run on `ranks` processes, from number `skip` on."""
        return islice(self._groups(epoch), skip, len(self) * ranks if self._train else None)

    def _groups(self, epoch: int) -> Iterator[list[_Sequence]]:
        """The sequences of each micro-batch."""
        size = self._config.per_device_train_batch_size if self._train else self._config.per_device_eval_batch_size
        budget = getattr(self._config, "max_tokens_per_batch", None)
        group: list[list[_Sequence]] = []
        held = 0
        for unit in self._units(epoch):
            tokens = sum(len(sequence.ids) for sequence in unit)
            if budget is not None and tokens > budget:
                raise UserError(
                    f"{tokens} tokens in one sequence are more than max_tokens_per_batch={budget}",
                    where=f"row {unit[0].row}",
                    mend="Raise max_tokens_per_batch or lower max_length",
                )
            if group and (held + tokens > budget if budget is not None else len(group) == size):
                yield [sequence for unit_ in group for sequence in unit_]
                group, held = [], 0
            group.append(unit)
            held += tokens
        if group:
            yield [sequence for unit_ in group for sequence in unit_]

    def _units(self, epoch: int) -> Iterator[list[_Sequence]]:
        """Rows or packs, one pass after the other in training."""
        number = epoch
        while True:
            found = False
            for examples in self._windows(number):
                if len(examples):
                    found = True
                    yield from self._pack(examples)
            if not found:
                raise UserError("no row of the stream trains on anything", where=self.report.source)
            if not self._train:
                return
            if iter(self._source) is self._source:
                raise UserError(
                    f"the stream ended after {self.report.rows_read} rows, before max_steps, and can't be read again",
                    mend="Lower max_steps or give an iterable that starts anew each time",
                )
            number += 1

    def _windows(self, number: int) -> Iterator[Examples]:
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(number)
        arrow = type(self._source).__module__.partition(".")[0] == "datasets"
        source = Source("stream", lambda: iter(self._source), lambda: "", arrow=arrow)
        if self._formatting_func is not None:
            source = formatted(source, self._formatting_func, self._config)
        collector = Collector(self._limit, getattr(self._config, "truncation_mode", "keep_start"), self.report)
        for row, tokens in tokenized(source, self._tokenizer, self._settings, self.report, block_size=_WINDOW):
            collector.add(tokens, row)
            if (row + 1) % _WINDOW == 0:
                yield collector.take()
        yield collector.take()

    def _pack(self, examples: Examples) -> list[list[_Sequence]]:
        config = self._config
        if not packs_split(config, self._train):
            packs = whole_rows(examples.lengths)
        else:
            strategy, budget = config.packing_strategy, getattr(config, "max_tokens_per_batch", None)
            capacity = None if strategy == "wrapped" else budget
            packs = pack(examples.lengths, config.max_length, strategy, capacity=capacity)
        return [[_sequence(examples, *piece) for piece in packs[k]] for k in range(len(packs))]


def _sequence(examples: Examples, example: int, start: int, stop: int) -> _Sequence:
    begin = examples.offsets[example]
    span = slice(begin + start, begin + stop)
    return _Sequence(examples.ids[span], examples.trained[span], int(examples.rows[example]), start)


def _collate(sequences: list[_Sequence]) -> Batch:
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence.ids) for sequence in sequences], out=offsets[1:])
    examples = Examples(
        ids=np.concatenate([sequence.ids for sequence in sequences]),
        trained=np.concatenate([sequence.trained for sequence in sequences]),
        offsets=offsets,
        rows=np.array([sequence.row for sequence in sequences], dtype=np.int64),
    )
    return collate(examples, whole_rows(examples.lengths).pieces)
