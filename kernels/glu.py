"""Gated linear units: act(gate) * up, with act = SiLU or GELU (Shazeer, "GLU Variants Improve Transformer", 2020).

Only gate and up are kept for backward, which recomputes the activation and writes both gradients in one pass:
dup = dy * act(gate) and dgate = dy * up * act'(gate).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once
from burnish.kernels.rows import Rows, rows_of

SILU, GELU_TANH, GELU_ERF = "silu", "gelu_tanh", "gelu_erf"
BLOCK = 2048
WARPS = 4
CPU_BLOCK = 131072  # elements a thread handles at a time on the CPU: temporaries stay in its cache


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """The op in plain torch, in any floating type; see `swiglu`."""
    return _definition(gate, up, SILU)


def geglu_definition(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """The op in plain torch, in any floating type; see `geglu`."""
    return _definition(gate, up, GELU_TANH if approximate == "tanh" else GELU_ERF)


def _definition(gate: Tensor, up: Tensor, act: str) -> Tensor:
    out = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(out, torch.float32)
    return (_activate(gate.to(wide), act) * up.to(wide)).to(out)


def _activate(gate: Tensor, act: str) -> Tensor:
    if act == SILU:
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if act == GELU_TANH else "none")


@triton.jit
def _activation(g, ACT: tl.constexpr):
    """act(g) and act'(g). The tanh of GELU is written 1 + tanh(u) = 2 sigmoid(2u), with u = k (g + 0.044715 g^3)."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s + value * (1.0 - s)
    elif ACT == "gelu_tanh":
        # beyond 30 the sigmoid is 0 or 1 in float32, and a cube of the clamped value can't become inf * 0
        t = tl.minimum(tl.maximum(g, -30.0), 30.0)
        s = tl.sigmoid(1.5957691216057308 * t * (1.0 + 0.044715 * t * t))  # 2 k = 2 sqrt(2 / pi)
        value = g * s
        slope = s + t * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * t * t)
    else:
        half = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        value = g * half
        slope = half + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)  # the normal density, 1 / sqrt(2 pi)
    return value, slope


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """This program's row, its columns in it, and which of them exist; every row is cut into blocks of columns."""
    blocks = (width + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, cols, cols < width


@triton.jit
def _load(P, row, cols, mask, inner, outer_stride, inner_stride):
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    return tl.load(P + start + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    G, U, Y, width, g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols, mask = _place(width, BLOCK)
    g = _load(G, row, cols, mask, g_inner, g_outer_stride, g_inner_stride)
    u = _load(U, row, cols, mask, u_inner, u_outer_stride, u_inner_stride)
    value, _ = _activation(g, ACT)
    tl.store(Y + row * width + cols, (value * u).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    DY, G, U, DG, DU, Y, width, dy_inner, dy_outer_stride, dy_inner_stride,
    g_inner, g_outer_stride, g_inner_stride, u_inner, u_outer_stride, u_inner_stride,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DG or DU may be None: that gradient is not wanted. Y, if not None, gets the forward's result, be it over DY."""
    row, cols, mask = _place(width, BLOCK)
    dy = _load(DY, row, cols, mask, dy_inner, dy_outer_stride, dy_inner_stride)
    g = _load(G, row, cols, mask, g_inner, g_outer_stride, g_inner_stride)
    value, slope = _activation(g, ACT)
    if DG is not None or Y is not None:
        u = _load(U, row, cols, mask, u_inner, u_outer_stride, u_inner_stride)
    if DG is not None:
        tl.store(DG + row * width + cols, (dy * u * slope).to(DG.dtype.element_ty), mask=mask)
    if DU is not None:
        tl.store(DU + row * width + cols, (dy * value).to(DU.dtype.element_ty), mask=mask)
    if Y is not None:
        tl.store(Y + row * width + cols, (value * u).to(Y.dtype.element_ty), mask=mask)


def _as_rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """The tensors (of one shape), the row strides of them all in a row, the width of a row and the number of programs.

    Contiguous tensors are one long row, so that narrow ones fill their blocks too.
    """
    numel = tensors[0].numel()
    if all(x.is_contiguous() for x in tensors):
        return list(tensors), list(Rows(1, 0, 0)) * len(tensors), numel, triton.cdiv(numel, BLOCK)
    seen = [rows_of(x) for x in tensors]
    width = tensors[0].shape[-1]
    return (
        [x for x, _ in seen],
        [n for _, rows in seen for n in rows],
        width,
        numel // width * triton.cdiv(width, BLOCK),
    )


def _forward_triton(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if y.numel():
        ins, strides, width, programs = _as_rows(gate, up)
        with torch.cuda.device_of(y):
            _forward_kernel[(programs,)](*ins, y, width, *strides, ACT=act, BLOCK=BLOCK, num_warps=WARPS)
    return y


def _backward_triton(
    grad: Tensor, gate: Tensor, up: Tensor, act: str, needs: tuple[bool, bool], product: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup) where needed; act(gate) * up goes into `product` on the way, which may be `grad` itself."""
    dgate, dup = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((gate, up), needs, strict=True)
    )
    if grad.numel():
        ins, strides, width, programs = _as_rows(grad, gate, up)
        with torch.cuda.device_of(grad):
            _backward_kernel[(programs,)](
                *ins, dgate, dup, product, width, *strides, ACT=act, BLOCK=BLOCK, num_warps=WARPS
            )
    return dgate, dup


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (of one shape), cut alike into pieces whose intermediate results stay in the processor's cache."""
    size = CPU_BLOCK * torch.get_num_threads()
    if all(x.is_contiguous() for x in tensors):
        tensors = tuple(x.view(-1) for x in tensors)
    else:
        width = tensors[0].shape[-1]
        tensors = tuple(x.reshape(-1, width) for x in tensors)
        size = max(1, size // max(width, 1))
    return zip(*(x.split(size) for x in tensors), strict=True)


def _activation_torch(g: Tensor, act: str, slope: bool) -> tuple[Tensor, Tensor | None]:
    """act(g) and, where asked, act'(g), by the kernel's formulas: a sigmoid is far cheaper here than torch's gelu."""
    if act == GELU_ERF:
        half = torch.erf(g * math.sqrt(0.5)).mul_(0.5).add_(0.5)
        value = g * half
        return value, half.addcmul_((g * g).mul_(-0.5).exp_(), g, value=math.sqrt(0.5 / math.pi)) if slope else None
    if act == SILU:
        if not slope:
            return F.silu(g), None
        s = torch.sigmoid(g)
        value = g * s
        return value, s.lerp_(s.new_ones(()), value)  # s + value * (1 - s)
    t = g.clamp(-30.0, 30.0)
    square = t * t
    twice = math.sqrt(8 / math.pi)
    s = (square * (0.044715 * twice)).add_(twice).mul_(t).sigmoid_()
    value = g * s
    if not slope:
        return value, None
    rise = square.mul_(3 * 0.044715 * twice).add_(twice).mul_(t).mul_(s)  # s * d(2u)/dg * g
    return value, s.addcmul_(rise, 1 - s)


def _forward_torch(gate: Tensor, up: Tensor, act: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    wide = torch.promote_types(y.dtype, torch.float32)
    for g, u, out in _blocks(gate, up, y):
        value, _ = _activation_torch(g.to(wide), act, slope=False)
        torch.mul(value, u, out=out)
    return y


def _backward_torch(
    grad: Tensor, gate: Tensor, up: Tensor, act: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    for g, u, dy, dg, du in _blocks(gate, up, grad, dgate, dup):
        value, slope = _activation_torch(g.to(wide), act, slope=needs[0])
        if slope is not None:
            torch.mul(slope.mul_(dy), u, out=dg)
        if needs[1]:
            torch.mul(value, dy, out=du)
    return dgate if needs[0] else None, dup if needs[1] else None


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.backend = act, backend
        run = _forward_triton if backend == "triton" else _forward_torch
        return run(gate, up, act)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_triton if ctx.backend == "triton" else _backward_torch
        gate, up = ctx.saved_tensors
        dgate, dup = run(grad, gate, up, ctx.act, ctx.needs_input_grad[:2])
        return dgate, dup, None, None


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"gate and up must have one shape [..., I], got {tuple(gate.shape)} and {tuple(up.shape)}")
    backend = backend_for(gate)
    if backend == "reference":
        return _definition(gate, up, act)
    return _GatedUnit.apply(gate, up, act, backend)


class _GatedLinear(torch.autograd.Function):
    """The gated unit and the projection after it: the unit's result is made again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, act: str, backend: str):
        ctx.save_for_backward(gate, up, weight)
        ctx.act, ctx.backend = act, backend
        run = _forward_triton if backend == "triton" else _forward_torch
        return F.linear(run(gate, up, act), weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])  # [T, O]
        triton = ctx.backend == "triton"
        dgate = dup = product = None
        if needs[0] or needs[1]:
            dproduct = grad @ weight  # [..., I], ours alone: the kernel may put the unit's result in its place
            if triton and needs[2]:
                product = dproduct
                dgate, dup = _backward_triton(dproduct, gate, up, ctx.act, needs[:2], product)
            else:
                dgate, dup = (_backward_triton if triton else _backward_torch)(dproduct, gate, up, ctx.act, needs[:2])
            del dproduct
        if needs[2] and product is None:
            product = (_forward_triton if triton else _forward_torch)(gate, up, ctx.act)
        dweight = flat.t() @ product.reshape(-1, gate.shape[-1]) if product is not None else None
        dbias = flat.sum(0) if needs[3] else None
        return dgate, dup, dweight, dbias, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(g) = g / (1 + exp(-g)): the gated unit of Llama, Qwen, Mistral and most others.

    gate  [..., I] of any strides (the halves of one fused projection need no copy); float32, bfloat16 or float16
          (float64 outside Triton)
    up    [..., I], the same shape

    Returns [..., I] in the type to which torch promotes the two; the arithmetic is float32 (float64 for float64),
    rounded once. Gradients flow to gate and up, each computed only where it is needed, and can't be differentiated
    again; only gate and up are kept for backward, and never written to.
    Moves on a GPU, an element: forward 3 (two read, one written), backward 5 (three read, two written): the minimum.
    Raises ValueError where the shapes differ.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020; silu'(g) = s + g s (1 - s), s = sigmoid(g).
    """
    return _gated(gate, up, SILU)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up: the gated unit of Gemma.

    gate  [..., I], up  [..., I]: as for `swiglu`
    approximate  "tanh" for g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) or "none" for g/2 (1 + erf(g / sqrt(2)))

    Returns [..., I], with types, gradients and errors as for `swiglu`; ValueError also for another `approximate`.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, 2020.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    return _gated(gate, up, GELU_TANH if approximate == "tanh" else GELU_ERF)


def glu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """linear(act(gate) * up, weight, bias): a gated MLP's last two steps, keeping gate and up only.

    gate, up  [..., I] as for `swiglu`; weight [O, I] and bias [O] of the type of gate and up
    activation  "silu", "gelu_tanh" or "gelu"

    Returns [..., O], equal to the two steps one after the other, gradients too; [..., I] is spared between forward and
    backward and made a second time in backward. On a GPU that costs one write: the pass that makes both gradients (3
    reads and 2 writes an element) writes it too, over the gradient that it has read.
    Under autocast the two steps run one after the other, the projection cast as torch casts it.
    Raises ValueError for shapes that differ and another activation.
    """
    acts = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU_ERF}
    if activation not in acts:
        raise ValueError(f"glu_linear: activation must be one of {', '.join(acts)}, got {activation!r}")
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape [..., I], got {tuple(gate.shape)} and {tuple(up.shape)}")
    backend = backend_for(gate)
    if backend == "reference":
        return F.linear(_definition(gate, up, acts[activation]), weight, bias)
    if torch.is_autocast_enabled(gate.device.type):
        return F.linear(_gated(gate, up, acts[activation]), weight, bias)
    return _GatedLinear.apply(gate, up, weight, bias, acts[activation], backend)
