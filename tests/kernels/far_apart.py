"""Tensors whose rows lie so far apart that their offsets need more than 32 bits, in memory that is never touched."""

import mmap

import torch

NORESERVE = 0x4000  # Linux; in Python's mmap from 3.13 on


def far_apart(x: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy of x [n, ...] whose rows begin `gap` elements apart; the pages between them are reserved, not backed.

    2^32 elements are reserved in front as well: an offset that wraps around finds zeros there, and a test that fails.
    """
    wrapped = 2**32
    size = (wrapped + (x.shape[0] - 1) * gap + x[0].numel()) * x.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    flat = torch.frombuffer(memory, dtype=x.dtype)
    inner = x[0].contiguous().stride()
    return flat.as_strided(x.shape, (gap, *inner), wrapped).copy_(x)
