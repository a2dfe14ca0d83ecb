"""The norm, rotation and gated-unit kernels as real models launch them."""

from importlib import import_module

from aot import Case

from burnish.kernels import glu

rms_norm = import_module("burnish.kernels.rms_norm")  # the package's attributes of these names are the ops
rope = import_module("burnish.kernels.rope")

ROWS = ("inner", "outer_stride", "inner_stride")


def rows(name: str, levels: int = 1) -> tuple[dict[str, str], dict[str, int]]:
    """Types and folded values of the three integers that address the rows of tensor `name`."""
    inner, outer, level = (f"{name}_{part}" for part in ROWS)
    if levels == 1:  # the launch folds an integer that is 1
        return {outer: "i32:16", level: "i32:16"}, {inner: 1}
    return {inner: "i32", outer: "i32:16", level: "i32:16"}, {}


def norm_forward(width: int, dtype: str, weight: str | None, cast: str = "llama", levels: int = 1) -> Case:
    block_rows, block, warps = rms_norm.tiling(width)
    signature, folded = rows("x", levels)
    signature |= {"X": f"*{dtype}", "Y": f"*{dtype}", "RSTD": "*fp32", "H": "i32:16", "eps": "fp32", "offset": "fp32"}
    constexprs = folded | {"LLAMA": cast == "llama", "BLOCK": block}
    if weight is None:
        constexprs["W"] = None
    else:
        signature["W"] = f"*{weight}"
    if block_rows:
        signature["n_rows"] = "i32"
        constexprs["ROWS"] = block_rows
    kernel = rms_norm._forward_kernel if block_rows else rms_norm._forward_wide_kernel
    return Case(f"rms_norm forward {width} {dtype} w={weight} {cast}", kernel, signature, constexprs, warps)


def norm_backward(width: int, dtype: str, weight: str, frozen: bool = False, levels: int = 1) -> Case:
    (block_rows, block, _), warps = rms_norm.tiling(width), rms_norm.BACKWARD_WARPS
    x_rows, x_folded = rows("x", levels)
    dy_rows, dy_folded = rows("dy")
    signature = x_rows | dy_rows | dict.fromkeys(("DY", "X", "DX"), f"*{dtype}")
    signature |= {"W": f"*{weight}", "RSTD": "*fp32", "n_rows": "i32", "H": "i32:16", "offset": "fp32"}
    constexprs = x_folded | dy_folded | {"LLAMA": True, "BLOCK": block}
    if frozen:
        constexprs["DW"] = None
    else:
        signature["DW"] = "*fp32"
    if block_rows:
        constexprs["ROWS"] = block_rows
    else:
        constexprs["BLOCK"], warps = rms_norm.BACKWARD_LOOP_BLOCK, 4
    kernel = rms_norm._backward_kernel if block_rows else rms_norm._backward_wide_kernel
    return Case(f"rms_norm backward {width} {dtype} frozen={frozen}", kernel, signature, constexprs, warps)


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


def gated(act: str, dtype: str, *, backward: bool, levels: int = 1) -> Case:
    tensors = ("dy", "g", "u") if backward else ("g", "u")
    signature, constexprs = {"width": "i32:16"}, {"ACT": act, "BLOCK": glu.BLOCK}
    for name in tensors:
        types, folded = rows(name, levels)
        signature |= types
        constexprs |= folded
    pointers = ("DY", "G", "U", "DG", "DU") if backward else ("G", "U", "Y")
    signature |= dict.fromkeys(pointers, f"*{dtype}")
    kernel = glu._backward_kernel if backward else glu._forward_kernel
    name = f"glu {'backward' if backward else 'forward'} {act} {dtype} levels={levels}"
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
    ]
