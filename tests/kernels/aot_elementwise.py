"""The norm, rotation and gated-unit kernels as real models launch them."""

from importlib import import_module

import torch
from aot import Case

from burnish.kernels import glu
from burnish.kernels import qk_norm_rope_triton as qk
from burnish.kernels import rms_norm_triton as rms_norm

rope = import_module("burnish.kernels.rope")  # the package's attribute of this name is the op

ROWS = ("inner", "outer_stride", "inner_stride")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
R_STRIDES = ("r_outer_stride", "r_inner_stride")


def rows(name: str, levels: int = 1) -> tuple[dict[str, str], dict[str, int]]:
    """Types and folded values of the three integers that address the rows of tensor `name`."""
    inner, outer, level = (f"{name}_{part}" for part in ROWS)
    if levels == 1:  # the launch folds an integer that is 1
        return {outer: "i32:16", level: "i32:16"}, {inner: 1}
    return {inner: "i32", outer: "i32:16", level: "i32:16"}, {}


def place(signature: dict[str, str], constexprs: dict, dtype: str | None, *pointers: str) -> None:
    """Pointers of type `dtype`, or None in their places."""
    if dtype is None:
        constexprs |= dict.fromkeys(pointers)
    else:
        signature |= dict.fromkeys(pointers, f"*{dtype}")


def norm_forward(
    width: int, dtype: str, weight: str | None, cast: str = "llama", levels: int = 1, residual: bool = False
) -> Case:
    block_rows, block, warps = rms_norm.tiling(width)
    x_types, x_folded = rows("x", levels)
    r_types, r_folded = rows("r") if residual else ({}, dict(zip(("r_inner", *R_STRIDES), (1, 0, 0), strict=True)))
    signature = x_types | r_types | {"H": "i32:16", "eps": "fp32", "offset": "fp32"}
    signature |= {"X": f"*{dtype}", "Y": f"*{dtype}", "RSTD": "*fp32"}
    constexprs = x_folded | r_folded | {"LLAMA": cast == "llama", "BLOCK": block}
    place(signature, constexprs, dtype if residual else None, "R", "TOTAL")
    place(signature, constexprs, weight, "W")
    if block_rows:
        signature["n_rows"] = "i32"
        constexprs["ROWS"] = block_rows
    kernel = rms_norm._forward_kernel if block_rows else rms_norm._forward_wide_kernel
    name = f"{'add_' * residual}rms_norm forward {width} {dtype} w={weight} {cast}"
    return Case(name, kernel, signature, constexprs, warps)


def norm_backward(
    width: int, dtype: str, weight: str, frozen: bool = False, levels: int = 1, residual: bool = False
) -> Case:
    (block_rows, block, _), warps = rms_norm.tiling(width), rms_norm.BACKWARD_WARPS
    signature = {"H": "i32:16", "offset": "fp32", "n_rows": "i32", "W": f"*{weight}", "RSTD": "*fp32"}
    signature |= dict.fromkeys(("DY", "X", "DX"), f"*{dtype}")
    constexprs = {"LLAMA": True, "BLOCK": block}
    for name, depth in (("x", levels), ("dy", 1), ("onto", 1)):
        types, folded = rows(name, depth)
        if name == "onto" and not residual:
            types, folded = {}, {"onto_inner": 1, "onto_outer_stride": 0, "onto_inner_stride": 0}
        signature |= types
        constexprs |= folded
    place(signature, constexprs, dtype if residual else None, "ONTO")
    place(signature, constexprs, None if frozen else "fp32", "DW")
    if block_rows:
        constexprs["ROWS"] = block_rows
    else:
        constexprs["BLOCK"], warps = rms_norm.BACKWARD_LOOP_BLOCK, rms_norm.BACKWARD_LOOP_WARPS
    kernel = rms_norm._backward_kernel if block_rows else rms_norm._backward_wide_kernel
    name = f"{'add_' * residual}rms_norm backward {width} {dtype} frozen={frozen}"
    return Case(name, kernel, signature, constexprs, warps)


def qk_norm_rope(
    dtype: str,
    dim: int,
    rotated: int,
    heads: tuple[int, int] = (32, 8),
    *,
    backward: bool = False,
    frozen: bool = False,
    interleaved: bool = False,
    weight: str = "bf16",
    levels: int = 1,
) -> Case:
    signature = {"n_tokens": "i32", "q_programs": "i32", "eps": "fp32", "offset": "fp32"}
    like = [torch.empty(1, n, dim, dtype=TYPES[dtype], device="meta") for n in heads]
    constexprs = qk.constants(*like, rotated, qk.Settings(1e-6, 0.0, "llama", interleaved))
    warps = constexprs.pop("num_warps")
    signature |= dict.fromkeys(("Q", "K", "COS", "SIN"), f"*{dtype}") | dict.fromkeys(("QW", "KW"), f"*{weight}")
    pointers = ("DQ_OUT", "DK_OUT", "DQ", "DK") if backward else ("Q_OUT", "K_OUT")
    signature |= dict.fromkeys(pointers, f"*{dtype}")
    for name in ("q", "k", "table", *(("dq", "dk") if backward else ())):
        types, folded = rows(name, levels)
        signature |= types
        constexprs |= folded
        if name != "table":
            signature[f"{name}_head_stride"] = "i32:16"
    if backward:
        signature |= {"q_tiles": "i32", "k_tiles": "i32"}
        place(signature, constexprs, None if frozen else "fp32", "DQW", "DKW")
    name = f"qk_norm_rope {'backward' if backward else 'forward'} {dtype} {heads} {rotated}/{dim} w={weight}"
    name += f"{' frozen' * frozen}{' interleaved' * interleaved} levels={levels}"
    kernel = qk._backward_kernel if backward else qk._forward_kernel
    whole = dim == rotated and dim & (dim - 1) == 0  # others have smaller tiles, which gfx942's 256 threads cut finer
    return Case(name, kernel, signature, constexprs, warps, vector_loads=whole)


def rotation(dtype: str, dim: int, rotated: int, *, interleaved: bool = False, backward: bool = False) -> Case:
    q_heads, k_heads = 32, 8
    meta = rope.tiling(q_heads, dim, rotated)
    warps = meta.pop("num_warps")
    strides = [f"{name}_{level}_stride" for name in ("q", "k") for level in ("batch", "token", "head")]
    strides += [f"{name}_{level}_stride" for name in ("cos", "sin") for level in ("batch", "token")]
    signature = dict.fromkeys(strides, "i32:16") | {"T": "i32"}
    signature |= dict.fromkeys(("Q", "K", "COS", "SIN", "Q_OUT", "K_OUT"), f"*{dtype}")
    constexprs = meta | {"Q_HEADS": q_heads, "K_HEADS": k_heads, "D": dim, "R": rotated}
    constexprs |= {"INTERLEAVED": interleaved, "BACKWARD": backward}
    name = f"rope {'backward' if backward else 'forward'} {dtype} {rotated}/{dim}{' interleaved' * interleaved}"
    return Case(name, rope._rope_kernel, signature, constexprs, warps)


def gated(act: str, dtype: str, *, backward: bool, levels: int = 1, product: bool = False) -> Case:
    tensors = ("dy", "g", "u") if backward else ("g", "u")
    signature, constexprs = {"width": "i32:16"}, {"ACT": act, "BLOCK": glu.BLOCK}
    for name in tensors:
        types, folded = rows(name, levels)
        signature |= types
        constexprs |= folded
    pointers = ("DY", "G", "U", "DG", "DU") if backward else ("G", "U", "Y")
    signature |= dict.fromkeys(pointers, f"*{dtype}")
    if backward:
        place(signature, constexprs, dtype if product else None, "Y")
    kernel = glu._backward_kernel if backward else glu._forward_kernel
    name = f"glu {'backward' if backward else 'forward'} {act} {dtype} levels={levels}{' product' * product}"
    return Case(name, kernel, signature, constexprs, glu.WARPS)


def cases() -> list[Case]:
    return [
        norm_forward(4096, "bf16", "bf16"),
        norm_forward(4096, "bf16", "fp32", "gemma"),
        norm_forward(8192, "bf16", "bf16"),
        norm_forward(576, "fp32", "fp32"),
        norm_forward(128, "bf16", "bf16", levels=2),
        norm_forward(128, "fp16", None),
        norm_forward(16384, "bf16", "bf16"),
        norm_backward(4096, "bf16", "bf16"),
        norm_backward(4096, "bf16", "bf16", frozen=True),
        norm_backward(4096, "fp32", "fp32"),
        norm_backward(8192, "bf16", "bf16"),
        norm_backward(8192, "fp32", "fp32"),
        norm_backward(128, "bf16", "bf16", levels=2),
        norm_backward(16384, "bf16", "bf16"),
        norm_backward(16384, "fp32", "fp32"),
        norm_forward(4096, "bf16", "bf16", residual=True),
        norm_forward(1024, "bf16", "bf16", residual=True),
        norm_forward(16384, "bf16", "bf16", residual=True),
        norm_backward(4096, "bf16", "bf16", residual=True),
        norm_backward(4096, "bf16", "bf16", frozen=True, residual=True),
        norm_backward(1024, "bf16", "bf16", residual=True),
        norm_backward(8192, "bf16", "bf16", residual=True),
        norm_backward(16384, "bf16", "bf16", residual=True),
        qk_norm_rope("bf16", 128, 128),
        qk_norm_rope("bf16", 128, 128, levels=2),
        qk_norm_rope("bf16", 128, 128, weight="fp32"),
        qk_norm_rope("bf16", 256, 256, (8, 4)),
        qk_norm_rope("bf16", 80, 80, interleaved=True),
        qk_norm_rope("bf16", 256, 64, (16, 2)),
        qk_norm_rope("fp32", 64, 64, (9, 3), weight="fp32"),
        qk_norm_rope("bf16", 128, 128, backward=True),
        qk_norm_rope("bf16", 128, 128, backward=True, levels=2),
        qk_norm_rope("bf16", 128, 128, backward=True, frozen=True),
        qk_norm_rope("bf16", 256, 256, (8, 4), backward=True),
        qk_norm_rope("bf16", 80, 80, backward=True, interleaved=True),
        qk_norm_rope("bf16", 256, 64, (16, 2), backward=True),
        qk_norm_rope("bf16", 128, 64, (96, 8), backward=True),
        qk_norm_rope("bf16", 64, 64, (16, 2), backward=True),
        qk_norm_rope("bf16", 96, 96, backward=True),
        qk_norm_rope("fp32", 64, 64, (9, 3), backward=True, weight="fp32"),
        rotation("bf16", 128, 128),
        rotation("bf16", 128, 128, backward=True),
        rotation("bf16", 128, 128, interleaved=True),
        rotation("bf16", 256, 64),
        rotation("fp32", 64, 64),
        *(
            gated(act, "bf16", backward=back)
            for act in (glu.SILU, glu.GELU_TANH, glu.GELU_ERF)
            for back in (False, True)
        ),
        gated(glu.SILU, "bf16", backward=True, levels=2),
        gated(glu.SILU, "fp32", backward=True),
        gated(glu.SILU, "bf16", backward=True, product=True),
    ]
