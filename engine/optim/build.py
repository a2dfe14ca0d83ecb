"""Optimizers and schedules by their names in the configuration."""

import importlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.optim.bf16 import AdamWBF16
from burnish.optim.footprint import ROUNDED

# optim: (module, what to install) for optimizers that are another package's; both call the class AdamW8bit
PACKAGES = {"adamw_8bit": ("bitsandbytes.optim", "bitsandbytes"), "adamw_torch_8bit": ("torchao.optim", "torchao")}


def check_optimizer(config, compute: torch.dtype, given: torch.optim.Optimizer | None) -> None:
    """Raises UserError, before anything is loaded, for an optimizer that this machine or configuration can't have.

    compute: what the model will compute in; given: the caller's own optimizer.
    """
    if given is not None:
        if config.optimizer_in_bwd:
            raise UserError(
                "a caller's optimizer steps all parameters at once, after backward",
                where="optimizer_in_bwd",
                mend="Name one with optim instead, or set optimizer_in_bwd: false",
            )
        return
    if config.optim in ROUNDED and config.dtype != "bfloat16" and compute != torch.bfloat16:
        raise UserError(f"{config.optim} keeps parameters in bfloat16", where="optim", mend="Set bf16: true")
    if config.optim in PACKAGES:
        _class_of(config.optim)


def _class_of(optim: str) -> type:
    module, package = PACKAGES[optim]
    try:
        return importlib.import_module(module).AdamW8bit
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"{optim} is {package}'s, which can't be imported ({error})",
            where="optim",
            mend=f"Install it with: pip install {package}; or use adamw_bf16_sr, which takes 8 bytes a parameter",
        ) from error


def parameter_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups: matrices decay, vectors (norms, biases) don't, as transformers' Trainer has it."""
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config, masters: Mapping | None = None) -> torch.optim.Optimizer:
    """The optimizer that config.optim names, with transformers' names and defaults.

    masters: for adamw_bf16, {parameter: its low bits} of those that were float32.
    """
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    common = {"lr": config.learning_rate, "betas": betas, "eps": eps}
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, **common, fused=True)
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, **common)
    if config.optim in ROUNDED:
        other = [p.dtype for group in groups for p in group["params"] if p.dtype != torch.bfloat16]
        if other:
            raise UserError(
                f"{config.optim} takes bfloat16 parameters, the model has {other[0]}",
                where="optim",
                mend="Set dtype: float32 or bfloat16",
            )
        low = (masters or {}) if config.optim == "adamw_bf16" else None
        return AdamWBF16(groups, **common, masters=low, seed=config.seed)
    if config.optim in PACKAGES:
        return _class_of(config.optim)(groups, **common)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    assert config.optim == "adafactor", config.optim
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)


def build_schedule(optimizer: torch.optim.Optimizer, config, num_steps: int):
    """transformers' schedule of that name over num_steps updates; warm-up as a count or a share of them."""
    from transformers.optimization import get_scheduler

    warmup = config.warmup_steps or 0
    warmup = int(warmup) if warmup >= 1 else math.ceil(num_steps * (warmup or config.warmup_ratio or 0.0))
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the schedule {config.lr_scheduler_type} can't be made ({error})",
            where="lr_scheduler_kwargs",
            mend="Give the arguments that it needs",
        ) from error
    schedule.base_lrs = [float(rate) for rate in schedule.base_lrs]  # torchao's are tensors, and would round each rate
    return schedule
