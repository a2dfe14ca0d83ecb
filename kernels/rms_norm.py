"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension (Zhang and Sennrich, 2019).

Both paths keep x and one float32 number a row (rstd) for backward, nothing else. With n = x * rstd and
s = offset + weight: dx = rstd * (s*dy - n * mean(s*dy*n)) and ds = sum over rows of dy*n.
"""

from typing import Any

import torch
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once
from burnish.kernels.rms_norm_triton import backward_triton, forward_triton

CASTS = ("llama", "gemma")


def rms_norm_definition(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama"
) -> Tensor:
    """The op in plain torch, in any floating type; see `rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "llama":
        return _scale(weight, offset) * normed.to(x.dtype)
    return (normed * _scale(weight.to(wide), offset)).to(x.dtype)


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight + offset if offset else weight


def forward_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As forward_triton; the definition's arithmetic, step for step: bit for bit what transformers' modules give."""
    x = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    y = torch.mul(x_wide, x_wide)
    rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
    torch.mul(x_wide, rstd, out=y)
    if weight is not None and cast == "gemma":
        y.mul_(_scale(weight.to(wide), offset))
    y = y.to(x.dtype)
    if weight is not None and cast == "llama":
        scale = _scale(weight, offset)
        y = y.mul_(scale) if torch.promote_types(y.dtype, scale.dtype) == y.dtype else y * scale
    return y, x, rstd


def backward_torch(
    grad: Tensor,
    onto: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As backward_triton, in one buffer of x's size. Both sums are products with vectors:

    dW = rstd @ (dy*x), mean = (dy*x) @ scale.
    """
    width = x.shape[-1]
    x_rows = x.to(rstd.dtype).reshape(-1, width)  # [N, H]
    dy = grad.to(rstd.dtype).reshape(-1, width)
    rstd = rstd.reshape(-1, 1)  # [N, 1]
    buffer = dy * x_rows
    dw = torch.mm(rstd.t(), buffer)[0].to(weight.dtype) if weight is not None and needs[1] else None
    if not needs[0]:
        return None, dw
    if weight is None:
        mean = buffer.sum(-1, keepdim=True)
    else:
        scale = _scale(weight if cast == "llama" else weight.to(rstd.dtype), offset).to(rstd.dtype)
        mean = torch.mv(buffer, scale).unsqueeze(1)
    mean.mul_(rstd).mul_(rstd).div_(-width)
    torch.mul(x_rows, mean, out=buffer)
    if weight is None:
        buffer.add_(dy)
    else:
        buffer.addcmul_(dy, scale)
    buffer.mul_(rstd)
    if onto is not None:
        buffer.add_(onto.to(rstd.dtype).reshape(-1, width))
    return buffer.to(x.dtype).view(x.shape), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, backend: str
    ) -> Tensor:
        run = forward_triton if backend == "triton" else forward_torch
        y, _, rstd = run(x, None, weight, eps, offset, cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast, ctx.backend = offset, cast, backend
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = backward_triton if ctx.backend == "triton" else backward_torch
        x, weight, rstd = ctx.saved_tensors
        dx, dw = run(grad, None, x, weight, rstd, ctx.offset, ctx.cast, ctx.needs_input_grad[:2])
        return dx, dw, None, None, None, None


def check(op: str, x: Tensor, weight: Tensor | None, cast: str) -> None:
    """Raises ValueError, in the name of `op`, where x and weight can't be normed."""
    if cast not in CASTS:
        raise ValueError(f"{op}: unknown cast {cast!r}, use one of {', '.join(CASTS)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x needs a last dimension that is not empty, got shape {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama") -> Tensor:
    """Root-mean-square norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    x       [..., H] of any strides; float32, bfloat16 or float16 (float64 outside Triton)
    weight  [H], of any of these types, or None for a norm without a scale (offset is then ignored)
    eps     added to the mean of squares
    offset  added to the weight: 1.0 for Gemma's norms, which store weight - 1
    cast    where the result is rounded when x is narrower than float32.
            "llama": x * rstd is rounded to x's type, then multiplied; the result has the type to which torch
            promotes weight and x (transformers' LlamaRMSNorm, Qwen2, Mistral, ...).
            "gemma": everything in float32, rounded to x's type once, at the end (Gemma2RMSNorm with offset 1;
            Olmo2RMSNorm with offset 0).

    Returns [..., H]. On the CPU the result equals transformers' modules bit for bit. Gradients flow to x and weight,
    each computed only where it is needed, accumulated in float32 (float64 for float64) in a fixed order. Saved for
    backward: x itself, and rstd, one number a row. The gradient can't be differentiated again.
    Moves on a GPU, an element: forward 2 (reads x, writes the result), backward 3 (reads x and the gradient, writes
    dx), which is the minimum; rstd (4 bytes a row) and dW's partial rows come on top.
    Raises ValueError for an unknown cast, an empty last dimension, or a weight that is not [H].
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the gradient is derived above.
    """
    check("rms_norm", x, weight, cast)
    backend = backend_for(x)
    if backend == "reference":
        return rms_norm_definition(x, weight, eps, offset=offset, cast=cast)
    return _RMSNorm.apply(x, weight, eps, offset, cast, backend)
