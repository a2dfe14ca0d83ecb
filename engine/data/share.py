"""A window of micro-batches shared out over ranks: which units each rank gets, without a word between them.

Every rank works out the whole assignment from lengths alone and builds only its own batches. What counts as equal work
is a*n + b*n^2 a sequence of n tokens (`balance.py`), not tokens; what a rank holds at once stays under the largest
micro-batch that one process would have had, so that what was planned for memory stays true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from burnish.data.balance import deal

if TYPE_CHECKING:
    from burnish.data.batch import Batch


@dataclass
class Share:
    """One rank's part of a window.

    batches        this rank's micro-batches, heaviest first, as many as every other rank's; those that only keep step
                   with the others are not `counted`
    micro_batches  of the epoch that the window holds: a cursor in the epoch moves by it
    tokens         of the whole window, all ranks together, each counted once
    imbalance      work of the busiest rank over the mean of all: 1.0 is perfect
    """

    batches: list[Batch]
    micro_batches: int
    tokens: int
    imbalance: float


@dataclass
class Window:
    """The units of consecutive micro-batches, in the order of one process.

    lengths  [E, s] int64  tokens of each of a unit's sequences
    names    [E, 2] int64  what tells units apart, whatever order they come in: example and start
    home     [E] int64     the micro-batch of each on one process, ascending from 0
    """

    lengths: np.ndarray
    names: np.ndarray
    home: np.ndarray

    @property
    def largest(self) -> int:
        """Tokens of its largest micro-batch on one process."""
        return int(np.bincount(self.home, weights=self.lengths.sum(axis=1)).max())


def share(
    window: Window,
    cap: int,
    build: Callable[[np.ndarray], Batch],
    *,
    ranks: int,
    rank: int,
    cost: tuple[float, float],
) -> Share:
    """The part of `rank` of `ranks`. `build` makes the batch of some units, given their numbers in the window.

    cap   tokens that no micro-batch exceeds, at least those of each of the window's own
    cost  (a, b): a sequence of n tokens is a*n + b*n^2 of work, in any unit
    """
    assert 0 <= rank < ranks, "ranks count from 0"
    count, tokens = int(window.home[-1]) + 1, int(window.lengths.sum())
    if ranks == 1:
        batches = [build(np.flatnonzero(window.home == number)) for number in range(count)]
        return Share(batches, count, tokens, 1.0)
    parts, work = divided(window, cap, ranks, cost)
    idle = np.lexsort((window.names[:, 1], window.names[:, 0], work))[:1]  # the cheapest unit, run to keep step
    loads = [sum(float(work[slot if len(slot) else idle].sum()) for slot in part) for part in parts]
    batches = []
    for slot in parts[rank]:
        batch = build(slot if len(slot) else idle)
        batch.counted = len(slot) > 0
        batches.append(batch)
    return Share(batches, count, tokens, max(loads) * ranks / sum(loads))


def divided(
    window: Window, cap: int, ranks: int, cost: tuple[float, float]
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """For each rank its micro-batches, each as numbers of units in the window (maybe none), and each unit's work.

    The same units in another order, or in other micro-batches that leave some room, are divided alike.
    """
    assert min(cost) >= 0 < max(cost), "work is positive"
    lengths = window.lengths.astype(np.float64)
    work = (cost[0] * lengths + cost[1] * lengths * lengths).sum(axis=1)
    example, start = window.names.T
    order = np.lexsort((start, example, -work))
    parts = deal(window.lengths.sum(axis=1)[order], work[order], window.home[order], cap, ranks)
    named = [[order[slot] for slot in part] for part in parts]
    return [[slot[np.lexsort((start[slot], example[slot]))] for slot in part] for part in named], work
