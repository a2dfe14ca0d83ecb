"""A decoder layer of the prenorm Llama shape as four plain functions of its modules.

    q, k, v = project(attn, input_norm(layer, x), cos, sin)
    normed, residual = after_attention(layer, attend(attn, q, k, v, **call), x)
    hidden = mlp(layer, normed, residual)

Llama, Mistral, Qwen2, Qwen3, SmolLM3 and every family with the same children and the same mathematics: `matches`
runs a layer's own forward beside these functions before anyone relies on them. Weights are read when a function is
called, so a layer can be moved, adapted and trained as ever.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels import add_rms_norm, glu_linear, lora_linears, qk_norm_rope, rms_norm, rope, swiglu
from burnish.model.adapters import is_adapted, plain_lora
from burnish.model.probe import (
    Elementwise,
    difference,
    first_line,
    has_hooks,
    norm_parts,
    probe_norm,
    randn,
    trial,
    twin_of,
)

Block = Any  # a module, whose children a type checker can't know
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_TRIAL = "burnish_trial"


def input_norm(layer: Block, x: Tensor) -> Tensor:
    """The norm before attention: x [B, T, H] -> [B, T, H]."""
    return _norm(layer.input_layernorm, x)


def project(attn: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of normed hidden states x [B, T, H], ready for attention.

    cos, sin  [B or 1, T, R] as the model's rotary embedding gives them

    Returns q [B, T, Hq, D], k [B, T, Hk, D], v [B, T, Hk, D]: projected, normed where the family norms heads, and
    rotated (not in layers without positions, SmolLM3's NoPE).
    """
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in linears([attn.q_proj, attn.k_proj, attn.v_proj], x))
    turns, norms = getattr(attn, "use_rope", True), [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []
    if turns and norms and _eps(norms[0]) == _eps(norms[1]):
        return *qk_norm_rope(q, k, norms[0].weight, norms[1].weight, cos, sin, _eps(norms[0])), v
    if norms:
        q, k = (_norm(norm, t) for norm, t in zip(norms, (q, k), strict=True))
    if turns:
        q, k = rope(q, k, cos, sin)
    return q, k, v


def attend(attn: Block, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Attention of projected q, k, v as `project` returns them -> [B, T, Hq * D], contiguous.

    kwargs  what the model's call hands its layers: attention_mask, position_ids, cu_seq_lens_q, max_length_q, ...

    Runs what transformers' AttentionInterface has for this layer's attn_implementation ("burnish": varlen_attention),
    with the layer's own scale, sliding window and dropout.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mask = kwargs.pop("attention_mask", None)
    function = ALL_ATTENTION_FUNCTIONS[attn.config._attn_implementation]
    out, _ = function(
        attn,
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        dropout=attn.attention_dropout if attn.training else 0.0,
        scaling=attn.scaling,
        sliding_window=_window(attn),
        **kwargs,
    )
    return out.flatten(-2).contiguous()


def after_attention(layer: Block, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(normed, residual) for the MLP, from attend's [B, T, Hq * D] and the layer's input x [B, T, H].

    residual = x + o_proj(attended), normed = the second norm of it; both [B, T, H].
    """
    (out,) = linears([layer.self_attn.o_proj], attended)
    norm = layer.post_attention_layernorm
    return add_rms_norm(out, x, norm.weight, _eps(norm))


def mlp(layer: Block, normed: Tensor, residual: Tensor) -> Tensor:
    """The layer's output [B, T, H]: residual + down(silu(gate(normed)) * up(normed))."""
    gate_proj, up_proj, down_proj = (getattr(layer.mlp, name) for name in _MLP)
    gate, up = linears([gate_proj, up_proj], normed)
    plain = type(down_proj) is nn.Linear and not has_hooks(down_proj) and "forward" not in vars(down_proj)
    if plain and not torch.is_autocast_enabled(normed.device.type):
        return residual + glu_linear(gate, up, down_proj.weight, down_proj.bias, activation="silu")
    (out,) = linears([down_proj], swiglu(gate, up))
    return residual + out


def linears(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Each layer's output for the same x [..., K]: plain LoRA adapters share their thin products, others are called.

    Called as modules, so that hooks, quantised weights and every other kind of adapter count.
    """
    if torch.is_autocast_enabled(x.device.type):
        return [layer(x) for layer in layers]
    found = [plain_lora(layer) if is_adapted(layer) else "" for layer in layers]
    fused = [parts for parts in found if not isinstance(parts, str)]
    if not fused or {(parts[0].weight.dtype, parts[1].dtype) for parts in fused} != {(x.dtype, fused[0][1].dtype)}:
        return [layer(x) for layer in layers]
    bases, a, b, scales = zip(*fused, strict=True)
    outs = iter(lora_linears(x, [base.weight for base in bases], [base.bias for base in bases], a, b, scales))
    return [layer(x) if isinstance(parts, str) else next(outs) for layer, parts in zip(layers, found, strict=True)]


def _norm(norm: Block, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, _eps(norm))


def _eps(norm: Block) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _window(attn: Block) -> int | None:
    """The layer's sliding window: its own, or the model's where layers don't differ (Mistral)."""
    config = attn.config
    return attn.sliding_window if hasattr(attn, "sliding_window") else getattr(config, "sliding_window", None)


def matches(layer: Block) -> str | None:
    """None where `layer` computes what the four functions compute; otherwise the reason why they can't stand in.

    Structure first, then a trial: the layer's own forward against the functions on random tokens in float32, outputs
    and the gradients of the input and of every weight, on a twin with stand-ins for the linear layers (so quantised,
    adapted and sharded weights cost and change nothing). The two must also ask attention for the same thing.
    """
    if reason := shape(layer):
        return reason
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name, norm in layer.self_attn.named_children() if name in _HEAD_NORMS]
    for norm in norms:
        found = probe_norm(norm)
        if isinstance(found, str):
            return f"its norm {type(norm).__name__} {found}"
        if (found.settings["cast"], found.settings["offset"], found.settings["weight"]) != ("llama", 0.0, "weight"):
            return f"its norm {type(norm).__name__} is not Llama's"
    return _differs(layer)


def shape(layer: Block) -> str | None:
    """None where a module has the children of such a layer; otherwise what is missing."""
    children = dict(layer.named_children())
    if set(children) != _LAYER or next(layer.parameters(recurse=False), None) is not None:
        return "is not built of self_attn, mlp and two norms"
    attention = {name for name, _ in children["self_attn"].named_children()}
    if attention not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return "its attention is not built of q_proj, k_proj, v_proj and o_proj"
    names = {name for name, _ in children["mlp"].named_children()}
    if not set(_MLP) <= names or len(names) > len(_MLP) + 1:
        return "its MLP is not built of gate_proj, up_proj and down_proj"
    linear = [*(getattr(children["self_attn"], n) for n in _ATTENTION), *(getattr(children["mlp"], n) for n in _MLP)]
    if not all(isinstance(getattr(child, "in_features", None), int) for child in linear):
        return "its projections are no linear layers"
    if any(norm_parts(children[name]) is None for name in ("input_layernorm", "post_attention_layernorm")):
        return "its norms are not RMSNorm"
    return None


def projections(layer: Block) -> dict[str, nn.Module]:
    """{path below the layer: linear layer} of all seven."""
    attn, gated = layer.self_attn, layer.mlp
    found = {f"self_attn.{name}": getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return found | {f"mlp.{name}": getattr(gated, name) for name in _MLP}


def passed_by(layer: Block) -> list[nn.Module]:
    """The modules of a layer that `matches` whose own forward the functions don't call."""
    attn, gated = layer.self_attn, layer.mlp
    inner = [attn, gated, layer.input_layernorm, layer.post_attention_layernorm]
    inner += [child for name, child in attn._modules.items() if name in _HEAD_NORMS]
    return inner + [child for name, child in gated._modules.items() if name not in _MLP]


def forward(layer: Block, x: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> Tensor:
    """The whole layer: x [B, T, H] -> [B, T, H]; kwargs as for `attend`."""
    q, k, v = project(layer.self_attn, input_norm(layer, x), cos, sin)
    normed, residual = after_attention(layer, attend(layer.self_attn, q, k, v, **kwargs), x)
    return mlp(layer, normed, residual)


def _differs(layer: Block) -> str | None:
    """Why the twin's own forward and ours are not the same function, or None."""
    calls: list[dict] = []
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    call = {"attention_mask": mask, "position_ids": torch.arange(5)[None], "use_cache": False, "max_length_q": 5}
    try:
        x = randn(2, 5, layer.self_attn.q_proj.in_features, seed=1)
        cos, sin = (randn(2, 5, layer.self_attn.head_dim, seed=seed).detach() for seed in (2, 3))
        twin, leaves = _twin_layer(layer)
        with _recorded(calls):
            theirs = trial(lambda x, *_: twin.forward(x, position_embeddings=(cos, sin), **call), [x, *leaves])
            ours = trial(lambda x, *_: forward(twin, x, cos, sin, **call), [x, *leaves])
    except Exception as error:  # whatever a layer does that is not made like this one
        return f"could not be run alone ({first_line(error)})"
    if len(calls) != 2 or calls[0] != calls[1]:
        return "asks for another attention (scale, window, dropout, softcap)"
    return "computes something else" if difference(theirs, ours, torch.float32) > 1.0 else None


def _twin_layer(layer: Block) -> tuple[nn.Module, list[Tensor]]:
    """The layer in small: its own code on the CPU, random norm weights, stand-ins for linear layers; and its leaves."""
    leaves: list[Tensor] = []

    def stand_in(linear: Block) -> nn.Module:
        made = Elementwise(linear.in_features, linear.out_features, len(leaves), torch.float32)
        leaves.extend((made.scale, made.shift))
        return made

    def norm(module: Block) -> nn.Module:
        weight = randn(*module.weight.shape, seed=90 + len(leaves))
        leaves.append(weight)
        return twin_of(module, {"weight": weight}, {})

    def inner(module: Block, names: set[str]) -> nn.Module:
        made = {}
        for name, child in module.named_children():
            if name in names:
                made[name] = stand_in(child)
            elif name in _HEAD_NORMS:
                made[name] = norm(child)
        return twin_of(module, {}, made)

    attn = inner(layer.self_attn, _ATTENTION)
    attn.config = copy.copy(attn.config)
    attn.config._attn_implementation_internal = _TRIAL
    children = {
        "self_attn": attn,
        "mlp": inner(layer.mlp, set(_MLP)),
        "input_layernorm": norm(layer.input_layernorm),
        "post_attention_layernorm": norm(layer.post_attention_layernorm),
    }
    twin = twin_of(layer, {}, children)
    twin.gradient_checkpointing = False
    return twin, leaves


@contextmanager
def _recorded(calls: list[dict]) -> Iterator[None]:
    """An attention of the trial's own that notes what it was asked for; its mathematics is beside the point."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, mask, **kwargs):
        asked = {name: value for name, value in kwargs.items() if value is not None and name != "position_ids"}
        calls.append({**asked, "mask": id(mask), "positions": id(kwargs.get("position_ids"))})
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return torch.tanh(query * key + value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS[_TRIAL] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_TRIAL]
