"""Rates of the device at hand: matrix products, attention, copies in its memory and to the host. Under 20 seconds.

Inputs are random numbers: a card multiplies zeros a tenth faster. Each rate is the median of repeated runs after one
that warms up. On the CPU everything is small, and "the host" is another place in the same memory.
"""

import statistics
import time
from collections.abc import Callable

import torch

from burnish.kernels import varlen_attention
from burnish.memory.time import BACKWARD_ATTENTION, Card, Rates

SECONDS = 3.0  # for each of five rates, preparation included


def probe(device: torch.device, *, seconds: float = SECONDS) -> Rates:
    """Measured rates of `device`, each within `seconds`."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    size, tokens, heads, length = (8192, 16384, 32, 1 << 30) if cuda else (384, 512, 4, 1 << 23)
    linear = _products(size, dtype, device, seconds)
    attention = _attention(tokens, heads, dtype, device, seconds)
    source, target = (torch.empty(length, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    memory = 2.0 * length / _time(lambda: target.copy_(source), device, seconds)
    host = torch.empty(length, dtype=torch.uint8, pin_memory=cuda)
    to_host = length / _time(lambda: host.copy_(source, non_blocking=True), device, seconds)
    from_host = length / _time(lambda: target.copy_(host, non_blocking=True), device, seconds)
    return Rates(linear, attention, memory, to_host, from_host, "measured here")


def _products(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations a second of a square matrix product."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / _time(lambda: a @ b, device, seconds)


def _attention(tokens: int, heads: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations a second of one causal document, forward and backward together."""
    q, k, v = (torch.randn(tokens, heads, 128, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    edges = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    upstream = torch.randn_like(q)

    def once() -> None:
        out = varlen_attention(q, k, v, edges, tokens)
        torch.autograd.grad(out, (q, k, v), upstream)

    forward = 4.0 * heads * 128 * tokens**2 / 2
    return forward * (1 + BACKWARD_ATTENTION) / _time(once, device, seconds)


def _time(run: Callable[[], object], device: torch.device, limit: float) -> float:
    """Median seconds of `run`: at least three times, then until the limit."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    began = time.perf_counter()
    run()
    wait()
    spans: list[float] = []
    while len(spans) < 3 or (time.perf_counter() - began < limit and len(spans) < 50):
        start = time.perf_counter()
        run()
        wait()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)


def here(device: torch.device, *, seconds: float = SECONDS) -> Card:
    """The card at hand with measured rates; for the CPU, this machine and its memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Card(properties.name, float(properties.total_memory), probe(device, seconds=seconds))
    return Card("this machine", host_memory(), probe(device, seconds=seconds))


def host_memory() -> float:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    import os

    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(name, encoding="ascii") as file:
                total = min(total, float(file.read()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return total
