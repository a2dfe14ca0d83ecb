"""A GPU that is not there: tensors which say that they lie on one, so that the ops take the way they take on CUDA.

Numbers are real ("cpu": Triton's interpreter runs the kernels) or only shapes are ("meta": sizes that no memory holds;
kernels are recorded, not run). Asking the device for a value raises HostSync. Where a GPU differs from the CPU it is
followed: products of bfloat16 are added up in float32, and kernels round to nearest (the interpreter cuts off).
"""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.overrides import TorchFunctionMode, get_default_nowrap_functions
from triton.runtime import interpreter

from burnish import kernels

CUDA = torch.device("cuda", 0)
MODULES = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
ASKS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "is_nonzero", "cpu", "numpy")
ASKS += ("equal", "allclose", "unique", "masked_select", "bincount", "argwhere")


class HostSync(Exception):
    """The host asked the device for a value."""


class Launch(NamedTuple):
    name: str
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]


class OnGpu(torch.Tensor):
    """Lies on the pretended device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, "cpu")


def to_gpu(x: torch.Tensor) -> OnGpu:
    return x.detach().as_subclass(OnGpu).requires_grad_(x.requires_grad)


def plain(x: Any) -> Any:
    return x.as_subclass(torch.Tensor) if isinstance(x, OnGpu) else x


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _call(func, args: tuple, kwargs: dict, home: str) -> Any:
    name = getattr(func, "__name__", "")
    ours = any(isinstance(t, OnGpu) for t in _tensors((*args, *kwargs.values())))
    if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
        return ours
    if func == torch.Tensor.device.__get__ and ours:  # type: ignore[attr-defined]
        return CUDA
    if ours and name in ASKS:
        raise HostSync(f"{name} waits for the device")
    if ours and name == "__getitem__" and any(t.dtype == torch.bool for t in _tensors(args[1:])):
        raise HostSync("a mask as index waits for the device")
    there = ours or any(map(_is_cuda, (*args, *kwargs.values())))
    args = tuple(torch.device(home) if _is_cuda(a) else a for a in args)
    kwargs = {key: torch.device(home) if _is_cuda(value) else value for key, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        if name in ("mm", "addmm", "addmm_") and any(t.dtype == torch.bfloat16 for t in _tensors(args)):
            result = _product(name, args, kwargs)
        else:
            result = func(*args, **kwargs)
    return _wrapped(result) if there and func not in get_default_nowrap_functions() else result


def _product(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """mm(a, b) or addmm(total, a, b) of bfloat16, added up in float32 and rounded at most once, at the end."""
    *total, a, b = args
    assert kwargs.get("beta", 1) in (0, 1) and kwargs.get("alpha", 1) == 1
    result = a.float() @ b.float()
    if total and kwargs.get("beta", 1):
        result += total[0]
    out = total[0] if name == "addmm_" else kwargs.get("out")
    wanted = kwargs.get("out_dtype", a.dtype)
    assert out is None or out.dtype == wanted
    return result.to(wanted) if out is None else out.copy_(result)


def _wrapped(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result if isinstance(result, OnGpu) else result.as_subclass(OnGpu)
    if isinstance(result, (tuple, list)):
        values = [_wrapped(value) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return result


class _Mode(TorchFunctionMode):
    def __init__(self, home: str):
        super().__init__()
        self.home = home

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, self.home)


class _Kernel:
    """Stands for a kernel: notes the launch and runs it in the interpreter, or not."""

    def __init__(self, kernel, launches: list[Launch], run: bool):
        self.kernel, self.launches, self.run = kernel, launches, run

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(Launch(self.kernel.__name__, tuple(grid), args, options))
            if self.run:
                with torch._C.DisableTorchFunction():
                    self.kernel[grid](*map(plain, args), **options)

        return launch


class _Context:
    """An autograd context whose saved tensors lie on the pretended device, as they did when they were saved."""

    def __init__(self, inner):
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        return tuple(map(_wrapped, value)) if name == "saved_tensors" else value

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)


def _given_back(backward, home: str):
    """autograd hands plain tensors to a backward, where a GPU's would stay there, and runs it with dispatch off."""

    def run(ctx, *grads):
        with torch._C._EnableTorchFunction(), _Mode(home):
            return tuple(map(plain, backward(_Context(ctx), *map(_wrapped, grads))))

    return staticmethod(run)


def _is_function(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


_convert_float = interpreter._convert_float


def _to_nearest(data, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, mode)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


@contextmanager
def pretended(home: str = "cpu", processors: int = 3) -> Iterator[list[Launch]]:
    """Inside, device "cuda" means `home`, "cpu" or "meta"; yields the list of kernel launches, growing."""
    launches: list[Launch] = []
    with ExitStack() as stack:

        def patch(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(torch.cuda, "device_of", lambda x: nullcontext())
        patch(interpreter, "_convert_float", _to_nearest)
        for module in (importlib.import_module(f"burnish.kernels.{name}") for name in MODULES):
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch(module, name, _Kernel(value, launches, home == "cpu"))
                elif name == "processors":
                    patch(module, name, lambda device: processors)
                elif _is_function(value) and value.__module__ == module.__name__:
                    patch(value, "backward", _given_back(value.backward, home))
        with _Mode(home):
            yield launches
