"""LoRA adapters through peft, which is imported only when a run asks for them.

Saving is the PeftModel's own save_pretrained: adapter_model.safetensors and adapter_config.json, nothing of the base.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.model.head import output_layer
from burnish.model.probe import has_hooks


def apply_adapter(model: nn.Module, source: Any, *, scores: bool = False) -> nn.Module:
    """`model` inside a PeftModel, its own parameters frozen.

    source  a peft config, or a burnish config with the fields lora_r, lora_alpha, lora_dropout, lora_target_modules,
            lora_modules_to_save, use_rslora and use_dora

    scores  the model is a reward model: its new score layer is trained and saved beside the adapters

    Works on a patched model and on one that is patched afterwards. Raises UserError for target modules that the model
    does not have, for an output layer with LoRA (the fused head can't train it; modules_to_save can), and for a
    model that has an adapter already.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        raise UserError(
            "the model has an adapter already", where="peft_config", mend="Merge it first, or leave this out"
        )
    config = source if isinstance(source, peft.PeftConfig) else lora_config(source, scores)
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__} puts virtual tokens into the input, which packed rows have no place for",
            where="peft_config",
            mend="Use LoRA or another adapter on the weights",
        )
    try:
        adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"peft can't place the adapter ({reason})",
            where="lora_target_modules",
            mend="Name linear layers of the model, or use all-linear",
        ) from error
    if not scores:
        output_layer(adapted)  # refuses LoRA on the head now, by name, instead of at the first batch
    return adapted


def adapter_base(folder: str | Path) -> str | None:
    """The base model's name if `folder` holds a saved adapter, else None. Raises UserError for a torn file."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("not an adapter's configuration", where=str(path), mend="Save the adapter again") from error


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model` inside a PeftModel with the adapter saved in `folder`, for inference. UserError where it does not fit."""
    import peft

    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError("holds no adapter_model.safetensors", where=str(folder), mend="Save the adapter again")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter does not fit its base model ({reason})", where=str(folder)) from error


def lora_config(config: Any, scores: bool = False) -> Any:
    """peft's LoraConfig for a causal LM, or a reward model, from the lora fields of a burnish config."""
    import peft

    targets = config.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"  # peft knows it as a string only; in a list it would be a module's name
    return peft.LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def is_adapted(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer inside one of peft's LoRA layers, of whatever kind."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def plain_lora(layer: nn.Module, ever: bool = False) -> tuple[nn.Linear, Tensor, Tensor, float] | str:
    """(base layer, A [r, K], B [N, r], scale) of a peft layer that now computes base(x) + scale * B(A(x)).

    Otherwise the reason why it has to be called as a module. Read anew for every call, so that set_adapter,
    disable_adapter, merging and train() count. `ever`: dropout counts in eval mode too, where it is off for now.
    """
    home = sys.modules.get("peft.tuners.lora.layer")
    if home is None or type(layer) is not home.Linear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not peft's LoRA on a plain linear layer"
    if layer.disable_adapters or layer.merged:
        return "its adapter is disabled or merged"
    parts = layer._modules  # read past nn.Module.__getattr__: every adapter is looked at in every call
    downs = parts["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in downs]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    (name,) = active
    base, down, up = parts["base_layer"], downs[name], parts["lora_B"]._modules[name]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is more than a low-rank product"
    dropout = parts["lora_dropout"]._modules[name]
    still = type(dropout) is nn.Dropout and (dropout.p == 0 or not (ever or dropout.training))
    if type(dropout) is not nn.Identity and not still:
        return "its input goes through dropout (lora_dropout)"
    for part in (base, down, up):
        if type(part) is not nn.Linear or "forward" in part.__dict__ or has_hooks(part):
            return "its base or adapter is quantised, wrapped or has hooks"
    weight, a, b = base._parameters["weight"], down._parameters["weight"], up._parameters["weight"]
    if up._parameters["bias"] is not None or down._parameters["bias"] is not None:
        return "its adapter has a bias (lora_bias)"
    for tensor in (weight, a, b):
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_floating_point():
            return "its weights are quantised or distributed tensors"
    narrower = weight.dtype != a.dtype and torch.promote_types(weight.dtype, a.dtype) != a.dtype
    if a.dtype != b.dtype or narrower:
        return f"its adapter is {a.dtype} beside {weight.dtype}"
    if weight.dtype != a.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "its input may not be cast (disable_input_dtype_casting)"
    if "forward" in layer.__dict__ or has_hooks(layer):
        return "it is wrapped or has hooks"
    return base, a, b, layer.scaling[name]
