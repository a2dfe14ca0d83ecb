"""`burnish env`: what is installed, what the device is, and which kernels would run. Loads no model."""

import importlib.metadata
import os
import platform
from importlib.util import find_spec

PACKAGES = ("torch", "triton", "transformers", "datasets", "peft", "safetensors", "tokenizers", "numpy")
ATTENTION = {"flash-attn 4": "flash_attn.cute", "flash-attn 2": "flash_attn.flash_attn_interface"}


def env() -> str:
    """One fact a line: topic, then value."""
    import burnish

    lines = [("burnish", burnish.__version__), ("python", platform.python_version()), ("system", platform.platform())]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += _device()
    lines += [(name, "importable" if _importable(module) else "not installed") for name, module in ATTENTION.items()]
    varlen = _importable("torch.nn.attention.varlen")
    lines += [("varlen_attn", "importable" if varlen else "not in this torch")]
    return "\n".join(f"{topic:<14}{value}" for topic, value in lines)


def _device() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        ops = "triton, interpreted (slow; for tests)" if interpreted else "torch (hand-written CPU path)"
        return [("device", f"cpu, {torch.get_num_threads()} threads"), ("kernels", ops)]
    place = torch.cuda.get_device_properties(0)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    memory = f"{place.total_memory / 2**30:.0f} GiB"
    target = place.gcnArchName if torch.version.hip else f"sm_{place.major}{place.minor}"
    count = torch.cuda.device_count()
    return [
        ("device", f"{place.name}, {memory}, {target}" + f" ({count} of them, one is used)" * (count > 1)),
        ("runtime", runtime),
        ("kernels", "triton"),
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
