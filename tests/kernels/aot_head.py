"""The kernels between the head's GEMMs as real models launch them (vocabulary 128256 in tiles of 16384 columns)."""

from aot import Case

from burnish.kernels import head_triton as head

SCALARS = {"scale": "fp32", "softcap": "fp32", "inverse_temperature": "fp32"}
PARTS = {"parts_ptr": "*fp32", "plane": "i32:16", "best_ptr": "*i32", "blocks": "i32:16"}


def bias(given: bool) -> tuple[dict[str, str], dict[str, object]]:
    return ({"bias_ptr": "*bf16"}, {"HAS_BIAS": True}) if given else ({}, {"bias_ptr": None, "HAS_BIAS": False})


def target(dtype: str, softcap: bool = False, with_bias: bool = False) -> Case:
    types, folded = bias(with_bias)
    types |= SCALARS | {"x_ptr": f"*{dtype}", "x_row": "i32:16", "w_ptr": f"*{dtype}", "w_row": "i32:16"}
    types |= {"labels_ptr": "*i64", "target_ptr": "*fp32", "slope_ptr": "*fp32", "hidden": "i32:16"}
    folded |= {"x_col": 1, "w_col": 1, "SOFTCAP": softcap, "BLOCK_H": head.BLOCK_H}
    return Case(f"head target {dtype} {softcap=} {with_bias=}", head._target_kernel, types, folded, num_warps=4)


def exponentials(dtype: str, softcap: bool = False, extra: bool = False) -> Case:
    types, folded = bias(extra)
    types |= SCALARS | PARTS | {"z_ptr": "*fp32", "z_row": "i32:16", "e_ptr": f"*{dtype}", "e_row": "i32:16"}
    types |= {"labels_ptr": "*i64", "target_ptr": "*fp32", "first": "i32:16", "width": "i32:16"}
    types["store"] = "i32"
    folded |= {"SOFTCAP": softcap, "BLOCK": head.BLOCK}
    folded |= dict.fromkeys(("ENTROPY", "TOTAL", "ARGMAX"), extra)
    name = f"head exp {dtype} {softcap=} {extra=}"
    return Case(name, head._exp_kernel, types, folded, num_warps=8)


def row(dtype: str, blocks: int, store: bool, extra: bool = False) -> Case:
    types = PARTS | {"vocab": "i32:16", "labels_ptr": "*i64", "top_ptr": "*i64", "smoothing": "fp32", "z_loss": "fp32"}
    types |= dict.fromkeys(("target_ptr", "slope_ptr", "sums_ptr", "power_ptr", "unit_ptr"), "*fp32")
    types |= {"sums_plane": "i32:16", "e_ptr": f"*{dtype}", "e_row": "i32:16"}
    folded = dict.fromkeys(("ENTROPY", "TOTAL", "ARGMAX", "Z_LOSS"), extra) | {"STORE": store, "BLOCKS": blocks}
    folded["LEAST_GAIN"] = head.LEAST_GAIN
    folded |= {"S_TARGET": head.TARGET, "S_OTHERS": head.OTHERS, "S_OFFSET": head.OFFSET}
    folded |= {"S_WEIGHTED": head.WEIGHTED, "S_TOTAL": head.TOTAL}
    name = f"head row {dtype} {blocks=} {store=} {extra=}"
    return Case(name, head._row_kernel, types, folded, num_warps=1, vector_loads=False)  # a few numbers a row


def level(dtype: str) -> Case:
    types = {"e_ptr": f"*{dtype}", "e_row": "i32:16", "parts_ptr": "*fp32", "plane": "i32:16", "blocks": "i32:16"}
    types |= {"power_ptr": "*fp32", "labels_ptr": "*i64", "vocab": "i32:16"}
    return Case(f"head level {dtype}", head._level_kernel, types, {"BLOCK": head.BLOCK}, 8)


def gradient(dtype: str, softcap: bool = False, extra: bool = False) -> Case:
    types, folded = bias(extra)
    types |= SCALARS | {"z_ptr": "*fp32", "z_row": "i32:16", "e_ptr": f"*{dtype}", "e_row": "i32:16"}
    rows = ("reference_ptr", "offset_ptr", "log_sum_ptr", "alpha_ptr", "beta_ptr", "kappa_ptr", "own_ptr")
    types |= dict.fromkeys(rows, "*fp32") | {"labels_ptr": "*i64", "first": "i32:16", "width": "i32:16"}
    folded |= {"SOFTCAP": softcap, "HAS_BETA": extra, "HAS_KAPPA": extra, "BLOCK": head.BLOCK}
    return Case(f"head gradient {dtype} {softcap=} {extra=}", head._gradient_kernel, types, folded, num_warps=8)


def cases() -> list[Case]:
    return [
        target("bf16"),
        target("fp32", softcap=True, with_bias=True),
        exponentials("bf16"),
        exponentials("bf16", extra=True),
        exponentials("fp32"),
        exponentials("bf16", softcap=True, extra=True),
        row("bf16", 32, store=True),
        row("bf16", 32, store=True, extra=True),
        row("fp32", 128, store=False, extra=True),
        level("bf16"),
        gradient("bf16"),
        gradient("fp32", softcap=True, extra=True),
    ]
