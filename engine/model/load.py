"""Models and tokenizers from a folder or a hub id, with one clear line for each way that can fail.

transformers is imported inside the functions, and only its Auto classes: nothing here needs its Trainer or peft.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    model_init_kwargs: dict | None = None,
    attn: str = "burnish",
    scores: bool = False,
) -> nn.Module:
    """A causal LM in training mode on `device`, from a folder or a hub id.

    dtype  of the weights: "float32", "bfloat16", "float16", "auto" (as saved), or a torch.dtype
    attn   transformers' attn_implementation; "burnish" is registered first
    scores a sequence classifier with one score, for reward modelling; its score layer may be new
    model_init_kwargs  further arguments of from_pretrained; they win over the ones above

    Weights are read from safetensors only (a pickle can run code) unless model_init_kwargs says otherwise. Raises
    UserError for a missing or unfit folder, an unreachable hub, an unknown architecture, and for a checkpoint that
    lacks weights of the model, which transformers would fill with random numbers.
    """
    options: dict[str, Any] = {
        "dtype": _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype,
        "attn_implementation": attn,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        **(model_init_kwargs or {}),
    }
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = _named_dtype(options["dtype"])
    name = _located(name_or_path)
    if os.path.isdir(name):
        _check_folder(Path(name), safetensors_only=bool(options["use_safetensors"]) and "gguf_file" not in options)
    if options["attn_implementation"] == "burnish":
        from burnish.model.attention import register

        register()
    if scores:
        options["num_labels"] = 1
    try:
        family = _family(name, trust_remote_code, scores)
        model, info = family.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # of a dozen libraries' classes: all of them mean that these files don't load
        raise _load_error("model", name, error) from error
    missing = [key for key in info["missing_keys"] if not (scores and key.startswith("score."))]
    lacking = sorted(missing) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"the checkpoint lacks {len(lacking)} weights of {type(model).__name__} or has them in another shape: "
            + ", ".join(lacking[:3])
            + ", ..." * (len(lacking) > 3),
            where=name,
            mend="They would be random; check that config.json and the weights belong together",
        )
    if "device_map" not in options:
        model = model.to(device)
    align(model)
    return model.train()


def _family(name: str, trust_remote_code: bool, scores: bool) -> Any:
    """The Auto class that loads this model: of causal LMs, unless its configuration is only known with images."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if scores:
        return AutoModelForSequenceClassification
    kind = type(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    pictures = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if pictures else AutoModelForCausalLM


def load_processor(name_or_path: str, *, trust_remote_code: bool = False) -> Any:
    """The processor (images and tokenizer) of a folder or a hub id. Raises UserError where there is none."""
    from transformers import AutoProcessor

    name = _located(name_or_path)
    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _load_error("processor", name, error) from error


def align(model: nn.Module) -> None:
    """Move CPU parameters that lie off a 64-byte boundary, as those mapped from a safetensors file do.

    Matrix products read aligned weights 1.7 times as fast (float32, [720, 576] x [576, 1536], AVX-512).
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point() and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def load_config(name_or_path: str, *, trust_remote_code: bool = False, here: bool = False) -> Any:
    """A model's configuration, without its weights, from a folder or a hub id; with `here`, from no network.

    Raises UserError as load_model does.
    """
    from transformers import AutoConfig

    name = _located(name_or_path)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=here)
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise _load_error("model", name, error) from error


def load_tokenizer(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> Any:
    """The tokenizer of a folder or a hub id.

    chat_template_path  a Jinja file, or a folder or hub id whose tokenizer's template replaces this one's
    eos_token, pad_token  tokens of the vocabulary that replace the tokenizer's own

    Raises UserError for a missing folder, an unreachable hub, a template that isn't there, an unknown token.
    """
    from transformers import AutoTokenizer

    name = _located(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _load_error("tokenizer", name, error) from error
    return dress_tokenizer(
        tokenizer,
        trust_remote_code=trust_remote_code,
        chat_template_path=chat_template_path,
        eos_token=eos_token,
        pad_token=pad_token,
    )


def dress_tokenizer(
    tokenizer: Any,
    *,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> Any:
    """`tokenizer` itself with the template and tokens that `load_tokenizer` names, for one that a script brings."""
    if chat_template_path:
        tokenizer.chat_template, ends = _chat_template(chat_template_path, trust_remote_code)
        eos_token = eos_token or ends  # replies must end as the template ends them
    for role, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            mend = "Name an existing token, or add it first with burnish.clone_chat_template"
            raise UserError(f"{token!r} is not in the tokenizer's vocabulary", where=role, mend=mend)
        setattr(tokenizer, role, token)
    return tokenizer


def end_replies(model: nn.Module, tokenizer: Any) -> str:
    """Make generation stop at the tokenizer's end of sequence, in what is saved too. A line for the log."""
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    known = config.eos_token_id if generation is None else generation.eos_token_id
    known = [known] if isinstance(known, int) else list(known or [])
    end = tokenizer.eos_token_id
    config.eos_token_id = end
    if generation is not None and end not in known:
        generation.eos_token_id = [end, *known]
    return f"replies end with {tokenizer.eos_token} ({end})"


def check_vocabulary(tokenizer: Any, model: nn.Module) -> None:
    """Raises UserError if the tokenizer can give ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    size = len(getattr(tokenizer, "tokenizer", tokenizer))  # a processor's
    if size > rows:
        raise UserError(
            f"the tokenizer has {size} tokens, the model embeds {rows}",
            where=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"),
            mend="Use the model's own tokenizer, or enlarge the model first (model.resize_token_embeddings)",
        )


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"unknown dtype {name!r}", where="dtype", mend="Use float32, bfloat16 or auto")
    return dtype


def _located(name: str) -> str:
    """The folder's path with ~ expanded, or a hub id as it is; raises UserError for a path that isn't there."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError("a model is a folder, this is a file", where=path, mend="Give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        parent = Path(path).absolute().parent
        near = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())[:8] if parent.is_dir() else []
        raise UserError(
            "no such model folder",
            where=path,
            mend=f"{parent} holds {', '.join(near)}" if near else f"{parent} has no folders or isn't there",
        )
    return name


def _check_folder(folder: Path, *, safetensors_only: bool) -> None:
    """Raises UserError for a folder that from_pretrained would refuse at length."""
    if not (folder / "config.json").exists():
        adapter = folder / "adapter_config.json"
        if adapter.exists():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise UserError("holds an adapter, not a model", where=str(folder), mend=f"Its base model is {base}")
        raise UserError("holds no config.json", where=str(folder), mend="Give a folder that save_pretrained wrote")
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if safetensors_only and not any(folder.glob("*.safetensors")):
        if pickles:
            raise UserError(
                f"its weights are a pickle ({pickles[0]}), which can run code when it is read",
                where=str(folder),
                mend="Save them as safetensors, or set model_init_kwargs: {use_safetensors: false} if you trust them",
            )
        raise UserError("holds no weights (*.safetensors)", where=str(folder), mend="Give a complete model folder")


def _load_error(what: str, name: str, error: Exception) -> UserError:
    """transformers' own reason in one line, with what can be done where the name is a folder or a hub id."""
    reason = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {reason[:300]}"
    if os.path.isdir(name):
        return UserError(f"the {what} can't be loaded ({reason})", where=name)
    return UserError(
        f"the {what} is neither a folder here nor can it be had from the hub ({reason})",
        where=name,
        mend="Give the path of a local folder, or check the name and the network",
    )


def _chat_template(source: str, trust_remote_code: bool) -> tuple[str, str | None]:
    """(the template of a Jinja file or of a tokenizer, the token that ends its replies, which a file doesn't say)."""
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path.read_text(encoding="utf-8"), None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError("its tokenizer has no chat template", where=source, mend="Give a Jinja file")
    return tokenizer.chat_template, tokenizer.eos_token


def drop_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it, a policy differs from the reference that it starts as."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
