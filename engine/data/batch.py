"""Flat token store -> packed micro-batches: one stream of real tokens each, no padding, no attention mask.

`Examples` holds every tokenized row end to end in flat arrays (memory-mapped where they come from the cache). A piece
`(example, start, stop)` is a run of one example's tokens and becomes one sequence of a `Batch`: sequences never attend
to each other, positions restart, and the last position of each predicts nothing. `Batches` decides which pieces make
which micro-batch of which epoch, from (seed, epoch) alone, and knows the number of trained tokens of each before any
tensor exists: the loop divides by the count of its whole accumulation window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config.errors import UserError
from burnish.data.packing import Packs, pack, whole_rows

IGNORE = -100
_COUNT_BLOCK = 4096  # pieces summed at a time: bounds the memory of counting over a mapped array


@dataclass
class Examples:
    """Tokenized rows, end to end. Row r is `ids[offsets[r]:offsets[r + 1]]`.

    ids      [N] int32    token ids
    trained  [N] bool     token i is a target (means nothing for a row's first token, which no position predicts)
    offsets  [R + 1] int64
    rows     [R] int64    each row's number in the source, for reports
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:  # [R] int64
        return np.diff(self.offsets)


@dataclass
class Batch:
    """One micro-batch of T tokens in S sequences. `labels[t]` is the token that position t must predict, or -100."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarting at each sequence
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    labels: Tensor  # [T] int64, already shifted inside each sequence
    num_valid: int
    valid: Tensor  # [num_valid] int64, ascending positions t with labels[t] != -100
    rows: list[int]  # [S] source row of each sequence

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`. Copies to a CUDA device go through pinned memory and do not block."""
        pinned = torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            if pinned and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            labels=move(self.labels),
            num_valid=self.num_valid,
            valid=move(self.valid),
            rows=self.rows,
        )


def collate(examples: Examples, pieces: Iterable[tuple[int, int, int]] | np.ndarray) -> Batch:
    """One packed batch from pieces `(example, start, stop)`, in their order. Every piece has at least one token."""
    table = np.asarray(pieces if isinstance(pieces, np.ndarray) else list(pieces), dtype=np.int64).reshape(-1, 3)
    begin = examples.offsets[table[:, 0]] + table[:, 1]  # [S]
    lengths = table[:, 2] - table[:, 1]  # [S]
    assert len(table) and (lengths > 0).all(), "a batch needs at least one sequence, and no empty ones"
    spans = [slice(b, b + n) for b, n in zip(begin.tolist(), lengths.tolist(), strict=True)]
    ids = np.concatenate([examples.ids[span] for span in spans]).astype(np.int64)  # [T]
    target = np.concatenate([examples.trained[span] for span in spans]).astype(bool)  # [T]

    cu = np.zeros(len(table) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu[1:])
    target[cu[:-1]] = False  # nothing predicts a sequence's first token
    valid = np.flatnonzero(target[1:])  # position t predicts token t + 1
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[valid] = ids[valid + 1]
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(cu[:-1].astype(np.int64), lengths)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu),
        max_seqlen=int(lengths.max()),
        labels=torch.from_numpy(labels),
        num_valid=len(valid),
        valid=torch.from_numpy(valid),
        rows=examples.rows[table[:, 0]].tolist(),
    )


def count_trained(examples: Examples, pieces: np.ndarray) -> np.ndarray:
    """Tokens that each piece `(example, start, stop)` trains on: its targets except its own first token.  [P] int64"""
    begin = examples.offsets[pieces[:, 0]] + pieces[:, 1]
    end = begin + pieces[:, 2] - pieces[:, 1]
    counts = np.zeros(len(pieces), dtype=np.int64)
    order = np.argsort(begin, kind="stable")
    for at in range(0, len(order), _COUNT_BLOCK):
        block = order[at : at + _COUNT_BLOCK]
        low, high = int(begin[block[0]]), int(end[block].max())
        running = np.zeros(high - low + 1, dtype=np.int64)
        np.cumsum(examples.trained[low:high], out=running[1:])
        counts[block] = running[end[block] - low] - running[begin[block] + 1 - low]
    return counts


class Batches:
    """The micro-batches of a data set, epoch by epoch, deterministic from (seed, epoch).

    A unit is a row, or a pack of at most `max_length` tokens when packing is on. A micro-batch is
    `per_device_train_batch_size` (`per_device_eval_batch_size`) units flattened into one stream; in training a new
    permutation of the units makes each epoch's micro-batches, unless `train_sampling_strategy` is "sequential".
    With `max_tokens_per_batch` a micro-batch is as many units as fit into that many tokens (with packing: one pack of
    that size); which units share a micro-batch is then fixed by the seed and an epoch shuffles the micro-batches,
    so that their number is known.
    """

    def __init__(self, examples: Examples, config: Any, *, train: bool = True, seed: int | None = None):
        if len(examples) == 0:
            raise UserError("the data set has no rows to train on")
        self.examples = examples
        if seed is None:
            seed = config.seed if getattr(config, "data_seed", None) is None else config.data_seed
        self.seed = int(seed)
        packing = bool(config.packing)
        if not train and config.eval_packing is not None:
            packing = bool(config.eval_packing)
        if packing and config.max_length is None:
            raise UserError("packing needs a max_length", mend="Set max_length, or packing=false")
        budget = getattr(config, "max_tokens_per_batch", None)
        self._shuffle = train and getattr(config, "train_sampling_strategy", "random") != "sequential"
        self._drop_last = train and bool(getattr(config, "dataloader_drop_last", False))
        self._size = config.per_device_train_batch_size if train else config.per_device_eval_batch_size

        order = np.arange(len(examples))
        if train and getattr(config, "shuffle_dataset", False):
            order = np.random.default_rng([self.seed, 1 << 20]).permutation(order)
        self._units = self._make_units(order, packing, config, budget)
        self._counts = np.add.reduceat(count_trained(examples, self._units.pieces), self._units.offsets[:-1])
        self._groups = self._budget_groups(budget) if budget is not None else None

    def _make_units(self, order: np.ndarray, packing: bool, config: Any, budget: int | None) -> Packs:
        lengths = self.examples.lengths[order]
        if not packing:
            units = whole_rows(lengths)
        elif budget is None or config.packing_strategy == "wrapped":
            units = pack(lengths, config.max_length, config.packing_strategy)
        else:
            units = pack(lengths, config.max_length, config.packing_strategy, capacity=budget)
        units.pieces[:, 0] = order[units.pieces[:, 0]]
        return units

    def _budget_groups(self, budget: int) -> list[np.ndarray]:
        """Units in (shuffled) order, cut into runs of at most `budget` tokens."""
        tokens = self._units.tokens
        if (tokens > budget).any():
            unit = int(np.argmax(tokens > budget))
            row = int(self.examples.rows[self._units.pieces[self._units.offsets[unit], 0]])
            raise UserError(
                f"{int(tokens[unit])} tokens in one sequence are more than max_tokens_per_batch={budget}",
                where=f"row {row}",
                mend="Raise max_tokens_per_batch or lower max_length",
            )
        order = np.arange(len(tokens))
        if self._shuffle:
            order = np.random.default_rng([self.seed, 1 << 21]).permutation(order)
        ends = np.cumsum(tokens[order])
        groups, at, done = [], 0, 0
        while at < len(order):
            stop = int(np.searchsorted(ends, done + budget, side="right"))
            groups.append(order[at:stop])
            at, done = stop, int(ends[stop - 1])
        return groups[:-1] if self._drop_last and len(groups) > 1 else groups

    def __len__(self) -> int:
        """Micro-batches in an epoch (the same for every epoch)."""
        if self._groups is not None:
            return len(self._groups)
        full, rest = divmod(len(self._units), self._size)
        return full if self._drop_last else full + bool(rest)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The unit numbers of each micro-batch of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        if self._groups is not None:
            order = rng.permutation(len(self._groups)) if self._shuffle else range(len(self._groups))
            return [self._groups[i] for i in order]
        order = rng.permutation(len(self._units)) if self._shuffle else np.arange(len(self._units))
        return [order[i * self._size : (i + 1) * self._size] for i in range(len(self))]

    def trained_tokens(self, epoch: int) -> np.ndarray:
        """`num_valid` of each micro-batch of an epoch, without building one.  [len(self)] int64"""
        return np.array([self._counts[units].sum() for units in self._plan(epoch)], dtype=np.int64)

    def tokens(self, epoch: int) -> np.ndarray:
        """Tokens (trained or not) of each micro-batch of an epoch.  [len(self)] int64"""
        sizes = self._units.tokens
        return np.array([sizes[units].sum() for units in self._plan(epoch)], dtype=np.int64)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch in their order, from number `skip` on (skipped ones cost nothing)."""
        for units in self._plan(epoch)[skip:]:
            yield collate(self.examples, np.concatenate([self._units.table(unit) for unit in units.tolist()]))

    @property
    def packs(self) -> tuple[int, float]:
        """Number of units, and how full they are: tokens over units times the longest one."""
        sizes = self._units.tokens
        return len(sizes), float(sizes.sum() / (len(sizes) * sizes.max()))
