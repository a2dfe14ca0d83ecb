"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension (Zhang and Sennrich, 2019).

Both paths keep x and one float32 number a row (rstd) for backward, nothing else. With n = x * rstd and
s = offset + weight: dx = rstd * (s*dy - n * mean(s*dy*n)) and ds = sum over rows of dy*n.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once
from burnish.kernels.rows import processors, rows_of

CASTS = ("llama", "gemma")
WIDEST_BLOCK = 8192  # columns a program holds in registers; longer rows go through a loop over columns
LOOP_BLOCK = 4096
BACKWARD_LOOP_BLOCK = 2048
BACKWARD_WARPS = 8  # with x, dy, the scale and dW in registers, 4 warps would need over 160 registers a thread


def rms_norm_definition(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama"
) -> Tensor:
    """The op in plain torch, in any floating type; see `rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "llama":
        return _scale(weight, offset) * normed.to(x.dtype)
    return (normed * _scale(weight.to(wide), offset)).to(x.dtype)


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight + offset if offset else weight


def _out_dtype(x: Tensor, weight: Tensor | None, cast: str) -> torch.dtype:
    return x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)


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
def _forward_kernel(
    X, W, Y, RSTD, n_rows, x_inner, x_outer_stride, x_inner_stride, H, eps, offset,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises ROWS whole rows held in registers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    live = rows < n_rows
    mask = live[:, None] & (cols < H)[None, :]
    x = tl.load(X + _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride) + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)  # [ROWS, BLOCK]
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + tl.cast(eps, tl.float32))
    tl.store(RSTD + rows, rstd, mask=live)
    y = x * rstd[:, None]
    if LLAMA:
        y = y.to(X.dtype.element_ty).to(tl.float32)
    if W is not None:
        y = y * _load_scale(W, cols, cols < H, offset, LLAMA)[None, :]
    tl.store(Y + rows[:, None] * H + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_wide_kernel(
    X, W, Y, RSTD, x_inner, x_outer_stride, x_inner_stride, H, eps, offset,
    LLAMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalises one long row, block by block; the second read of x comes from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    x_row = X + (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + cols, mask=cols < H, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / H + tl.cast(eps, tl.float32))
    tl.store(RSTD + row, rstd)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x_row + cols, mask=cols < H, other=0.0).to(tl.float32) * rstd
        if LLAMA:
            y = y.to(X.dtype.element_ty).to(tl.float32)
        if W is not None:
            y = y * _load_scale(W, cols, cols < H, offset, LLAMA)
        tl.store(Y + row * H + cols, y.to(Y.dtype.element_ty), mask=cols < H)


@triton.jit
def _backward_kernel(
    DY, X, W, RSTD, DX, DW, n_rows, dy_inner, dy_outer_stride, dy_inner_stride,
    x_inner, x_outer_stride, x_inner_stride, H, offset,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program walks every num_programs-th block of ROWS rows and keeps its own row of DW: no atomics, one order."""
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
            tl.store(DX + rows[:, None] * H + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
        rows += step
    if DW is not None:
        tl.store(DW + program.to(tl.int64) * H + cols, tl.sum(dw, axis=0), mask=cols < H)


@triton.jit
def _backward_wide_kernel(
    DY, X, W, RSTD, DX, DW, n_rows, dy_inner, dy_outer_stride, dy_inner_stride,
    x_inner, x_outer_stride, x_inner_stride, H, offset,
    LLAMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _backward_kernel for long rows: two loops over the columns, and DW (zeros at the start) grows in memory."""
    program = tl.program_id(0)
    row = program.to(tl.int64)
    dw_row = DW + row * H if DW is not None else None
    for _ in range(program, n_rows, tl.num_programs(0)):
        x_row = X + (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
        dy_row = DY + (row // dy_inner) * dy_outer_stride + (row % dy_inner) * dy_inner_stride
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
                tl.store(DX + row * H + cols, dx.to(DX.dtype.element_ty), mask=cols < H)
        tl.debug_barrier()  # the next row's loads of DW see this row's stores, whichever thread made them
        row += tl.num_programs(0)


def tiling(columns: int) -> tuple[int, int, int]:
    """(rows a program, block of columns, warps forward) for rows of `columns`; 0 rows means: loop over the columns."""
    if columns > WIDEST_BLOCK:
        return 0, LOOP_BLOCK, 8
    block = max(16, triton.next_power_of_2(columns))
    rows = min(64, max(1, 4096 // block))
    return rows, block, 8 if block > 4096 else 4


def _forward_triton(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    n_rows = x.numel() // width
    y = torch.empty(x.shape, dtype=_out_dtype(x, weight, cast), device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return y, rstd
    x, x_rows = rows_of(x)
    weight = None if weight is None else weight.contiguous()
    rows, block, warps = tiling(width)
    llama = cast == "llama"
    with torch.cuda.device_of(x):
        if rows:
            _forward_kernel[(triton.cdiv(n_rows, rows),)](
                x, weight, y, rstd, n_rows, *x_rows, width, eps, offset,
                LLAMA=llama, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            _forward_wide_kernel[(n_rows,)](
                x, weight, y, rstd, *x_rows, width, eps, offset, LLAMA=llama, BLOCK=block, num_warps=warps
            )
    return y, rstd


def _backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    width = x.shape[-1]
    n_rows = x.numel() // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if n_rows == 0:
        return dx, torch.zeros_like(weight) if needs[1] and weight is not None else None
    x, x_rows = rows_of(x)
    grad, grad_rows = rows_of(grad)
    rows, block, _ = tiling(width)
    programs = triton.cdiv(n_rows, max(rows, 1))
    partial = None
    if needs[1]:  # one wave of programs, so that summing their partial rows stays small beside the pass over x
        programs = min(programs, processors(x.device) * (2 if block <= 4096 else 1))
        partial = torch.zeros(programs, width, dtype=torch.float32, device=x.device)
    weight_in = None if weight is None else weight.contiguous()
    arguments = (grad, x, weight_in, rstd, dx, partial, n_rows, *grad_rows, *x_rows, width, offset, cast == "llama")
    with torch.cuda.device_of(x):
        if rows:
            _backward_kernel[(programs,)](*arguments, ROWS=rows, BLOCK=block, num_warps=BACKWARD_WARPS)
        else:
            _backward_wide_kernel[(programs,)](*arguments, BLOCK=BACKWARD_LOOP_BLOCK, num_warps=4)
    return dx, partial.sum(0).to(weight.dtype) if partial is not None and weight is not None else None


def _forward_torch(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """The definition's arithmetic, step for step, in one buffer: bit for bit what transformers' modules give."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    y = torch.mul(x_wide, x_wide)
    rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
    torch.mul(x_wide, rstd, out=y)
    if weight is not None and cast == "gemma":
        y.mul_(_scale(weight.to(wide), offset))
    y = y.to(x.dtype)
    if weight is not None and cast == "llama":
        scale = _scale(weight, offset)
        y = y.mul_(scale) if torch.promote_types(y.dtype, scale.dtype) == y.dtype else y * scale
    return y, rstd


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, cast: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """One buffer of x's size; both sums are products with vectors: dW = rstd @ (dy*x), mean = (dy*x) @ scale."""
    width = x.shape[-1]
    x_rows = x.to(rstd.dtype).reshape(-1, width)  # [N, H]
    dy = grad.to(rstd.dtype).reshape(-1, width)
    rstd = rstd.reshape(-1, 1)  # [N, 1]
    buffer = dy * x_rows
    dw = torch.mm(rstd.t(), buffer)[0].to(weight.dtype) if weight is not None and needs[1] else None
    if not needs[0]:
        return None, dw
    if weight is None:
        mean = buffer.sum(-1, keepdim=True)
    else:
        scale = _scale(weight if cast == "llama" else weight.to(rstd.dtype), offset).to(rstd.dtype)
        mean = torch.mv(buffer, scale).unsqueeze(1)
    mean.mul_(rstd).mul_(rstd).div_(-width)
    torch.mul(x_rows, mean, out=buffer)
    if weight is None:
        buffer.add_(dy)
    else:
        buffer.addcmul_(dy, scale)
    return buffer.mul_(rstd).to(x.dtype).view(x.shape), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, backend: str
    ) -> Tensor:
        run = _forward_triton if backend == "triton" else _forward_torch
        y, rstd = run(x, weight, eps, offset, cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast, ctx.backend = offset, cast, backend
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_triton if ctx.backend == "triton" else _backward_torch
        x, weight, rstd = ctx.saved_tensors
        dx, dw = run(grad, x, weight, rstd, ctx.offset, ctx.cast, ctx.needs_input_grad[:2])
        return dx, dw, None, None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "llama") -> Tensor:
    """Root-mean-square norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    x       [..., H] of any strides; float32, bfloat16 or float16 (float64 outside Triton)
    weight  [H], of any of these types, or None for a norm without a scale (offset is then ignored)
    eps     added to the mean of squares
    offset  added to the weight: 1.0 for Gemma's norms, which store weight - 1
    cast    where the result is rounded when x is narrower than float32.
            "llama": x * rstd is rounded to x's type, then multiplied; the result has the type to which torch
            promotes weight and x (transformers' LlamaRMSNorm, Qwen2, Mistral, ...).
            "gemma": everything in float32, rounded to x's type once, at the end (Gemma2RMSNorm with offset 1;
            Olmo2RMSNorm with offset 0).

    Returns [..., H]. On the CPU the result equals transformers' modules bit for bit. Gradients flow to x and weight,
    each computed only where it is needed, accumulated in float32 (float64 for float64) in a fixed order. Saved for
    backward: x itself, and rstd, one number a row. The gradient can't be differentiated again.
    Raises ValueError for an unknown cast, an empty last dimension, or a weight that is not [H].
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the gradient is derived above.
    """
    if cast not in CASTS:
        raise ValueError(f"rms_norm: unknown cast {cast!r}, use one of {', '.join(CASTS)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm: x needs a last dimension that is not empty, got shape {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    backend = backend_for(x)
    if backend == "reference":
        return rms_norm_definition(x, weight, eps, offset=offset, cast=cast)
    return _RMSNorm.apply(x, weight, eps, offset, cast, backend)
