"""A residual added and the sum normed, in one pass: total = x + residual, normed = rms_norm(total).

The step between attention and MLP of every prenorm decoder layer. Backward is one pass as well: with n = total * rstd
and s = offset + weight, the gradient that reaches both x and residual is
    d = d_total + rstd * (s*d_normed - n * mean(s*d_normed*n))
The kernels are rms_norm's, with a second tensor to add on the way in (residual) and on the way out (d_total).
"""

from typing import Any

import torch
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once
from burnish.kernels.rms_norm import backward_torch, check, forward_torch, rms_norm_definition
from burnish.kernels.rms_norm_triton import backward_triton, forward_triton


def add_rms_norm_definition(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, in any floating type; see `add_rms_norm`."""
    total = x + residual
    return rms_norm_definition(total, weight, eps, offset=offset, cast=cast), total


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float,
        cast: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # an output that nobody used costs no pass over zeros
        run = forward_triton if backend == "triton" else forward_torch
        normed, total, rstd = run(x, residual, weight, eps, offset, cast)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.cast, ctx.backend = offset, cast, backend
        ctx.types = x.dtype, residual.dtype
        return normed, total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_normed: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        dx, dweight = d_total, None
        if d_normed is not None:
            run = backward_triton if ctx.backend == "triton" else backward_torch
            total, weight, rstd = ctx.saved_tensors
            needs = (needs_x or needs_residual, needs_weight)
            dx, dweight = run(d_normed, d_total, total, weight, rstd, ctx.offset, ctx.cast, needs)
        dx, dresidual = (
            dx.to(dtype) if dx is not None and need else None
            for dtype, need in zip(ctx.types, (needs_x, needs_residual), strict=True)
        )
        return dx, dresidual, dweight, None, None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Add a residual and norm the sum: total = x + residual, normed = rms_norm(total, weight, eps).

    x         [..., H] of any strides; float32, bfloat16 or float16 (float64 outside Triton)
    residual  [..., H], the same shape, of any strides
    weight, eps, offset, cast  as for `rms_norm`

    Returns (normed, total), both [..., H]. total is rounded to the type to which torch promotes x and residual before
    it is normed; normed has rms_norm's type for such a total. On the CPU both equal the two steps bit for bit.
    Gradients flow through both outputs to x, residual and weight, each computed only where it is needed, in float32
    (float64 for float64), rounded once; x's and residual's are one tensor where their types are one. They can't be
    differentiated again. Saved for backward: total, and rstd, one number a row.
    Moves on a GPU, an element: forward 4 (reads x and residual, writes total and normed), backward 4 (reads d_normed,
    d_total and total, writes the gradient), which is the minimum.
    Raises ValueError where the shapes do not fit, and as rms_norm does.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the gradient is derived above.
    """
    check("add_rms_norm", x, weight, cast)
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x and residual must have one shape, got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    backend = backend_for(residual if residual.dtype == torch.float64 else x)
    if backend == "reference":
        return add_rms_norm_definition(x, residual, weight, eps, offset=offset, cast=cast)
    return _AddRMSNorm.apply(x, residual, weight, eps, offset, cast, backend)
