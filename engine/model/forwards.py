"""The forwards that burnish.patch puts on module instances.

Each is a plain function of `self` that reads parameters and children when it is called and holds no module, so a
patched model can be moved, copied, adapted and saved like any other. The attribute OP says whose a function is.
"""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels import glu_linear, linear_cross_entropy, rms_norm
from burnish.model import blocks
from burnish.model.head import backbone, output_layer, read_head
from burnish.model.probe import GLU_OPS, Match, glu, has_hooks, rotate

OP = "burnish_op"
_ACTIVATIONS = {("swiglu", ""): "silu", ("geglu", "tanh"): "gelu_tanh", ("geglu", "none"): "gelu"}


def installed_op(module: nn.Module) -> str | None:
    """The op whose forward `patch` put on this module, also below what others wrapped round it since, or None."""
    function = vars(module).get("forward")
    while function is not None and (op := _own_op(function)) is None:
        function = getattr(function, "__wrapped__", None)
    return None if function is None else op


def outermost(module: nn.Module) -> bool:
    """Whether the forward on this instance is burnish's own, with nobody's wrapper round it."""
    return _own_op(vars(module).get("forward")) is not None


def _own_op(method: object) -> str | None:
    function = getattr(method, "__func__", method)
    op, code = getattr(function, OP, (None, None))
    return op if code is getattr(function, "__code__", None) else None  # functools.wraps copies attributes, not code


def norm_forward(match: Match) -> Callable:
    weight_name, eps_name = match.settings["weight"], match.settings["eps"]
    offset, cast = match.settings["offset"], match.settings["cast"]

    def forward(self, *args, **kwargs):
        x = _only(args, kwargs)
        weight = None if weight_name is None else getattr(self, weight_name)
        return rms_norm(x, weight, getattr(self, eps_name), offset=offset, cast=cast)

    return _marked(forward, match.op)


def glu_forward(match: Match) -> Callable:
    roles, key = match.settings["roles"], (match.op, match.settings["approximate"])
    act, activation = GLU_OPS[key], _ACTIVATIONS[key]

    def forward(self, *args, **kwargs):
        x = _only(args, kwargs)
        layers = [getattr(self, name) for name in roles]
        down = layers[-1]
        if type(down) is not nn.Linear or has_hooks(down) or torch.is_autocast_enabled(x.device.type):
            return glu(x, layers, act)  # called as modules: adapters and hooks count
        return glu(x, [*layers[:-1], _identity], partial(_into, down, activation))

    return _marked(forward, match.op)


def _only(args: tuple, kwargs: dict) -> Tensor:
    """The one input, by position or under whatever name the class gives it."""
    (x,) = [*args, *kwargs.values()]
    return x


def _identity(x: Tensor) -> Tensor:
    return x


def _into(down: nn.Linear, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return glu_linear(gate, up, down.weight, down.bias, activation=activation)


def attention_forward(original: Callable, matches: dict[str, Match]) -> Callable:
    """The class's own attention code with other rotary functions: same byte code, its own copy of the globals.

    The module's globals and its class stay as they are, so no other model is touched.
    """
    assert isinstance(original, FunctionType)
    rotary = {name: partial(_rotate, layout=match.settings["layout"]) for name, match in matches.items()}
    forward = FunctionType(
        original.__code__,
        {**original.__globals__, **rotary},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    return _marked(_named_like(original, forward), "rope")


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, layout: str):
    return rotate(q, k, cos, sin, unsqueeze_dim, layout)


def layer_forward(original: Callable) -> Callable:
    """A decoder layer's forward made of burnish.model.blocks; the class's own runs wherever that can't answer.

    Both run below transformers' gradient checkpointing, which newer versions put into the class's forward (older ones
    into __call__, outside of this one).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    outside = "__call__" in vars(GradientCheckpointingLayer)

    def whole(self, x, position_embeddings, past_key_values=None, **kwargs):
        return blocks.forward(self, x, *position_embeddings, **kwargs)

    def forward(self, *args, **kwargs):
        if len(args) != 1 or not answers(self, kwargs):
            return type(self).forward(self, *args, **kwargs)
        if self.training and not outside and getattr(self, "gradient_checkpointing", False):
            return self._gradient_checkpointing_func(partial(whole, self, **kwargs), *args)
        return whole(self, *args, **kwargs)

    return _marked(_named_like(original, forward), "decoder_layer")


def answers(layer: nn.Module, call: dict) -> bool:
    """Whether blocks can answer this call of a layer that it matches, now.

    Not one that fills or reads a cache or returns attention weights, nor while something runs round a module that
    blocks pass by (hooks, somebody's wrapper), nor eager attention, which is not in transformers' AttentionInterface.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if call.get("past_key_values") is not None or call.get("use_cache") or call.get("output_attentions"):
        return False
    implementation = layer.self_attn.config._attn_implementation  # type: ignore[union-attr]
    if call.get("position_embeddings") is None or implementation not in ALL_ATTENTION_FUNCTIONS:
        return False
    return not any(
        has_hooks(module) or ("forward" in vars(module) and not outermost(module)) for module in blocks.passed_by(layer)
    )


def loss_forward(original: Callable) -> Callable:
    """A ForCausalLM forward that computes the loss from hidden states when it trains on labels.

    Then `logits` is None. Without labels, in eval mode, or when something is asked for that needs the logits or the
    model's own loss (logits_to_keep, router losses, another loss_function, hooks on the output layer), the original
    runs. The loss is transformers' ForCausalLMLoss: num_items_in_batch, ignore_index and shift_labels mean the same.
    """
    signature = inspect.signature(original)

    def forward(self, *args, **kwargs):
        if not self.training:
            return original(self, *args, **kwargs)
        inputs = _flat_arguments(signature, self, args, kwargs)
        if inputs.get("labels") is None or needs_logits(self, inputs):
            return original(self, *args, **kwargs)
        return_dict = inputs.pop("return_dict", None)
        output = fused_loss(self, **inputs)
        return output if return_dict in (None, True) else output.to_tuple()

    return _marked(_named_like(original, forward), "linear_cross_entropy")


def needs_logits(model: nn.Module, inputs: dict) -> str | None:
    """Why the fused loss can't answer this call: the reason, or None."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    keep = inputs.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        return "logits_to_keep asks for logits"
    wanted = inputs.get("output_router_logits")
    if wanted or (wanted is None and getattr(config, "output_router_logits", False)):
        return "output_router_logits: the load-balancing loss is the model's own"
    if getattr(getattr(model, "loss_function", None), "__name__", None) != "ForCausalLMLoss":
        return "the model's loss_function is not transformers' ForCausalLMLoss"
    if has_hooks(output_layer(model)):
        return "the output layer has hooks, which would not run"
    return None


def fused_loss(
    model: nn.Module,
    labels: Tensor,  # [B, T]
    shift_labels: Tensor | None = None,  # [B, T]; already shifted, as sequence parallelism passes them
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    logits_to_keep: int = 0,
    **inputs: Any,
) -> Any:
    """CausalLMOutputWithPast with the loss of `labels` and without logits; `inputs` go to the backbone.

    The mean over trained tokens, or their sum over num_items_in_batch; 0 where nothing is trained.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if inputs.get("use_cache") is None:
        inputs["use_cache"] = False
    outputs = backbone(model)(**inputs)
    hidden = outputs.last_hidden_state  # [B, T, H]
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    head = read_head(model)
    loss = linear_cross_entropy(
        hidden.to(head.weight.device),
        head.weight,
        shift_labels.to(head.weight.device),
        num_items=num_items_in_batch,
        ignore_index=ignore_index,
        **head.options(),
    )
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=getattr(outputs, "past_key_values", None),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _flat_arguments(signature: inspect.Signature, model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Arguments by name, those behind **kwargs too, without self."""
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _named_like(original: Callable, function: Callable) -> Callable:
    """Name, docs and signature of `original`: generate and trainers read the signature.

    No __wrapped__: accelerate follows it when it takes its mixed-precision wrapper off, and would pass ours by.
    """
    functools.update_wrapper(function, original)
    del function.__wrapped__  # type: ignore[attr-defined]
    function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return function


def _marked(function: Callable, op: str) -> Callable:
    setattr(function, OP, (op, function.__code__))
    return function
