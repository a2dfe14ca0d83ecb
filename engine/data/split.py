"""Hold rows out of a training set for evaluation."""

import numpy as np

from burnish.config.errors import UserError
from burnish.data.batch import Examples


def hold_out(examples: Examples, size: float, seed: int) -> tuple[Examples, Examples]:
    """(training rows, held-out rows): `size` rows, or below 1 that share of them, drawn by `seed`, in their old order.

    Raises UserError where nothing would be left on one side.
    """
    count = round(len(examples) * size) if size < 1 else int(size)
    if not 0 < count < len(examples):
        raise UserError(
            f"test_split_size {size:g} of {len(examples)} rows leaves nothing to {'train' if count else 'evaluate'} on",
            where="test_split_size",
            mend="Choose another size",
        )
    drawn = np.random.default_rng(seed).permutation(len(examples))
    return _rows(examples, np.sort(drawn[count:])), _rows(examples, np.sort(drawn[:count]))


def _rows(examples: Examples, numbers: np.ndarray) -> Examples:
    spans = [slice(examples.offsets[n], examples.offsets[n + 1]) for n in numbers]
    offsets = np.zeros(len(numbers) + 1, dtype=np.int64)
    np.cumsum(examples.lengths[numbers], out=offsets[1:])
    return Examples(
        ids=np.concatenate([examples.ids[span] for span in spans]),
        trained=np.concatenate([examples.trained[span] for span in spans]),
        offsets=offsets,
        rows=examples.rows[numbers],
    )
