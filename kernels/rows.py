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


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """x [..., C] with the addresses of its rows; a copy of x where its strides do not fit (C strided, three levels)."""
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return x.contiguous(), Rows(1, x.shape[-1], 0)
    if len(levels) == 2:
        return x, Rows(levels[1][0], levels[0][1], levels[1][1])
    return x, Rows(1, levels[0][1] if levels else 0, 0)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; 1 in the interpreter, where programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
