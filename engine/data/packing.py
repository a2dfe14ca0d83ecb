"""Which tokens share a pack: best-fit decreasing, the same with long rows split, or plain wrapping.

All three look at the lengths of the whole data set at once and are deterministic. A pack lists pieces
`(example, start, stop)`; each piece is its own attention segment, so a pack mixes documents without mixing what they
see. Best-fit decreasing for bin packing: Johnson, Demers, Ullman, Garey and Graham (1974), at most 11/9 of the
optimal number of packs (plus a constant).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from burnish.config.errors import UserError


@dataclass
class Packs:
    """A sequence of packs. Pack k is the list of pieces `pieces[offsets[k]:offsets[k + 1]]`.

    pieces   [P, 3] int64   (example, start, stop), stop exclusive
    offsets  [K + 1] int64
    """

    pieces: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> list[tuple[int, int, int]]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return [tuple(piece) for piece in self.table(k).tolist()]

    def table(self, k: int) -> np.ndarray:
        """Pack k as an array.  [pieces, 3] int64"""
        return self.pieces[self.offsets[k] : self.offsets[k + 1]]

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each pack.  [K] int64"""
        if len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.pieces[:, 2] - self.pieces[:, 1], self.offsets[:-1])


def whole_rows(lengths: np.ndarray) -> Packs:
    """No packing: each row that has tokens is a pack of its own."""
    rows = np.flatnonzero(np.asarray(lengths) > 0)
    pieces = np.stack([rows, np.zeros_like(rows), np.asarray(lengths)[rows]], axis=1).astype(np.int64)
    return Packs(pieces, np.arange(len(rows) + 1, dtype=np.int64))


def pack(lengths: np.ndarray, max_length: int, strategy: str = "bfd", *, capacity: int | None = None) -> Packs:
    """Packs of at most `capacity` tokens (default `max_length`) from rows of the given lengths.

    "bfd"        rows longer than max_length keep their first max_length tokens; longest first, each into the pack
                 with the least room that still holds it (the one that got there first, of several), else a new one
    "bfd_split"  rows longer than max_length are first cut into pieces of it, then as "bfd": nothing is lost
    "wrapped"    rows end to end, cut every max_length tokens: nothing is lost, rows are cut anywhere

    Empty rows vanish. Ties keep the input order. `capacity` below max_length raises UserError where a piece does not
    fit. "wrapped" has no separate capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if max_length < 1:
        raise UserError(f"max_length must be at least 1, it is {max_length}")
    if strategy == "wrapped":
        return _wrap(lengths, max_length)
    if strategy == "bfd":
        rows = np.flatnonzero(lengths > 0)
        pieces = np.stack([rows, np.zeros_like(rows), np.minimum(lengths[rows], max_length)], axis=1)
    elif strategy == "bfd_split":
        pieces = _cut(lengths, max_length)
    else:
        raise UserError(f"unknown packing_strategy {strategy!r}", mend="Use bfd, bfd_split or wrapped")
    return _best_fit(pieces, capacity or max_length)


def _cut(lengths: np.ndarray, size: int) -> np.ndarray:
    """Every row in pieces of `size` tokens, the last one shorter.  [P, 3]"""
    counts = -(-lengths // size)  # pieces per row, 0 for an empty one
    rows = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([rows, nth * size, np.minimum((nth + 1) * size, lengths[rows])], axis=1)


def _wrap(lengths: np.ndarray, size: int) -> Packs:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, size)).astype(np.int64)
    begin, stop = cuts[:-1], cuts[1:]
    rows = np.searchsorted(ends, begin, side="right")
    first = ends[rows] - lengths[rows] if len(rows) else rows
    pieces = np.stack([rows, begin - first, stop - first], axis=1).astype(np.int64)
    return Packs(pieces, np.append(np.searchsorted(begin, np.arange(0, total, size)), len(begin)).astype(np.int64))


def _best_fit(pieces: np.ndarray, capacity: int) -> Packs:
    sizes = pieces[:, 2] - pieces[:, 1]
    if len(sizes) and sizes.max() > capacity:
        raise UserError(
            f"a sequence of {int(sizes.max())} tokens does not fit into packs of {capacity}",
            mend="Raise max_tokens_per_batch or lower max_length",
        )
    order = np.argsort(-sizes, kind="stable")
    home = np.empty(len(order), dtype=np.int64)  # the pack of each piece, in packing order
    rooms: list[int] = []  # distinct amounts of room left, ascending
    waiting: dict[int, deque[int]] = {}  # room -> packs that have it, oldest first
    count = 0
    for i, size in enumerate(sizes[order].tolist()):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, room = count, capacity - size
            count += 1
        else:
            old = rooms[at]
            queue = waiting[old]
            chosen, room = queue.popleft(), old - size
            if not queue:
                del waiting[old], rooms[at]
        home[i] = chosen
        if room:
            if room in waiting:
                waiting[room].append(chosen)
            else:
                waiting[room] = deque((chosen,))
                insort(rooms, room)
    by_pack = np.argsort(home, kind="stable")
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(home, minlength=count), out=offsets[1:])
    return Packs(pieces[order][by_pack], offsets)
