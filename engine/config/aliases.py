"""Keys by the names that TRL and transformers gave them earlier, and keys that ask for nothing burnish doesn't do.

Three kinds, none of them silent where a value asks for something: an older name stands for today's, a hint changes no
number here and is noted, and a refused key is taken where its value asks for what happens anyway (fp16: false).
"""

from collections.abc import Container
from typing import Any

from burnish.config.refused import REFUSED

OLDER = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "max_target_length": "max_completion_length",
    "activation_checkpointing": "gradient_checkpointing",  # transformers' newer name; TRL's is the other
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_PACKED = "rows are packed by their token counts, not by an estimate"
_LOADER = "batches are sliced from memory-mapped tokens, without worker processes"
_ALWAYS = "burnish's own kernels are always on"
_CONSOLE = "burnish prints one line a log step"
_UNPADDED = "burnish never pads"
_VERB = "train() and evaluate() say what is done"
HINTS = {
    "use_liger": _ALWAYS,
    "use_liger_kernel": _ALWAYS,
    "use_liger_loss": _ALWAYS,
    "liger_kernel_config": _ALWAYS,
    "use_logits_to_keep": "the head only ever sees what is trained",
    "dataset_num_proc": "one process with a threaded tokenizer prepares the rows, once; they are cached",
    "dataset_batch_size": "the tokenizer's batch size is chosen for you",
    "infinite": "max_steps, or else num_train_epochs, says how long rows are repeated",
    "num_of_sequences": _PACKED,
    "chars_per_token": _PACKED,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "remove_unused_columns": "columns that training doesn't use are never loaded",
    "group_by_length": "batches hold no padding that sorting by length could save",
    "length_column_name": "lengths are known from the tokens",
    "pad_to_multiple_of": _UNPADDED,
    "label_pad_token_id": _UNPADDED,
    "padding_value": _UNPADDED,
    "optimize_device_cache": "rows are packed, so the allocator's cache is kept",
    "disable_tqdm": _CONSOLE,
    "log_level": _CONSOLE,
    "log_level_replica": _CONSOLE,
    "do_train": _VERB,
    "do_eval": _VERB,
    "skip_memory_metrics": "mem_gib is always in metrics.jsonl and costs nothing",
    "include_num_input_tokens_seen": "num_tokens is always in metrics.jsonl",
    "include_tokens_per_second": "tok_s is always in metrics.jsonl",
}
# Values of refused keys that ask for what burnish does anyway, beside null, false, 0 and "" ...
_AS_IT_IS: dict[str, tuple] = {
    "average_tokens_across_devices": (True,),
    "save_safetensors": (True,),
    "dataloader_in_order": (True,),
    "eval_do_concat_batches": (True,),
    "log_on_each_node": (True,),
    "restore_callback_states_from_checkpoint": (True,),
    "logging_nan_inf_filter": (True,),
    "logging_strategy": ("steps",),
    "hub_strategy": ("every_save",),
    "local_rank": (-1,),
    "past_index": (-1,),
    "half_precision_backend": ("auto",),
    "fp16_opt_level": ("O1",),
    "ray_scope": ("last",),
    "model_revision": ("main",),
    "lora_task_type": ("CAUSAL_LM",),
}
# ... but for these, which are on by themselves.
_ON = {"average_tokens_across_devices", "save_safetensors", "dataloader_in_order", "eval_do_concat_batches"}


def today(name: str, value: Any, known: Container[str]) -> tuple[str | None, str]:
    """(the key that `name` with this value stands for, or None where nothing is to be set; a line for the log, or "").

    A name that is no key comes back as it is: `refused.explain` says why.
    """
    if name in known:
        return name, ""
    if name in OLDER and OLDER[name] in known:
        return (None, "") if value is None else (OLDER[name], f"{name} is called {OLDER[name]} here")
    if name in HINTS:
        return None, "" if value is None or value is False else f"{name} changes nothing here: {HINTS[name]}"
    if name in REFUSED and _as_it_is(name, value):
        return None, ""
    return name, ""


def todays_loading(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(model_init_kwargs as burnish hands them to from_pretrained, lines for the log).

    Its attention is no choice: packed rows go through burnish's, which computes the same. KeyError where torch_dtype
    and dtype are both given.
    """
    taken, notes = dict(given), []
    if "torch_dtype" in taken:
        if "dtype" in taken:
            raise KeyError("torch_dtype")
        taken["dtype"] = taken.pop("torch_dtype")
        notes.append("model_init_kwargs: torch_dtype is called dtype here")
        if taken["dtype"] is None:
            del taken["dtype"]
    for name, value in taken.items():
        if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
            taken[name] = str(value).removeprefix("torch.")  # as a configuration's file has it
    for name in ("attn_implementation", "use_flash_attention_2"):
        if taken.pop(name, None) not in (None, False):
            notes.append(f"model_init_kwargs: {name} changes nothing here: packed rows go through burnish's attention")
    return taken, notes


def _as_it_is(name: str, value: Any) -> bool:
    value = getattr(value, "value", value)  # transformers' enums
    if any(value == same and type(value) is type(same) for same in _AS_IT_IS.get(name, ())):
        return True
    return name not in _ON and (value is None or value is False or value in ("", [], {}) or value == 0)
