"""Parameters, gradients and optimizer states in parts, one part a process (FSDP2, `fully_shard`).

Every decoder layer (or checkpoint segment of layers) is a unit whose parameters are gathered when it runs; the rest
(embeddings, last norm, head) is the root's. burnish calls neither the model's forward nor its head's, so `inside` runs
whatever uses them as the root's forward: there all of the root's parameters are whole, tied ones once. Gradients are
sums: the loss has been divided by the count of all processes before.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from burnish.config.errors import UserError

Result = TypeVar("Result")
_computes: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()  # what sharded models compute in


def shard(model: nn.Module, segment: int, compute: torch.dtype, device: torch.device) -> None:
    """Divide the parameters of `model` among all processes, in place, each part on its process's `device`.

    segment  so many layers are run as one (checkpoint segments)
    compute  dtype in which gathered parameters compute; parts, sums of gradients and the optimizer stay as they are
    """
    layers = _layers(model)
    units = [layers[at : at + segment] for at in range(0, len(layers), segment)]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(
        param_dtype=compute if compute != torch.float32 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    _computes[model] = compute
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # of each: these settings don't reach a module's children
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, by transformers' own mark, none inside another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if "__call__" in vars(GradientCheckpointingLayer):
        raise UserError(
            "this transformers runs a checkpointed layer outside of the hooks that gather its parameters",
            where="parallel: fsdp",
            mend="Install the newest transformers, or use ddp",
        )
    found: list[nn.Module] = []
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(p) for p in prefixes):
            found.append(module)
            prefixes.append(f"{name}.")
    return found


def inside(model: nn.Module, run: Callable[[], Result]) -> Result:
    """run(), with the parameters of `model` whole where it is sharded: as the forward of its root."""
    if not isinstance(model, FSDPModule):
        return run()
    own = vars(model).get("forward")
    model.forward = lambda: run()  # type: ignore[method-assign, assignment]
    try:
        return model()
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward adds up gradients over the processes, or keeps them here for a later one that does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def rest(model: nn.Module) -> None:
    """Let go of parameters that were left whole, in a model whose parts are about to change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Shards:
    """What an Updater does across processes that each hold a part of every parameter."""

    def __init__(self) -> None:
        self._parts: dict[nn.Parameter, nn.Parameter] = {}

    def own(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        """{parameter: this process's part of it}, sharing memory. A part may be empty."""
        self._parts = {p: nn.Parameter(local(p)) for p in parameters}
        return self._parts

    def add_up(self, parameters: list[nn.Parameter], sums: dict[nn.Parameter, Tensor]) -> None:
        """Gradients go from the parameters, where they have been added up, to the parts."""
        for parameter, part in self._parts.items():
            if parameter.grad is not None:
                part.grad = local(parameter.grad)
                parameter.grad = None

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from the norm of the parts here."""
        squares = norm.double().square()
        dist.all_reduce(squares)
        return squares.sqrt().to(norm.dtype)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a tensor that is not in parts itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into `target`, of which this process may hold only a part."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    (placement,) = target.placements
    parts = whole.chunk(target.device_mesh.size(), dim=placement.dim)  # type: ignore[attr-defined]
    rank = target.device_mesh.get_local_rank()
    if rank < len(parts):
        target.to_local().copy_(parts[rank])


def whole(tensor: Tensor) -> Tensor:
    """A tensor of a model as it would be undivided; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """The state dict of a sharded model with whole tensors on the CPU; every process must ask, `keep` where it is used.

    Parameters are what the model computes with, not the float32 that the optimizer steps. Tied names share one tensor,
    as in the model.
    """
    compute = _computes[model]
    state: dict[str, Any] = {}
    made: dict[int, Tensor | None] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in made:
            tensor = whole(value)
            if isinstance(value, nn.Parameter) and value.dtype == torch.float32:
                tensor = tensor.to(compute)
            made[id(value)] = tensor.detach().cpu() if keep else None
        state[name] = made[id(value)]
    return state
