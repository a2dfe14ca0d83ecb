"""The flat store of tokenized rows that every batch is cut from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Examples:
    """Tokenized rows, end to end. Row r is `ids[offsets[r]:offsets[r + 1]]`.

    ids      [N] int32    token ids
    trained  [N] bool     token i is a target (means nothing for a row's first token, which no position predicts)
    offsets  [R + 1] int64
    rows     [R] int64    each row's number in the source, for reports

    Preferences have more. Pairs: row 2p is the chosen and row 2p + 1 the rejected of pair p, and `trained` marks their
    completions (nothing where sequences are scored as a whole). Rated completions: `desirable` and `question`.

    paired     the rows are pairs
    prompt     [R] int64    tokens of the row that are its prompt; the rest is its completion
    margin     [R / 2] float32  by how much each chosen is better, where the rows say so
    desirable  [R] bool
    question   [R] int64    equal for rows whose whole prompts, before any cutting, are equal
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    paired: bool = False
    prompt: np.ndarray | None = None
    margin: np.ndarray | None = None
    desirable: np.ndarray | None = None
    question: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:  # [R] int64
        return np.diff(self.offsets)
