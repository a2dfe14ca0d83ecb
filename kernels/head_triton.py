"""The step between the head's GEMMs as Triton kernels: each logit is read once, and written once for gradients.

The reference of a row is its target's logit, known beforehand from one dot product, so no pass for the row maximum is
needed: E = exp(z - r). A block whose largest exponent passes GUARD is stored relative to a power of two of its own;
when the row is complete, `_level_kernel` brings such rows to one power, exactly. Sums are kept per (row, block) and
added in a fixed order; E's own entry at the target is made when they are known (head_chunks.target_entry).

Two kinds of gradient have no such form, an entropy's and that of label smoothing under a softcap: they take the row's
log-sum-exp from an earlier sweep, or from a first round over the same chunk, and are written by a kernel of their own.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.head_chunks import (
    LEAST_GAIN,
    OFFSET,
    OTHERS,
    TARGET,
    TOTAL,
    WEIGHTED,
    HeadSpec,
    Stats,
    Upstream,
    coefficients,
    finish,
    mm_f32,
    weight_tiles,
)

COLUMNS = 16384  # columns of float32 logits between two GEMM calls
BLOCK = 4096  # columns a program handles, and the unit of the partial sums
BLOCK_H = 2048
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its product with a power below 2^15 is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
GUARD = tl.constexpr(
    27.0
)  # in nats: exp(27) = 2^39, times weights and hidden states stays far from the end of bfloat16 and float32
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _effective(raw, scale, softcap, inverse_temperature, SOFTCAP: tl.constexpr):
    """Effective logits and 1 - tanh^2 (1 without a softcap). tanh from exp2, near 0 from its series."""
    z = raw * tl.cast(scale, tl.float32)
    if SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        u = z / cap
        q = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
        w = u * u
        series = u * (1.0 + w * (-0.33333333 + w * (0.13333333 + w * (-0.053968254 + w * 0.021869488))))
        far = tl.where(u < 0.0, q - 1.0, 1.0 - q) / (1.0 + q)
        z = cap * tl.where(tl.abs(u) < 0.3, series, far)
        slope = 4.0 * q / ((1.0 + q) * (1.0 + q))
    else:
        slope = tl.cast(1.0, tl.float32)
    return z * tl.cast(inverse_temperature, tl.float32), slope


@triton.jit
def _finite_or_zero(r):
    return tl.where(tl.abs(r) < float("inf"), r, 0.0)


@triton.jit
def _less(z, power):
    """z - power * log 2, to the last digit of z."""
    return (z - power * LN2_HIGH) - power * LN2_LOW


@triton.jit
def _target_kernel(
    x_ptr, x_row, x_col, w_ptr, w_row, w_col, bias_ptr, labels_ptr, target_ptr, slope_ptr, hidden,
    scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """target[i] = effective logit of row i's label; slope[i] = its 1 - tanh^2."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        at = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        live = at < hidden
        x = tl.load(x_ptr + row * x_row + at * x_col, mask=live, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + label * w_row + at * w_col, mask=live, other=0.0).to(tl.float32)
        total += x * w
    raw = tl.sum(total, 0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + label).to(tl.float32)
    z, slope = _effective(raw, scale, softcap, inverse_temperature, SOFTCAP)
    tl.store(target_ptr + row, z)
    tl.store(slope_ptr + row, slope)


@triton.jit(do_not_specialize=["store"])
def _exp_kernel(
    z_ptr, z_row, e_ptr, e_row, store, bias_ptr, labels_ptr, target_ptr, parts_ptr, plane, best_ptr, blocks, first,
    width, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, TOTAL: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of one block of logits: E and its sums, parts [5, rows, blocks] = sum, power, weighted, total, max.

    Whether E is stored is a question at run time: one binary, so one order of summation, with gradients and without.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width
    raw = tl.load(z_ptr + row * z_row + at, mask=live, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + first + at, mask=live, other=0.0).to(tl.float32)
    z, slope = _effective(raw, scale, softcap, inverse_temperature, SOFTCAP)
    z = tl.where(live, z - _finite_or_zero(tl.load(target_ptr + row)), -float("inf"))
    high = tl.max(z, 0)
    power = tl.where(high > GUARD, tl.ceil(high * LOG2E), 0.0)
    rest = _less(z, power)
    e = tl.exp2(rest * LOG2E)
    e = tl.where(at + first == tl.load(labels_ptr + row), 0.0, e)
    tl.store(e_ptr + row * e_row + first + at, (e * slope).to(e_ptr.dtype.element_ty), mask=live & (store > 0))
    part = parts_ptr + row * blocks + first // BLOCK + tl.program_id(1)
    tl.store(part, tl.sum(e, 0))
    tl.store(part + plane, power)
    if ENTROPY:
        tl.store(part + 2 * plane, tl.sum(tl.where(e > 0.0, e * rest, 0.0), 0))
    if TOTAL:
        tl.store(part + 3 * plane, tl.sum(tl.where(live, z, 0.0), 0))
    if ARGMAX:
        tl.store(part + 4 * plane, high)
        where = tl.min(tl.where((z == high) & live, at + first, NOWHERE), 0)
        tl.store(best_ptr + row * blocks + first // BLOCK + tl.program_id(1), where)


@triton.jit
def _row_kernel(
    parts_ptr, plane, best_ptr, blocks, vocab, target_ptr, slope_ptr, labels_ptr, sums_ptr, sums_plane, top_ptr,
    power_ptr, unit_ptr, e_ptr, e_row, smoothing, z_loss, STORE: tl.constexpr, ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr, ARGMAX: tl.constexpr, Z_LOSS: tl.constexpr, BLOCKS: tl.constexpr, S_TARGET: tl.constexpr,
    S_OTHERS: tl.constexpr, S_OFFSET: tl.constexpr, S_WEIGHTED: tl.constexpr, S_TOTAL: tl.constexpr,
    LEAST_GAIN: tl.constexpr,
):  # fmt: skip
    """One row's sums from its blocks', in fixed order; for gradients also its unit and its target entry of E."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)
    live = at < blocks
    part = parts_ptr + row * blocks + at
    sums = tl.load(part, mask=live, other=0.0)
    powers = tl.load(part + plane, mask=live, other=0.0)
    power = tl.max(powers, 0)
    level = tl.exp2(powers - power)
    others = tl.sum(sums * level, 0)
    target = tl.load(target_ptr + row)
    tl.store(sums_ptr + S_TARGET * sums_plane + row, target)
    tl.store(sums_ptr + S_OTHERS * sums_plane + row, others)
    tl.store(sums_ptr + S_OFFSET * sums_plane + row, power)
    if ENTROPY:
        weighted = tl.load(part + 2 * plane, mask=live, other=0.0) + (powers - power) * LN2 * sums
        tl.store(sums_ptr + S_WEIGHTED * sums_plane + row, tl.sum(tl.where(level > 0.0, level * weighted, 0.0), 0))
    if TOTAL:
        tl.store(sums_ptr + S_TOTAL * sums_plane + row, tl.sum(tl.load(part + 3 * plane, mask=live, other=0.0), 0))
    if ARGMAX:
        high = tl.load(part + 4 * plane, mask=live, other=-float("inf"))
        best = tl.load(best_ptr + row * blocks + at, mask=live, other=NOWHERE)
        top = tl.min(tl.where(high == tl.max(high, 0), best, NOWHERE), 0)
        tl.store(top_ptr + row, tl.minimum(top, vocab - 1).to(tl.int64))
    if STORE:
        own = tl.where(tl.abs(target) < float("inf"), tl.exp2(-power), tl.where(target < 0.0, 0.0, target * 0.0))
        total = others + own
        entry = -others
        if TOTAL:
            entry += tl.cast(smoothing, tl.float32) * total
        gain = tl.cast(1.0, tl.float32)
        if Z_LOSS:
            lse = _finite_or_zero(target) + power * LN2 + tl.log2(total) * LN2
            pull = 2.0 * tl.cast(z_loss, tl.float32) * lse
            gain = 1.0 + pull
            gain = tl.where(tl.abs(gain) < LEAST_GAIN, LEAST_GAIN, gain)
            entry = (entry + pull * own) / gain
        tl.store(unit_ptr + row, gain / total)
        tl.store(power_ptr + row, power)
        entry *= tl.load(slope_ptr + row)
        tl.store(e_ptr + row * e_row + tl.load(labels_ptr + row), entry.to(e_ptr.dtype.element_ty))


@triton.jit
def _level_kernel(e_ptr, e_row, parts_ptr, plane, blocks, power_ptr, labels_ptr, vocab, BLOCK: tl.constexpr):
    """Bring the blocks of a row to the row's power of two. Nearly every row has power 0 and nothing to do."""
    row = tl.program_id(0).to(tl.int64)
    power = tl.load(power_ptr + row)
    if power > 0.0:
        label = tl.load(labels_ptr + row)
        for block in range(0, blocks):
            level = tl.exp2(tl.load(parts_ptr + plane + row * blocks + block) - power)
            at = block * BLOCK + tl.arange(0, BLOCK)
            here = e_ptr + row * e_row + at
            e = tl.load(here, mask=at < vocab, other=0.0).to(tl.float32)
            e = tl.where(at == label, e, e * level)  # in the mask it would leave no 16-byte access
            tl.store(here, e.to(e_ptr.dtype.element_ty), mask=at < vocab)


@triton.jit
def _gradient_kernel(
    z_ptr, z_row, e_ptr, e_row, bias_ptr, labels_ptr, reference_ptr, offset_ptr, log_sum_ptr, alpha_ptr, beta_ptr,
    kappa_ptr, own_ptr, first, width, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_BETA: tl.constexpr, HAS_KAPPA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/draw of one row of one block, from coefficients that are known beforehand (head_chunks.Coefficients)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width
    raw = tl.load(z_ptr + row * z_row + at, mask=live, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + first + at, mask=live, other=0.0).to(tl.float32)
    z, slope = _effective(raw, scale, softcap, inverse_temperature, SOFTCAP)
    z = _less(z - tl.load(reference_ptr + row), tl.load(offset_ptr + row)) - tl.load(log_sum_ptr + row)
    p = tl.exp2(z * LOG2E)
    factor = tl.load(alpha_ptr + row)
    if HAS_BETA:
        factor += tl.load(beta_ptr + row) * tl.where(p > 0.0, z, 0.0)
    d = p * factor
    if HAS_KAPPA:
        d += tl.load(kappa_ptr + row)
    d = tl.where(at + first == tl.load(labels_ptr + row), tl.load(own_ptr + row), d)
    tl.store(e_ptr + row * e_row + first + at, (d * slope).to(e_ptr.dtype.element_ty), mask=live)


class Step:
    """Buffers for one sweep; a call does one chunk."""

    offset_unit = math.log(2.0)

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: HeadSpec, rows: int, work: torch.dtype, store: bool):
        self.weight, self.spec, self.work, self.store = weight, spec, work, store
        self.bias = None if bias is None else bias.contiguous()
        vocab, device = weight.shape[0], weight.device
        self.block = min(BLOCK, triton.next_power_of_2(vocab))
        self.columns = min(COLUMNS // BLOCK * self.block, vocab)
        self.blocks = triton.cdiv(vocab, self.block)
        self.transform = (spec.logit_scale, spec.softcap or 0.0, 1.0 / spec.temperature)
        self.logits = torch.empty(rows * self.columns, dtype=torch.float32, device=device)
        self.parts = torch.empty(5, rows, self.blocks, dtype=torch.float32, device=device)
        self.best = torch.empty(rows, self.blocks, dtype=torch.int32, device=device)
        self.lines = torch.empty(3, rows, dtype=torch.float32, device=device)  # target, its slope, power

    def buffer(self, rows: int) -> Tensor:
        """Room for the E of one chunk. A row stride of whole 128-byte lines keeps rows aligned for any vocabulary."""
        vocab, device = self.weight.shape[0], self.weight.device
        stride = triton.cdiv(vocab, 64) * 64
        return torch.empty(rows if self.store else 0, stride, dtype=self.work, device=device)[:, :vocab]

    def __call__(
        self,
        x: Tensor,
        labels: Tensor,
        exps: Tensor,
        sums: Tensor,
        top: Tensor | None,
        unit: Tensor,
        *,
        store: bool,
        late: Upstream | None,
        known: Stats | None,
    ) -> None:
        """Fill `sums` [5, rows] and `top`; with `store` also `exps` [rows, V] and `unit` [rows], or with `late`
        upstream gradients dL/draw in `exps`, for which a `known` result spares the round that makes the sums."""
        if late is None or known is None:
            self.exponentials(x, labels, exps, sums, top, unit, store and late is None)
        if late is not None and store:
            known = known or finish(sums, None, self.weight.shape[0], self.spec, self.offset_unit)
            self.gradient(x, labels, exps, known, late)

    def tiles(self, x: Tensor) -> Iterator[tuple[int, int, Tensor, tuple[int, int]]]:
        """(first column, width, float32 logits [rows, width], their grid), one tile after another in one buffer."""
        for first, last, tile in weight_tiles(self.weight, self.work, self.columns):
            width = last - first
            logits = mm_f32(x, tile.T, out=self.logits[: x.shape[0] * width].view(x.shape[0], width))
            yield first, width, logits, (x.shape[0], triton.cdiv(width, self.block))

    def exponentials(
        self, x: Tensor, labels: Tensor, exps: Tensor, sums: Tensor, top: Tensor | None, unit: Tensor, store: bool
    ) -> None:
        n, spec, weight, stride = x.shape[0], self.spec, self.weight, exps.stride(0)
        target, slope, power = self.lines
        cap = {"HAS_BIAS": self.bias is not None, "SOFTCAP": bool(spec.softcap)}
        wanted = {"ENTROPY": spec.entropy, "TOTAL": spec.label_smoothing > 0, "ARGMAX": top is not None}
        _target_kernel[(n,)](
            x, x.stride(0), x.stride(1), weight, weight.stride(0), weight.stride(1), self.bias, labels, target, slope,
            x.shape[1], *self.transform, **cap, BLOCK_H=min(BLOCK_H, triton.next_power_of_2(x.shape[1])), num_warps=4,
        )  # fmt: skip
        plane = self.parts.stride(0)
        for first, width, logits, grid in self.tiles(x):
            _exp_kernel[grid](
                logits, width, exps, stride, int(store), self.bias, labels, target, self.parts, plane, self.best,
                self.blocks, first, width, *self.transform, **cap, **wanted, BLOCK=self.block, num_warps=8,
            )  # fmt: skip
        _row_kernel[(n,)](
            self.parts, plane, self.best, self.blocks, weight.shape[0], target, slope, labels, sums, sums.stride(0),
            self.best if top is None else top, power, unit, exps, stride, spec.label_smoothing, spec.z_loss, **wanted,
            STORE=store, Z_LOSS=spec.z_loss != 0, BLOCKS=triton.next_power_of_2(self.blocks), S_TARGET=TARGET,
            S_OTHERS=OTHERS, S_OFFSET=OFFSET, S_WEIGHTED=WEIGHTED, S_TOTAL=TOTAL, LEAST_GAIN=LEAST_GAIN, num_warps=1,
        )  # fmt: skip
        if store:
            _level_kernel[(n,)](
                exps, stride, self.parts, plane, self.blocks, power, labels, weight.shape[0],
                BLOCK=self.block, num_warps=8,
            )  # fmt: skip

    def gradient(self, x: Tensor, labels: Tensor, exps: Tensor, known: Stats, upstream: Upstream) -> None:
        alpha, beta, kappa, own = coefficients(known, upstream, self.weight.shape[0], self.spec)
        for first, width, logits, grid in self.tiles(x):
            _gradient_kernel[grid](
                logits, width, exps, exps.stride(0), self.bias, labels, known.reference, known.offset, known.log_sum,
                alpha, alpha if beta is None else beta, alpha if kappa is None else kappa, own, first, width,
                *self.transform, HAS_BIAS=self.bias is not None, SOFTCAP=bool(self.spec.softcap),
                HAS_BETA=beta is not None, HAS_KAPPA=kappa is not None, BLOCK=self.block, num_warps=8,
            )  # fmt: skip
