"""The head: how a model turns hidden states into logits, read from the model and checked against it.

burnish never calls a ForCausalLM forward while training: it runs the backbone and computes log-probs from its hidden
states. That is right only if the head is exactly `softcap * tanh(scale * (h W^T + b) / softcap)`, so the reading is
compared with the model's own logits once, and a head that can't be reproduced is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError

# Where a text config says what its model multiplies the logits by; Granite's name for a divisor comes last.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_LOGIT_SPREAD = 40.0  # standard deviation of the logits that check_head asks for: saturates a softcap of 15 to 50


@dataclass
class Head:
    """logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap) or z.

    weight [V, H], bias [V] or None: the model's own parameters (not copies), so gradients reach them.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def options(self) -> dict:
        """The keyword arguments that linear_logprob and linear_cross_entropy take beside weight."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself: what a PeftModel wraps, or the model as given."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal LM that returns `last_hidden_state` (through a PeftModel too).

    Raises UserError for a model that has no such part.
    """
    model = causal_lm(model)
    found = getattr(model, "base_model", model)
    if found is model and hasattr(model, "get_decoder"):
        found = model.get_decoder()
    if found is None or found is model:
        raise UserError(
            f"{type(model).__name__} has no backbone that returns hidden states",
            mend="load a causal language model (AutoModelForCausalLM)",
        )
    return found


def output_layer(model: nn.Module) -> nn.Module:
    """The module that holds the head's weight now, below peft's wrappers.

    A copy trained through modules_to_save counts; LoRA on the head is refused with a UserError, because its update
    is a second matrix product that the fused head does not make.
    """
    model = causal_lm(model)
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise UserError(
            f"{type(model).__name__} has no output embeddings",
            mend="load a causal language model (AutoModelForCausalLM)",
        )
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):  # peft's ModulesToSaveWrapper
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if hasattr(layer, "base_layer"):  # a peft tuner layer or wrapper
        if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
            return layer.base_layer
        raise UserError(
            f"the output layer is wrapped by peft's {type(layer).__module__}.{type(layer).__name__}: "
            "its update can't be trained through the fused head",
            mend="take lm_head out of lora_target_modules, or train it whole with modules_to_save: [lm_head]",
        )
    return layer


def read_head(model: nn.Module) -> Head:
    """The head as burnish understands it: parameters live from the model, softcap and scale from its config.

    Costs nothing and runs nothing, so it may be called for every batch. Raises UserError where there is no plain
    [V, H] floating-point weight.
    """
    layer = output_layer(model)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"the output layer {type(layer).__name__} has no plain floating-point [vocabulary, hidden] weight",
            mend="keep the output layer out of quantisation",
        )
    config = causal_lm(model).config.get_text_config()
    scale = next((value for name in _MULTIPLIERS if (value := getattr(config, name, None)) is not None), None)
    if scale is None:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is None:
            scale = 1.0
        else:  # HyperCLOVA X multiplies by the number that Granite and MiniCPM3 divide by
            scale = scaling if config.model_type.startswith("hyperclovax") else 1.0 / scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(layer, "bias", None)
    return Head(weight, bias, float(softcap) if softcap else None, float(scale))


def head_logits(head: Head, hidden: Tensor) -> Tensor:
    """The definition of a head: hidden [..., H] -> logits [..., V]. For checks; training never holds logits."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> None:
    """Compare `head` with the model's own logits on two tokens; raises UserError where they differ.

    The hidden states of the two tokens are replaced by random ones that spread the logits over about +-40, so that a
    softcap, a scale or a bias that was missed shows even in a freshly initialised model.
    """
    inner = causal_lm(model)
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    spread = head_logits(Head(weight, None, None, head.logit_scale), hidden).float().std().item()
    hidden = hidden * (_LOGIT_SPREAD / spread if spread > 0 else 1.0)
    ids = torch.tensor([[0, 1]], device=inner.get_input_embeddings().weight.device) % weight.shape[0]

    def substitute(module, args, output):
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    hook = backbone(model).register_forward_hook(substitute)
    try:
        with evaluating(inner):
            theirs = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    finally:
        hook.remove()
    ours = head_logits(head, hidden).float()
    if theirs.shape != ours.shape:
        raise UserError(
            f"the model's logits have {theirs.shape[-1]} columns, its output weight gives {ours.shape[-1]}",
            where=type(inner).__name__,
        )
    error = ((ours - theirs).norm() / theirs.norm()).item()
    # Rounding to bfloat16 two or three times gives about 0.3 eps. Not `error > ...`: a NaN must fail.
    if not error <= max(0.75 * torch.finfo(weight.dtype).eps, 1e-5):
        raise UserError(
            f"the head can't be reproduced: logits differ by {error:.2g} of their size (softcap {head.softcap}, "
            f"scale {head.logit_scale:g}, bias {head.bias is not None})",
            where=type(inner).__name__,
            mend="burnish can train models with logits = softcap(scale * (h W^T + b)) only",
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own training flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
