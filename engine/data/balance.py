"""Dealing out units of work over ranks: equal work, equal numbers of micro-batches, none over its tokens. Pure numpy.

Where there is room, longest processing time first (Graham 1969): units by falling work, each to the rank with the
least so far. Packs that are full leave no room for that, so they are dealt out whole in this way, and then the busiest
rank and the idlest exchange sets of units of (nearly) equal tokens and unequal work until all are close: the packs stay
as full as they were. Such sets are found where the sums of two packs' units, taken in some random orders, meet.

Every process must come to the same answer: weights are whole numbers, so that no order of summation matters, and the
random orders come from a constant seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

_UNIT = 1 << 32  # the heaviest unit's weight
_FULL = 0.97  # of all room: with less left over, dealing out units one by one rarely succeeds
_CLOSE = 1.003  # busiest rank over the mean: where exchanging stops
_POOR = 1.075  # busiest rank over the mean: above it, packs that aren't full are the smaller loss
_WORTH = 1.05  # by how much they must then ease the busiest rank
_SUMS = 1024  # sums of a micro-batch's units that an exchange looks at
_ORDERS = 24  # in which they are summed up, at most
_PAIRS = 8  # pairs of micro-batches that one round looks at
_IDLEST = 3  # ranks that the busiest looks to


def deal(tokens: np.ndarray, work: np.ndarray, home: np.ndarray, cap: int, ranks: int) -> list[list[np.ndarray]]:
    """For each rank its micro-batches, heaviest first, each as the numbers of its units: as many for every rank.

    A rank has ceil(H / ranks) micro-batches, where `home` has H; one more where full ones can't be balanced. Some may
    be empty. The answer depends on the order of the units (give them a canonical one), and on `home` only as a set of
    sets, and that only where it leaves less than 3 % of the room.

    tokens  [E] int64
    work    [E] float64, falling; the first positive
    home    [E] int64, the micro-batch of each unit in a partition under `cap`; 0 to H - 1, none empty
    cap     tokens that no micro-batch exceeds
    """
    weights = np.rint(work * (_UNIT / work[0])).astype(np.int64)
    slots = -(-(int(home.max()) + 1) // ranks)
    if tokens.sum() <= _FULL * cap * slots * ranks:
        bins = _longest_first(tokens, weights, cap, ranks, slots)
        if bins is not None:
            return _by_rank(_exchanged(bins, tokens, weights, cap, ranks, slots), weights, ranks, slots)
    bins = _exchanged(_dealt_whole(weights, home, ranks, slots), tokens, weights, cap, ranks, slots)
    busiest = _busiest(bins, weights, ranks, slots)
    if busiest > _POOR * weights.sum() / ranks:
        looser = _longest_first(tokens, weights, cap, ranks, slots + 1, tight=True)
        if looser is not None and _WORTH * _busiest(looser, weights, ranks, slots + 1) < busiest:
            return _by_rank(looser, weights, ranks, slots + 1)
    return _by_rank(bins, weights, ranks, slots)


def _longest_first(
    tokens: np.ndarray, weights: np.ndarray, cap: int, ranks: int, slots: int, *, tight: bool = False
) -> np.ndarray | None:
    """The micro-batch (rank * slots + slot) of each unit, or None where one finds no room.  [E] int64

    Inside a rank a unit goes to the micro-batch with most room, or if tight, with the least that holds it: then ranks
    that meet at every micro-batch wait less for the one with a very long unit.
    """
    rooms = [[cap] * slots for _ in range(ranks)]
    waiting = [(0, rank) for rank in range(ranks)]
    heapify(waiting)
    bins = np.empty(len(tokens), dtype=np.int64)
    for unit, (size, weight) in enumerate(zip(tokens.tolist(), weights.tolist(), strict=True)):
        full = []
        while waiting:
            load, rank = heappop(waiting)
            room = max(rooms[rank])
            if room >= size:
                break
            full.append((load, rank))
        else:
            return None
        if tight:
            room = min(other for other in rooms[rank] if other >= size)
        slot = rooms[rank].index(room)
        rooms[rank][slot] = room - size
        bins[unit] = rank * slots + slot
        heappush(waiting, (load + weight, rank))
        for entry in full:
            heappush(waiting, entry)
    return bins


def _dealt_whole(weights: np.ndarray, home: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """The same with the micro-batches of `home` as they are."""
    _, first, names = np.unique(home, return_index=True, return_inverse=True)
    loads = np.bincount(names, weights=weights).astype(np.int64)
    order = np.lexsort((first, -loads))
    ones = np.ones(len(order), dtype=np.int64)
    places = _longest_first(ones, loads[order], 1, ranks, slots)
    assert places is not None, "there are as many places as micro-batches"
    place = np.empty(len(order), dtype=np.int64)
    place[order] = places
    return place[names]


@dataclass
class _Sums:
    """Tokens and weights of the first 0, 1, ... n of a micro-batch's n units, in several orders, end to end."""

    orders: np.ndarray  # [R, n] int64, units
    tokens: np.ndarray  # [R * (n + 1)] int64
    weights: np.ndarray  # [R * (n + 1)] int64

    def units(self, at: int) -> np.ndarray:
        """The units that sum number `at` is of."""
        order, count = divmod(at, self.orders.shape[1] + 1)
        return self.orders[order, :count]


def _sums(units: np.ndarray, keys: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> _Sums:
    count = min(max(_SUMS // (len(units) + 1), 2), _ORDERS)
    orders = units[np.argsort(keys[:count, units], axis=1, kind="stable")]
    made = np.zeros((2, count, len(units) + 1), dtype=np.int64)
    np.cumsum(tokens[orders], axis=1, out=made[0, :, 1:])
    np.cumsum(weights[orders], axis=1, out=made[1, :, 1:])
    return _Sums(orders, made[0].reshape(-1), made[1].reshape(-1))


def _meeting(ours: _Sums, theirs: _Sums, our_room: int, their_room: int, wanted: int) -> tuple[int, int, int] | None:
    """Numbers of the sums of ours and theirs to exchange, and the weight that goes over: as near to `wanted` as found.

    None where nothing found is nearer than no exchange.
    """
    rising = np.argsort(theirs.tokens, kind="stable")
    sizes = theirs.tokens[rising]
    first = np.searchsorted(sizes, ours.tokens - their_room)
    nearest, best = wanted, None
    for step in range(3):  # of those that fit
        at = np.minimum(first + step, len(sizes) - 1)
        gain = sizes[at] - ours.tokens
        off = np.abs(ours.weights - theirs.weights[rising[at]] - wanted)
        off[(gain > our_room) | (gain < -their_room)] = wanted
        found = int(np.argmin(off))
        if off[found] < nearest:
            nearest, best = int(off[found]), (found, int(rising[at[found]]))
    if best is None:
        return None
    return best[0], best[1], int(ours.weights[best[0]] - theirs.weights[best[1]])


def _exchanged(
    bins: np.ndarray, tokens: np.ndarray, weights: np.ndarray, cap: int, ranks: int, slots: int
) -> np.ndarray:
    """`bins` after exchanges between the busiest rank and idle ones. No micro-batch comes to have more than `cap`."""
    bins, count = bins.copy(), ranks * slots
    rooms = cap - np.bincount(bins, weights=tokens, minlength=count).astype(np.int64)
    loads = np.bincount(bins, weights=weights, minlength=count).astype(np.int64)
    mean = int(loads.sum()) // ranks
    keys = np.random.default_rng(0).random((_ORDERS, len(bins)))
    known: dict[int, _Sums] = {}

    def sums(number: int) -> _Sums:
        if number not in known:
            known[number] = _sums(np.flatnonzero(bins == number), keys, tokens, weights)
        return known[number]

    for _ in range(min(8 * ranks, 256)):
        totals = loads.reshape(ranks, slots).sum(axis=1)
        busy = int(np.argmax(totals))
        if totals[busy] <= _CLOSE * mean:
            break
        best = None
        for idle in np.argsort(totals, kind="stable")[:_IDLEST].tolist():
            wanted = int(min(totals[busy] - mean, (totals[busy] - totals[idle]) // 2))
            for p, q in _pairs(loads, busy * slots, idle * slots, slots) if wanted > 0 else []:
                met = _meeting(sums(p), sums(q), int(rooms[p]), int(rooms[q]), wanted)
                if met is not None and (best is None or abs(met[2] - wanted) < best[0]):
                    best = abs(met[2] - wanted), p, q, met
                if best is not None and best[0] < wanted // 5:
                    break
            if best is not None and best[0] < wanted - wanted // 10:
                break
            best = None
        if best is None:
            break
        _, p, q, (ours, theirs, moved) = best
        given, taken = sums(p).units(ours), sums(q).units(theirs)
        size = int(tokens[given].sum() - tokens[taken].sum())
        bins[given], bins[taken] = q, p
        rooms[p], rooms[q], loads[p], loads[q] = rooms[p] + size, rooms[q] - size, loads[p] - moved, loads[q] + moved
        del known[p], known[q]
    return bins


def _pairs(loads: np.ndarray, ours: int, theirs: int, slots: int) -> list[tuple[int, int]]:
    """Micro-batches of two ranks (the numbers of their first are given), those that differ most before others."""
    every = [(ours + p, theirs + q) for p in range(slots) for q in range(slots)]
    return sorted(every, key=lambda pair: loads[pair[1]] - loads[pair[0]])[:_PAIRS]


def _busiest(bins: np.ndarray, weights: np.ndarray, ranks: int, slots: int) -> float:
    return float(np.bincount(bins // slots, weights=weights, minlength=ranks).max())


def _by_rank(bins: np.ndarray, weights: np.ndarray, ranks: int, slots: int) -> list[list[np.ndarray]]:
    """The units of each micro-batch of each rank, the heaviest micro-batch first."""
    loads = np.bincount(bins, weights=weights, minlength=ranks * slots).reshape(ranks, slots)
    order = np.argsort(bins, kind="stable")
    starts = np.searchsorted(bins[order], np.arange(ranks * slots + 1))
    parts = []
    for rank in range(ranks):
        numbers = rank * slots + np.argsort(-loads[rank], kind="stable")
        parts.append([order[starts[n] : starts[n + 1]] for n in numbers.tolist()])
    return parts
