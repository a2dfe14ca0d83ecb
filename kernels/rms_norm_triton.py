"""RMSNorm on a GPU, with or without a residual that is added first: the kernels of rms_norm and add_rms_norm.

Short rows (heads) share a program, rows up to WIDEST_BLOCK are held in registers, longer ones are walked twice.
Backward is persistent where dW is wanted: as many programs as run at once, each with a partial row of dW, summed after.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.rows import NO_ROWS, processors, rows_of

WIDEST_BLOCK = 8192  # columns a program holds in registers; longer rows go through a loop over columns
LOOP_BLOCK = 4096
BACKWARD_LOOP_BLOCK, BACKWARD_LOOP_WARPS = 2048, 4
BACKWARD_WARPS = 8  # with x, dy, the scale and dW in registers, 4 warps would need over 160 registers a thread


def out_dtype(dtype: torch.dtype, weight: Tensor | None, cast: str) -> torch.dtype:
    """The type of the norm of an x of type `dtype`."""
    return dtype if weight is None or cast == "gemma" else torch.promote_types(dtype, weight.dtype)


@triton.jit
def _row_offsets(rows, inner, outer_stride, inner_stride):
    """Where each row starts; rows is int64, so the result is."""
    return ((rows // inner) * outer_stride + (rows % inner) * inner_stride)[:, None]


@triton.jit
def _load_scale(W, cols, mask, offset, LLAMA: tl.constexpr):
    """offset + weight in float32; under the llama cast the sum is rounded to the weight's type first, as torch does."""
    scale = tl.load(W + cols, mask=mask, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
    if LLAMA:
        scale = scale.to(W.dtype.element_ty).to(tl.float32)
    return scale


@triton.jit
def _load_total(X, R, TOTAL, x_at, r_at, mask):
    """x, or x + residual rounded to TOTAL's type where there is a residual."""
    x = tl.load(X + x_at, mask=mask, other=0.0)
    if R is not None:
        x = x.to(tl.float32) + tl.load(R + r_at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(TOTAL.dtype.element_ty)
    return x


@triton.jit
def _forward_kernel(
    X, R, W, Y, TOTAL, RSTD, n_rows, x_inner, x_outer_stride, x_inner_stride,
    r_inner, r_outer_stride, r_inner_stride, H, eps, offset,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises ROWS whole rows held in registers; R, the residual, and TOTAL are None together."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    live = rows < n_rows
    mask = live[:, None] & (cols < H)[None, :]
    x_at = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride) + cols[None, :]
    r_at = _row_offsets(rows, r_inner, r_outer_stride, r_inner_stride) + cols[None, :]
    out_at = rows[:, None] * H + cols[None, :]
    total = _load_total(X, R, TOTAL, x_at, r_at, mask)  # [ROWS, BLOCK]
    if R is not None:
        tl.store(TOTAL + out_at, total, mask=mask)
    x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + tl.cast(eps, tl.float32))
    tl.store(RSTD + rows, rstd, mask=live)
    y = x * rstd[:, None]
    if LLAMA:
        y = y.to(total.dtype).to(tl.float32)
    if W is not None:
        y = y * _load_scale(W, cols, cols < H, offset, LLAMA)[None, :]
    tl.store(Y + out_at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_wide_kernel(
    X, R, W, Y, TOTAL, RSTD, x_inner, x_outer_stride, x_inner_stride,
    r_inner, r_outer_stride, r_inner_stride, H, eps, offset,
    LLAMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises one long row, block by block; the second read of x and R comes from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    x_at = (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    r_at = (row // r_inner) * r_outer_stride + (row % r_inner) * r_inner_stride
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_total(X, R, TOTAL, x_at + cols, r_at + cols, cols < H).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / H + tl.cast(eps, tl.float32))
    tl.store(RSTD + row, rstd)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total = _load_total(X, R, TOTAL, x_at + cols, r_at + cols, cols < H)
        if R is not None:
            tl.store(TOTAL + row * H + cols, total, mask=cols < H)
        y = total.to(tl.float32) * rstd
        if LLAMA:
            y = y.to(total.dtype).to(tl.float32)
        if W is not None:
            y = y * _load_scale(W, cols, cols < H, offset, LLAMA)
        tl.store(Y + row * H + cols, y.to(Y.dtype.element_ty), mask=cols < H)


@triton.jit
def _backward_kernel(
    DY, ONTO, X, W, RSTD, DX, DW, n_rows, dy_inner, dy_outer_stride, dy_inner_stride,
    onto_inner, onto_outer_stride, onto_inner_stride, x_inner, x_outer_stride, x_inner_stride, H, offset,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program walks every num_programs-th block of ROWS rows and keeps its own row of DW: no atomics, one order.

    ONTO is a gradient that reaches x by another way and is added to DX, or None.
    """
    program = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    if W is not None:
        scale = _load_scale(W, cols, cols < H, offset, LLAMA)[None, :]
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for _ in range(program * ROWS, n_rows, step):
        live = rows < n_rows
        mask = live[:, None] & (cols < H)[None, :]
        x_at = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride) + cols[None, :]
        dy_at = _row_offsets(rows, dy_inner, dy_outer_stride, dy_inner_stride) + cols[None, :]
        rstd = tl.load(RSTD + rows, mask=live, other=0.0)[:, None]
        normed = tl.load(X + x_at, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(DY + dy_at, mask=mask, other=0.0).to(tl.float32)
        if DW is not None:
            dw += dy * normed
        if DX is not None:
            if W is not None:
                dy = dy * scale
            dx = rstd * (dy - normed * (tl.sum(dy * normed, axis=1) / H)[:, None])
            if ONTO is not None:
                onto_at = _row_offsets(rows, onto_inner, onto_outer_stride, onto_inner_stride) + cols[None, :]
                dx += tl.load(ONTO + onto_at, mask=mask, other=0.0).to(tl.float32)
            tl.store(DX + rows[:, None] * H + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
        rows += step
    if DW is not None:
        tl.store(DW + program.to(tl.int64) * H + cols, tl.sum(dw, axis=0), mask=cols < H)


@triton.jit
def _backward_wide_kernel(
    DY, ONTO, X, W, RSTD, DX, DW, n_rows, dy_inner, dy_outer_stride, dy_inner_stride,
    onto_inner, onto_outer_stride, onto_inner_stride, x_inner, x_outer_stride, x_inner_stride, H, offset,
    LLAMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _backward_kernel for long rows: two loops over the columns, and DW (zeros at the start) grows in memory."""
    program = tl.program_id(0)
    dw_row = DW + program.to(tl.int64) * H if DW is not None else None
    for index in range(program, n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        x_row = X + (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
        dy_row = DY + (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
        if ONTO is not None:
            onto_row = ONTO + (row // onto_inner) * onto_outer_stride + (row % onto_inner) * onto_inner_stride
        rstd = tl.load(RSTD + row)
        dots = tl.zeros([BLOCK], dtype=tl.float32)
        if DX is not None:
            for start in range(0, H, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                dy = tl.load(dy_row + cols, mask=cols < H, other=0.0).to(tl.float32)
                if W is not None:
                    dy = dy * _load_scale(W, cols, cols < H, offset, LLAMA)
                dots += dy * tl.load(x_row + cols, mask=cols < H, other=0.0).to(tl.float32)
        mean = tl.sum(dots, axis=0) * rstd / H
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            normed = tl.load(x_row + cols, mask=cols < H, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_row + cols, mask=cols < H, other=0.0).to(tl.float32)
            if DW is not None:
                dw = tl.load(dw_row + cols, mask=cols < H, other=0.0) + dy * normed
                tl.store(dw_row + cols, dw, mask=cols < H)
            if DX is not None:
                if W is not None:
                    dy = dy * _load_scale(W, cols, cols < H, offset, LLAMA)
                dx = rstd * (dy - normed * mean)
                if ONTO is not None:
                    dx += tl.load(onto_row + cols, mask=cols < H, other=0.0).to(tl.float32)
                tl.store(DX + row * H + cols, dx.to(DX.dtype.element_ty), mask=cols < H)
        tl.debug_barrier()  # the next row's loads of DW see this row's stores, whichever thread made them


def tiling(columns: int) -> tuple[int, int, int]:
    """(rows a program, block of columns, warps forward) for rows of `columns`; 0 rows means: loop over the columns."""
    if columns > WIDEST_BLOCK:
        return 0, LOOP_BLOCK, 8
    block = max(16, triton.next_power_of_2(columns))
    rows = min(64, max(1, 4096 // block))
    return rows, block, 8 if block > 4096 else 4


def forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, x + residual or else x, rstd), in one pass; residual has x's shape."""
    width = x.shape[-1]
    n_rows = x.numel() // width
    total = x
    if residual is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y = torch.empty(x.shape, dtype=out_dtype(total.dtype, weight, cast), device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return y, total, rstd
    x, x_rows = rows_of(x)
    sum_out = None if residual is None else total
    residual, residual_rows = (None, NO_ROWS) if residual is None else rows_of(residual)
    weight = None if weight is None else weight.contiguous()
    arguments = (*x_rows, *residual_rows, width, eps, offset, cast == "llama")
    rows, block, warps = tiling(width)
    with torch.cuda.device_of(x):
        if rows:
            _forward_kernel[(triton.cdiv(n_rows, rows),)](
                x, residual, weight, y, sum_out, rstd, n_rows, *arguments, ROWS=rows, BLOCK=block, num_warps=warps
            )
        else:
            _forward_wide_kernel[(n_rows,)](
                x, residual, weight, y, sum_out, rstd, *arguments, BLOCK=block, num_warps=warps
            )
    return y, total, rstd


def backward_triton(
    grad: Tensor,
    onto: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight), each where needed, of normed's gradient `grad`; `onto` is added to dx before it is rounded."""
    width = x.shape[-1]
    n_rows = x.numel() // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if n_rows == 0:
        return dx, torch.zeros_like(weight) if needs[1] and weight is not None else None
    x, x_rows = rows_of(x)
    grad, grad_rows = rows_of(grad)
    onto, onto_rows = (None, NO_ROWS) if onto is None else rows_of(onto)
    rows, block, _ = tiling(width)
    programs = triton.cdiv(n_rows, max(rows, 1))
    partial = None
    if needs[1]:  # one wave of programs, so that summing their partial rows stays small beside the pass over x
        programs = min(programs, processors(x.device) * (2 if block <= 4096 else 1))
        partial = torch.zeros(programs, width, dtype=torch.float32, device=x.device)
    weight_in = None if weight is None else weight.contiguous()
    tensors = (grad, onto, x, weight_in, rstd, dx, partial)
    arguments = (*tensors, n_rows, *grad_rows, *onto_rows, *x_rows, width, offset, cast == "llama")
    with torch.cuda.device_of(x):
        if rows:
            _backward_kernel[(programs,)](*arguments, ROWS=rows, BLOCK=block, num_warps=BACKWARD_WARPS)
        else:
            _backward_wide_kernel[(programs,)](*arguments, BLOCK=BACKWARD_LOOP_BLOCK, num_warps=BACKWARD_LOOP_WARPS)
    return dx, partial.sum(0).to(weight.dtype) if partial is not None and weight is not None else None
