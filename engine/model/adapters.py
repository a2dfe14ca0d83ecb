"""LoRA adapters through peft, which is imported only when a run asks for them.

Saving is the PeftModel's own save_pretrained: adapter_model.safetensors and adapter_config.json, nothing of the base.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from burnish.config.errors import UserError
from burnish.model.head import output_layer


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
