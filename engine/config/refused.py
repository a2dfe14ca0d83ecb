"""Names of TRL and transformers that burnish doesn't take: why, and what to use instead.

Each is an error and never ignored. The reasons are grouped by what they are about; the second part holds names that
have another name today.
"""

import difflib
from collections.abc import Iterable

_LOGITS = ("burnish never makes logits, so nothing can be computed from them", "Delete it")
_EVAL_LOOP = ("evaluation keeps only sums on the device and returns loss and token metrics", "Delete it")
_LOADER = ("batches are sliced from memory-mapped tokens, without worker processes", "Delete it")
_LAUNCH = ("this version trains on one device", "Delete it")
_CONSOLE = ("burnish prints one line a log step and keeps the libraries' output off the screen", "Set BURNISH_DEBUG=1")
_HUB = ("burnish uploads nothing", "Upload output_dir afterwards with: hf upload REPO output_dir")
_QUANTIZED = ("quantised base models can't be trained yet", "Use dtype: bfloat16 with use_peft: true")
_COMPILE = ("the hand-written kernels replace compilation", "Delete it")
_HALF = ("float16 needs loss scaling, which burnish doesn't do", "Use bf16: true")
_VERB = ("the verb says what is done", "Delete it")
_RENAMED = "has another name today"
_UDM = ("matching of prompt distributions is not offered", "Delete it")

REFUSED: dict[str, tuple[str, str]] = {
    # precision and compilation
    "fp16": _HALF,
    "fp16_full_eval": _HALF,
    "bf16_full_eval": ("evaluation computes in the same dtype as training", "Use bf16"),
    "tf32": ("float32 matrix products stay exact", "Use bf16: true for speed"),
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": ("burnish's own kernels are always on", "Delete it"),
    "liger_kernel_config": ("burnish's own kernels are always on", "Delete it"),
    "attn_implementation": (
        "packed rows need burnish's own attention, which uses flash-attn where installed",
        "Delete it",
    ),
    "activation_checkpointing": ("TRL's name is used", "Use gradient_checkpointing"),
    "activation_checkpointing_kwargs": ("checkpointing is always non-reentrant and of every layer", "Delete it"),
    "torch_empty_cache_steps": ("shapes vary little, so the allocator's cache is kept", "Delete it"),
    "auto_find_batch_size": ("a changed batch size would change the run", "Use max_tokens_per_batch"),
    "use_cache": ("training never keeps a key-value cache", "Delete it"),
    # model
    "model_revision": ("the revision belongs to loading the model", "Use model_init_kwargs: {revision: ...}"),
    "router_aux_loss_coef": ("mixture-of-experts balancing losses are not computed yet", "Delete it"),
    "lora_target_parameters": ("adapters go on linear modules only", "Use lora_target_modules"),
    "lora_task_type": ("adapters are always those of a causal language model", "Delete it"),
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "use_bnb_nested_quant": _QUANTIZED,
    "bnb_4bit_quant_storage": _QUANTIZED,
    # optimizer and loss
    "optim_args": ("optimizers have named keys here", "Use adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": ("the optimizers that need it (GaLore, APOLLO) are not offered", "Use use_peft: true"),
    "average_tokens_across_devices": ("the loss is always divided by the global number of trained tokens", "Delete it"),
    "label_smoothing_factor": ("SFT trains on the plain likelihood", "Delete it, or use loss_type: dft"),
    "neftune_noise_alpha": ("noisy embeddings are not offered yet", "Delete it"),
    "full_determinism": ("runs on one device are deterministic as they are", "Delete it"),
    # data and batches
    "dataset_num_proc": ("one process with a threaded tokenizer prepares the rows, once; they are cached", "Delete it"),
    "dataset_kwargs": ("special tokens come from the rows' format", "Use rows that are already tokenized"),
    "dataset_streaming": ("rows are read once and cached on disk", "Delete it"),
    "pad_to_multiple_of": ("burnish never pads", "Delete it"),
    "remove_unused_columns": ("columns that training doesn't use are never loaded", "Delete it"),
    "label_names": ("labels come from the rows' format", "Delete it"),
    "length_column_name": ("lengths are known from the tokens", "Delete it"),
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "ignore_data_skip": ("resuming continues at the exact row and reads nothing twice", "Delete it"),
    # preference objectives
    "generate_during_eval": (_EVAL_LOOP[0], "Use output_dir with a generation tool afterwards"),
    "is_encoder_decoder": ("only causal language models are trained", "Delete it"),
    "padding_value": ("burnish never pads", "Delete it"),
    "label_pad_token_id": ("burnish never pads", "Delete it"),
    "use_logits_to_keep": ("the head only ever sees the completions", "Delete it"),
    "base_model_attribute_name": ("the backbone is found from the model itself", "Delete it"),
    "use_liger_loss": ("burnish's own kernels are always on", "Delete it"),
    "ref_model_init_kwargs": ("the reference is loaded as the model is", "Use model_init_kwargs"),
    "prompt_sample_size": _UDM,
    "min_density_ratio": _UDM,
    "max_density_ratio": _UDM,
    # evaluation
    "eval_delay": ("evaluations follow eval_steps from the first step", "Use eval_steps"),
    "prediction_loss_only": _EVAL_LOOP,
    "eval_do_concat_batches": _EVAL_LOOP,
    "eval_use_gather_object": _EVAL_LOOP,
    "eval_accumulation_steps": _EVAL_LOOP,
    "batch_eval_metrics": _EVAL_LOOP,
    "include_for_metrics": _LOGITS,
    "do_eval": ("the verb says what is done", "Use eval_strategy"),
    "do_train": _VERB,
    "do_predict": _VERB,
    # logging
    "logging_strategy": ("logging goes by steps", "Use logging_steps"),
    "logging_nan_inf_filter": ("a loss that is not finite is shown as it is", "Delete it"),
    "include_num_input_tokens_seen": ("num_tokens is always in metrics.jsonl", "Delete it"),
    "log_on_each_node": _LAUNCH,
    "log_level": _CONSOLE,
    "log_level_replica": _CONSOLE,
    "disable_tqdm": _CONSOLE,
    "debug": ("burnish has one switch for debugging", "Set BURNISH_DEBUG=1"),
    "skip_memory_metrics": ("mem_gib is always in metrics.jsonl and costs nothing", "Delete it"),
    "run_name": ("trackers are not offered yet", "Use output_dir to tell runs apart"),
    "project": ("trackers are not offered yet", "Read output_dir/metrics.jsonl"),
    "trackio_space_id": ("trackers are not offered yet", "Read output_dir/metrics.jsonl"),
    "trackio_bucket_id": ("trackers are not offered yet", "Read output_dir/metrics.jsonl"),
    "trackio_static_space_id": ("trackers are not offered yet", "Read output_dir/metrics.jsonl"),
    # saving and the hub
    "enable_jit_checkpoint": ("checkpoints follow save_strategy", "Use save_steps"),
    "save_on_each_node": _LAUNCH,
    "restore_callback_states_from_checkpoint": ("a checkpoint always restores everything it holds", "Delete it"),
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    # many devices
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH,
    "ddp_bucket_cap_mb": _LAUNCH,
    "ddp_broadcast_buffers": _LAUNCH,
    "ddp_static_graph": _LAUNCH,
    "ddp_backend": _LAUNCH,
    "ddp_timeout": _LAUNCH,
    "ignore_bias_buffers": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "local_rank": _LAUNCH,
    # names of earlier versions
    "max_seq_length": (_RENAMED, "Use max_length"),
    "torch_dtype": (_RENAMED, "Use dtype"),
    "evaluation_strategy": (_RENAMED, "Use eval_strategy"),
    "no_cuda": (_RENAMED, "Use use_cpu"),
    "group_by_length": ("batches hold no padding that sorting by length could save", "Delete it"),
    "per_gpu_train_batch_size": (_RENAMED, "Use per_device_train_batch_size"),
    "dataset_batch_size": ("the tokenizer's batch size is chosen for you", "Delete it"),
    "num_of_sequences": ("rows are packed by their token counts, not by an estimate", "Use packing and max_length"),
    "chars_per_token": ("rows are packed by their token counts, not by an estimate", "Use packing and max_length"),
    "max_target_length": (_RENAMED, "Use max_completion_length"),
    "use_liger": ("burnish's own kernels are always on", "Delete it"),
}


def explain(name: str, known: Iterable[str]) -> tuple[str, str]:
    """(what is wrong with this name, how to mend it), for a name that is no key."""
    if name in REFUSED:
        why, mend = REFUSED[name]
        return f"{name} is not taken: {why}", mend
    close = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    if close:
        return f"unknown key {name}", f"Did you mean {close[0]}?"
    return f"unknown key {name}", "burnish sft --help-all lists every key"
