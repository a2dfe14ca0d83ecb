"""Optimizer, schedule and master weights.

`Updater` owns what happens between the last backward of a window and the next forward: float32 master weights where
the model computes in bfloat16, clipping on the global norm, the optimizer's step and the schedule's.
"""

import math

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError


def parameter_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups: matrices decay, vectors (norms, biases) don't, as transformers' Trainer has it."""
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config) -> torch.optim.Optimizer:
    """The optimizer that config.optim names, with transformers' names and defaults."""
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps, fused=True)
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)
    raise UserError(
        f"unknown optimizer {config.optim}", where="optim", mend="Use adamw_torch_fused, adamw_torch, sgd or adafactor"
    )


def build_schedule(optimizer: torch.optim.Optimizer, config, num_steps: int):
    """transformers' schedule of that name over num_steps updates; warm-up as a count or a share of them."""
    from transformers.optimization import get_scheduler

    warmup = config.warmup_steps or 0
    warmup = int(warmup) if warmup >= 1 else math.ceil(num_steps * (warmup or config.warmup_ratio or 0.0))
    try:
        return get_scheduler(
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


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, nn.Parameter]:
    """Make `model` compute in `dtype`; returns {parameter: float32 master} of the trainable ones that were float32.

    Buffers stay as they are: rotary frequencies are float32 in every model of transformers, and lose positions in
    bfloat16. A master takes over the parameter's storage, so nothing is copied.
    """
    masters = {}
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or dtype == torch.float32:
            continue
        if parameter.requires_grad:
            masters[parameter] = nn.Parameter(parameter.data)
        parameter.data = parameter.data.to(dtype)
    return masters


def _allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Make AdamW's moments now, as its first step would: what doesn't fit fails before the first forward, and they
    don't end up between activations that come and go (0.5 GiB of 4.5 on a CPU run of SmolLM2-135M)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] or group["capturable"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class Updater:
    """The trainable parameters of `model` with their optimizer and schedule.

    masters: float32 twins from `cast_parameters`; the gradients of a parameter that has one are added up in float32 on
    it as soon as backward has made them, and the optimizer steps the twin.
    """

    def __init__(self, model: nn.Module, masters: dict, config, num_steps: int, optimizer=None, schedule=None):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("no parameter is trainable", where="model", mend="Unfreeze some, or give peft_config")
        self.parameters = [p for _, p in named]
        self.max_norm = config.max_grad_norm
        self._masters: dict[nn.Parameter, nn.Parameter] = masters
        for parameter in masters:
            parameter.register_post_accumulate_grad_hook(self._move_gradient)
        self.updated = [self._masters.get(p, p) for p in self.parameters]  # what the optimizer steps
        groups = parameter_groups([(n, self._masters.get(p, p)) for n, p in named], config.weight_decay)
        assert optimizer is None or not masters, "a caller's optimizer steps the parameters themselves"
        self.optimizer = optimizer or build_optimizer(groups, config)
        if optimizer is None and isinstance(self.optimizer, torch.optim.AdamW):
            _allocate_state(self.optimizer)
        self.schedule = schedule or build_schedule(self.optimizer, config, num_steps)

    def _move_gradient(self, parameter: Tensor) -> None:
        master = self._masters[parameter]  # type: ignore[index]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def step(self) -> Tensor:
        """Clip, update, advance the schedule, drop the gradients. Returns the norm before clipping, on the device."""
        limit = self.max_norm if self.max_norm and self.max_norm > 0 else math.inf
        grads = [p.grad for p in self.updated if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if math.isfinite(limit):
            torch.nn.utils.clip_grads_with_norm_(self.updated, limit, norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            if self._masters:
                torch._foreach_copy_(list(self._masters), list(self._masters.values()))
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, scalars) that `load` takes back: optimizer, masters, schedule. Tensors are not copied."""
        packed = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, dict] = {}
        for index, entry in packed["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        tensors |= {f"master.{i}": m.data for i, m in enumerate(self._masters.values())}
        schedule = {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))}
        return tensors, {"groups": packed["param_groups"], "entries": scalars, "schedule": schedule}

    def load(self, tensors: dict[str, Tensor], scalars: dict) -> None:
        """Put back what `state` gave, on this optimizer's devices and in the dtypes it was saved in."""
        entries: dict[int, dict] = {int(i): dict(entry) for i, entry in scalars["entries"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": entries, "param_groups": scalars["groups"]})
        with torch.no_grad():
            for i, (parameter, master) in enumerate(self._masters.items()):
                master.copy_(tensors[f"master.{i}"])
                parameter.copy_(master)
        self.schedule.load_state_dict(scalars["schedule"])
