"""What a call of the linear head costs: operations and peak bytes, from shapes alone, before anything is allocated.

For planners and benchmarks. It follows `head_chunks.sweep` and its steps buffer by buffer; the tests hold it against
operations counted and peaks measured on the CPU.
"""

from typing import NamedTuple

import torch

from burnish.kernels.head_chunks import CAST_TILE, chunks_to_keep, rows_per_chunk
from burnish.kernels.head_rows import BLOCK_ELEMENTS

COLUMNS, BLOCK = 16384, 4096  # head_triton's, which imports Triton
ROW_BYTES = 96  # sums, losses and factors of a row


class Cost(NamedTuple):
    """flops: multiplications and additions of the GEMMs. peak_bytes: the most that is allocated at once beside hidden
    states, weight, bias and labels, forward or backward, returned gradients included. kept_bytes: what stays from the
    forward to the backward."""

    flops: int
    peak_bytes: int
    kept_bytes: int


def head_cost(
    n: int,
    hidden: int,
    vocab: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    needs: tuple[bool, bool] = (True, True),
    known: bool = True,
    softcap: bool = False,
    keep_bytes: int | None = None,
) -> Cost:
    """Cost of the loss or log-probs of n rows that have a target, with gradients of (hidden states, weight) by `needs`.

    dtype   of hidden states and weight alike
    known   linear_cross_entropy as a mean or sum, whose gradients are made in the forward; else linear_logprob, with
            its `keep_bytes`, whose upstream gradients come with the backward
    Not counted: a bias, smoothing under a softcap, and entropies that are differentiated.
    """
    cuda, unit = device.type != "cpu", n * hidden * vocab
    work = 2 if cuda and dtype == torch.bfloat16 else 4
    rows = rows_per_chunk(n, hidden, vocab, device)
    cast = work != dtype.itemsize
    scratch = min(CAST_TILE, vocab) * hidden * work * cast  # of the weight
    narrow = rows * hidden * work * cast  # the rows in the GEMMs' dtype
    measuring = _logits(rows, vocab, cuda, softcap and any(needs)) + scratch + narrow + n * ROW_BYTES
    exps = rows * (-(-vocab // 64) * 64 if cuda else vocab) * work
    if not any(needs):
        return Cost(2 * unit, measuring + (0 if cuda else exps), 0)
    dx = n * hidden * dtype.itemsize * needs[0]
    one_chunk = n <= rows and not cast
    dw = vocab * hidden * (dtype.itemsize if one_chunk else 4) * needs[1]
    final = vocab * hidden * dtype.itemsize * needs[1] * (dw > 0 and not one_chunk and dtype.itemsize != 4)
    scaling = rows * hidden * (work + (4 if work != 4 else 0))  # the rows times their factors
    adding = rows * hidden * 4 * (dtype.itemsize != 4) * needs[0] + scaling + narrow + n * ROW_BYTES
    both = 2 * unit * sum(needs)
    if known or needs == (True, False):
        forward = measuring + exps + adding + dx + dw
        late = dx + dw + final if known else dx + n * hidden * (4 + dtype.itemsize * (dtype.itemsize != 4))
        return Cost(2 * unit + both, max(forward, late), dx + (dw if known else 0) + n * ROW_BYTES)
    chunks = chunks_to_keep(n, hidden, vocab, device, dtype if work == 2 else torch.float32, keep_bytes)
    held = min(chunks * rows, n)
    kept = held * (exps // rows)
    again = measuring + exps if held < n else 0
    forward = kept + (measuring if held == n else again)
    backward = kept + max(again, scratch) + adding + dx + dw
    flops = 2 * unit + both + 2 * (n - held) * hidden * vocab
    left = kept + n * ROW_BYTES
    return Cost(flops, max(forward, backward, left + dx + dw + final), left)


def _logits(rows: int, vocab: int, cuda: bool, slopes: bool) -> int:
    """What a step holds beside E: a tile of logits and its partial sums, or a block of exponentials and slopes."""
    if not cuda:
        return min(rows, max(1, BLOCK_ELEMENTS // vocab)) * vocab * 4 * (1 + slopes)
    return rows * (4 * min(COLUMNS, vocab) + 6 * 4 * -(-vocab // BLOCK))
