"""Flat token store -> packed micro-batches: one stream of real tokens each, no padding, no attention mask.

`Examples` holds every tokenized row end to end in flat arrays (memory-mapped where they come from the cache). A piece
`(example, start, stop)` is a run of one example's tokens and becomes one sequence of a `Batch`: sequences never attend
to each other, positions restart, and the last position of each predicts nothing. `Batches` decides which pieces make
which micro-batch of which epoch, from (seed, epoch) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config.errors import UserError
from burnish.data.examples import Examples
from burnish.data.packing import Packs, pack, whole_rows
from burnish.data.share import Share, Window, share
from burnish.data.unpaired import Mismatches, check_questions, spread

IGNORE = -100


@dataclass
class Batch:
    """One micro-batch of T tokens in S sequences. `labels[t]` is the token that position t must predict, or -100.

    The fields after `rows` are for preferences: P pairs, or U rated completions; None where they don't apply.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarting at each sequence
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    labels: Tensor  # [T] int64, already shifted inside each sequence
    num_valid: int
    valid: Tensor  # [num_valid] int64, ascending positions t with labels[t] != -100
    rows: list[int]  # [S] source row of each sequence
    examples: list[int] = field(default_factory=list)  # [S] its number in Examples; if mismatched, its prompt's
    chosen: Tensor | None = None  # [P] int64, the sequence that is pair p's chosen one
    rejected: Tensor | None = None  # [P] int64
    margin: Tensor | None = None  # [P] float32
    rated: Tensor | None = None  # [U] int64, the sequences that are rated
    desirable: Tensor | None = None  # [U] bool
    mismatched: Tensor | None = None  # [U] int64, sequences of the same prompts with completions of other prompts
    edge: tuple[int, int] | None = None  # tokens, and entries of `valid`, before the first mismatched sequence
    completion: Tensor | None = None  # [T] bool, t predicts a token of a completion; None: where labels[t] != -100
    reference: Tensor | None = None  # [S] float32, cached sums of log-probs under the reference
    inputs: dict[str, Any] | None = None  # padded rows, what the backbone is called with: input_ids [B, L], ...
    place: Tensor | None = None  # [T] int64, where each token stands in the padded rows, row after row
    counted: bool = True  # False: it only keeps step with other ranks, and nothing of it may count

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`. Copies to a CUDA device go through pinned memory and do not block."""
        pinned = torch.device(device).type == "cuda"

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(each) for name, each in value.items()}
            if not isinstance(value, Tensor):
                return value
            if pinned and not value.is_cuda:
                value = value.pin_memory()
            return value.to(device, non_blocking=True)

        return Batch(**{each.name: move(getattr(self, each.name)) for each in fields(self)})


def collate(
    examples: Examples,
    pieces: Iterable[tuple[int, int, int]] | np.ndarray,
    *,
    joined: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
) -> Batch:
    """One packed batch from pieces `(example, start, stop)`, in their order. Every sequence has at least one token.

    joined    [S] pieces that make up each sequence; None: each is one
    labelled  [S] bool, sequences that get labels on every token, not only on targets; the batch then has `completion`
    """
    table = np.asarray(pieces if isinstance(pieces, np.ndarray) else list(pieces), dtype=np.int64).reshape(-1, 3)
    begin = examples.offsets[table[:, 0]] + table[:, 1]
    lengths = table[:, 2] - table[:, 1]
    spans = [slice(b, b + n) for b, n in zip(begin.tolist(), lengths.tolist(), strict=True)]
    ids = np.concatenate([examples.ids[span] for span in spans]).astype(np.int64)  # [T]
    target = np.concatenate([examples.trained[span] for span in spans]).astype(bool)  # [T]
    owner = table[:, 0]
    if joined is not None:
        first = np.cumsum(joined) - joined
        owner, lengths = owner[first], np.add.reduceat(lengths, first)
    assert len(lengths) and (lengths > 0).all(), "a batch needs at least one sequence, and no empty ones"

    cu = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu[1:])
    target[cu[:-1]] = False  # nothing predicts a sequence's first token
    completion = None
    if labelled is not None:
        completion = torch.from_numpy(np.append(target[1:], False))
        target |= np.repeat(labelled, lengths)
        target[cu[:-1]] = False
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
        rows=examples.rows[owner].tolist(),
        examples=owner.tolist(),
        completion=completion,
    )


class Batches:
    """The micro-batches of a data set, epoch by epoch, deterministic from (seed, epoch).

    A unit is a row, a pair of rows, or a pack of at most `max_length` tokens when packing is on. A micro-batch is
    `per_device_train_batch_size` (`per_device_eval_batch_size`) units flattened into one stream; in training a new
    permutation of the units makes each epoch's micro-batches, unless `train_sampling_strategy` is "sequential". Rated
    rows are spread so that every part of the permutation mixes the desirable and the undesirable as the whole does.
    With `max_tokens_per_batch` a micro-batch is as many units as fit into that many tokens (with packing: one pack of
    that size); which units share a micro-batch is then fixed by the seed and an epoch shuffles the micro-batches,
    so that their number is known.

    mismatch       for rated rows: each micro-batch also has, for every row, its prompt with a completion that belongs
                   to another prompt (see `unpaired.py`). With precompute_ref_log_probs the micro-batches are fixed by
                   the seed here too, so that a row keeps its mismatched completion
    label_prompts  for pairs: the prompts of chosen sequences get labels as well
    reference      to be set; [R] float sums of log-probs under the reference, or with mismatch [R, 2], the second of
                   each row's mismatched sequence: `Batch.reference` is looked up here
    """

    def __init__(
        self,
        examples: Examples,
        config: Any,
        *,
        train: bool = True,
        seed: int | None = None,
        mismatch: bool = False,
        label_prompts: bool = False,
    ):
        if len(examples) == 0:
            raise UserError("the data set has no rows to train on")
        assert examples.paired or not label_prompts, "only pairs have prompts of chosen sequences"
        self.examples = examples
        if seed is None:
            seed = config.seed if getattr(config, "data_seed", None) is None else config.data_seed
        self.seed = int(seed)
        self.reference: np.ndarray | None = None
        self._label_prompts, self.mismatch = label_prompts, mismatch
        if mismatch:
            check_questions(examples)
        self._cut = (config.max_length, getattr(config, "truncation_mode", "keep_start"))
        self._budget = getattr(config, "max_tokens_per_batch", None)
        self._shuffle = train and getattr(config, "train_sampling_strategy", "random") != "sequential"
        self._drop_last = train and bool(getattr(config, "dataloader_drop_last", False))
        self._size = config.per_device_train_batch_size if train else config.per_device_eval_batch_size

        self._units = self._make_units(config, train)
        self._groups: list[np.ndarray] | None = None
        if self._budget is not None:
            self._groups = self._budget_groups(self._budget)
        elif mismatch and getattr(config, "precompute_ref_log_probs", False):
            self._groups = self._sized_groups(self._order(1 << 21))
        if len(self) == 0:
            raise UserError(
                f"{len(self._units)} rows or packs don't fill one batch, and dataloader_drop_last is on",
                where="dataloader_drop_last",
                mend="Turn it off or lower per_device_train_batch_size",
            )

    def _make_units(self, config: Any, train: bool) -> Packs:
        packing = bool(getattr(config, "packing", False))
        if not train and getattr(config, "eval_packing", None) is not None:
            packing = bool(config.eval_packing)
        if packing and config.max_length is None:
            raise UserError("packing needs a max_length", mend="Set max_length, or packing=false")
        lengths, each = self.examples.lengths, 2 if self.examples.paired else 1
        order = np.arange(len(lengths) // each)
        if train and getattr(config, "shuffle_dataset", False):
            order = np.random.default_rng([self.seed, 1 << 20]).permutation(order)
        if not packing:
            rows = (order[:, None] * each + np.arange(each)).reshape(-1)
            units = whole_rows(lengths[rows])
            if each == 2:
                assert len(units) == len(rows), "a pair has no empty sequence"
                units.offsets = units.offsets[::2]
            order = rows
        elif self._budget is None or config.packing_strategy == "wrapped":
            units = pack(lengths[order], config.max_length, config.packing_strategy)
        else:
            units = pack(lengths[order], config.max_length, config.packing_strategy, capacity=self._budget)
        units.pieces[:, 0] = order[units.pieces[:, 0]]
        return units

    def _order(self, salt: int) -> np.ndarray:
        """The units in the order that the seed and `salt` give them, or as they are without shuffling."""
        if not self._shuffle:
            return np.arange(len(self._units))
        order = np.random.default_rng([self.seed, salt]).permutation(len(self._units))
        if self.examples.desirable is None:
            return order
        return spread(order, self.examples.desirable[self._units.pieces[order, 0]])

    def _budget_groups(self, budget: int) -> list[np.ndarray]:
        """Units in (shuffled) order, cut into runs of at most `budget` tokens."""
        tokens = self._units.tokens * (2 if self.mismatch else 1)  # mismatched sequences are no longer than the rows
        if (tokens > budget).any():
            unit = int(np.argmax(tokens > budget))
            row = int(self.examples.rows[self._units.pieces[self._units.offsets[unit], 0]])
            what = "one pair" if self.examples.paired else "one sequence"
            raise UserError(
                f"{int(tokens[unit])} tokens in {what + (' and its mismatched one' if self.mismatch else '')} "
                f"are more than max_tokens_per_batch={budget}",
                where=f"row {row}",
                mend="Raise max_tokens_per_batch or lower max_length",
            )
        order = self._order(1 << 21)
        ends = np.cumsum(tokens[order])
        groups, at, done = [], 0, 0
        while at < len(order):
            stop = int(np.searchsorted(ends, done + budget, side="right"))
            groups.append(order[at:stop])
            at, done = stop, int(ends[stop - 1])
        return groups[:-1] if self._drop_last and len(groups) > 1 else groups

    def _sized_groups(self, order: np.ndarray) -> list[np.ndarray]:
        full, rest = divmod(len(order), self._size)
        return [order[i * self._size : (i + 1) * self._size] for i in range(full + (rest > 0 and not self._drop_last))]

    def __len__(self) -> int:
        """Micro-batches in an epoch (the same for every epoch)."""
        if self._groups is not None:
            return len(self._groups)
        full, rest = divmod(len(self._units), self._size)
        return full if self._drop_last else full + bool(rest)

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], list[int], Mismatches | None]:
        """The unit numbers of the micro-batches of an epoch, the order in which these come, and their mismatches."""
        if self._groups is None:
            groups = self._sized_groups(self._order(epoch))
            order = list(range(len(groups)))
        else:
            groups, order = self._groups, list(range(len(self._groups)))
            if self._shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(groups)).tolist()
        if not self.mismatch:
            return groups, order, None
        numbers = [self._units.pieces[units, 0] for units in groups]
        return groups, order, Mismatches(self.examples, numbers, *self._cut, tight=self._budget is not None)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch in their order, from number `skip` on (skipped ones cost nothing)."""
        groups, order, mismatches = self._plan(epoch)
        for i in order[skip:]:
            pieces = np.concatenate([self._units.table(unit) for unit in groups[i].tolist()])
            yield self._batch(pieces, mismatches.pieces(i) if mismatches is not None else None)

    def shares(
        self, epoch: int, skip: int, size: int, *, ranks: int, rank: int, cost: tuple[float, float]
    ) -> Iterator[Share]:
        """What `rank` gets of each window of `size` micro-batches (the last may hold fewer), from number `skip` on.

        All ranks' parts together hold the window's units once; with packing a unit is a piece of a pack. One rank
        alone gets the micro-batches of `epoch`. cost (a, b): a sequence of n tokens is a*n + b*n^2 of work.
        """
        groups, order, mismatches = self._plan(epoch)
        each, tokens = 2 if self.examples.paired else 1, self._units.tokens
        sums = [int(tokens[group].sum()) for group in groups]
        cap = max(sums) if mismatches is None else max(sums) + mismatches.tokens(sums.index(max(sums)))
        for at in range(skip, len(order), size):
            numbers = order[at : at + size]
            tables = [np.concatenate([self._units.table(unit) for unit in groups[i].tolist()]) for i in numbers]
            pieces = np.concatenate(tables).reshape(-1, each, 3)  # [E, each, 3]
            home = np.repeat(np.arange(len(numbers)), [len(table) // each for table in tables])
            lengths, glued = pieces[:, :, 2] - pieces[:, :, 1], None
            if mismatches is not None:
                glued = np.concatenate([mismatches.pieces(i) for i in numbers])  # [E, 2, 3]
                lengths = np.append(lengths, (glued[:, :, 2] - glued[:, :, 1]).sum(axis=1, keepdims=True), axis=1)
            window = Window(lengths, pieces[:, 0, :2], home)

            def build(units: np.ndarray, pieces: np.ndarray = pieces, glued: np.ndarray | None = glued) -> Batch:
                return self._batch(pieces[units].reshape(-1, 3), None if glued is None else glued[units])

            most = max(cap, window.largest)  # a window's mismatched sequences may be longer
            yield share(window, most, build, ranks=ranks, rank=rank, cost=cost)

    def heaviest(self, epoch: int) -> Batch:
        """The epoch's micro-batch that costs most memory: most tokens, and of those the longest units."""
        groups, order, _ = self._plan(epoch)
        tokens = self._units.tokens
        best = max(range(len(order)), key=lambda n: (tokens[groups[order[n]]].sum(), tokens[groups[order[n]]].max()))
        return next(self.epoch(epoch, skip=best))

    def _batch(self, pieces: np.ndarray, glued: np.ndarray | None) -> Batch:
        """The batch of some units. pieces [n, 3]; glued [n, 2, 3]: the two pieces of each mismatched sequence."""
        examples, count = self.examples, len(pieces)
        joined = labelled = None
        if glued is not None:
            pieces, joined = np.concatenate([pieces, glued.reshape(-1, 3)]), np.repeat([1, 2], count)
        if self._label_prompts:
            labelled = np.arange(count) % 2 == 0
        batch = collate(examples, pieces, joined=joined, labelled=labelled)
        if examples.paired:
            batch.chosen, batch.rejected = torch.arange(0, count, 2), torch.arange(1, count, 2)
            if examples.margin is not None:
                batch.margin = torch.from_numpy(examples.margin[pieces[::2, 0] // 2])
        if examples.desirable is not None:
            batch.rated = torch.arange(count)
            batch.desirable = torch.from_numpy(examples.desirable[pieces[:count, 0]])
            if glued is not None:
                batch.mismatched, edge = torch.arange(count, 2 * count), int(batch.cu_seqlens[count])
                batch.edge = edge, int(np.searchsorted(batch.valid.numpy(), edge))
        if self.reference is not None:
            batch.reference = self._look_up(batch.examples, count)
        return batch

    def _look_up(self, numbers: list[int], count: int) -> Tensor:
        """The cached sums of sequences, of which the first `count` are whole rows.  [S] float32"""
        assert self.reference is not None
        known = self.reference.reshape(len(self.examples), -1)
        assert known.shape[1] >= 1 + self.mismatch, "mismatched sequences need sums of their own: [R, 2]"
        values = known[numbers, np.arange(len(numbers)) // count].astype(np.float32)
        assert not np.isnan(values).any(), "a row has no cached log-prob"
        return torch.from_numpy(values)

    def fingerprint(self) -> str:
        """SHA-256 of what the log-probs of the rows, and of their mismatched sequences, depend on."""
        digest = hashlib.sha256()
        for array in (self.examples.ids, self.examples.trained, self.examples.offsets):
            digest.update(np.ascontiguousarray(array).data)
        if self.mismatch and self._groups is not None:  # else they change with the epoch, and nothing is cached
            _, _, mismatches = self._plan(0)
            assert mismatches is not None
            for number in range(len(self._groups)):
                digest.update(mismatches.pieces(number).data)
        return digest.hexdigest()
