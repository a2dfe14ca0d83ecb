"""The kernels of qk_norm_rope: heads of q and k in tiles of ROWS, whatever the number of heads, one launch a direction.

A row is one head of one token, in three pieces: the first places of the rotated pairs and the second ones, HALF columns
each, and the REST that stays unrotated. Tables are read row by row: heads of one token find them in the L1 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.rms_norm_triton import out_dtype
from burnish.kernels.rope import load_pairs, store_pairs
from burnish.kernels.rows import NO_ROWS, Rows, heads_of, processors, rows_of

TILE_BYTES = 8192  # of q or k that a program holds at a time
WARPS = 4
PROGRAMS = 3  # a processor, where dW is wanted: as many as their registers let run side by side

Pair = tuple[Tensor | None, Tensor | None]


class Settings(NamedTuple):
    """What the arithmetic depends on besides the tensors."""

    eps: float
    offset: float
    cast: str
    interleaved: bool


@triton.jit
def _tile_rows(tile, n_tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of each row of a tile, int64, and which exist: row r is head r % HEADS of token r // HEADS."""
    first = tl.cast(tile, tl.int64) * ROWS
    place = (first % HEADS).to(tl.int32) + tl.arange(0, ROWS)
    tokens = first // HEADS + place // HEADS
    return tokens, (place % HEADS).to(tl.int64), (tokens < n_tokens)[:, None]


@triton.jit
def _starts(tokens, rows):
    """Where the rows of `tokens` start, by (inner, outer_stride, inner_stride) of rows.py."""
    return ((tokens // rows[0]) * rows[1] + (tokens % rows[0]) * rows[2])[:, None]


@triton.jit
def _load_rest(P, offsets, mask, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr):
    cols = R + tl.arange(0, REST)[None, :]
    return tl.load(P + offsets + cols, mask=mask & (cols < D), other=0.0).to(tl.float32)


@triton.jit
def _store_rest(P, offsets, mask, rest, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr):
    cols = R + tl.arange(0, REST)[None, :]
    tl.store(P + offsets + cols, rest.to(P.dtype.element_ty), mask=mask & (cols < D))


@triton.jit
def _add_offset(weight, W, offset, LLAMA: tl.constexpr):
    """offset + weight; under the llama cast rounded to the weight's type, as torch does."""
    scale = weight + tl.cast(offset, tl.float32)
    if LLAMA:
        scale = scale.to(W.dtype.element_ty).to(tl.float32)
    return scale


@triton.jit
def _load_scales(
    W, offset, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """offset + weight of the three pieces, [1, HALF], [1, HALF] and [1, REST]."""
    zero = tl.zeros([1, 1], dtype=tl.int64)
    always = tl.full([1, 1], True, dtype=tl.int1)
    w1, w2 = load_pairs(W, zero, always, R, HALF, INTERLEAVED)
    w3 = _load_rest(W, zero, always, D, R, REST)
    return _add_offset(w1, W, offset, LLAMA), _add_offset(w2, W, offset, LLAMA), _add_offset(w3, W, offset, LLAMA)


@triton.jit
def _scaled(n, w, X, OUT, SCALE: tl.constexpr, LLAMA: tl.constexpr):
    """n * w with rms_norm's roundings, OUT's type at the end."""
    if LLAMA:
        n = n.to(X.dtype.element_ty).to(tl.float32)
    if SCALE:
        n = n * w
    return n.to(OUT.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward_tile(
    X, W, OUT, COS, SIN, tile, n_tokens, x_rows, x_head_stride, table_rows, eps, offset,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """OUT is contiguous [n_tokens, HEADS, D]."""
    tokens, heads, live = _tile_rows(tile, n_tokens, HEADS, ROWS)
    x_at = _starts(tokens, x_rows) + heads[:, None] * x_head_stride
    table_at = _starts(tokens, table_rows)
    out_at = (tokens * HEADS + heads)[:, None] * D
    x1, x2 = load_pairs(X, x_at, live, R, HALF, INTERLEAVED)  # [ROWS, HALF]
    c1, c2 = load_pairs(COS, table_at, live, R, HALF, INTERLEAVED)
    s1, s2 = load_pairs(SIN, table_at, live, R, HALF, INTERLEAVED)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
    if D > R:
        x3 = _load_rest(X, x_at, live, D, R, REST)
        squares += tl.sum(x3 * x3, axis=1)
    rstd = tl.rsqrt(squares / D + tl.cast(eps, tl.float32))[:, None]
    w1, w2, w3 = 0.0, 0.0, 0.0
    if W is not None:
        w1, w2, w3 = _load_scales(W, offset, D, R, REST, HALF, INTERLEAVED, LLAMA)
    y1 = _scaled(x1 * rstd, w1, X, OUT, W is not None, LLAMA)
    y2 = _scaled(x2 * rstd, w2, X, OUT, W is not None, LLAMA)
    store_pairs(OUT, out_at, live, y1 * c1 - y2 * s1, y2 * c2 + y1 * s2, R, HALF, INTERLEAVED)
    if D > R:
        _store_rest(OUT, out_at, live, _scaled(x3 * rstd, w3, X, OUT, W is not None, LLAMA), D, R, REST)


@triton.jit
def _forward_kernel(
    Q, K, QW, KW, Q_OUT, K_OUT, COS, SIN, n_tokens, q_programs, q_inner, q_outer_stride, q_inner_stride, q_head_stride,
    k_inner, k_outer_stride, k_inner_stride, k_head_stride, table_inner, table_outer_stride, table_inner_stride,
    eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs have a tile of q each, the others one of k."""
    program = tl.program_id(0)
    table_rows = (table_inner, table_outer_stride, table_inner_stride)
    if Q is not None and program < q_programs:
        _forward_tile(
            Q, QW, Q_OUT, COS, SIN, program, n_tokens, (q_inner, q_outer_stride, q_inner_stride), q_head_stride,
            table_rows, eps, offset, Q_HEADS, D, R, REST, HALF, ROWS, INTERLEAVED, LLAMA,
        )  # fmt: skip
    if K is not None and program >= q_programs:
        _forward_tile(
            K, KW, K_OUT, COS, SIN, program - q_programs, n_tokens, (k_inner, k_outer_stride, k_inner_stride),
            k_head_stride, table_rows, eps, offset, K_HEADS, D, R, REST, HALF, ROWS, INTERLEAVED, LLAMA,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    DY, X, W, DX, DW, COS, SIN, program, programs, n_tiles, n_tokens, dy_rows, dy_head_stride, x_rows, x_head_stride,
    table_rows, eps, offset,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """Every programs-th tile from tile `program` on; row `program` of DW is the sum over them. DX or DW may be None."""
    if W is not None:
        w1, w2, w3 = _load_scales(W, offset, D, R, REST, HALF, INTERLEAVED, LLAMA)
    dw1 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    dw2 = tl.zeros([ROWS, HALF], dtype=tl.float32)
    dw3 = tl.zeros([ROWS, REST], dtype=tl.float32)
    for tile in range(program, n_tiles, programs):
        tokens, heads, live = _tile_rows(tile, n_tokens, HEADS, ROWS)
        x_at = _starts(tokens, x_rows) + heads[:, None] * x_head_stride
        dy_at = _starts(tokens, dy_rows) + heads[:, None] * dy_head_stride
        table_at = _starts(tokens, table_rows)
        x1, x2 = load_pairs(X, x_at, live, R, HALF, INTERLEAVED)  # [ROWS, HALF]
        dy1, dy2 = load_pairs(DY, dy_at, live, R, HALF, INTERLEAVED)
        c1, c2 = load_pairs(COS, table_at, live, R, HALF, INTERLEAVED)
        s1, s2 = load_pairs(SIN, table_at, live, R, HALF, INTERLEAVED)
        z1 = dy1 * c1 + dy2 * s2
        z2 = dy2 * c2 - dy1 * s1
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
        if D > R:
            x3 = _load_rest(X, x_at, live, D, R, REST)
            z3 = _load_rest(DY, dy_at, live, D, R, REST)
            squares += tl.sum(x3 * x3, axis=1)
        rstd = tl.rsqrt(squares / D + tl.cast(eps, tl.float32))[:, None]
        if DW is not None:
            dw1 += z1 * (x1 * rstd)
            dw2 += z2 * (x2 * rstd)
            if D > R:
                dw3 += z3 * (x3 * rstd)
        if DX is not None:
            if W is not None:
                z1 = z1 * w1
                z2 = z2 * w2
            dots = tl.sum(z1 * x1 + z2 * x2, axis=1)
            if D > R:
                if W is not None:
                    z3 = z3 * w3
                dots += tl.sum(z3 * x3, axis=1)
            mean = dots[:, None] * rstd / D
            out_at = (tokens * HEADS + heads)[:, None] * D
            dx1 = rstd * (z1 - x1 * rstd * mean)
            dx2 = rstd * (z2 - x2 * rstd * mean)
            store_pairs(DX, out_at, live, dx1, dx2, R, HALF, INTERLEAVED)
            if D > R:
                _store_rest(DX, out_at, live, rstd * (z3 - x3 * rstd * mean), D, R, REST)
    if DW is not None:
        at = tl.zeros([1, 1], dtype=tl.int64) + tl.cast(program, tl.int64) * D
        always = tl.full([1, 1], True, dtype=tl.int1)
        store_pairs(DW, at, always, tl.sum(dw1, axis=0)[None, :], tl.sum(dw2, axis=0)[None, :], R, HALF, INTERLEAVED)
        if D > R:
            _store_rest(DW, at, always, tl.sum(dw3, axis=0)[None, :], D, R, REST)


@triton.jit
def _backward_kernel(
    DQ_OUT, DK_OUT, Q, K, QW, KW, DQ, DK, DQW, DKW, COS, SIN, n_tokens, q_programs, q_tiles, k_tiles,
    dq_inner, dq_outer_stride, dq_inner_stride, dq_head_stride,
    dk_inner, dk_outer_stride, dk_inner_stride, dk_head_stride,
    q_inner, q_outer_stride, q_inner_stride, q_head_stride, k_inner, k_outer_stride, k_inner_stride, k_head_stride,
    table_inner, table_outer_stride, table_inner_stride, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs walk the tiles of q, the others those of k. No atomics, one order of sums."""
    program = tl.program_id(0)
    table_rows = (table_inner, table_outer_stride, table_inner_stride)
    if Q is not None and program < q_programs:
        _backward_tiles(
            DQ_OUT, Q, QW, DQ, DQW, COS, SIN, program, q_programs, q_tiles, n_tokens,
            (dq_inner, dq_outer_stride, dq_inner_stride), dq_head_stride,
            (q_inner, q_outer_stride, q_inner_stride), q_head_stride,
            table_rows, eps, offset, Q_HEADS, D, R, REST, HALF, ROWS, INTERLEAVED, LLAMA,
        )  # fmt: skip
    if K is not None and program >= q_programs:
        _backward_tiles(
            DK_OUT, K, KW, DK, DKW, COS, SIN, program - q_programs, tl.num_programs(0) - q_programs, k_tiles,
            n_tokens, (dk_inner, dk_outer_stride, dk_inner_stride), dk_head_stride,
            (k_inner, k_outer_stride, k_inner_stride), k_head_stride,
            table_rows, eps, offset, K_HEADS, D, R, REST, HALF, ROWS, INTERLEAVED, LLAMA,
        )  # fmt: skip


def tiling(dim: int, rotated: int, itemsize: int) -> dict[str, int]:
    """The kernels' block sizes for heads of `dim` elements of `itemsize` bytes, of which `rotated` turn."""
    half = triton.next_power_of_2(rotated // 2)
    rest = triton.next_power_of_2(dim - rotated) if dim > rotated else 0
    tile = TILE_BYTES if 2 * half == dim else TILE_BYTES // 2  # padding and a third piece take registers too
    rows = max(1, tile // (itemsize * triton.next_power_of_2(2 * half + rest)))
    return {"HALF": half, "REST": max(rest, 1), "ROWS": rows}


def _addresses(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """x [..., T, heads, D] and the four integers that address its rows; zeros of None."""
    if x is None:
        return None, (*NO_ROWS, 0)
    x, rows, head_stride = heads_of(x)
    return x, (*rows, head_stride)


def _tables(cos: Tensor, sin: Tensor, lead: torch.Size) -> tuple[Tensor, Tensor, Rows]:
    """cos and sin with a row for every token, and the address of both; broadcast dimensions are not copied."""
    cos, sin = (table.expand(*lead, table.shape[-1]) for table in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    (cos, rows), (sin, _) = rows_of(cos), rows_of(sin)
    return cos, sin, rows


def constants(q: Tensor, k: Tensor, rotated: int, settings: Settings) -> dict[str, int]:
    """The kernels' compile-time arguments."""
    heads, dim = q.shape[-2:]
    sizes = {"Q_HEADS": heads, "K_HEADS": k.shape[-2], "D": dim, "R": rotated}
    sizes |= {"INTERLEAVED": settings.interleaved, "LLAMA": settings.cast == "llama", "num_warps": WARPS}
    return sizes | tiling(dim, rotated, max(q.element_size(), k.element_size()))


def forward_triton(
    q: Tensor, k: Tensor, weights: Pair, cos: Tensor, sin: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """q and k normed and rotated; nothing is left to keep."""
    outs = [
        torch.empty(x.shape, dtype=out_dtype(x.dtype, weight, settings.cast), device=x.device)
        for x, weight in zip((q, k), weights, strict=True)
    ]
    lead, heads = q.shape[:-2], [q.shape[-2], k.shape[-2]]
    meta = constants(q, k, cos.shape[-1], settings)
    tiles = [triton.cdiv(lead.numel() * n, meta["ROWS"]) for n in heads]
    if sum(tiles) == 0:
        return outs[0], outs[1]
    *tables, table_rows = _tables(cos, sin, lead)
    (q_in, q_rows), (k_in, k_rows) = (_addresses(x if x.shape[-2] else None) for x in (q, k))
    scales = [None if weight is None else weight.contiguous() for weight in weights]
    with torch.cuda.device_of(q):
        _forward_kernel[(sum(tiles),)](
            q_in, k_in, *scales, *outs, *tables, lead.numel(), tiles[0],
            *q_rows, *k_rows, *table_rows, settings.eps, settings.offset, **meta,
        )  # fmt: skip
    return outs[0], outs[1]


def backward_triton(
    grads: Pair,
    q: Tensor,
    k: Tensor,
    weights: Pair,
    cos: Tensor,
    sin: Tensor,
    settings: Settings,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dq_weight, dk_weight: each where `needs`, in this order, says so and its output has a gradient."""
    xs, lead = (q, k), q.shape[:-2]
    meta = constants(q, k, cos.shape[-1], settings)
    given = [grad is not None for grad in grads]
    dxs = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and there else None
        for x, need, there in zip(xs, needs[:2], given, strict=True)
    ]
    tiles = [
        triton.cdiv(x.shape[:-1].numel(), meta["ROWS"]) if there else 0 for x, there in zip(xs, given, strict=True)
    ]
    programs, partials = tiles, [None, None]
    if any(needs[2:]):  # as many programs as run at once, the tiles shared out alike
        share = max(1, triton.cdiv(sum(tiles), PROGRAMS * processors(q.device)))
        programs = [triton.cdiv(count, share) for count in tiles]
        partials = [
            torch.empty(count, q.shape[-1], dtype=torch.float32, device=q.device) if need and there else None
            for count, need, there in zip(programs, needs[2:], given, strict=True)
        ]
    if sum(tiles):
        *tables, table_rows = _tables(cos, sin, lead)
        ins = [_addresses(x if count else None) for pair in (grads, xs) for x, count in zip(pair, tiles, strict=True)]
        scales = [None if weight is None else weight.contiguous() for weight in weights]
        with torch.cuda.device_of(q):
            _backward_kernel[(sum(programs),)](
                *(x for x, _ in ins), *scales, *dxs, *partials, *tables, lead.numel(), programs[0], *tiles,
                *(number for _, rows in ins for number in rows), *table_rows,
                settings.eps, settings.offset, **meta,
            )  # fmt: skip
    dws = [
        None if partial is None or weight is None else partial.sum(0).to(weight.dtype)
        for partial, weight in zip(partials, weights, strict=True)
    ]
    return *dxs, *dws
