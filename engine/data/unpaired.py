"""What rated completions need of a micro-batch: both ratings in it, and completions that belong to other prompts.

KTO (arXiv 2402.01306) estimates how far the policy has moved from log-ratios of completions put after prompts that they
do not belong to, best the completions of the same micro-batch: then the estimate and the rewards speak of the same
texts. The rows of a micro-batch are put in order by their prompts and every prompt takes the completion of the row as
many places back as the commonest prompt has rows: no two rows of one prompt meet, unless that prompt has more than half
of the rows. Those left over take completions from the rows that come next, so that micro-batches of one row, or of one
prompt, have mismatched sequences too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from burnish.config.errors import UserError

if TYPE_CHECKING:
    from burnish.data.batch import Examples


def check_questions(examples: Examples) -> None:
    """Raises UserError where no completion belongs to another prompt."""
    assert examples.question is not None and examples.prompt is not None, "mismatched sequences need rated rows"
    if (examples.question == examples.question[0]).all():
        raise UserError(
            "all rows have the same prompt, and KTO's estimate needs completions of other prompts",
            mend="Use loss_type=apo_zero_unpaired, or rows with other prompts",
        )


def spread(order: np.ndarray, desirable: np.ndarray) -> np.ndarray:
    """`order` [n], rearranged so that every stretch of it holds the two kinds in their overall shares.

    desirable  [n] bool, of each element of `order`; within a kind the order stays
    """
    place = np.empty(len(order))
    for kind in (desirable, ~desirable):
        number = int(kind.sum())
        place[kind] = (np.arange(number) + 0.5) / max(number, 1)
    return order[np.argsort(place, kind="stable")]


def rotated(question: np.ndarray) -> np.ndarray:
    """For each row of a micro-batch the row whose completion it takes: a permutation.  question [n] -> [n]

    Rows of one prompt can meet only where it has more than half of the rows. With all prompts different, row i takes
    the completion of row i - 1.
    """
    _, first, inverse, counts = np.unique(question, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first[inverse], kind="stable")  # rows of one prompt together, prompts as they first come
    taken = np.empty(len(question), dtype=np.int64)
    taken[order] = np.roll(order, counts.max())
    return taken


class Mismatches:
    """The mismatched sequences of an epoch's micro-batches.

    groups      the rows (numbers in `examples`) of each micro-batch
    max_length  sequences are cut to it at the end that `mode` gives up
    tight       the sequences of a micro-batch must not have more tokens than its rows
    """

    def __init__(self, examples: Examples, groups: list[np.ndarray], max_length: int | None, mode: str, *, tight: bool):
        assert examples.question is not None and examples.prompt is not None
        self._groups, self._question, self._prompt = groups, examples.question, examples.prompt
        self._completion = examples.lengths - examples.prompt
        self._limit, self._mode, self._tight = max_length, mode, tight
        self._stream = np.concatenate(groups)  # all rows as they come
        self._ends = np.cumsum([len(group) for group in groups])

    def pieces(self, number: int) -> np.ndarray:
        """For each row of micro-batch `number`, the piece of its prompt and that of the completion.  [n, 2, 3] int64"""
        rows = self._groups[number]
        others = rows[rotated(self._question[rows])]
        lengths = self._completion[others]
        alike = np.flatnonzero(self._question[others] == self._question[rows])
        at = int(self._ends[number])
        for i in alike.tolist():
            others[i], at = self._next(self._question[rows[i]], at)
            own = self._completion[others[i]]
            lengths[i] = min(own, lengths[i]) if self._tight else own
        return self._cut(rows, others, lengths)

    def _next(self, question: int, at: int) -> tuple[int, int]:
        """The first row from place `at` of the epoch on (and around) with another prompt, and the place after it."""
        for place in range(at, at + len(self._stream)):
            row = int(self._stream[place % len(self._stream)])
            if self._question[row] != question:
                return row, place + 1
        return int(np.argmax(self._question != question)), at  # an incomplete micro-batch with the others was dropped

    def _cut(self, rows: np.ndarray, others: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pieces of the prompts of `rows` and of the first `lengths` tokens of the completions of `others`, all [n]."""
        prompt, start = self._prompt[rows], self._prompt[others]
        excess = np.zeros_like(prompt)
        if self._limit is not None:
            excess = np.maximum(prompt + lengths - self._limit, 0)
        pieces = np.stack([rows, np.zeros_like(rows), prompt, others, start, start + lengths], axis=1)
        if self._mode == "keep_start":
            pieces[:, 5] -= excess
        else:
            pieces[:, 1] = np.minimum(excess, prompt)
            pieces[:, 4] += np.maximum(excess - prompt, 0)
        return pieces.reshape(-1, 2, 3)

    def tokens(self, number: int) -> int:
        """Tokens of the mismatched sequences of micro-batch `number`."""
        pieces = self.pieces(number)
        return int((pieces[:, :, 2] - pieces[:, :, 1]).sum())
