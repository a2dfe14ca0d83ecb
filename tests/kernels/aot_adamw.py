"""The AdamW step as runs launch it: with low bits and without, with a gradient to scale and without."""

from aot import Case

from burnish.kernels import adamw

NUMBERS = ("keep", "rate", "mean_share", "beta2", "square_share", "eps", "correction")


def step(low: bool, grad: str, scaled: bool, count: str = "i32:16") -> Case:
    signature = {"P": "*i16", "G": f"*{grad}", "M": "*i16", "V": "*i16", "n": count, "key": "i32", "factor": "i32"}
    signature |= dict.fromkeys(NUMBERS, "fp32")
    constexprs: dict[str, object] = {"BLOCK": adamw.BLOCK}
    for name, given, kind in (("LOW", low, "*i16"), ("SCALE", scaled, "*fp32")):
        if given:
            signature[name] = kind
        else:
            constexprs[name] = None
    name = f"adamw {'exact' if low else 'stochastic'} {grad} scaled={scaled} n={count}"
    return Case(name, adamw._step_kernel, signature, constexprs, adamw.WARPS)


def cases() -> list[Case]:
    return [
        step(True, "bf16", True),
        step(True, "fp32", True),
        step(False, "bf16", False, "i64:16"),
    ]
