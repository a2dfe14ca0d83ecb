"""Sharded checkpoints: every process writes its parts and reads them again, on any number of processes.

torch.distributed.checkpoint in its safetensors form, so nothing in it is a pickle. A checkpoint has the parameters (of
a model with adapters the trained ones) as `model.<name>` and the optimizer's tensors under the names of Updater.state.
What was written whole by one process is read into parts here too, and parts into a whole model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from burnish.optim.updater import Updater
from burnish.parallel.shards import fill, rest

FOLDER = "shards"
_talk: Any = None  # the group of the processes that write beside the training


def parts(model: nn.Module, updater: Updater | None) -> dict[str, Tensor]:
    """What a checkpoint holds, as tensors that know which part of the whole they are. They share the run's memory.

    updater  None: the weights alone
    """
    rest(model)  # what an evaluation left whole
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _weights(model).items()}
    if updater is None:
        return tensors
    owners = {id(part): parameter for parameter, part in zip(updater.parameters, updater.updated, strict=True)}
    stepped = [p for group in updater.optimizer.param_groups for p in group["params"]]
    for name, tensor in updater.state()[0].items():
        kind, index, *_ = name.split(".")
        owner = owners[id(stepped[int(index)])] if kind == "optimizer" else None
        if isinstance(owner, DTensor) and tensor.shape == owner.to_local().shape:
            tensor = DTensor.from_local(
                tensor, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
            )
        if kind != "master":  # whose parameter is stored in its place
            tensors[name] = tensor
    return tensors


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that a checkpoint must have, tied ones once; buffers are made, not trained."""
    trained_only = hasattr(model, "peft_config")
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's parts into folder/shards; all processes must."""
    with plainly():
        dcp.save(tensors, storage_writer=_writer(folder))


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, the error that one process met when it wrote or read is the error of all of them."""
    try:
        yield
    except CheckpointException as error:  # no Exception, and all tracebacks in one
        first, _ = next(iter(error.failures.values()))
        raise first from None


def save_later(folder: Path, tensors: dict[str, Tensor]) -> Any:
    """As `save`, from a copy on the CPU, while training goes on; a future whose result() waits for the files (and is
    to be asked `plainly`)."""
    global _talk
    if _talk is None:
        _talk = dist.new_group(backend="gloo")  # its own: the writers' words must not mix with the training's
    return dcp.async_save(tensors, storage_writer=_writer(folder), process_group=_talk)


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(path=str(folder / FOLDER), save_distributed=True)


def is_sharded(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


@torch.no_grad()
def load(folder: Path, model: nn.Module, updater: Updater, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a sharded checkpoint into the model, its float32 masters, the optimizer, and `others` that it holds.

    Returns the optimizer's tensors, under the names that Updater.load takes.
    """
    _read(folder, {**parts(model, updater), **others}, model, updater)
    return updater.state()[0]


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module, updater: Updater) -> None:
    """Read the weights of a sharded checkpoint, which may have no more, into the model and its float32 masters."""
    _read(folder, parts(model, None), model, updater)


def _read(folder: Path, targets: dict[str, Tensor], model: nn.Module, updater: Updater) -> None:
    masters = {id(p): m for p, m in zip(updater.parameters, updater.updated, strict=True) if m.dtype != p.dtype}
    for name, parameter in _weights(model).items():
        if id(parameter) in masters:
            targets[f"model.{name}"] = masters[id(parameter)].data
    with plainly():
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER)))
    for parameter, master in zip(updater.parameters, updater.updated, strict=True):
        if id(parameter) in masters:
            parameter.copy_(master)


@torch.no_grad()
def load_whole(tensors: dict[str, Tensor], model: nn.Module, updater: Updater) -> dict[str, Tensor]:
    """Read the optimizer's tensors of a checkpoint that one process wrote into this process's parts; returns those.

    Float32 masters become the parameters, which hold them where parameters are sharded.
    """
    targets = parts(model, updater)
    for name, tensor in tensors.items():
        kind, _, index = name.partition(".")
        if kind == "master":
            fill(updater.parameters[int(index)], tensor)
        elif name in targets:
            fill(targets[name], tensor)
    return updater.state()[0]
