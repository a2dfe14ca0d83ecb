"""Hold rows out of a training set for evaluation. What was made of one row (a pair) stays together, as do copies."""

import hashlib

import numpy as np

from burnish.config.errors import UserError
from burnish.data.batch import Examples


def hold_out(examples: Examples, size: float, seed: int) -> tuple[Examples, Examples]:
    """(training rows, held-out rows): `size` rows, or below 1 that share of them, drawn by `seed`, in their old order.

    Rows are those of the source: both sequences that a pair was made into go the same way. So do rows of the same
    tokens, else a text would be judged by its copy; where such rows don't fit into `size`, the next ones are taken.
    Raises UserError where nothing would be left on one side.
    """
    starts = np.diff(examples.rows, prepend=examples.rows[0] - 1) != 0  # an example of another row than the one before
    row = np.cumsum(starts) - 1  # [R]
    total = int(row[-1]) + 1
    count = round(total * size) if size < 1 else int(size)
    if not 0 < count < total:
        raise UserError(
            f"test_split_size {size:g} of {total} rows leaves nothing to {'train' if count else 'evaluate'} on",
            where="test_split_size",
            mend="Choose another size",
        )
    copies = _copies(examples, np.append(np.flatnonzero(starts), len(examples)))
    held = np.zeros(total, dtype=bool)
    left = count
    for number in np.random.default_rng(seed).permutation(len(copies)).tolist():
        if len(copies[number]) <= left:
            held[copies[number]] = True
            left -= len(copies[number])
    if left == count:
        raise UserError(
            f"test_split_size {size:g}: every row has more copies than are to be held out, and copies stay together",
            where="test_split_size",
            mend="Take the copies out of the data or choose a larger size",
        )
    return _picked(examples, np.flatnonzero(~held[row])), _picked(examples, np.flatnonzero(held[row]))


def _copies(examples: Examples, edges: np.ndarray) -> list[list[int]]:
    """Rows by what they say. Row r was made into the examples edges[r] to edges[r + 1]."""
    found: dict[bytes, list[int]] = {}
    for row, (first, last) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        at, to = examples.offsets[first], examples.offsets[last]
        digest = hashlib.blake2b(np.ascontiguousarray(examples.ids[at:to]).data, digest_size=16)
        found.setdefault(digest.digest(), []).append(row)
    return list(found.values())


def _picked(examples: Examples, numbers: np.ndarray) -> Examples:
    spans = [slice(examples.offsets[n], examples.offsets[n + 1]) for n in numbers]
    offsets = np.zeros(len(numbers) + 1, dtype=np.int64)
    np.cumsum(examples.lengths[numbers], out=offsets[1:])

    def picked(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[numbers]

    return Examples(
        ids=np.concatenate([examples.ids[span] for span in spans]),
        trained=np.concatenate([examples.trained[span] for span in spans]),
        offsets=offsets,
        rows=examples.rows[numbers],
        paired=examples.paired,
        prompt=picked(examples.prompt),
        margin=None if examples.margin is None else examples.margin[numbers[::2] // 2],
        desirable=picked(examples.desirable),
        question=picked(examples.question),
    )
