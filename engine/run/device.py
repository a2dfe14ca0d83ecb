"""Which device a run uses, in which dtype it computes, and what of both a log should say."""

import ctypes
import importlib.metadata
import os
from typing import Any

import torch

from burnish.config.errors import UserError
from burnish.parallel.world import started


def device_for(config: Any) -> torch.device:
    """CUDA where there is one and use_cpu doesn't forbid it: of several processes on a machine each has its own."""
    if config.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if not started():
        return torch.device("cuda")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"process {number} of this machine has no GPU, there are {there}",
            where="nproc",
            mend=f"Start {there} processes a machine",
        )
    return torch.device("cuda", number)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads"


def compute_dtype(config: Any, device: torch.device) -> torch.dtype:
    """What a float32 model computes in: bfloat16 when asked for (on CUDA by default), else float32."""
    bf16 = config.bf16 if config.bf16 is not None else device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks instead of handing them back to the kernel; False where that isn't possible.

    A training step frees and takes gigabytes. Page by page from the kernel that cost 1.3 times the whole step
    (SmolLM2-135M, batch 4, 2 cores); the peak of memory stayed the same.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    never_mmap, keep_top = set_option(-4, 0), set_option(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(never_mmap and keep_top)


def versions() -> str:
    """What the figures of this run depend on, for log.txt."""
    names = ("burnish", "torch", "triton", "transformers", "datasets", "peft", "safetensors")
    found = {name: _version(name) for name in names}
    return "  ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
