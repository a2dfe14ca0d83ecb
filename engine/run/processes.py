"""A run on several processes: what must be so before it starts, and the model and its optimizer wired to the others."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from burnish.config.errors import UserError
from burnish.memory.forecast import strategy
from burnish.memory.settings import Memory
from burnish.metrics import Log
from burnish.parallel import sequence
from burnish.parallel.replicas import Replicas
from burnish.parallel.shards import Shards, shard
from burnish.parallel.world import World, any_of, world
from burnish.reference import Reference
from burnish.run.device import compute_dtype

_WHOLE = ("adamw_torch", "adamw_torch_fused", "sgd")  # optimizers that step a part of a matrix as they step it whole


def check_parallel(config: Any, own: World, optimizers: tuple) -> None:
    """Raises UserError for keys that several processes can't honour."""
    if config.nproc is not None and config.nproc != own.size and "LOCAL_WORLD_SIZE" not in os.environ:
        raise UserError(
            f"nproc {config.nproc} starts processes from the command line only",
            where="nproc",
            mend=f"Start the script with torchrun --nproc-per-node {config.nproc}",
        )
    if own.size == 1:
        if config.sequence_parallel > 1 or config.parallel in ("ddp", "fsdp"):
            key = "sequence_parallel" if config.sequence_parallel > 1 else "parallel"
            raise UserError("there is one process", where=key, mend="Set nproc, or start it with torchrun")
        return
    if config.parallel == "none":
        raise UserError(f"{own.size} processes were started", where="parallel: none", mend="Use ddp or fsdp")
    if config.optimizer_in_bwd:
        raise UserError(
            "gradients are added up over processes after the backward",
            where="optimizer_in_bwd",
            mend="Set it to false, or train on one process",
        )
    if config.parallel == "fsdp" and (config.optim not in _WHOLE or optimizers[0] is not None):
        what = "an optimizer of your own" if optimizers[0] is not None else config.optim
        raise UserError(f"{what} can't step parts of parameters", where="parallel: fsdp", mend=f"Use {_WHOLE[1]}")


def settle_parallel(config: Any, batches: Any, device: torch.device, optimizers: tuple) -> None:
    """Where `parallel` was left open, what the plan says, if this run can do that."""
    if config.parallel is not None or world().size == 1:
        return
    divisible = config.optim in _WHOLE and optimizers[0] is None and not (config.load_in_4bit or config.load_in_8bit)
    fits = not divisible or strategy(config, batches, device) == "ddp"
    config.parallel = "fsdp" if any_of(not fits) else "ddp"  # one card may have less room than the others
    config.origins["parallel"] = "the plan"


def spread(
    config: Any,
    model: nn.Module,
    reference: Reference | None,
    masters: dict,
    memory: Memory,
    device: torch.device,
    log: Log,
) -> Replicas | Shards | None:
    """Give the models their place among the processes; returns what joins the updates (None for one process).

    masters  of `cast_parameters`; none where parameters will be in parts
    """
    own = world()
    if own.size == 1:
        return None
    networks = list({id(m): m for m in (model, reference.model if reference else model)}.values())
    if own.sequence > 1:
        for network in networks:
            network.set_attn_implementation(sequence.register())  # type: ignore[operator]
    log.say("parallel", _line(config))
    if config.parallel == "fsdp":
        for network in networks:
            if not config.model_name_or_path:  # a script made it; what is read from a name is the same everywhere
                _as_first([*network.parameters(), *network.buffers()])
            shard(network, memory.segment, _computes(config, device), device)
        return Shards()
    for network in networks:
        _as_first([*network.parameters(), *network.buffers()])
    _as_first(list(masters.values()))
    return Replicas()


def _computes(config: Any, device: torch.device) -> torch.dtype:
    """What parts of parameters are gathered as: a model kept in bfloat16 computes in what its parameters are."""
    return torch.float32 if config.dtype == "bfloat16" else compute_dtype(config, device)


@torch.no_grad()
def _as_first(tensors: list[torch.Tensor]) -> None:
    """Every process has the first one's tensors: a script's model may have been made from another seed."""
    for tensor in tensors:
        data = tensor.data.contiguous()
        dist.broadcast(data.view(torch.uint8) if data.dtype == torch.int16 else data, 0)  # low bits: nobody sends int16
        if data.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(data)


def _line(config: Any) -> str:
    own = world()
    parts = [f"{config.parallel} on {own.size} processes"]
    if own.sequence > 1:
        parts.append(f"each document on {own.sequence}")
    parts.append(f"{config.gradient_accumulation_steps * own.shares} micro-batches an update")
    return "  ".join(parts)
