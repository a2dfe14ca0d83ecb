"""burnish.kernels: tensors in, tensors out. Every op has a plain definition, a CPU path and Triton kernels.

Public ops are loaded on first use, so that importing this package costs torch and nothing more.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # to a type checker these names would be the files of the same name
    from burnish.kernels.add_rms_norm import add_rms_norm as add_rms_norm
    from burnish.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from burnish.kernels.linear_logprob import linear_logprob as linear_logprob
    from burnish.kernels.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from burnish.kernels.rms_norm import rms_norm as rms_norm
    from burnish.kernels.rope import rope as rope

_HOME = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "add_rms_norm",
    "rope": "rope",
    "qk_norm_rope": "qk_norm_rope",
    "swiglu": "glu",
    "geglu": "glu",
    "glu_linear": "glu",
    "linear_logprob": "linear_logprob",
    "linear_cross_entropy": "linear_cross_entropy",
    "lora_linear": "lora",
    "lora_linears": "lora",
    "varlen_attention": "attention",
    "use": "dispatch",
    "backend_for": "dispatch",
}
__all__ = list(_HOME)
__version__ = "0.0.0"  # read by whoever finds this folder under the bare name `kernels`: older than any real release


class _Ops(ModuleType):
    """This package. Some ops share their file's name, and importing a file binds it here, over the op: undo that."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Ops


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"burnish.kernels.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stand_aside() -> None:
    """Give the bare name `kernels` back to Hugging Face's package of that name, where it is installed.

    Python started in this repository's root finds this folder first; transformers then imports it by that name.
    """
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p or ".").resolve() != here])
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)


if __name__ == "kernels":
    _stand_aside()
