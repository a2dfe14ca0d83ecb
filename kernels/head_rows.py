"""The step between the head's GEMMs in plain torch: a few whole rows of logits at a time, while they lie in the cache.

On the CPU asking is free, so the guard against overflow is a look at the sums: rows that left the safe range are done
again from their largest logit.
"""

import torch
from torch import Tensor

from burnish.kernels.head_chunks import (
    OFFSET,
    OTHERS,
    TARGET,
    TOTAL,
    WEIGHTED,
    Coefficients,
    HeadSpec,
    Stats,
    Upstream,
    coefficients,
    finish,
    target_entry,
    weight_tiles,
)

BLOCK_ELEMENTS = 1 << 18  # logits handled at a time: two blocks of float32 fit the second-level cache
SAFE_SUM = 2.0**60  # products of such terms with weights and hidden states are far from float32's end
LOWEST = -1e4  # exp gives 0 here, and 0 * LOWEST is 0 where 0 * -inf is not a number


class Step:
    """Buffers for one sweep; a call does one chunk."""

    offset_unit = 1.0

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: HeadSpec, rows: int, work: torch.dtype, store: bool):
        self.weight, self.spec, self.work, self.store = weight, spec, work, store
        vocab = weight.shape[0]
        # alpha of the GEMM: what is applied to the raw logits before tanh, or all there is without a softcap
        self.gain = spec.logit_scale / spec.softcap if spec.softcap else spec.slope
        self.bias = None if bias is None else bias.float() * self.gain
        self.block = min(rows, max(1, BLOCK_ELEMENTS // vocab))
        self.exps = torch.empty(self.block, vocab, dtype=torch.float32, device=weight.device)
        self.slopes = torch.empty_like(self.exps) if spec.softcap and store else None

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of one chunk, which become E."""
        return torch.empty(rows, self.weight.shape[0], dtype=torch.float32, device=self.weight.device)

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
        upstream gradients dL/draw in `exps`."""
        for first, last, tile in weight_tiles(self.weight, self.work, self.weight.shape[0]):
            exps[:, first:last].addmm_(x, tile.T, beta=0, alpha=self.gain)
        for start in range(0, x.shape[0], self.block):
            part = slice(start, min(start + self.block, x.shape[0]))
            self.rows(
                exps[part],
                labels[part, None],
                sums[:, part],
                None if top is None else top[part],
                unit[part] if store else None,
                None if late is None else late.rows(part),
            )

    def rows(
        self, z: Tensor, labels: Tensor, sums: Tensor, top: Tensor | None, unit: Tensor | None, late: Upstream | None
    ) -> None:
        """Whole rows z [b, V] with labels [b, 1]: their sums; with `unit`, z is overwritten by E or dL/draw."""
        spec, exps = self.spec, self.exps[: z.shape[0]]
        slopes = self.effective(z)
        if top is not None:
            torch.argmax(z, dim=1, out=top)
        target = z.gather(1, labels)
        z.sub_(torch.where(target.isfinite(), target, 0.0))
        if spec.label_smoothing:
            torch.sum(z, dim=1, out=sums[TOTAL])
        own = self.exponentials(z, labels, exps, sums)
        sums[TARGET] = target[:, 0]
        if spec.entropy:
            z.clamp_(min=LOWEST)
            torch.bmm(exps[:, None], z[:, :, None], out=sums[WEIGHTED, :, None, None])
        if unit is None:
            return
        if late is not None:
            stats = finish(sums, None, z.shape[1], spec, self.offset_unit)
            factors = coefficients(stats, late, z.shape[1], spec)
            inverse = (sums[OTHERS] + own).reciprocal_()
            self.gradient(z, labels, exps, slopes, factors, inverse, stats.log_sum)
            return
        lse = finish(sums, None, z.shape[1], spec, self.offset_unit).lse if spec.z_loss else None
        entry, unit[:] = target_entry(sums[OTHERS], own, lse, spec)
        exps.scatter_(1, labels, entry[:, None])
        if slopes is None:
            z.copy_(exps)
        else:
            torch.mul(exps, slopes, out=z)

    def effective(self, z: Tensor) -> Tensor | None:
        """z becomes the effective logits in place; with a softcap return 1 - tanh^2, from cosh so as not to cancel."""
        if self.bias is not None:
            z.add_(self.bias)
        if not self.spec.softcap:
            return None
        slopes = None
        if self.slopes is not None:
            slopes = torch.cosh(z, out=self.slopes[: z.shape[0]]).square_().reciprocal_()
        z.tanh_().mul_(self.spec.softcap / self.spec.temperature)
        return slopes

    def exponentials(self, z: Tensor, labels: Tensor, exps: Tensor, sums: Tensor) -> Tensor:
        """exps = exp(z) with 0 at the target, the rows' sums and offsets; return the target's own exponential [b]."""
        torch.exp(z, out=exps)
        own = exps.gather(1, labels)[:, 0]
        exps.scatter_(1, labels, 0.0)
        others = torch.sum(exps, dim=1, out=sums[OTHERS])
        sums[OFFSET] = 0.0
        safe = others < SAFE_SUM
        if not bool(safe.all()):
            again = (~safe).nonzero()[:, 0]
            offset = z[again].amax(1, keepdim=True)
            z[again] -= offset
            redone = z[again].exp()
            own[again] = redone.gather(1, labels[again])[:, 0]
            redone.scatter_(1, labels[again], 0.0)
            exps[again] = redone
            sums[OTHERS, again] = redone.sum(1)
            sums[OFFSET, again] = offset[:, 0]
        return own

    @staticmethod
    def gradient(
        z: Tensor,
        labels: Tensor,
        exps: Tensor,
        slopes: Tensor | None,
        factors: Coefficients,
        inverse: Tensor,
        log_sum: Tensor,
    ) -> None:
        """z [b, V], less reference and offset, is overwritten by dL/draw."""
        if factors.beta is None:
            torch.mul(exps, (factors.alpha * inverse)[:, None], out=z)
        else:
            z.mul_((factors.beta * inverse)[:, None])
            z.add_(((factors.alpha - factors.beta * log_sum) * inverse)[:, None]).mul_(exps)
        if factors.kappa is not None:
            z.add_(factors.kappa[:, None])
        z.scatter_(1, labels, factors.target[:, None])
        if slopes is not None:
            z.mul_(slopes)
