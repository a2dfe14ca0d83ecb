"""What the planner must know of a model: the sizes of its layers and who holds which parameters. No weights.

`shape_of` builds the model on torch's meta device, where a parameter has a shape and no memory, adapters and all, so
that counts are those of the model that a run would train; `describe` reads the same from any model.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.model import blocks
from burnish.model.adapters import apply_adapter
from burnish.model.head import backbone, causal_lm
from burnish.model.load import load_config

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Linear:
    """One projection [inputs] -> [outputs]; trained: its own weight is.

    rank     of its adapter, 0 without one
    dropout  the adapter drops some of its input: peft's own module runs, which keeps a copy of that for every adapter
    """

    inputs: int
    outputs: int
    bias: bool = False
    trained: bool = True
    rank: int = 0
    dropout: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def adapter(self) -> int:
        """Elements of A [rank, inputs] and B [outputs, rank]."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. window: tokens that a token sees, None for all; rotates: has rotary positions."""

    linears: dict[str, Linear]  # by role
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    rotates: bool = True
    head_norms: bool = False  # queries and keys are normed per head
    norms: int = 2  # of the hidden states; Gemma 2 and 3 have 4
    norms_trained: bool = True
    parameters: int = 0
    block: bool = True  # runs as `burnish.model.blocks`; otherwise as transformers' own forward with patched modules

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def inner(self) -> int:
        return self.linears["gate"].outputs

    def weights(self, *roles: str) -> int:
        """Elements of these projections' weights, of all without roles."""
        return sum(self.linears[role].weights for role in roles or ROLES)

    @property
    def adapters(self) -> int:
        return sum(linear.adapter for linear in self.linears.values())


@dataclass(frozen=True)
class Tensors:
    """Parameters of one kind: how many elements, bytes each, and whether they are trained."""

    kind: str
    count: int
    itemsize: int
    trained: bool


@dataclass(frozen=True)
class Shape:
    """A causal language model. `tensors` counts every parameter once, a tied one as the embedding."""

    family: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tensors: tuple[Tensors, ...]
    tied: bool
    embedding_trained: bool
    head_trained: bool
    final_norm_trained: bool
    softcap: bool  # on the attention's scores: no fused kernel of torch's takes it

    def count(self, kind: str = "", trained: bool | None = None) -> int:
        """Parameters, of one kind or of all, trained ones or frozen ones or both."""
        return sum(t.count for t in self.tensors if kind in ("", t.kind) and (trained is None or t.trained == trained))

    @cached_property
    def kinds(self) -> list[tuple[Layer, int]]:
        """Layers that are alike, and how many of each there are."""
        found: list[tuple[Layer, int]] = []
        for layer in self.layers:
            at = next((i for i, (kind, _) in enumerate(found) if kind == layer), None)
            if at is None:
                found.append((layer, 1))
            else:
                found[at] = (layer, found[at][1] + 1)
        return found

    @property
    def by_hand(self) -> bool:
        """Whether its layers run as burnish's own Function where they are checkpointed."""
        return all(layer.block for layer in self.layers)

    @property
    def matrices(self) -> int:
        """Weights that a token meets in a matrix product, the head's among them, adapters not."""
        return sum(layer.weights() * number for layer, number in self.kinds) + self.hidden * self.vocab


def shape_of(config: Any, *, loaded: str | None = None) -> Shape:
    """The shape of the model that a training configuration names, from its config.json alone.

    config  of a training run: model_name_or_path, dtype, and the lora keys where use_peft is on
    loaded  the dtype that a run loads the model in, where that is not config.dtype

    Raises UserError for a model that can't be found, has experts, or is built in a way that the planner doesn't know.
    """
    if not config.model_name_or_path:
        raise UserError("no model", where="model_name_or_path", mend="Give a folder or a hub id")
    settings = load_config(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    model = skeleton(settings, loaded or config.dtype, where=config.model_name_or_path)
    return describe(apply_adapter(model, config) if config.use_peft else model)


def skeleton(settings: Any, dtype: str, *, where: str = "") -> nn.Module:
    """The causal LM of a transformers configuration on the meta device: shapes, no memory."""
    from transformers import AutoModelForCausalLM

    _refuse_experts(settings.get_text_config(), where)
    saved = getattr(settings, "dtype", None) or torch.float32
    kind = saved if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, dtype=kind)
    except (ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        raise UserError(
            f"transformers can't build this model ({' '.join(str(error).split())[:200]})",
            where=where,
            mend="Plan for a causal language model",
        ) from error


def _refuse_experts(text: Any, where: str) -> None:
    for name in _EXPERTS:
        if (getattr(text, name, None) or 0) > 1:
            raise UserError(
                f"a mixture of experts ({name} {getattr(text, name)}): which weights a token meets isn't known before",
                where=where,
                mend="Plan for a dense model",
            )


def describe(model: nn.Module) -> Shape:
    """The shape of a causal LM, adapted or not, on any device.

    Raises UserError where its layers are not self_attn (q_proj, k_proj, v_proj, o_proj) and mlp (gate, up, down_proj).
    """
    inner = causal_lm(model)
    text = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    _refuse_experts(text, type(inner).__name__)
    layers = _decoder_layers(backbone(model), text.num_hidden_layers)
    if layers is None:
        raise UserError(f"{type(inner).__name__} is not a stack of decoder layers with gated MLPs", where="model")
    block = blocks.matches(layers[0]) is None
    embedding = inner.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[operator]
    head = next(iter(output.parameters()), None) if output is not None else None
    last = [p for name, p in backbone(model).named_parameters() if name.split(".")[-2:] == ["norm", "weight"]]
    return Shape(
        family=str(text.model_type),
        hidden=text.hidden_size,
        vocab=embedding.shape[0] if head is not None else 1,  # a reward model has one score
        layers=tuple(_layer(layer, text, block) for layer in layers),
        tensors=_tensors(model, embedding, head),
        tied=head is embedding,
        embedding_trained=embedding.requires_grad,
        head_trained=head is not None and any(p.requires_grad for p in output.parameters()),  # type: ignore[union-attr]
        final_norm_trained=any(p.requires_grad for p in last),
        softcap=bool(getattr(text, "attn_logit_softcapping", None)),
    )


def _decoder_layers(model: nn.Module, number: int) -> list[nn.Module] | None:
    """The decoder layers: the one list of that many modules that each hold an attention and a gated MLP."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number and all(map(_is_decoder, module)):
            return list(module)
    return None


def _is_decoder(layer: nn.Module) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    named = [(attention, f"{role}_proj") for role in ROLES[:4]] + [(mlp, f"{role}_proj") for role in ROLES[4:]]
    return all(hasattr(getattr(owner, name, None), "in_features") for owner, name in named)


def _layer(layer: Any, text: Any, block: bool) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = getattr(attention, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found = {role: _linear(getattr(attention if role in ROLES[:4] else mlp, f"{role}_proj")) for role in ROLES}
    norms = [child for name, child in layer.named_children() if name not in ("self_attn", "mlp")]
    norms = [norm for norm in norms if any(p.ndim == 1 for p in norm.parameters())]
    used = getattr(attention, "use_rope", 1)  # SmolLM3 leaves rotary positions out of every fourth layer
    return Layer(
        linears=found,
        hidden=text.hidden_size,
        heads=found["q"].outputs // head_dim,
        kv_heads=found["k"].outputs // head_dim,
        head_dim=head_dim,
        window=_window(attention, layer, text),
        rotates=bool(used),
        head_norms=hasattr(attention, "q_norm"),
        norms=len(norms),
        norms_trained=any(p.requires_grad for norm in norms for p in norm.parameters()),
        parameters=sum(p.numel() for p in layer.parameters()),
        block=block,
    )


def _window(attention: Any, layer: Any, text: Any) -> int | None:
    """The layer's own sliding window, as its attention passes it on."""
    kind = getattr(layer, "attention_type", None) or getattr(attention, "layer_type", None)
    if kind == "full_attention":
        return None
    if kind == "sliding_attention":
        return getattr(attention, "sliding_window", None) or getattr(text, "sliding_window", None)
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None


def _linear(layer: Any) -> Linear:
    base = getattr(layer, "base_layer", layer)
    rank = sum(adapter.out_features for adapter in getattr(layer, "lora_A", {}).values())
    drops = any(getattr(each, "p", 0.0) > 0 for each in getattr(layer, "lora_dropout", {}).values())
    weight = base.weight
    return Linear(layer.in_features, layer.out_features, base.bias is not None, weight.requires_grad, rank, drops)


def _tensors(model: nn.Module, embedding: nn.Parameter, head: nn.Parameter | None) -> tuple[Tensors, ...]:
    counts: dict[tuple[str, int, bool], int] = {}
    for name, parameter in model.named_parameters():  # a shared parameter comes once
        key = (_kind(name, parameter, embedding, head), parameter.element_size(), parameter.requires_grad)
        counts[key] = counts.get(key, 0) + parameter.numel()
    return tuple(Tensors(kind, count, size, trained) for (kind, size, trained), count in counts.items())


def _kind(name: str, parameter: nn.Parameter, embedding: nn.Parameter, head: nn.Parameter | None) -> str:
    if parameter is embedding:
        return "embedding"
    if parameter is head:
        return "head"
    if "lora_" in name or "modules_to_save" in name:
        return "adapter"
    if parameter.ndim < 2:
        return "vector"
    return "attention" if "attn" in name else "mlp"
