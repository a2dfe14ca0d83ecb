"""TRL's helpers around training, by their names: chat formats on a model, model options of a script, seeds.

What they make is plain transformers and peft; a script hands it to a trainer, or goes on without burnish.
"""

import importlib.util
import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from burnish.config.errors import UserError
from burnish.model.load import load_tokenizer

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"help": doc})


@dataclass
class ModelConfig:
    """Options of a script for its model, as TRL names them; transformers' HfArgumentParser makes a command line of it.

    torch_dtype is the earlier name of dtype: both hold what either was given. UserError for 4 and 8 bits at once.
    """

    model_name_or_path: str | None = _option(None, "model: a folder or a hub id")
    model_revision: str = _option("main", "branch, tag or commit of a hub id")
    dtype: str | None = _option(None, "dtype of the weights: auto, float32, bfloat16 or float16")
    torch_dtype: str | None = _option(None, "earlier name of dtype")
    trust_remote_code: bool = _option(False, "run Python code that comes with the model")
    attn_implementation: str | None = _option(
        None, "attention of a model that the script loads; trainers put in their own"
    )
    use_peft: bool = _option(False, "train LoRA adapters")
    lora_r: int = _option(16, "rank of the adapters")
    lora_alpha: int = _option(32, "scale of the adapters: their output is multiplied by lora_alpha / lora_r")
    lora_dropout: float = _option(0.05, "dropout before the adapters")
    lora_target_modules: list[str] | None = _option(None, "modules that get adapters, or all-linear")
    lora_target_parameters: list[str] | None = _option(None, "parameters that get adapters")
    lora_modules_to_save: list[str] | None = _option(None, "modules trained in full beside the adapters")
    lora_task_type: str = _option("CAUSAL_LM", "peft's task type; SEQ_CLS for reward models")
    use_rslora: bool = _option(False, "scale adapters by 1/sqrt(rank) instead of 1/rank")
    use_dora: bool = _option(False, "weight-decomposed adapters (DoRA)")
    load_in_8bit: bool = _option(False, "hold the base in 8 bits")
    load_in_4bit: bool = _option(False, "hold the base in 4 bits")
    bnb_4bit_quant_type: str = _option("nf4", "kind of 4-bit numbers: nf4 or fp4")
    use_bnb_nested_quant: bool = _option(False, "quantise the 4-bit base's scales as well")
    bnb_4bit_quant_storage: str | None = _option(None, "dtype that 4-bit weights are packed into")

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("load_in_8bit and load_in_4bit are both set", where="ModelConfig", mend="Keep one")
        if self.dtype and self.torch_dtype and self.dtype != self.torch_dtype:
            raise UserError(
                f"dtype {self.dtype} and torch_dtype {self.torch_dtype}, its earlier name, differ",
                where="ModelConfig",
                mend="Keep dtype",
            )
        self.dtype = self.torch_dtype = self.dtype or self.torch_dtype
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]  # all-linear is no name


def get_peft_config(model_args: ModelConfig) -> Any:
    """peft's LoraConfig for the options, or None without use_peft."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,  # type: ignore[arg-type]  # peft reads its own enum from text
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> Any:
    """transformers' BitsAndBytesConfig for load_in_4bit or load_in_8bit, or None without them.

    4-bit weights are expanded to model_args.dtype for each product (auto or None: float32). Raises UserError where
    bitsandbytes is not installed.
    """
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "bases in 4 or 8 bits take the package bitsandbytes, which is not installed",
            where="get_quantization_config",
            mend="pip install bitsandbytes",
        )
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


def get_kbit_device_map() -> dict[str, int] | None:
    """Where a quantised base is loaded: whole, on this process's own GPU; None without one."""
    return {"": int(os.environ.get("LOCAL_RANK", "0"))} if torch.cuda.is_available() else None


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a base model the ChatML format: its two tokens, its template, and embeddings for them. Returns both.

    <|im_start|> becomes BOS and <|im_end|> EOS and padding, in the tokenizer and in the model's configurations. New
    embeddings are drawn around the mean of the old ones (transformers). resize_to_multiple_of rounds their number up.
    """
    if format != "chatml":
        raise UserError(f"unknown format {format!r}", where="setup_chat_format", mend="Use chatml")
    start, end = "<|im_start|>", "<|im_end|>"
    tokenizer.add_special_tokens({"bos_token": start, "eos_token": end, "pad_token": end})
    tokenizer.chat_template = _CHATML
    _resize(model, len(tokenizer), resize_to_multiple_of)
    for part in _configurations(model):
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def clone_chat_template(
    model: Any, tokenizer: Any, source_tokenizer_path: str, resize_to_multiple_of: int | None = 64
) -> tuple[Any, Any, list[int]]:
    """Give a model another tokenizer's chat template, with the special tokens that it needs and its EOS.

    The embeddings grow to a multiple of resize_to_multiple_of, and the tokenizer with them (<extra_id_0>, ...), so that
    both have one size. Returns model, tokenizer and the ids of the tokens that were added from the source.
    """
    source = load_tokenizer(source_tokenizer_path)
    if not source.chat_template:
        raise UserError("its tokenizer has no chat template", where=source_tokenizer_path)
    if source.eos_token is None:
        raise UserError("its tokenizer has no EOS token, which ends a reply", where=source_tokenizer_path)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    _resize(model, len(tokenizer), resize_to_multiple_of)
    rows = model.get_input_embeddings().weight.shape[0]
    number, known = 0, tokenizer.get_vocab()
    while len(tokenizer) < rows:
        if f"<extra_id_{number}>" not in known:
            tokenizer.add_tokens([f"<extra_id_{number}>"])
        number += 1
    for part in _configurations(model):
        part.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, [tokenizer.convert_tokens_to_ids(token.content) for token in new]


def _resize(model: Any, tokens: int, multiple: int | None) -> None:
    """Embeddings for at least so many tokens, their number a multiple. A model that has rows to spare keeps them."""
    rows = max(tokens, model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)


def _configurations(model: Any) -> list[Any]:
    """Where a model keeps its special tokens: its configuration, and that of generation where it has one."""
    parts = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    return [part for part in parts if part is not None]
