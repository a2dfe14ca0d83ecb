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
        self.logits = torch.empty(rows, vocab, dtype=torch.float32, device=weight.device)
        self.exps = torch.empty(self.block, vocab, dtype=torch.float32, device=weight.device)
        self.slopes = torch.empty_like(self.exps) if spec.softcap and store else None

    def __call__(
        self,
        x: Tensor,
        labels: Tensor,
        sums: Tensor,
        top: Tensor | None,
        upstream: Upstream | None,
        known: Stats | None,
    ) -> tuple[Tensor, None]:
        """Fill `sums` [5, rows] and `top`; with `upstream`, return dL/draw [rows, V]."""
        logits = self.logits[: x.shape[0]]
        for first, last, tile in weight_tiles(self.weight, self.work, self.weight.shape[0]):
            logits[:, first:last].addmm_(x, tile.T, beta=0, alpha=self.gain)
        for start in range(0, x.shape[0], self.block):
            part = slice(start, min(start + self.block, x.shape[0]))
            given = None if upstream is None or not self.store else upstream.rows(part)
            self.rows(logits[part], labels[part, None], sums[:, part], None if top is None else top[part], given)
        return logits, None

    def rows(self, z: Tensor, labels: Tensor, sums: Tensor, top: Tensor | None, upstream: Upstream | None) -> None:
        """Whole rows z [b, V] with labels [b, 1]: their sums; with `upstream`, z is overwritten by dL/draw."""
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
        if upstream is None:
            return
        stats = finish(sums, None, z.shape[1], spec, self.offset_unit)
        factors = coefficients(stats, upstream, z.shape[1], spec)
        inverse = (sums[OTHERS] + own).reciprocal_()
        self.gradient(z, labels, exps, slopes, factors, inverse, stats.log_sum)

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
