"""The numerics gate: no figure of a way that is not shown to be right first.

Every way, burnish's and each peer's, is run on a small shape in the type that will be timed, and its results and
gradients are compared with the definition in float64 on the same inputs. At the timed shape some rows are compared
again (in float32), because what overflows overflows only there. An error is the norm of the difference over the norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from burnish.verbs.bench.ops import Case, Op, gradients, make_inputs, outputs, upstream

ROWS = 64  # compared at the timed shape
# Largest relative error where results have float32: of burnish, of peers. Peers may round logits to bfloat16.
FLOAT32 = (1e-5, 1e-4)
LOSSES = (1e-5, 2e-2)  # results that stay float32 although the inputs are bfloat16: log-probs and losses


def relative_error(got: Tensor, want: Tensor) -> float:
    """NaN counts as infinite."""
    if got.shape != want.shape:
        return float("inf")
    wanted = want.double()
    size = wanted.norm().item()
    error = (got.detach().double() - wanted).norm().item()
    error = error / size if size else error
    return error if error == error else float("inf")


def limit_for(op: Op, ours: bool, result: Tensor, dtype: torch.dtype) -> float:
    place = 0 if ours else 1
    if dtype == torch.float32:
        return FLOAT32[place]
    return LOSSES[place] if result.dtype == torch.float32 else op.limits[place]


def _names(op: Op, count: int) -> list[str]:
    return [f"result {i + 1}" for i in range(count)] + [f"gradient {place + 1}" for place in op.wanted]


def _verdict(op: Op, ours: bool, got: tuple, want: tuple, count: int, dtype: torch.dtype) -> tuple[float, str | None]:
    """(largest error, why the gate is red or None)."""
    worst, red = 0.0, None
    for name, mine, right in zip(_names(op, count), got, want, strict=True):
        error, limit = relative_error(mine, right), limit_for(op, ours, mine, dtype)
        worst = max(worst, error)
        if not error <= limit and red is None:
            red = f"{name} differs from the definition by {error:.1e}, more than {limit:.0e}"
    return worst, red


def _run(op: Op, function: Callable, inputs: tuple, grads: tuple[Tensor, ...] | None, dtype: torch.dtype) -> tuple:
    """(results, gradients, the upstream gradients that were used)."""
    if not op.wanted:
        with torch.no_grad():
            return outputs(function(*inputs)), (), ()
    outs = outputs(function(*inputs))
    if grads is None:
        grads = upstream(outs, dtype)
    given = tuple(g.to(out.dtype, copy=True) for g, out in zip(grads, outs, strict=True))
    return tuple(out.detach().clone() for out in outs), gradients(op, inputs, outs, given), grads


def _wide(inputs: tuple, dtype: torch.dtype) -> tuple:
    """The same numbers in another floating type, with gradients asked for as before."""
    return tuple(
        t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in inputs
    )


def check(op: Op, function: Callable, ours: bool, device: torch.device, dtype: torch.dtype) -> tuple[float, str | None]:
    """(largest error, why the gate is red or None) on the op's small shape against float64."""
    inputs = make_inputs(op, op.gate, device, dtype, seed=7)
    exact = _wide(inputs, torch.float64)
    outs, grads, given = _run(op, function, inputs, None, dtype)
    want_outs, want_grads, _ = _run(op, op.definition, exact, given or None, dtype)
    return _verdict(op, ours, (*outs, *grads), (*want_outs, *want_grads), len(outs), dtype)


def check_rows(case: Case, function: Callable, inputs: tuple, ours: bool, dtype: torch.dtype) -> str | None:
    """Why the gate is red at the timed shape, or None: results and gradients of some rows against float32."""
    op = case.op
    if not op.by_token:
        return None
    first = inputs[op.by_token[0]]
    rows = torch.linspace(0, len(first) - 1, min(ROWS, len(first)), device=first.device).long()
    asked = [place for place in op.wanted if place in op.by_token]
    few = _few_rows(op, inputs, rows, asked)
    outs, grads, given = _run(op, function, inputs, None, dtype)
    made = [grad for place, grad in zip(op.wanted, grads, strict=True) if place in asked]
    got = [t[rows] for t in (*outs, *made) if t.dim()]
    right = outputs(op.definition(*few))
    want = [out.detach() for out in right if out.dim()]
    if asked:
        given = tuple((g[rows] if g.dim() else g).to(out.dtype) for g, out in zip(given, right, strict=True))
        want += torch.autograd.grad(right, [few[place] for place in asked], given)
    for mine, exact in zip(got, want, strict=True):
        error, limit = relative_error(mine, exact), 1.5 * limit_for(op, ours, mine, dtype)  # float32 errs as well
        if not error <= limit:
            return f"some rows of this shape differ from the definition by {error:.1e}, more than {limit:.0e}"
    return None


def _few_rows(op: Op, inputs: tuple, rows: Tensor, asked: list[int]) -> tuple:
    """The inputs of these rows alone, in float32, with gradients wanted of `asked`."""
    few = []
    for place, value in enumerate(inputs):
        if isinstance(value, Tensor):
            value = value.detach()[rows] if place in op.by_token else value.detach()
            value = value.float() if value.is_floating_point() else value
        few.append(value.requires_grad_() if place in asked else value)
    return tuple(few)
