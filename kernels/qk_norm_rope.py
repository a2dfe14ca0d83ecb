"""Queries and keys normed head by head and rotated by their positions, in one pass: rms_norm over D, then rope.

What attention with QK-norm (Qwen3, Gemma 3, ...) does between its projections and its scores. With x a head,
n = x * rstd, s = offset + weight and P the rotation of rope.py,
    y = P (n * s)
and backward, with z = P^T dy, is rms_norm's: dx = rstd * (s*z - n * mean(s*z*n)) and ds = sum over heads of z*n.
The Triton path keeps q and k only: backward reads them anyway, and makes rstd again in a reduction that it does anyway.
"""

from typing import Any

import torch
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once
from burnish.kernels.qk_norm_rope_triton import Pair, Settings, backward_triton, forward_triton
from burnish.kernels.rms_norm import backward_torch as norm_backward
from burnish.kernels.rms_norm import check as check_norm
from burnish.kernels.rms_norm import forward_torch as norm_forward
from burnish.kernels.rms_norm import rms_norm_definition
from burnish.kernels.rope import check as check_rope
from burnish.kernels.rope import rope_definition, rotate_torch


def qk_norm_rope_definition(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "llama",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, in any floating type; see `qk_norm_rope`."""
    q = rms_norm_definition(q, q_weight, eps, offset=offset, cast=cast)
    k = rms_norm_definition(k, k_weight, eps, offset=offset, cast=cast)
    return rope_definition(q, k, cos, sin, interleaved=interleaved)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        settings: Settings,
        backend: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing
        ctx.settings, ctx.backend = settings, backend
        rstds: tuple[Tensor, ...] = ()
        if backend == "triton":
            outs = forward_triton(q, k, (q_weight, k_weight), cos, sin, settings)
        else:
            eps, offset, cast, interleaved = settings
            q_normed, _, q_rstd = norm_forward(q, None, q_weight, eps, offset, cast)
            k_normed, _, k_rstd = norm_forward(k, None, k_weight, eps, offset, cast)
            outs = rotate_torch(q_normed, k_normed, cos, sin, interleaved, False)
            rstds = q_rstd, k_rstd
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, *rstds)
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        dq = dq if needs[0] or needs[2] else None
        dk = dk if needs[1] or needs[3] else None
        if dq is None and dk is None:
            return (None,) * 8
        q, k, q_weight, k_weight, cos, sin, *rstds = ctx.saved_tensors
        if ctx.backend == "triton":
            grads = backward_triton((dq, dk), q, k, (q_weight, k_weight), cos, sin, ctx.settings, needs)
        else:
            grads = _backward_torch((dq, dk), (q, k), (q_weight, k_weight), cos, sin, rstds, ctx.settings, needs)
        return *grads, None, None, None, None


def _backward_torch(
    grads: Pair,
    xs: tuple[Tensor, Tensor],
    weights: Pair,
    cos: Tensor,
    sin: Tensor,
    rstds: list[Tensor],
    settings: Settings,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As backward_triton: rotated back in float32 and not rounded before the norm's backward."""
    dq, dk = (None if grad is None else grad.to(rstd.dtype) for grad, rstd in zip(grads, rstds, strict=True))
    turned = rotate_torch(dq, dk, cos, sin, settings.interleaved, True)
    dx: list[Tensor | None] = [None, None]
    dw: list[Tensor | None] = [None, None]
    for side, (grad, x, weight, rstd) in enumerate(zip(turned, xs, weights, rstds, strict=True)):
        if grad is not None:
            wanted = needs[side], needs[side + 2]
            dx[side], dw[side] = norm_backward(grad, None, x, weight, rstd, settings.offset, settings.cast, wanted)
    return *dx, *dw


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "llama",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm every head of q and k over its D dimensions, then rotate it by its position: rms_norm, then rope.

    q  [..., T, Hq, D], any strides: a view of the projection's output stays put; float32, bfloat16 or float16 (float64
       outside Triton)
    k  [..., T, Hk, D], likewise, with the same leading dimensions as q
    q_weight, k_weight  [D] each, or None; eps, offset, cast  as for `rms_norm`
    cos, sin  [..., T, R], and interleaved  as for `rope`

    Returns (q, k), new contiguous tensors of rms_norm's types; on the CPU equal, bit for bit, to rms_norm followed by
    rope. Gradients flow to q, k and the weights, each computed only where it is needed, in float32 (float64 for
    float64) from the incoming gradient on, in a fixed order, and can't be differentiated again. Saved for backward:
    q, k, the weights and the tables; on the CPU one number a head beside them.
    Moves on a GPU, an element of q and k: forward 2 (read, written), backward 3 (x and the gradient read, dx written),
    which is the minimum; 2 R elements of tables a token come on top, read from memory once and from the cache after.
    Raises ValueError where the shapes do not fit, and for an unknown cast.
    Source: Henry et al., "Query-Key Normalization for Transformers", 2020, with RMSNorm (Zhang and Sennrich, 2019);
    Su et al., "RoFormer", 2021; the gradient is derived above.
    """
    check_rope("qk_norm_rope", q, k, cos, sin)
    check_norm("qk_norm_rope", q, q_weight, cast)
    check_norm("qk_norm_rope", k, k_weight, cast)
    settings = Settings(eps, offset, cast, interleaved)
    backend = backend_for(q)
    if backend == "reference":
        return qk_norm_rope_definition(q, k, q_weight, k_weight, cos, sin, **settings._asdict())
    return _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, settings, backend)
