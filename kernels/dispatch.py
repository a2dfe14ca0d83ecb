"""Which implementation of an op runs: one function decides, one context manager overrides.

auto       Triton on CUDA (and ROCm) tensors; on the CPU hand-written torch ("torch"), which saves what the Triton
           path saves and never holds the logits. float64, which no kernel holds, takes "torch" on any device.
reference  the plain definition at the top of each op's file, on any device, differentiated by autograd.
triton     Triton or an error. On the CPU that needs TRITON_INTERPRET=1 in the environment before triton is imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("auto", "reference", "triton")
_choice: ContextVar[str] = ContextVar("burnish_kernels", default="auto")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on `backend`: "auto", "reference" or "triton".

    Raises ValueError for another name. A backend that cannot run on a tensor raises when the op is called.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels.use({backend!r}): unknown backend, use one of {', '.join(BACKENDS)}")
    token = _choice.set(backend)
    try:
        yield
    finally:
        _choice.reset(token)


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


def backend_for(x: torch.Tensor) -> str:
    """The implementation that an op on `x` runs now: "triton", "torch" or "reference"."""
    choice = _choice.get()
    if choice == "reference":
        return "reference"
    if choice == "auto":
        return "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"
    if x.dtype == torch.float64:
        raise ValueError("kernels.use('triton'): the kernels compute in float32, a float64 tensor needs 'auto'")
    if x.is_cuda or interpreting():
        return "triton"
    raise ValueError(
        f"kernels.use('triton'): a tensor on {x.device} needs Triton's interpreter; "
        "set TRITON_INTERPRET=1 before Python starts, or use 'auto'"
    )
