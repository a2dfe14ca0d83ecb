"""Packs against the naive best fit, token by token, on random lengths; TRL's verified results; nothing lost."""

import random

import numpy as np
import pytest

from burnish.config.errors import UserError
from burnish.data.packing import pack, whole_rows


def tokens_of(rows, packs):
    return [[row_token for e, a, b in packed for row_token in rows[e][a:b]] for packed in packs]


def pieces_of(packs):
    return [[b - a for _, a, b in packed] for packed in packs]


@pytest.mark.parametrize(
    ("rows", "length", "strategy", "expected", "sizes"),
    [
        ([[1, 2, 3], [4, 5, 6, 7], [8], [9, 9]], 4, "bfd", [[4, 5, 6, 7], [1, 2, 3, 8], [9, 9]], [[4], [3, 1], [2]]),
        ([[10, 10], [20, 20], [30, 30], [40, 40]], 4, "bfd", [[10, 10, 20, 20], [30, 30, 40, 40]], [[2, 2], [2, 2]]),
        (
            [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]],
            4,
            "bfd_split",
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]],
            [[4], [4], [2, 1, 1]],
        ),
        (
            [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]],
            5,
            "bfd_split",
            [[1, 2, 3, 4, 5], [7, 8, 9, 10, 6], [11, 12, 13]],
            [[5], [4, 1], [3]],
        ),
        ([[], [1, 2], [], [3, 4, 5, 6]], 4, "bfd", [[3, 4, 5, 6], [1, 2]], [[4], [2]]),
        ([[1, 2, 3, 4, 5], [6, 7]], 4, "bfd", [[1, 2, 3, 4], [6, 7]], [[4], [2]]),
        ([[1, 2, 3], [], [4, 5, 6, 7, 8], [9]], 4, "wrapped", [[1, 2, 3, 4], [5, 6, 7, 8], [9]], [[3, 1], [4], [1]]),
    ],
)  # fmt: skip
def test_known_results(rows, length, strategy, expected, sizes):
    packs = pack(np.array([len(row) for row in rows]), length, strategy)
    assert tokens_of(rows, packs) == expected
    assert pieces_of(packs) == sizes


def naive_best_fit(pieces, capacity):
    """Longest first; of the packs that can hold it the one with the least room; of equals the one whose room has been
    what it is for the longest time; else a new pack."""
    packs, since = [], []
    for clock, piece in enumerate(sorted(pieces, key=lambda p: -(p[2] - p[1]))):
        size = piece[2] - piece[1]
        room = [capacity - sum(b - a for _, a, b in packed) for packed in packs]
        fits = [(room[k], since[k], k) for k in range(len(packs)) if room[k] >= size]
        k = min(fits)[2] if fits else len(packs)
        if k == len(packs):
            packs.append([])
            since.append(0)
        packs[k].append(piece)
        since[k] = clock
    return packs


@pytest.mark.parametrize("seed", range(40))
def test_best_fit_equals_the_naive_one(seed):
    draw = random.Random(seed)
    length = draw.choice([1, 2, 3, 7, 16, 100, 101])
    lengths = [draw.randint(0, draw.choice([length, 3 * length])) for _ in range(draw.randint(0, 60))]
    whole = [(i, 0, min(n, length)) for i, n in enumerate(lengths) if n]
    assert list(pack(lengths, length, "bfd")) == naive_best_fit(whole, length)
    split = [(i, a, min(a + length, n)) for i, n in enumerate(lengths) for a in range(0, n, length)]
    assert list(pack(lengths, length, "bfd_split")) == naive_best_fit(split, length)
    assert list(pack(lengths, length, "bfd", capacity=2 * length)) == naive_best_fit(whole, 2 * length)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", range(15))
def test_nothing_lost_nothing_too_long(strategy, seed):
    draw = random.Random(seed)
    length = draw.randint(1, 50)
    lengths = [draw.randint(0, 2 * length) for _ in range(draw.randint(1, 80))]
    packs = pack(lengths, length, strategy)
    seen = sorted((e, t) for packed in packs for e, a, b in packed for t in range(a, b))
    kept = [min(n, length) if strategy == "bfd" else n for n in lengths]
    assert seen == [(e, t) for e, n in enumerate(kept) for t in range(n)]
    assert all(0 < size <= length for size in packs.tokens)
    half_empty = sum(2 * size <= length for size in packs.tokens)
    assert half_empty <= 1, "two packs at most half full would have become one"
    assert packs.tokens.sum() == sum(kept)


def test_wrapped_fills_every_pack_but_the_last():
    packs = pack([5, 1, 9, 4], 4, "wrapped")
    assert packs.tokens.tolist() == [4, 4, 4, 4, 3]
    assert packs[1] == [(0, 4, 5), (1, 0, 1), (2, 0, 2)]


def test_a_large_set_is_packed_densely():
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5.5, 1, 100_000)), 1, 10_000).astype(int)
    packs = pack(lengths, 8192)
    assert packs.tokens.sum() / (len(packs) * 8192) > 0.999


def test_whole_rows_leaves_out_empty_ones():
    assert list(whole_rows(np.array([2, 0, 3]))) == [[(0, 0, 2)], [(2, 0, 3)]]


def test_refusals():
    with pytest.raises(UserError, match="unknown packing_strategy 'ffd'"):
        pack([1], 4, "ffd")
    with pytest.raises(UserError, match="does not fit into packs of 3"):
        pack([4], 4, "bfd", capacity=3)
    with pytest.raises(UserError, match="at least 1"):
        pack([4], 0)
