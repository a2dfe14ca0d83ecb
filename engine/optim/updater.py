"""`Updater`: what happens between the last backward of a window and the next forward (or inside that backward).

Float32 master weights where the model computes in bfloat16, clipping on the global norm, the optimizer's step and the
schedule's, and all of it as tensors for a checkpoint and back.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.kernels.adamw import split_master
from burnish.optim.bf16 import AdamWBF16
from burnish.optim.build import build_optimizer, build_schedule, parameter_groups
from burnish.optim.footprint import ROUNDED
from burnish.optim.in_backward import InBackward, gradient_norm, step_alone


def cast_parameters(model: nn.Module, dtype: torch.dtype, optim: str = "") -> dict[nn.Parameter, Tensor]:
    """Make `model` compute in `dtype`; returns what is kept of the trainable parameters that were float32.

    That is {parameter: float32 master}, for adamw_bf16 {parameter: int16 low bits of the master}, for adamw_bf16_sr
    nothing. Buffers stay as they are: rotary frequencies are float32 in every model of transformers, and lose positions
    in bfloat16. A master takes over the parameter's storage, so nothing is copied.
    """
    masters: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or dtype == torch.float32:
            continue
        if parameter.requires_grad and optim == "adamw_bf16":
            parameter.data, masters[parameter] = split_master(parameter.data.contiguous())
            continue
        if parameter.requires_grad and optim not in ROUNDED:
            masters[parameter] = nn.Parameter(parameter.data)
        parameter.data = parameter.data.to(dtype)
    return masters


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


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

    masters: from `cast_parameters`. The gradients of a parameter that has a float32 twin are added up in float32 on it
    as soon as backward has made them, and the optimizer steps the twin. For `adamw_bf16` and `adamw_bf16_sr` gradients
    are added up in float32 where a window has several micro-batches, else they stay bfloat16.

    across: how gradients and their norm are those of several processes (burnish.parallel: Replicas or Shards).

    A step whose loss or gradient norm isn't finite is not applied, nor is any after it, and `step` returns NaN: with
    `told`, torch's fused AdamW and burnish's bfloat16 ones leave parameters and moments as they are by a flag on the
    device; otherwise the flag is read back before each update, which costs nothing on the CPU, and on CUDA a wait. With
    optimizer_in_bwd see burnish.optim.in_backward: parameters before the bad one have been updated.

    `close` takes the hooks off the parameters again.
    """

    def __init__(
        self, model: nn.Module, masters: dict, config, num_steps: int, optimizer=None, schedule=None, *, across=None
    ):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            mend = "Unfreeze some, or give peft_config"
            if hasattr(model, "peft_config"):
                mend = "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
            raise UserError("no parameter is trainable", where="model", mend=mend)
        self.parameters = [p for _, p in named]
        self.max_norm = config.max_grad_norm
        self._masters: dict[nn.Parameter, nn.Parameter] = {p: m for p, m in masters.items() if m.dtype == torch.float32}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._across = across
        stepped = {**self._masters, **(across.own(self.parameters) if across else {})}
        self.updated = [stepped.get(p, p) for p in self.parameters]  # what the optimizer steps
        groups = parameter_groups([(n, stepped.get(p, p)) for n, p in named], config.weight_decay)
        assert optimizer is None or not masters, "a caller's optimizer steps the parameters themselves"
        self._given = optimizer is not None
        self.optimizer = optimizer or build_optimizer(groups, config, masters)
        if optimizer is None and isinstance(self.optimizer, torch.optim.AdamW):
            _allocate_state(self.optimizer)
        self.schedule = schedule or build_schedule(self.optimizer, config, num_steps)
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        device = self.updated[0].device
        fused = isinstance(self.optimizer, AdamWBF16) or (fused and isinstance(self.optimizer, torch.optim.AdamW))
        self.told = device.type == "cuda" and fused
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._inside = None
        if config.optimizer_in_bwd:
            assert config.gradient_accumulation_steps == 1 and not self.max_norm and optimizer is None
            self._inside = InBackward(self.optimizer, self.updated, self._masters, config.kernels)
        several = config.gradient_accumulation_steps > 1 or across is not None
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p, hook in self._hooks(several)]

    def _hooks(self, several: bool):
        """(parameter, what to do when its gradient has come)."""
        if self._inside is not None:
            return [(p, self._inside.step) for p in self.parameters]
        if several and isinstance(self.optimizer, AdamWBF16):
            return [(p, self._add_gradient) for p in self.parameters]
        return [(p, self._move_gradient) for p in self._masters]

    def close(self) -> None:
        """Take the hooks off: another Updater may follow on the same model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside, a backward makes gradients as ever, and none is left behind: nothing is updated, not even with
        optimizer_in_bwd."""
        if self._inside is not None:
            self.close()
            self._handles = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in self.parameters]
        try:
            yield
        finally:
            if self._inside is not None:
                self.close()
                self._handles = [p.register_post_accumulate_grad_hook(hook) for p, hook in self._hooks(False)]
            self._sums.clear()
            for parameter in {*self.parameters, *self.updated}:
                parameter.grad = None

    def _move_gradient(self, parameter: Tensor) -> None:
        master = self._masters[parameter]  # type: ignore[index]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    def _add_gradient(self, parameter: Tensor) -> None:
        if parameter in self._sums:
            self._sums[parameter] += parameter.grad  # type: ignore[index]
        else:
            self._sums[parameter] = parameter.grad.float()  # type: ignore[index]
        parameter.grad = None

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self, loss: Tensor | None = None) -> Tensor:
        """Clip, update, advance the schedule, drop the gradients. Returns the norm before clipping, on the device.

        loss: whose gradients these are; it too must be finite. With optimizer_in_bwd backward has updated already, and
        only the norm and the schedule are left.
        """
        norm = self._inside.norm() if self._inside is not None else self._update(loss)
        if self._inside is not None or self.told or not self._broken:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums.clear()
        return norm

    def _stopped(self, norm: Tensor, loss: Tensor | None) -> bool:
        """Whether this process knows that the update must not be made; an optimizer that is told leaves it out."""
        sound = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        self._broken |= ~sound
        if self.told:
            self.optimizer.found_inf = self._broken.float()  # type: ignore[attr-defined]  # as a GradScaler tells it
            return False
        return bool(self._broken)

    def _update(self, loss: Tensor | None) -> Tensor:
        if self._across:
            self._across.add_up(self.updated, self._sums)
        limit = self.max_norm if self.max_norm and self.max_norm > 0 else math.inf
        grads = [g for p in self.updated if (g := self._sums.get(p, p.grad)) is not None]
        if any(g.dtype == torch.bfloat16 for g in grads):  # whose norm torch would round to three digits
            norm = torch.linalg.vector_norm(torch.stack([gradient_norm(g) for g in grads]))
        else:
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self._across:
            norm = self._across.norm(norm)
        stopped = self._stopped(norm, loss)
        norm = norm.masked_fill(self._broken & norm.isfinite(), math.nan)
        if stopped:
            return norm
        if isinstance(self.optimizer, AdamWBF16):
            scale = (limit / (norm + 1e-6)).clamp(max=1.0) if math.isfinite(limit) else None  # as torch's clipping
            if self.told:
                scale = (torch.ones_like(norm) if scale is None else scale).masked_fill(self._broken, math.nan)
            self.optimizer.step(scale=scale, sums=self._sums)
            return norm
        if math.isfinite(limit):
            torch.nn.utils.clip_grads_with_norm_(self.updated, limit, norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            if self._masters:
                torch._foreach_copy_(list(self._masters), list(self._masters.values()))
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, scalars) that `load` takes back: optimizer, masters, schedule. Tensors are not copied, but for
        those that share memory, which a file can't say. A tensor made of tensors is stored as its parts."""
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, dict] = {}
        groups: list[dict] = []
        first = 0
        for group in self.optimizer.param_groups:  # not state_dict(), in which bitsandbytes nests its own
            indices = list(range(first, first + len(group["params"])))
            groups.append({key: _plain(value) for key, value in group.items()} | {"params": indices})
            first += len(indices)
            for index, parameter in zip(indices, group["params"], strict=True):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors |= {f"optimizer.{index}.{key}{part}": t for part, t in _parts(value).items()}
                    else:
                        scalars.setdefault(str(index), {})[key] = value
        tensors |= {f"master.{i}": m.data for i, m in enumerate(self._masters.values())}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.numel() and tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        schedule = {k: _plain(v) for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))}
        return tensors, {"groups": groups, "entries": scalars, "schedule": schedule}

    def load(self, tensors: dict[str, Tensor], scalars: dict) -> None:
        """Put back what `state` gave, on this optimizer's devices and in the dtypes it was saved in."""
        entries: dict[int, dict] = {int(i): dict(entry) for i, entry in scalars["entries"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = tensor
        if self._given:
            self.optimizer.load_state_dict({"state": entries, "param_groups": scalars["groups"]})
        else:
            self._fill(entries, scalars["groups"])
        with torch.no_grad():
            for i, (parameter, master) in enumerate(self._masters.items()):
                master.copy_(tensors[f"master.{i}"])
                parameter.copy_(master)
        self.schedule.load_state_dict(scalars["schedule"])

    @torch.no_grad()
    def _fill(self, entries: dict[int, dict], groups: list[dict]) -> None:
        """As load_state_dict, which casts states to the parameter's type: bits and 8-bit codes would not survive."""
        index = 0
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            for parameter in group["params"]:
                if index in entries:
                    self._fill_entry(group, parameter, entries[index])
                index += 1
            for key, value in saved.items():
                if isinstance(group[key], Tensor):
                    group[key].fill_(value)
                elif key != "params":
                    group[key] = tuple(value) if isinstance(value, list) else value

    def _fill_entry(self, group: dict, parameter: nn.Parameter, saved: dict) -> None:
        entry = self.optimizer.state[parameter]
        if any("." in key for key in saved):  # parts of a tensor: a step makes the whole that they go into
            before, parameter.grad = parameter.clone(), torch.zeros_like(parameter)
            step_alone(self.optimizer, group, parameter)
            parameter.copy_(before)
            parameter.grad = None
        for key, value in saved.items():
            name, _, part = key.partition(".")
            if isinstance(entry.get(name), Tensor):
                _parts(entry[name])[f".{part}" if part else ""].copy_(value)
            else:
                entry[name] = value.to(parameter.device) if isinstance(value, Tensor) else value


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    """{"": itself}, or of a tensor subclass that holds tensors {".name": each}."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    return {f".{name}": getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _plain(value):
    """A setting as JSON has it: torchao's learning rates are tensors."""
    if isinstance(value, list):
        return [_plain(item) for item in value if not isinstance(item, nn.Parameter)]
    return value.item() if isinstance(value, Tensor) else value
