"""burnish.patch(model): put burnish's kernels into a model that any trainer trains.

Every change is on a module instance (its `forward`), found by behaviour (burnish.model.probe) and reported; classes,
parameters, state dicts and other models of the same class stay as they are. burnish.unpatch(model) takes it back.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.kernels import use
from burnish.model import blocks, forwards
from burnish.model.adapters import is_adapted, plain_lora
from burnish.model.head import causal_lm, check_head, evaluating, read_head
from burnish.model.probe import Match, glu_roles, has_hooks, norm_parts, probe_glu, probe_norm, probe_rope

_REPLACED = "its forward was replaced before, not by burnish (device hooks, mixed precision, another patch)"


@dataclass
class PatchReport:
    """What `patch` did.

    patched   {op: modules that run it now}
    skipped   [(module or class, reason)]: what looked like a candidate and runs its own code
    already   how many of `patched` an earlier call had patched
    """

    patched: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    already: int = 0

    def __str__(self) -> str:
        rows = [(op, str(count)) for op, count in self.patched.items()] + self.skipped
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{op:<{width}}  {count}" for op, count in self.patched.items()]
        if self.already:
            lines.append(f"{self.already} of these were patched before this call")
        lines += [f"{name:<{width}}  left alone: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Replace what burnish has kernels for, in this model instance only, wherever a trial run proves it equal.

    model    a transformers causal LM, bare or inside a PeftModel, in any dtype and on any device. Norms become
             rms_norm, gated MLPs swiglu or geglu, rotary functions rope; and `model(input_ids, labels=...)` in
             training mode returns the loss of the fused head, with `logits` None.
    strict   raise UserError if any of these had to be left alone. Whole decoder layers and LoRA adapters, which come
             on top where they are of the plain kind (burnish.model.blocks), may be.

    Calling it twice is harmless. It runs the model on a few tokens, to compare losses. Raises UserError, with nothing
    changed, when nothing at all matches.
    """
    report, plan = PatchReport(), []
    counts: Counter[str] = Counter()
    needed: dict[tuple[str, str], list[str]] = {}  # (class, reason): names
    wished: dict[tuple[str, str], list[str]] = {}  # decoder layers and adapters, whose parts are patched as ever
    known: dict[tuple, tuple[str, Callable] | str] = {}
    for name, module in model.named_modules():
        op = forwards.installed_op(module)
        candidate = None if op is not None else next(_candidates(module, model), None)
        if candidate is not None:
            key = (candidate, _fingerprint(module), _inner_fingerprint(module) if candidate is _try_layer else ())
            if key not in known:
                known[key] = _REPLACED if "forward" in vars(module) else candidate(module)
            found = known[key]
            if isinstance(found, str):
                reasons = wished if candidate is _try_layer else needed
                reasons.setdefault((type(module).__name__, found), []).append(name)
            else:
                op, forward = found
                plan.append((module, forward))
        elif op is not None:
            report.already += 1
        if op is not None:
            counts[op] += 1
        if op == "decoder_layer":
            counts["lora_linear"] += _count_adapters(name, module, wished)
    lines = [[(_named(kind, names), reason) for (kind, reason), names in each.items()] for each in (needed, wished)]
    report.skipped = lines[0] + lines[1]
    report.patched = {op: count for op, count in sorted(counts.items()) if count}
    if not counts:
        raise UserError(
            f"nothing to patch in {type(model).__name__}: no norm, gated MLP, rotary function or head matches",
            where="; ".join(f"{name}: {reason}" for name, reason in report.skipped),
            mend="burnish.patch takes a causal language model of transformers",
        )
    if strict and lines[0]:
        raise UserError(
            "left alone: " + "; ".join(f"{name} ({reason})" for name, reason in lines[0]),
            where="patch(strict=True)",
            mend="Nothing was patched; without strict these run the model's own code",
        )
    for module, forward in plan:
        module.forward = MethodType(forward, module)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every module its class's forward back; returns how many had another. The opposite of `patch`.

    Raises UserError, with nothing changed, where somebody has wrapped a patched forward since.
    """
    ours = [(name, module) for name, module in model.named_modules() if forwards.installed_op(module) is not None]
    for name, module in ours:
        if not forwards.outermost(module):
            raise UserError(
                "its forward was wrapped after patching (mixed precision, device hooks)",
                where=name or type(module).__name__,
                mend="Unwrap it first, with accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
            )
    for _, module in ours:
        del module.forward
    return len(ours)


def _named(kind: str, names: list[str]) -> str:
    return names[0] or kind if len(names) == 1 else f"{kind} x{len(names)} ({names[0]}, ...)"


def _candidates(module: nn.Module, model: nn.Module) -> Iterator[Callable]:
    """The trials that this module's structure calls for; each takes it and returns (op, forward) or a reason."""
    if module is causal_lm(model) and _has_output_layer(module):
        yield _try_head
    if blocks.shape(module) is None:
        yield _try_layer
    if norm_parts(module) is not None:
        yield _try_norm
    if glu_roles(module):
        yield _try_glu
    if _holds_experts(module):
        yield lambda module: "experts hold three-dimensional weights, for which burnish has no kernel"
    if _rotary_names(module):
        yield _try_rope


def _has_output_layer(module: nn.Module) -> bool:
    """False for a bare backbone or a classifier: there is no head to patch, which is nothing to report."""
    try:
        return module.get_output_embeddings() is not None  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False


def _try_norm(module: nn.Module) -> tuple[str, Callable] | str:
    if not _takes_one_input(module):
        return "takes more than the hidden states"
    found = probe_norm(module)
    return found if isinstance(found, str) else (found.op, forwards.norm_forward(found))


def _try_glu(module: nn.Module) -> tuple[str, Callable] | str:
    if not _takes_one_input(module):
        return "takes more than the hidden states"
    roles = {name for order in glu_roles(module) for name in order}
    if any(has_hooks(child) for name, child in module.named_children() if name not in roles):
        return "its activation has hooks, which would not run"
    found = probe_glu(module)
    return found if isinstance(found, str) else (found.op, forwards.glu_forward(found))


def _try_layer(module: nn.Module) -> tuple[str, Callable] | str:
    for inner in blocks.passed_by(module):
        if has_hooks(inner):
            return f"its {type(inner).__name__} has hooks, which would not run"
        if "forward" in vars(inner) and not forwards.outermost(inner):
            return f"the forward of its {type(inner).__name__} was replaced before, not by burnish"
    return blocks.matches(module) or ("decoder_layer", forwards.layer_forward(type(module).forward))


def _count_adapters(name: str, layer: nn.Module, skipped: dict[tuple[str, str], list[str]]) -> int:
    """How many LoRA adapters of a decoder layer run as lora_linear; the others' reasons go to `skipped`."""
    count = 0
    for path, projection in blocks.projections(layer).items():
        if is_adapted(projection):
            found = plain_lora(projection, ever=True)
            if isinstance(found, str):
                skipped.setdefault((f"LoRA {type(projection).__name__}", found), []).append(f"{name}.{path}")
            else:
                count += 1
    return count


def _try_rope(module: nn.Module) -> tuple[str, Callable] | str:
    function = type(module).forward
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return "its forward is wrapped by a decorator"
    head_dim = getattr(module, "head_dim", None)
    matches: dict[str, Match] = {}
    for name in _rotary_names(module):
        found = probe_rope(function.__globals__[name], head_dim if isinstance(head_dim, int) else 32)
        if isinstance(found, str):
            return f"{name} {found}"
        matches[name] = found
    return "rope", forwards.attention_forward(function, matches)


def _try_head(module: nn.Module) -> tuple[str, Callable] | str:
    """The whole of a causal LM: its head must be readable, and its own loss must be what the fused head gives."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device"
    try:
        if reason := forwards.needs_logits(module, {}):
            return reason
        check_head(module, read_head(module))
        difference = _loss_difference(module)
    except UserError as error:
        return error.what
    except Exception as error:  # whatever a model does that needs more than input_ids
        return f"could not be run on two rows of tokens ({type(error).__name__}: {error})"[:200]
    limit = 2e-2 if module.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not difference <= limit:
        return f"its loss differs from the fused head's by {difference:.2g} (relative)"
    return "linear_cross_entropy", forwards.loss_forward(type(module).forward)


@torch.no_grad()
def _loss_difference(model: nn.Module) -> float:
    """Relative difference between the model's own loss and the fused head's, on two rows of six tokens."""
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    ids = torch.arange(12, device=embeddings.device).view(2, 6) % embeddings.shape[0]
    labels = ids.clone()
    labels[0, 3] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model), use("reference"):
        theirs = model(**inputs, labels=labels, use_cache=False).loss.item()
        ours = forwards.fused_loss(model, labels, **inputs).loss.item()
    return abs(ours - theirs) / abs(theirs)


def _takes_one_input(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and x


def _holds_experts(module: nn.Module) -> bool:
    """Several gated MLPs in one module, their weights stacked."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    return len(weights) >= 2 and any(name.startswith("act") for name in (*vars(module), *module._modules))


def _rotary_names(module: nn.Module) -> list[str]:
    """Names of module-level rotary functions that this class's forward calls."""
    function = inspect.unwrap(type(module).forward)
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None:
        return []
    return [
        name
        for name in code.co_names
        if "rotary" in name.lower() and callable(known.get(name)) and not isinstance(known[name], type)
    ]


def _fingerprint(module: nn.Module) -> tuple:
    """What a trial's outcome may depend on: the class, its plain settings, shapes, and the children's classes."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, bool, type(None))) and name not in ("layer_idx", "training")
    }
    shapes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    children = tuple(
        (name, type(child), getattr(child, "in_features", None), getattr(child, "out_features", None))
        for name, child in module._modules.items()
    )
    hooked = tuple(name for name, child in module.named_children() if has_hooks(child))
    return type(module), "forward" in vars(module), tuple(sorted(plain.items())), shapes, children, hooked


def _inner_fingerprint(layer: nn.Module) -> tuple:
    """The same of a decoder layer's parts; rotation, window and scale are settings of the attention or its config."""
    parts = [*layer.children(), *layer.self_attn.children()]  # type: ignore[union-attr]
    return *map(_fingerprint, parts), id(getattr(layer.self_attn, "config", None))
