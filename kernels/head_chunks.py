"""The language-model head in chunks: three GEMMs a chunk of rows, the logits of one chunk alive at a time.

`sweep` is the whole of it. It serves log-probs and cross-entropy, forward and backward, on the CPU and on a GPU; only
the step between the GEMMs differs: `head_rows.Step` in torch, `head_triton.Step` in Triton. Both leave, for every row i
with target t, effective logits z and reference c (the target's logit, 0 if that is infinite), these sums in float32
(o is a shift that keeps exp in the safe range, nearly always 0):

    TARGET    z_t
    OTHERS    s = sum_{j != t} exp(z_j - c - o)
    OFFSET    o / offset_unit, exactly; 0 unless exp would leave the safe range
    WEIGHTED  sum_{j != t} exp(z_j - c - o) (z_j - c - o)
    TOTAL     sum_j (z_j - c)

Measured from the target, the loss is log1p(s): exact for confident tokens, where log-sum-exp minus logit cancels.
`finish` turns the sums into losses.

For gradients they also leave E [n, V], E_ij = exp(z_ij - c - o) * dz_ij/draw_ij (slope left out), with an entry of its
own at the target, and unit [n], so that with an upstream gradient g, known now or later,

    dL/draw_ij = slope * g_i * (unit_i E_ij - smoothing / V)

`target_entry` derives both; z-loss changes them in closed form and smoothing's constant is a matrix of rank one, so
neither needs a second look at the logits. What has no such form is written as dL/draw itself, from `coefficients`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TARGET, OTHERS, OFFSET, WEIGHTED, TOTAL = range(5)

# float32 logits alive on the CPU: smaller re-reads the weight too often, larger gains nothing
CPU_TILE_BYTES = 64 << 20
CPU_MIN_ROWS = 128  # below this the GEMMs are bound by reading the weight
CUDA_MIN_ROWS = 4096
CAST_TILE = 8192  # rows of the weight in float32 at a time, where the weight has another dtype
# How much of E a forward may keep for a backward whose upstream gradients come later: fixed numbers, so that a run does
# not depend on what else the device holds. 256 MiB is 1,365 tokens of a vocabulary of 49,152 in float32; 4 GiB is
# 16,700 tokens of one of 128,256 in bfloat16.
CPU_KEEP_BYTES = 256 << 20
CUDA_KEEP_BYTES = 4 << 30
LEAST_GAIN = 1e-6  # of 1 + 2 z_loss lse, which divides the target's entry
NOTHING = (False, False, False)


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

    @property
    def uneven(self) -> bool:
        """Whether smoothing's constant meets a slope that differs from logit to logit: then it is not of rank one."""
        return bool(self.softcap and self.label_smoothing)


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

    def rows(self, part: slice) -> "Stats":
        return Stats(*(None if field is None else field[part] for field in self))


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


class Kept(NamedTuple):
    """What a sweep leaves for later gradients: E of its first chunks [rows, V], and unit [n] of all rows."""

    exps: list[Tensor]
    unit: Tensor


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


def chunks_to_keep(
    n: int, hidden: int, vocab: int, device: torch.device, work: torch.dtype, keep_bytes: int | None
) -> int:
    """Chunks whose E fits into keep_bytes (None: the device's constant), and if any bytes are allowed at least one:
    the backward needs such a buffer anyway."""
    if keep_bytes is None:
        keep_bytes = CPU_KEEP_BYTES if device.type == "cpu" else CUDA_KEEP_BYTES
    rows = rows_per_chunk(n, hidden, vocab, device)
    return min(-(-n // rows), max(1, keep_bytes // (rows * vocab * work.itemsize))) if keep_bytes > 0 else 0


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
    """total += a @ b in float32, in place; `out` may be the summand since torch 2.10."""
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


def target_entry(others: Tensor, own: Tensor, lse: Tensor | None, spec: HeadSpec) -> tuple[Tensor, Tensor]:
    """(E at the target, unit), [n] each, but for the softcap's slope. own: the target's exponential; lse for z-loss.

    With S = others + own, p_j = E_j / S and the gain a = 1 + 2 z_loss lse, dL/dz is g a p_j elsewhere (less smoothing's
    constant), so unit = a / S; at the target it is g (a p_t - 1 + smoothing), which times S / a is the entry. Without
    the extra terms the entry is -others: p_t - 1 without cancelling. A gain of nearly 0 is moved off it, by an error
    of LEAST_GAIN p_j.
    """
    total = others + own
    if not (spec.z_loss or spec.label_smoothing):
        return -others, total.reciprocal()
    above = spec.label_smoothing * total - others
    if lse is None:
        return above, total.reciprocal()
    pull = 2 * spec.z_loss * lse
    gain = 1 + pull
    gain = torch.where(gain.abs() < LEAST_GAIN, LEAST_GAIN, gain)
    return (pull * own + above) / gain, gain / total


def _step_of(backend: str) -> Any:
    """The class that does what stands between the GEMMs on a backend, "torch" or "triton"."""
    if backend == "torch":
        from burnish.kernels.head_rows import Step
    else:
        from burnish.kernels.head_triton import Step  # type: ignore[assignment]
    return Step


def sweep(
    x: Tensor,  # [n, H], n rows that all have a target
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [n] int64, all in [0, V)
    spec: HeadSpec,
    backend: str,
    *,
    upstream: Upstream | None = None,
    needs: tuple[bool, ...] = NOTHING,
    keep: int = 0,
    known: Stats | None = None,
    kept: Kept | None = None,
) -> tuple[Stats, Grads, Kept | None]:
    """Per-row losses and, given the upstream gradients, the gradients of x, weight and bias that `needs` names.

    2NHV operations for the losses, 2NHV more for each of the gradients of x and weight. The first `keep` chunks leave
    their E. `known` and `kept`, from an earlier sweep over the same rows, spare what is there already: a chunk whose E
    was kept costs its gradients' GEMMs and nothing else.
    """
    from burnish.kernels.head_gradients import Gradients

    Step = _step_of(backend)
    n, (vocab, hidden), device = x.shape[0], weight.shape, x.device
    work = work_dtype(x, weight)
    rows = rows_per_chunk(n, hidden, vocab, device)
    late = upstream if upstream is not None and (spec.uneven or upstream.entropy is not None) else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device_of(x):
        sums = torch.empty(5, n, dtype=torch.float32, device=device)
        top = torch.empty(n, dtype=torch.int64, device=device) if spec.argmax else None
        ready: list[Tensor] = [] if late is not None or kept is None else kept.exps
        unit = torch.empty(n, dtype=torch.float32, device=device) if kept is None else kept.unit.clone()
        grads = Gradients(x, weight, bias, spec, needs, rows, even=late is None)
        step = None
        if len(ready) * rows < n:
            step = Step(weight, bias, spec, rows, work, store=any(needs) or keep > 0)
        left: list[Tensor] = []
        spare = None
        for number, start in enumerate(range(0, n, rows)):
            part = slice(start, min(start + rows, n))
            x_part = x[part].to(work)
            if step is None or number < len(ready):
                exps = ready[number]
            else:
                keeps = number < keep
                if keeps or spare is None:
                    spare = step.buffer(part.stop - start if keeps else rows)
                exps = spare[: part.stop - start]
                step(
                    x_part, labels[part], exps, sums[:, part], None if top is None else top[part], unit[part],
                    store=keeps or any(needs), late=None if late is None else late.rows(part),
                    known=None if known is None else known.rows(part),
                )  # fmt: skip
                if keeps:
                    left, spare = [*left, spare], None
            if upstream is not None:
                grads.add(part, exps, None if late is not None else unit[part], upstream.loss[part], x_part)
        if known is None:
            known = finish(sums, top, vocab, spec, Step.offset_unit)
    return known, grads.result(), Kept(left, unit) if left else None
