"""Rotary position embedding of queries and keys (Su et al., 2021), whole or partial, half-split or interleaved.

A rotated dimension is paired with a partner: dimension i with i + R/2 (half-split) or 2i with 2i + 1 (interleaved).
With (x1, x2) a pair and (c1, c2), (s1, s2) the values of cos and sin at its two places,
    y1 = x1*c1 - x2*s1      y2 = x2*c2 + x1*s2
and backward is the transpose of that 2 x 2 matrix, which is a rotation back only where c1 = c2 and s1 = s2:
    dx1 = dy1*c1 + dy2*s2   dx2 = dy2*c2 - dy1*s1
Both are x1*c1 + x2*a, x2*c2 + x1*b, with (a, b) = (-s1, s2) forward and (s2, -s1) backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once


def rope_definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, in any floating type; see `rope`."""

    def rotate(x: Tensor) -> Tensor:
        width = cos.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        turning, still = x[..., :width].to(wide), x[..., width:]
        if interleaved:
            partner = torch.stack((-turning[..., 1::2], turning[..., 0::2]), dim=-1).flatten(-2)
        else:
            partner = torch.cat((-turning[..., width // 2 :], turning[..., : width // 2]), dim=-1)
        turned = turning * cos.to(wide).unsqueeze(-2) + partner * sin.to(wide).unsqueeze(-2)
        return torch.cat((turned.to(x.dtype), still), dim=-1)

    return rotate(q), rotate(k)


@triton.jit
def load_pairs(P, offsets, mask, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two places of every pair, [..., HALF] each: `offsets` [N, 1] are the starts of N rows of R elements."""
    pair = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(P + offsets + cols, mask=mask & (cols < R), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    else:
        inside = mask & (pair < R // 2)
        first = tl.load(P + offsets + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(P + offsets + pair + R // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(P, offsets, mask, first, second, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    pair = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * HALF])
        tl.store(P + offsets + cols, both.to(P.dtype.element_ty), mask=mask & (cols < R))
    else:
        inside = mask & (pair < R // 2)
        tl.store(P + offsets + pair, first.to(P.dtype.element_ty), mask=inside)
        tl.store(P + offsets + pair + R // 2, second.to(P.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_heads(
    X, OUT, head_stride, c1, c2, a, b,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """All heads of one token: X and OUT point at its first; OUT is contiguous [HEADS, D]."""
    for start in range(0, HEADS, HEAD_BLOCK):
        heads = (start + tl.arange(0, HEAD_BLOCK))[:, None].to(tl.int64)
        mask = heads < HEADS
        x1, x2 = load_pairs(X, heads * head_stride, mask, R, HALF, INTERLEAVED)
        store_pairs(OUT, heads * D, mask, x1 * c1 + x2 * a, x2 * c2 + x1 * b, R, HALF, INTERLEAVED)
        if REST > 0:
            cols = R + tl.arange(0, REST)[None, :]
            still = tl.load(X + heads * head_stride + cols, mask=mask & (cols < D))
            tl.store(OUT + heads * D + cols, still, mask=mask & (cols < D))


@triton.jit
def _rope_kernel(
    Q, K, COS, SIN, Q_OUT, K_OUT, T,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program rotates all heads of q and k of one token; REST is the padded width of what stays unrotated."""
    token = tl.program_id(0).to(tl.int64)
    batch = token // T
    place = token % T
    zero = tl.zeros([1, 1], dtype=tl.int64)
    always = tl.full([1, 1], True, dtype=tl.int1)
    cos_at = zero + batch * cos_batch_stride + place * cos_token_stride
    sin_at = zero + batch * sin_batch_stride + place * sin_token_stride
    c1, c2 = load_pairs(COS, cos_at, always, R, HALF, INTERLEAVED)  # [1, HALF]
    s1, s2 = load_pairs(SIN, sin_at, always, R, HALF, INTERLEAVED)
    if BACKWARD:
        a = s2
        b = -s1
    else:
        a = -s1
        b = s2
    if Q is not None:
        _rotate_heads(
            Q + batch * q_batch_stride + place * q_token_stride, Q_OUT + token * (Q_HEADS * D), q_head_stride,
            c1, c2, a, b, Q_HEADS, D, R, REST, HALF, HEAD_BLOCK, INTERLEAVED,
        )  # fmt: skip
    if K is not None:
        _rotate_heads(
            K + batch * k_batch_stride + place * k_token_stride, K_OUT + token * (K_HEADS * D), k_head_stride,
            c1, c2, a, b, K_HEADS, D, R, REST, HALF, HEAD_BLOCK, INTERLEAVED,
        )  # fmt: skip


def tiling(heads: int, dim: int, rotated: int) -> dict[str, int]:
    """The kernel's block sizes for up to `heads` heads of `dim`, of which `rotated` dimensions turn."""
    half = triton.next_power_of_2(rotated // 2)
    rest = triton.next_power_of_2(dim - rotated) if dim > rotated else 0
    head_block = max(1, min(triton.next_power_of_2(heads), 4096 // (2 * half)))
    return {"HALF": half, "REST": rest, "HEAD_BLOCK": head_block, "num_warps": max(1, min(4, head_block * half // 512))}


def _four_dims(x: Tensor) -> Tensor:
    """[..., T, heads, D] as [B, T, heads, D] with adjacent D: a view wherever the leading dimensions allow it."""
    x = x.reshape(-1, *x.shape[-3:]) if x.dim() != 4 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _table(table: Tensor, lead: torch.Size) -> Tensor:
    """cos or sin, broadcast to [B, T, R] without a copy (up to one leading dimension), with adjacent R."""
    table = table.expand(*lead, table.shape[-1]).reshape(-1, lead[-1], table.shape[-1])
    return table if table.stride(-1) == 1 else table.contiguous()


def rotate_triton(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Rotates q and k, or the one that is not None, in one launch."""
    shape = q.shape if q is not None else k.shape  # type: ignore[union-attr]
    outs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    tokens = shape[:-2].numel()
    heads = [0 if x is None else x.shape[-2] for x in (q, k)]
    if tokens == 0 or max(heads) == 0:
        return outs[0], outs[1]
    ins = [None if x is None or x.shape[-2] == 0 else _four_dims(x) for x in (q, k)]
    cos, sin = _table(cos, shape[:-2]), _table(sin, shape[:-2])
    strides = [stride for x in ins for stride in ((0, 0, 0) if x is None else x.stride()[:3])]
    with torch.cuda.device_of(cos):
        _rope_kernel[(tokens,)](
            *ins, cos, sin, *outs, shape[-3], *strides, *cos.stride()[:2], *sin.stride()[:2],
            Q_HEADS=heads[0], K_HEADS=heads[1], D=shape[-1], R=cos.shape[-1],
            INTERLEAVED=interleaved, BACKWARD=backward, **tiling(max(heads), shape[-1], cos.shape[-1]),
        )  # fmt: skip
    return outs[0], outs[1]


def rotate_torch(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor | None, Tensor | None]:
    width = cos.shape[-1]
    half = width // 2
    first, second = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, half), slice(half, width))

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        c, s = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
        a, b = (s[..., second], -s[..., first]) if backward else (-s[..., first], s[..., second])
        out = torch.empty(x.shape, dtype=wide, device=x.device)
        turning = x[..., :width].to(wide)
        torch.mul(turning, c, out=out[..., :width])
        out[..., first].addcmul_(turning[..., second], a)
        out[..., second].addcmul_(turning[..., first], b)
        out[..., width:] = x[..., width:]
        return out.to(x.dtype)

    return None if q is None else rotate(q), None if k is None else rotate(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)  # an output that nobody used costs no rotation
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        run = rotate_triton if backend == "triton" else rotate_torch
        return run(q, k, cos, sin, interleaved, False)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        dq = dq if ctx.needs_input_grad[0] else None
        dk = dk if ctx.needs_input_grad[1] else None
        if dq is not None or dk is not None:
            run = rotate_triton if ctx.backend == "triton" else rotate_torch
            cos, sin = ctx.saved_tensors
            dq, dk = run(dq, dk, cos, sin, ctx.interleaved, True)
        return dq, dk, None, None, None, None


def check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError, in the name of `op`, where the shapes do not fit."""
    width = cos.shape[-1]
    if q.dim() < 3 or q.dim() != k.dim() or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q and k must be [..., T, heads, D] alike but for heads, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if cos.shape != sin.shape or width % 2 or not 0 < width <= q.shape[-1]:
        raise ValueError(
            f"{op}: cos and sin must be [..., T, R] with an even R of at most {q.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    fits = all(size in (1, wanted) for size, wanted in zip(cos.shape[-2::-1], q.shape[-3::-1], strict=False))
    if cos.dim() > q.dim() - 1 or not fits:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} does not broadcast to q's tokens {tuple(q.shape[:-2])}")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions: x * cos + partner(x) * sin on the first R dimensions of every head.

    q    [..., T, Hq, D], any strides: a view of the projection's output, or a transposed [B, heads, T, D], stays put
    k    [..., T, Hk, D], likewise, with the same leading dimensions as q
    cos  [..., T, R] in any floating type, R even and at most D; leading dimensions broadcast to q's. The two places of
         a pair may hold different values.
    sin  [..., T, R]
    interleaved  pair dimension 2i with 2i + 1 (Cohere), not i with i + R/2 (Llama); cos and sin are then laid out
         in the same way, every value repeated in place

    Returns (q, k), new contiguous tensors of the inputs' shapes and types; dimensions from R on are copied. Arithmetic
    is float32 (float64 for float64). Gradients flow to q and k only, and can't be differentiated again; only cos and
    sin are kept for backward, which is the transposed rotation.
    Moves on a GPU, an element of q and k: 2 each way (read, written), which is the minimum for new tensors; the tables,
    2 R elements a token, come on top.
    Raises ValueError where the shapes do not fit.
    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; gradient derived above.
    """
    check("rope", q, k, cos, sin)
    backend = backend_for(q)
    if backend == "reference":
        return rope_definition(q, k, cos, sin, interleaved=interleaved)
    return _Rope.apply(q, k, cos, sin, interleaved, backend)
