"""Bases in 8 or 4 bits (bitsandbytes): loaded frozen, adapters train on top (QLoRA, arXiv 2305.14314).

bitsandbytes and accelerate, which transformers loads such a base with, are imported when a run asks for one.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.model.head import causal_lm


def kbit_options(config: Any, compute: torch.dtype) -> dict[str, Any]:
    """What from_pretrained is given for load_in_8bit or load_in_4bit beside its other arguments; {} without them.

    compute  the dtype that 4-bit weights are expanded to for each product

    Raises UserError where a package that it takes is not installed.
    """
    if not (config.load_in_8bit or config.load_in_4bit):
        return {}
    name = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name} takes the package {package}, which is not installed",
                where=config.origins[name],
                mend=f"pip install {package}, or delete {name} and use dtype: bfloat16",
            )
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        wanted = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        )
    return {"quantization_config": wanted}


def kbit(model: nn.Module) -> int:
    """Bits of the base's quantised weights: 8 or 4; 0 for a base that has none."""
    inner = causal_lm(model)
    if getattr(inner, "is_loaded_in_8bit", False):
        return 8
    return 4 if getattr(inner, "is_loaded_in_4bit", False) else 0


def prepare_kbit(model: nn.Module, *, adapted: bool, upcast: bool) -> nn.Module:
    """A quantised base, frozen, ready for adapters; other models as they are.

    adapted  adapters will be trained on it, or are there already
    upcast   weights that are not quantised become float32, as peft does it; burnish's norms and losses compute in
             float32 whatever their weights are, so a bfloat16 run leaves them

    Raises UserError without adapters: integers have no gradient.
    """
    bits = kbit(model)
    if not bits:
        return model
    if not adapted:
        raise UserError(
            f"the base model is in {bits} bits, which can't be trained themselves",
            where="model",
            mend="Use use_peft: true (in Python: peft_config=LoraConfig(...))",
        )
    _stay_differentiable(model)
    if hasattr(model, "peft_config"):
        return model  # its adapters are what its owner wants to train
    if not upcast:
        return model.requires_grad_(False)
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # burnish checkpoints by itself


def _stay_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking themselves for inference, which bitsandbytes does on some CPUs in eval mode:
    their products then have no gradient, and an evaluation would end the training without a sign of it.

    Raises UserError for weights that were repacked before, or are packed into floating-point numbers.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UserError(
                    "4-bit weights were repacked for inference, by a forward in eval mode on this CPU",
                    where=name,
                    mend="Load the model anew and hand it over before it is used",
                )
            if module.weight.is_floating_point():
                raise UserError(
                    f"4-bit weights are packed into {module.weight.dtype}, which would be taken for plain weights",
                    where=name,
                    mend="Load the model without bnb_4bit_quant_storage",
                )


@contextmanager
def row_by_row(model: nn.Module) -> Iterator[None]:
    """Inside, 8-bit layers quantise every token alone.

    Else they pick the columns that they leave in 16 bits by the largest value of the whole row (LLM.int8,
    arXiv 2208.07339), so that packed sequences change one another's rounding: some 2 % of a hidden state, which would
    hide a sequence that really sees its neighbour.
    """
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
