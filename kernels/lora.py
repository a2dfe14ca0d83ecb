"""Linear layers with low-rank adapters (LoRA, Hu et al., 2021): y = x W^T + bias + s (x A^T) B^T.

Projections of the same x (queries, keys and values; gate and up) share their thin products. With the A's stacked,
A = [A_1; A_2; ...] of R rows in all, H = x A^T is one product of [T, K] and [K, R], and so backward:
    dH = [s_1 dY_1 B_1, s_2 dY_2 B_2, ...]     dA = dH^T x     dX = sum of dY_i W_i + dH A     dB_i = s_i dY_i^T H_i
No Triton here: these are matrix products, and the additions ride on them. Kept for backward: x, once, where an A or a
W is trained, and H. Adapters wider than x (float32 beside a bfloat16 base, peft's default) are multiplied in their own
type, over CHUNK tokens at a time, so that no wide copy of x or of a result as long as the sequence is made.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once

CHUNK = 4096


def lora_linear_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The op in plain torch, in any floating type, with peft's order of roundings; see `lora_linear`."""
    y = F.linear(x, weight, bias)
    low = F.linear(F.linear(x.to(a.dtype), a), b) * scale
    return (y + low).to(y.dtype)


def _chunks(*tensors: Tensor, whole: bool) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, all at once or CHUNK at a time."""
    if whole:
        yield tensors
    else:
        yield from zip(*(t.split(CHUNK) for t in tensors), strict=True)


def _add_products(y: Tensor, low: Tensor, right: Tensor, scale: float) -> None:
    """y += scale * low @ right, in low's type and rounded once to y's. y [T, N], low [T, R], right [R, N]."""
    if y.dtype == low.dtype:
        y.addmm_(low, right, alpha=scale)
        return
    for part, narrow in _chunks(y, low, whole=False):
        part.copy_(torch.addmm(part.to(low.dtype), narrow, right, alpha=scale))


class _LoRALinear(torch.autograd.Function):
    """Arguments behind x and the scales: weight, bias, a, b of the first projection, then of the second, ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, a, b = (parameters[i::4] for i in range(4))
        flat = x.reshape(-1, x.shape[-1])  # [T, K]
        stacked = torch.cat(a) if len(a) > 1 else a[0]  # type: ignore[arg-type]
        ranks = [each.shape[0] for each in a]  # type: ignore[union-attr]
        low = torch.empty(flat.shape[0], sum(ranks), dtype=stacked.dtype, device=x.device)  # type: ignore[union-attr]
        for rows, out in _chunks(flat, low, whole=x.dtype == low.dtype):
            torch.mm(rows.to(low.dtype), stacked.t(), out=out)  # type: ignore[union-attr]
        outs = []
        for weight, bias, up, part, scale in zip(weights, biases, b, low.split(ranks, dim=1), scales, strict=True):
            y = F.linear(flat, weight, bias)  # type: ignore[arg-type]
            _add_products(y, part, up.t(), scale)  # type: ignore[union-attr]
            outs.append(y.view(*x.shape[:-1], y.shape[-1]))
        wanted = ctx.needs_input_grad[2:]
        keep_x = any(wanted[0::4]) or any(wanted[2::4])
        keep_low = any(wanted[3::4])
        ctx.save_for_backward(x if keep_x else None, low if keep_low else None, *weights, *a, *b)
        ctx.scales, ctx.shape = scales, x.shape
        ctx.set_materialize_grads(False)  # a projection that nobody used costs nothing
        return tuple(outs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, *saved = ctx.saved_tensors
        count = len(ctx.scales)
        weights, a, b = saved[:count], saved[count : 2 * count], saved[2 * count :]
        wanted = [ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i] for i in range(count)]
        if all(grad is None for grad in grads):
            return None, None, *[None] * (4 * count)
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads]  # [T, N_i]
        dlow, db = _thin_gradients(dys, low, a, b, ctx.scales, [needs[3] for needs in wanted])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        das: list[Tensor | None] = [None] * count
        if any(needs[2] for needs in wanted):
            das = list(_stacked_gradient(dlow, flat).split([each.shape[0] for each in a]))
        result: list[Tensor | None] = []
        for i, (dy, needs) in enumerate(zip(dys, wanted, strict=True)):
            used = dy is not None
            dweight = dy.t() @ flat if used and needs[0] else None  # type: ignore[union-attr]
            result += [dweight, dy.sum(0) if used and needs[1] else None, das[i], db[i]]  # type: ignore[union-attr]
        dx = _input_gradient(dys, weights, a, dlow).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, *result


def _thin_gradients(
    dys: list[Tensor | None],
    low: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: tuple[float, ...],
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """dH [T, R], and dB_i [N_i, r_i] where wanted: both in the adapters' type, from one pass over each dY."""
    used = next(dy for dy in dys if dy is not None)
    ranks = [each.shape[0] for each in a]
    dlow = torch.empty(used.shape[0], sum(ranks), dtype=a[0].dtype, device=used.device)
    parts = dlow.split(ranks, dim=1)
    lows = [None] * len(ranks) if low is None else low.split(ranks, dim=1)
    dbs: list[Tensor | None] = []
    for dy, up, scale, part, h, needed in zip(dys, b, scales, parts, lows, wanted, strict=True):
        dbs.append(torch.zeros_like(up) if needed and dy is not None else None)
        if dy is None:
            part.zero_()
            continue
        rows = (dy, part) if dbs[-1] is None else (dy, part, h)
        for wide, out, *thin in _chunks(*rows, whole=dy.dtype == up.dtype):  # type: ignore[arg-type]
            wide = wide.to(up.dtype)
            out.addmm_(wide, up, beta=0, alpha=scale)
            if thin:
                dbs[-1].addmm_(wide.t(), thin[0], alpha=scale)  # type: ignore[union-attr]
    return dlow, dbs


def _stacked_gradient(dlow: Tensor, x: Tensor) -> Tensor:
    """dA = dH^T x, [R, K]: of all the A's, in their type."""
    da = torch.zeros(dlow.shape[1], x.shape[1], dtype=dlow.dtype, device=dlow.device)
    for thin, rows in _chunks(dlow, x, whole=x.dtype == dlow.dtype):
        da.addmm_(thin.t(), rows.to(dlow.dtype))
    return da


def _input_gradient(dys: list[Tensor | None], weights: list[Tensor], a: list[Tensor], dlow: Tensor) -> Tensor:
    """dX [T, K]: every base's share, and the adapters' in one product on top."""
    dx: Tensor | None = None
    for dy, weight in zip(dys, weights, strict=True):
        if dy is not None:
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    assert dx is not None
    _add_products(dx, dlow, torch.cat(a) if len(a) > 1 else a[0], 1.0)
    return dx


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """Several adapted linear layers of one x: y_i = x W_i^T + bias_i + scale_i (x A_i^T) B_i^T.

    x        [..., K] of any strides
    weights  [N_i, K] of x's type, frozen or trained; biases [N_i] or None
    a, b     [r_i, K] and [N_i, r_i], all of one type: x's, or a wider one (float32 beside bfloat16), in which the
             low-rank products and their sum with the base's result are then made
    scales   numbers, alpha / r in the paper

    Returns one [..., N_i] in x's type for each, equal to the layers one by one to the last place or two. Gradients
    flow to x, weights, biases, a and b, each computed only where it is needed, and can't be differentiated again.
    Kept for backward: x, once for all, and only where an A or W is trained, and x A^T (R numbers a token). Under
    autocast the definition runs, cast as torch casts it. Raises ValueError for shapes and types that do not fit.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the gradient is derived above.
    """
    _check(x, weights, biases, a, b, scales)
    if backend_for(x) == "reference" or torch.is_autocast_enabled(x.device.type):
        each = zip(weights, biases, a, b, scales, strict=True)
        return tuple(lora_linear_definition(x, *arguments) for arguments in each)
    parameters = [t for group in zip(weights, biases, a, b, strict=True) for t in group]
    return _LoRALinear.apply(x, tuple(map(float, scales)), *parameters)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One adapted linear layer, x W^T + bias + scale (x A^T) B^T: `lora_linears` with one projection.

    x [..., K], weight [N, K], bias [N] or None, a [r, K], b [N, r] -> [..., N] in x's type.
    """
    return lora_linears(x, [weight], [bias], [a], [b], [scale])[0]


def _check(x: Tensor, weights: Any, biases: Any, a: Any, b: Any, scales: Any) -> None:
    if not 0 < len(weights) == len(biases) == len(a) == len(b) == len(scales):
        raise ValueError("lora_linears: needs a weight, bias, a, b and scale for each of one or more projections")
    if torch.promote_types(x.dtype, a[0].dtype) != a[0].dtype:
        raise ValueError(f"lora_linears: a and b must not be narrower than x, got {a[0].dtype} beside {x.dtype}")
    width = x.shape[-1] if x.dim() else 0
    for weight, bias, down, up in zip(weights, biases, a, b, strict=True):
        shapes = [tuple(t.shape) for t in (weight, down, up) if t is not None]
        rank, out = (down.shape[0] if down.dim() else 0), (weight.shape[0] if weight.dim() else 0)
        if shapes != [(out, width), (rank, width), (out, rank)] or (bias is not None and bias.shape != (out,)):
            raise ValueError(
                f"lora_linears: x {tuple(x.shape)} needs weight [N, {width}], bias [N], a [r, {width}] and b [N, r], "
                f"got {shapes}" + (f" and bias {tuple(bias.shape)}" if bias is not None else "")
            )
        if down.dtype != a[0].dtype or up.dtype != a[0].dtype:
            raise ValueError(f"lora_linears: every a and b must have one type, got {down.dtype} and {up.dtype}")
