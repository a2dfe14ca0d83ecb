"""Which burnish op does a module compute? Found by running it, not by its name.

A candidate is picked by its structure (an eps and one vector; linear layers round an activation; a function that
takes q, k, cos, sin) and then run, forward and backward, in float32 and bfloat16 at several scales, against the
definitions of burnish.kernels. It matches where outputs and all gradients agree to rounding.

Nothing here touches the module: it runs on a twin, a shallow copy with random parameters on the CPU, in which linear
layers are replaced by element-wise stand-ins. So quantised, adapted or sharded layers cost and change nothing.
"""

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from burnish.kernels import geglu, rms_norm, rope, swiglu, use

_DTYPES = (torch.float32, torch.bfloat16)
_SCALES = (1.0, 1e3, 1e-3)
# The largest difference that still counts as rounding, in units of the dtype's eps times the largest value of the row
# (outputs) or of the tensor (gradients). Float32 leaves room for another order of the same sums. In bfloat16 one unit
# in the last place is at most one eps; torch rounds after every element-wise operation and a definition need not.
_LIMITS = {torch.float32: 16.0, torch.bfloat16: 2.0}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_WEIGHTLESS_WIDTH = 48
NORM_SETTINGS = tuple({"cast": cast, "offset": offset} for cast in ("llama", "gemma") for offset in (0.0, 1.0))
GLU_OPS: dict[tuple[str, str], Callable] = {
    ("swiglu", ""): swiglu,
    ("geglu", "tanh"): lambda gate, up: geglu(gate, up, approximate="tanh"),
    ("geglu", "none"): lambda gate, up: geglu(gate, up, approximate="none"),
}
ROPE_LAYOUTS = ("half", "interleaved", "interleaved from half")


@dataclass(frozen=True)
class Match:
    """What a module computes: the op's name, and the settings its replaced forward is built from."""

    op: str
    settings: dict = field(default_factory=dict)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs around this module's forward: bypassing the module would bypass that too."""
    known = module.__dict__  # asked of every module of a layer at every call
    return any([known.get(name) for name in _HOOKS])


def norm_parts(module: nn.Module) -> tuple[str | None, str] | None:
    """(name of the 1-D weight or None, name of the eps attribute) where `module` is built like a norm, else None."""
    eps = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None]
    if eps is None or module._modules or len(parameters) > 1 or any(p.dim() != 1 for _, p in parameters):
        return None
    return (parameters[0][0] if parameters else None), eps


def glu_roles(module: nn.Module) -> list[tuple[str, ...]]:
    """Which linear children could be (gate, up, down) or (gate and up in one, down), by their shapes.

    Empty where `module` is not built like a gated MLP: an activation and two or three linear layers, [H, I] twice and
    [I, H], or [H, 2I] and [I, H]. A linear layer is what has in_features and out_features, so peft's count too.
    """
    shapes = {
        name: (child.in_features, child.out_features)
        for name, child in module._modules.items()
        if isinstance(getattr(child, "in_features", None), int) and isinstance(child.out_features, int)
    }
    others = [child for name, child in module._modules.items() if child is not None and name not in shapes]
    functions = [value for name, value in vars(module).items() if name.startswith("act") and callable(value)]
    if (
        len(shapes) not in (2, 3)
        or not (others or functions)
        or any(p is not None for p in module._parameters.values())
    ):
        return []
    if any(next(child.parameters(), None) is not None for child in others):
        return []
    roles = []
    for order in itertools.permutations(shapes):
        (hidden, inner), last = shapes[order[0]], shapes[order[-1]]
        three = len(order) == 3 and shapes[order[1]] == (hidden, inner) and last == (inner, hidden)
        fused = len(order) == 2 and inner % 2 == 0 and last == (inner // 2, hidden)
        if three or fused:
            roles.append(order)
    return roles


def probe_norm(module: nn.Module) -> Match | str:
    """The rms_norm settings that give what `module` gives, or the reason why there are none."""
    weight_name, eps_name = norm_parts(module) or (None, "")
    width = module._parameters[weight_name].shape[0] if weight_name else _WEIGHTLESS_WIDTH  # type: ignore[union-attr]
    settings = NORM_SETTINGS if weight_name else NORM_SETTINGS[:1]
    eps = getattr(module, eps_name)
    errors = [0.0] * len(settings)
    # The last case is what autocast gives a float32 weight; the casts differ in what they return there.
    for x_dtype, w_dtype in (*zip(_DTYPES, _DTYPES, strict=True), (torch.bfloat16, torch.float32)):
        weight = randn(width, seed=1, dtype=w_dtype) if weight_name else None
        for scale in _SCALES:
            x = _scaled(randn(5, width, seed=2), scale, x_dtype)
            leaves = [x] if weight is None else [x, weight]
            try:
                twin = twin_of(module, {weight_name: weight} if weight_name else {}, {})
                theirs = trial(lambda x, *_: twin.forward(x), leaves)  # noqa: B023  called before the next turn
            except Exception as error:  # whatever a module does on input that it is not made for
                return f"could not be run alone ({first_line(error)})"
            for index, options in enumerate(settings):
                ours = trial(lambda x, w=None, options=options: rms_norm(x, w, eps, **options), leaves)
                errors[index] = max(errors[index], difference(theirs, ours, x_dtype))
    best = min(range(len(settings)), key=errors.__getitem__)
    if errors[best] > 0.5:  # a norm rounds once or twice: in bfloat16 no more than one unit in the last place
        return "computes something other than RMSNorm"
    return Match("rms_norm", {"weight": weight_name, "eps": eps_name, **settings[best]})


def probe_glu(module: nn.Module) -> Match | str:
    """Which activation and which roles of the linear children give what `module` gives, or why none do.

    Runs in training mode, so that a dropout inside counts as a difference.
    """
    fits = {(roles, key) for roles in glu_roles(module) for key in GLU_OPS}
    for dtype, scale in itertools.product(_DTYPES, (1.0, 30.0, 1e-3)):
        children = {}
        for seed, name in enumerate(sorted({name for roles, _ in fits for name in roles})):
            layer = module._modules[name]
            children[name] = Elementwise(layer.in_features, layer.out_features, seed, dtype)  # type: ignore
        width = children[min(fits)[0][0]].width
        leaves = [_scaled(randn(4, width, seed=9), scale, dtype)]
        leaves += [tensor for child in children.values() for tensor in (child.scale, child.shift)]
        try:
            twin = twin_of(module, {}, children)
            theirs = trial(lambda x, *_: twin.forward(x), leaves)  # noqa: B023  called before the next turn
        except Exception as error:
            return f"could not be run alone ({first_line(error)})"
        errors = {}
        for roles, key in fits:
            layers = [children[name] for name in roles]
            ours = trial(lambda x, *_: glu(x, layers, GLU_OPS[key]), leaves)  # noqa: B023
            errors[roles, key] = difference(theirs, ours, dtype)
        # bfloat16 can't tell the two forms of gelu apart; float32, which came first, can.
        fits = {fit for fit in fits if errors[fit] <= 1.0}
        if not fits:
            still = trial(lambda x, *_: twin.eval().forward(x), leaves)  # noqa: B023
            dropout = " in training mode (dropout?)" if difference(theirs, still, dtype) > 1.0 else ""
            return "computes something other than down(act(gate) * up)" + dropout
    roles, (op, approximate) = min(fits)
    return Match(op, {"roles": roles, "approximate": approximate})


def glu(x: Tensor, layers: Iterable[Callable], act: Callable) -> Tensor:
    """down(act(gate(x), up(x))) for layers (gate, up, down), or (gate and up in one, down): gate's half comes first."""
    *first, down = layers
    gate, up = first[0](x).chunk(2, dim=-1) if len(first) == 1 else (first[0](x), first[1](x))
    return down(act(gate, up))


def probe_rope(function: Callable, head_dim: int) -> Match | str:
    """The layout in which `function(q, k, cos, sin, unsqueeze_dim=1)` rotates, or why burnish's rope can't stand in."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    if names != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return f"takes other arguments than q, k, cos, sin, unsqueeze_dim ({', '.join(names)})"
    widths = [width for width in (head_dim, head_dim // 2) if width % 2 == 0]
    layouts = set(ROPE_LAYOUTS)
    for dtype, width, dim in itertools.product(_DTYPES, widths, (1, 2)):
        shape = (2, 3, 5, head_dim) if dim == 1 else (2, 5, 3, head_dim)  # [B, heads, T, D] or [B, T, heads, D]
        q, k = randn(*shape, seed=3, dtype=dtype), randn(*shape, seed=4, dtype=dtype)
        cos, sin = randn(2, 5, width, seed=5, dtype=dtype), randn(2, 5, width, seed=6, dtype=dtype)
        try:
            theirs = trial(lambda q, k: function(q, k, cos, sin, unsqueeze_dim=dim), [q, k])  # noqa: B023
        except Exception as error:
            if width < head_dim:  # it rotates whole heads only, and is never asked for less
                continue
            return f"could not be run alone ({first_line(error)})"
        for layout in sorted(layouts):
            ours = trial(lambda q, k: rotate(q, k, cos, sin, dim, layout), [q, k])  # noqa: B023
            if difference(theirs, ours, dtype) > 1.0:
                layouts.discard(layout)
    if not layouts:
        return "rotates in a way that is neither in halves nor interleaved"
    return Match("rope", {"layout": min(layouts)})


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, layout: str) -> tuple[Tensor, Tensor]:
    """burnish's rope behind transformers' signature: q, k [B, heads, T, D] (unsqueeze_dim 1) or [B, T, heads, D] (2).

    Under autocast cos and sin are wider than q and k; the results keep q's and k's dtype, which attention casts to.
    """
    if layout == "interleaved from half":  # GLM hands over cos in halves and rotates in pairs
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))
    if unsqueeze_dim == 1:
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=layout != "half")
        return q.transpose(1, 2), k.transpose(1, 2)
    return rope(q, k, cos, sin, interleaved=layout != "half")


class Elementwise(nn.Module):
    """Stands in for a linear layer of the same shape: each output is one input times a number plus another.

    No product to sum up, so differences stay visible element by element. It has no `weight`: a module that reaches
    past its layers' forward fails here, as it would go wrong with an adapter.
    """

    def __init__(self, width: int, out: int, seed: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.out = width, out
        self.scale, self.shift = randn(out, seed=20 + seed, dtype=dtype), randn(out, seed=40 + seed, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(self.out) % self.width
        return x[..., index] * self.scale + self.shift


def twin_of(module: nn.Module, parameters: dict, children: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module` on the CPU in training mode with these parameters and children; no hooks run on it."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            twin.__dict__[name] = copy.copy(value)
    twin.__dict__.pop("forward", None)  # a patched one is bound to `module`
    twin._parameters.update(parameters)
    twin._buffers.update({name: buffer.cpu() for name, buffer in module._buffers.items() if buffer is not None})
    others = {name: child for name, child in module._modules.items() if child is not None and name not in children}
    twin._modules.update({name: copy.deepcopy(child).cpu() for name, child in others.items()} | children)
    for inner in twin.modules():
        inner.__dict__.update({name: OrderedDict() for name in _HOOKS})
    return twin.train()


def trial(function: Callable, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of the function on `leaves`, and the gradients of a fixed random projection of them to every leaf."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), use("reference"):
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        upstream = [randn(*out.shape, seed=7, dtype=out.dtype) for out in outputs]
        return outputs, list(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))


def difference(theirs: tuple, ours: tuple, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients over what rounding in `dtype` explains; infinite if unlike."""
    limit = _LIMITS[dtype] * torch.finfo(dtype).eps
    worst = 0.0
    for by_row, (expected, got) in zip((True, False), zip(theirs, ours, strict=True), strict=True):
        if len(expected) != len(got):
            return float("inf")
        for a, b in zip(expected, got, strict=True):
            if a is None and b is None:
                continue
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or not a.isfinite().all():
                return float("inf")
            a, b = a.detach().double(), b.detach().double()
            size = a.abs().amax(-1, keepdim=True) if by_row else a.abs().amax()
            ratio = ((a - b).abs() / (limit * size).clamp_min(1e-30)).max().item()
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf on the CPU whatever the default device, without touching the global generator."""
    values = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(dtype).requires_grad_()


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """A leaf of that size, with a mean: a LayerNorm takes it away."""
    return ((x.detach() + 0.3) * scale).to(dtype).requires_grad_()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
