"""How the row-wise kernels see a tensor of any strides: rows of adjacent elements, addressed by two strides."""

from functools import cache
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Row r of a tensor [..., C] starts at (r // inner) * outer_stride + (r % inner) * inner_stride.

    Two levels hold what models make: activations [B, T, H] and heads [B, T, heads, D] cut from a wider projection.
    """

    inner: int
    outer_stride: int
    inner_stride: int


NO_ROWS = Rows(1, 0, 0)  # of a tensor that is not there


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """x [..., C] with the addresses of its rows; a copy of x where its strides do not fit (C strided, three levels)."""
    rows = _two_levels(x.shape[:-1], x.stride()[:-1])
    if rows is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return x.contiguous(), Rows(1, x.shape[-1], 0)
    return x, rows


def heads_of(x: torch.Tensor) -> tuple[torch.Tensor, Rows, int]:
    """x [..., T, heads, D] with the addresses of its tokens' first heads, and the stride from one head to the next.

    A copy of x where its strides do not fit (D strided, more than two levels of tokens).
    """
    tokens = _two_levels(x.shape[:-2], x.stride()[:-2])
    if tokens is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return x.contiguous(), Rows(1, x.shape[-2] * x.shape[-1], 0), x.shape[-1]
    return x, tokens, x.stride(-2)


def _two_levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> Rows | None:
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    if len(levels) == 2:
        return Rows(levels[1][0], levels[0][1], levels[1][1])
    return Rows(1, levels[0][1] if levels else 0, 0)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; 1 in the interpreter, where programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
