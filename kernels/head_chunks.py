"""The language-model head in chunks: three GEMMs a chunk of rows, the logits of one chunk alive at a time.

`sweep` is the whole of it. It serves log-probs and cross-entropy, forward and backward, on the CPU and on a GPU; only
the step between the GEMMs differs: `head_rows.Step` in torch, `head_triton.Step` in Triton. Both leave, for every row i
with target t, effective logits z and reference c (the target's logit, 0 if that is infinite), these sums in float32:

    TARGET    z_t
    OTHERS    s = sum_{j != t} exp(z_j - c - o)
    OFFSET    o / offset_unit, exactly; 0 unless exp would leave the safe range
    WEIGHTED  sum_{j != t} exp(z_j - c - o) (z_j - c - o)
    TOTAL     sum_j (z_j - c)

Measured from the target, the loss is log1p(s): exact for confident tokens, where log-sum-exp minus logit cancels.
`finish` turns the sums into losses, `coefficients` the upstream gradients into the rows' factors of dL/dz.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TARGET, OTHERS, OFFSET, WEIGHTED, TOTAL = range(5)

CPU_TILE_BYTES = (
    64 << 20
)  # float32 logits alive on the CPU: smaller re-reads the weight too often, larger gains nothing
CPU_MIN_ROWS = 128  # below this the GEMMs are bound by reading the weight
CUDA_MIN_ROWS = 4096
CAST_TILE = 8192  # rows of the weight in float32 at a time, where the weight has another dtype


@dataclass(frozen=True)
class HeadSpec:
    """z = softcap * tanh(logit_scale * raw / softcap) / temperature, the terms of the loss and the outputs wanted."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy: bool = False
    argmax: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be None or positive, got {self.softcap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    @property
    def slope(self) -> float:
        """dz / d raw, but for the softcap's 1 - tanh^2."""
        return self.logit_scale / self.temperature


class Stats(NamedTuple):
    """Per row, float32 [n] (top: int64 or None): what the forward reports and the backward needs."""

    loss: Tensor
    nll: Tensor
    lse: Tensor
    entropy: Tensor
    reference: Tensor  # c
    offset: Tensor  # o / offset_unit
    log_sum: Tensor  # lse - c - o: log p = ((z - c) - o) - log_sum, in this order, has no rounding the sums had not
    top: Tensor | None


class Upstream(NamedTuple):
    """dL/dloss_i and dL/dentropy_i, float32 [n]."""

    loss: Tensor
    entropy: Tensor | None = None

    def rows(self, part: slice) -> "Upstream":
        return Upstream(self.loss[part], None if self.entropy is None else self.entropy[part])


class Grads(NamedTuple):
    """Gradients where wanted. `weight` and `bias` may be float32 sums for a parameter of a smaller dtype."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Coefficients(NamedTuple):
    """dL/draw_j = slope_j * (p_j * (alpha + beta * (z_j - lse)) + kappa), and slope_t * target at the target. [n]"""

    alpha: Tensor
    beta: Tensor | None
    kappa: Tensor | None
    target: Tensor


def work_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype the GEMMs read: bfloat16 where both are and the device adds up in float32, else float32."""
    both_bf16 = x.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if both_bf16 and x.is_cuda else torch.float32


def rows_per_chunk(n: int, hidden: int, vocab: int, device: torch.device) -> int:
    """Rows of one chunk: chunks are of equal size, so that no small one is left over."""
    if device.type == "cpu":
        limit = max(CPU_MIN_ROWS, CPU_TILE_BYTES // (4 * vocab))
    else:
        limit = max(CUDA_MIN_ROWS, 2 * hidden)
    if n <= limit:
        return max(n, 1)
    chunks = -(-n // limit)
    rows = -(-n // chunks)
    return rows if device.type == "cpu" else min(limit, -(-rows // 256) * 256)


def weight_tiles(weight: Tensor, dtype: torch.dtype, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, weight[first:last] in `dtype`): no second copy of the whole weight ever exists."""
    vocab, hidden = weight.shape
    if weight.dtype == dtype:
        for first in range(0, vocab, width):
            yield first, min(first + width, vocab), weight[first : first + width]
        return
    width = min(width, CAST_TILE, vocab)
    scratch = torch.empty(width, hidden, dtype=dtype, device=weight.device)
    for first in range(0, vocab, width):
        last = min(first + width, vocab)
        yield first, last, scratch[: last - first].copy_(weight[first:last])


def mm_f32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed and stored in float32 whatever the inputs are."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def addmm_f32(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b in float32, in place."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


def finish(sums: Tensor, top: Tensor | None, vocab: int, spec: HeadSpec, offset_unit: float) -> Stats:
    """Losses from the row sums [5, n]; the offsets are counted in `offset_unit`."""
    target, others, offset = sums[TARGET], sums[OTHERS], sums[OFFSET]
    finite = target.isfinite()
    usual = finite & (offset == 0)
    plain = not (spec.z_loss or spec.label_smoothing or spec.entropy)
    if plain and sums.device.type == "cpu" and bool(usual.all()):  # asking is free here, and nearly always answered yes
        nll = torch.log1p(others)
        return Stats(nll, nll, nll, nll, target, offset, nll, top)
    reference = target.where(finite, 0.0)
    shift = offset * offset_unit
    shifted = (target - reference) - shift
    own = shifted.exp()
    log_sum = torch.where(usual, others.log1p(), (others + own).log())
    loss = nll = log_sum - shifted
    lse = reference + shift + log_sum
    entropy = nll
    if spec.entropy:
        own_part = torch.where(own > 0, own * shifted, 0.0)
        entropy = log_sum - (sums[WEIGHTED] + own_part) / (others + own)
    if spec.label_smoothing:
        loss = loss - spec.label_smoothing / vocab * sums[TOTAL]
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
    return Stats(loss, nll, lse, entropy, reference, offset, log_sum, top)


def coefficients(stats: Stats, upstream: Upstream, vocab: int, spec: HeadSpec) -> Coefficients:
    """The rows' factors of dL/dz, from loss_i = nll + smoothing (z_t - mean z) + z_loss lse^2 and the entropy."""
    g = upstream.loss * spec.slope
    alpha, target = g, g * torch.expm1(-stats.nll)  # p_t - 1 without cancelling
    beta = kappa = None
    chance = torch.exp(-stats.nll)
    if spec.z_loss:
        pull = 2 * spec.z_loss * stats.lse * g
        alpha, target = alpha + pull, target + pull * chance
    if spec.label_smoothing:
        kappa = g * (-spec.label_smoothing / vocab)
        target = target + g * spec.label_smoothing + kappa
    if upstream.entropy is not None:
        beta = -spec.slope * upstream.entropy
        alpha = alpha + beta * stats.entropy
        target = target + beta * torch.where(chance > 0, chance * (stats.entropy - stats.nll), 0.0)
    return Coefficients(alpha, beta, kappa, target)


def sweep(
    x: Tensor,  # [n, H], n rows that all have a target
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [n] int64, all in [0, V)
    spec: HeadSpec,
    backend: str,
    *,
    upstream: Upstream | None = None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    known: Stats | None = None,
) -> tuple[Stats, Grads]:
    """Per-row losses and, given the upstream gradients, the gradients of x, weight and bias that `needs` names.

    2NHV operations for the losses, 2NHV more for each of the gradients of x and weight. `known`, the result of an
    earlier sweep over the same rows, spares the Triton step its sums.
    """
    if backend == "torch":
        from burnish.kernels.head_rows import Step
    else:
        from burnish.kernels.head_triton import Step  # type: ignore[assignment]
    n, (vocab, hidden) = x.shape[0], weight.shape
    work = work_dtype(x, weight)
    rows = rows_per_chunk(n, hidden, vocab, x.device)
    sums = torch.empty(5, n, dtype=torch.float32, device=x.device)
    top = torch.empty(n, dtype=torch.int64, device=x.device) if spec.argmax else None
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        grads = _empty_grads(x, weight, bias, needs, rows)
        step = Step(weight, bias, spec, rows, work, store=any(needs))
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            x_part = x[part].to(work)
            dlogits, row_scale = step(
                x_part,
                labels[part],
                sums[:, part],
                None if top is None else top[part],
                None if upstream is None else upstream.rows(part),
                None if known is None else Stats(*(None if s is None else s[part] for s in known)),
            )
            if any(needs):
                _add_grads(grads, part, dlogits, row_scale, x_part, weight)
        if known is None:
            known = finish(sums, top, vocab, spec, step.offset_unit)
    return known, grads


def _empty_grads(x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], rows: int) -> Grads:
    n = x.shape[0]
    new = torch.zeros if n == 0 else torch.empty
    one_chunk = n <= rows and weight.dtype == work_dtype(x, weight)
    dtype = weight.dtype if one_chunk else torch.float32
    return Grads(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None,
        new(weight.shape, dtype=dtype, device=x.device) if needs[1] else None,
        torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device) if needs[2] else None,
    )


def _add_grads(
    grads: Grads, part: slice, dlogits: Tensor, row_scale: Tensor | None, x_part: Tensor, weight: Tensor
) -> None:
    """One chunk's gradients, from dL/draw = row_scale[:, None] * dlogits."""
    if grads.x is not None:
        _input_gradient(dlogits, row_scale, weight, grads.x[part])
    if grads.bias is not None:
        if row_scale is None:
            grads.bias.add_(dlogits.sum(0, dtype=torch.float32))
        else:
            line = torch.empty(1, dlogits.shape[1], dtype=torch.float32, device=dlogits.device)
            grads.bias.add_(mm_f32(row_scale.to(dlogits.dtype)[None], dlogits, out=line)[0])
    if grads.weight is None:
        return
    scaled = x_part if row_scale is None else (x_part * row_scale[:, None]).to(x_part.dtype)
    if part.start:
        addmm_f32(grads.weight, dlogits.T, scaled)
    elif grads.weight.dtype == dlogits.dtype:
        torch.mm(dlogits.T, scaled, out=grads.weight)
    else:
        mm_f32(dlogits.T, scaled, out=grads.weight)


def _input_gradient(dlogits: Tensor, row_scale: Tensor | None, weight: Tensor, out: Tensor) -> None:
    total = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    width = weight.shape[0] if weight.dtype == dlogits.dtype else CAST_TILE
    for first, last, tile in weight_tiles(weight, dlogits.dtype, width):
        if first:
            addmm_f32(total, dlogits[:, first:last], tile)
        else:
            mm_f32(dlogits[:, first:last], tile, out=total)
    if row_scale is not None:
        torch.mul(total, row_scale[:, None], out=out)
    elif total is not out:
        out.copy_(total)
