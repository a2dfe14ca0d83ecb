"""Names of TRL and transformers that burnish doesn't take: why, and what to use instead.

Each is an error and never ignored, but for values that ask for what happens anyway (`aliases.py`, which also holds the
names that have another name today). The reasons are grouped by what they are about.
"""

import difflib
from collections.abc import Iterable

_LOGITS = ("burnish never makes logits, so nothing can be computed from them", "Delete it")
_EVAL_LOOP = ("evaluation keeps only sums on the device and returns loss and token metrics", "Delete it")
_LOADER = ("batches are sliced from memory-mapped tokens, without worker processes", "Delete it")
_LAUNCH = ("burnish wires its processes itself", "Delete it; see nproc, parallel and sequence_parallel")
_HUB = ("the model is uploaded once, when it is saved, and checkpoints never", "Use push_to_hub: true")
_COMPILE = ("the hand-written kernels replace compilation", "Delete it")
_SPACE = ("trackio's own variables say where its dashboard lies", "Set TRACKIO_SPACE_ID")
_HALF = ("float16 needs loss scaling, which burnish doesn't do", "Use bf16: true")
_VERB = ("the verb says what is done", "Delete it")
_TPU = ("burnish trains on GPUs and CPUs", "Delete it")
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
    "attn_implementation": (
        "packed rows need burnish's own attention, which uses flash-attn where installed",
        "Delete it",
    ),
    "torch_empty_cache_steps": ("shapes vary little, so the allocator's cache is kept", "Delete it"),
    "auto_find_batch_size": ("a changed batch size would change the run", "Use max_tokens_per_batch"),
    "use_cache": ("training never keeps a key-value cache", "Delete it"),
    # model
    "model_revision": ("the revision belongs to loading the model", "Use model_init_kwargs: {revision: ...}"),
    "router_aux_loss_coef": ("mixture-of-experts balancing losses are not computed yet", "Delete it"),
    "lora_target_parameters": ("adapters go on linear modules only", "Use lora_target_modules"),
    "lora_task_type": ("adapters are always those of a causal language model", "Delete it"),
    "bnb_4bit_quant_storage": ("4-bit weights are packed into bytes; other packing is for sharding them", "Delete it"),
    # optimizer and loss
    "optim_args": ("optimizers have named keys here", "Use adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": ("the optimizers that need it (GaLore, APOLLO) are not offered", "Use use_peft: true"),
    "average_tokens_across_devices": ("the loss is always divided by the global number of trained tokens", "Delete it"),
    "label_smoothing_factor": ("SFT trains on the plain likelihood", "Delete it, or use loss_type: dft"),
    "full_determinism": ("runs on one device are deterministic as they are", "Delete it"),
    # data and batches
    "dataset_streaming": ("rows are read once and cached on disk", "Delete it"),
    "label_names": ("labels come from the rows' format", "Delete it"),
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "ignore_data_skip": ("resuming continues at the exact row and reads nothing twice", "Delete it"),
    # preference objectives
    "generate_during_eval": (_EVAL_LOOP[0], "Use output_dir with a generation tool afterwards"),
    "is_encoder_decoder": ("only causal language models are trained", "Delete it"),
    "base_model_attribute_name": ("the backbone is found from the model itself", "Delete it"),
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
    "do_predict": _VERB,
    # logging
    "logging_strategy": ("logging goes by steps", "Use logging_steps"),
    "logging_nan_inf_filter": ("a loss that is not finite is shown as it is", "Delete it"),
    "log_on_each_node": _LAUNCH,
    "debug": ("burnish has one switch for debugging", "Set BURNISH_DEBUG=1"),
    "trackio_space_id": _SPACE,
    "trackio_bucket_id": _SPACE,
    "trackio_static_space_id": _SPACE,
    # saving and the hub
    "enable_jit_checkpoint": ("checkpoints follow save_strategy", "Use save_steps"),
    "save_on_each_node": _LAUNCH,
    "restore_callback_states_from_checkpoint": ("a checkpoint always restores everything it holds", "Delete it"),
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    # many devices
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH,
    "ddp_bucket_cap_mb": _LAUNCH,
    "ddp_broadcast_buffers": _LAUNCH,
    "ddp_static_graph": _LAUNCH,
    "ddp_backend": _LAUNCH,
    "ignore_bias_buffers": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "local_rank": _LAUNCH,
    # keys of earlier versions
    "adafactor": ("optimizers have names", "Use optim: adafactor"),
    "save_safetensors": ("weights are saved as safetensors, never as a pickle", "Delete it"),
    "logging_dir": ("what is logged lies in output_dir", "Use output_dir"),
    "use_mps_device": ("the device is found", "Use use_cpu to stay on the CPU"),
    "jit_mode_eval": _COMPILE,
    "torchdynamo": _COMPILE,
    "use_ipex": ("the hand-written kernels take its place", "Delete it"),
    "fp16_opt_level": _HALF,
    "fp16_backend": _HALF,
    "half_precision_backend": _HALF,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "past_index": ("training never keeps a key-value cache", "Delete it"),
    "mp_parameters": _LAUNCH,
    "fsdp_min_num_params": _LAUNCH,
    "fsdp_transformer_layer_cls_to_wrap": _LAUNCH,
    "dispatch_batches": _LAUNCH,
    "split_batches": _LAUNCH,
    "ray_scope": ("hyper-parameter searches are run from outside", "Delete it"),
    "use_legacy_prediction_loop": _EVAL_LOOP,
    "include_inputs_for_metrics": _LOGITS,
    "push_to_hub_model_id": (_RENAMED, "Use hub_model_id"),
    "push_to_hub_organization": (_RENAMED, "Use hub_model_id"),
    "push_to_hub_token": (_RENAMED, "Use hub_token"),
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
