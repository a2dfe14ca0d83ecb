"""The head's gradients from E: two GEMMs a chunk, every upstream factor in a vector of rows.

With dL/draw = slope g_i (unit_i E_ij + constant) (see head_chunks), dX = v (E W) + k colsum(W) and
dW = E^T (v X) + sum_i k_i X_i in every row, where v = slope g unit and k = slope g constant: the constant, which label
smoothing leaves, never becomes a matrix.
"""

import torch
from torch import Tensor

from burnish.kernels.head_chunks import Grads, HeadSpec, addmm_f32, mm_f32, weight_tiles, work_dtype


class Gradients:
    """The gradients of one sweep, added up chunk by chunk; the weight's and the bias's in float32."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: HeadSpec,
        needs: tuple[bool, ...],
        rows: int,
        even: bool,
    ):
        self.matrix, self.slope = weight, spec.slope
        self.constant = -spec.label_smoothing / weight.shape[0] if even else 0.0  # smoothing's part of every dL/dz / g
        n, work, device = x.shape[0], work_dtype(x, weight), x.device
        one_chunk = n <= rows and weight.dtype == work and not self.constant
        new = torch.zeros if n == 0 else torch.empty
        self.x = torch.empty(x.shape, dtype=x.dtype, device=device) if needs[0] else None
        dtype = weight.dtype if one_chunk else torch.float32
        self.weight = new(weight.shape, dtype=dtype, device=device) if needs[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=device) if needs[2] else None
        self.columns = self.common = None
        if self.constant and needs[0]:
            self.columns = column_sums(weight, work)  # [H]
        if self.constant and needs[1]:
            self.common = torch.zeros(weight.shape[1], dtype=torch.float32, device=device)  # [H], of every row of dW

    def add(self, part: slice, exps: Tensor, unit: Tensor | None, upstream: Tensor, x_part: Tensor) -> None:
        """One chunk: dL/draw = slope g (unit E + constant), or E itself where `unit` is None."""
        scale = even = None  # [rows]: factors of E, and of a matrix of ones
        scaled = x_part
        if unit is not None:
            g = upstream * self.slope
            scale = g * unit
            scaled = (x_part * scale[:, None]).to(x_part.dtype)
            even = g * self.constant if self.constant else None
        if self.x is not None:
            _input_gradient(exps, scale, even, self.columns, self.matrix, self.x[part])
        if self.bias is not None:
            self._add_bias(exps, scale, even)
        if self.weight is None:
            return
        if part.start:
            addmm_f32(self.weight, exps.T, scaled)
        elif self.weight.dtype == exps.dtype:
            torch.mm(exps.T, scaled, out=self.weight)
        else:
            mm_f32(exps.T, scaled, out=self.weight)
        if even is not None:
            self.common += torch.mv(x_part.T.float(), even)

    def _add_bias(self, exps: Tensor, scale: Tensor | None, even: Tensor | None) -> None:
        assert self.bias is not None
        if scale is None:
            self.bias += exps.sum(0, dtype=torch.float32)
            return
        line = torch.empty(1, exps.shape[1], dtype=torch.float32, device=exps.device)
        self.bias += mm_f32(scale.to(exps.dtype)[None], exps, out=line)[0]
        if even is not None:
            self.bias += even.sum()

    def result(self) -> Grads:
        if self.weight is not None and self.common is not None:
            self.weight += self.common
        return Grads(self.x, self.weight, self.bias)


def column_sums(weight: Tensor, work: torch.dtype) -> Tensor:
    """Sum over the vocabulary of weight [V, H] in float32, [H]."""
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for _, _, tile in weight_tiles(weight, work, weight.shape[0]):
        total += tile.sum(0, dtype=torch.float32)
    return total


def _input_gradient(
    exps: Tensor, scale: Tensor | None, even: Tensor | None, columns: Tensor | None, weight: Tensor, out: Tensor
) -> None:
    """out [rows, H] = scale[:, None] * (exps @ weight) + even[:, None] * columns."""
    total = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    for first, last, tile in weight_tiles(weight, exps.dtype, weight.shape[0]):
        if first:
            addmm_f32(total, exps[:, first:last], tile)
        else:
            mm_f32(exps[:, first:last], tile, out=total)
    if scale is not None:
        total.mul_(scale[:, None])
    if even is not None and columns is not None:
        total.addr_(even, columns)
    if total is not out:
        out.copy_(total)
