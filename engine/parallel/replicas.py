"""Every process has the whole model and adds up its gradients with the others' once a step (DDP).

burnish runs backbone and head, not a module's forward, makes gradients in functions of its own and moves them to
float32 twins as they come: torch's DistributedDataParallel waits for hooks that this passes by. The sum is taken once a
step, after the last backward, in buckets; adapters are one bucket.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish.parallel.world import any_of_each

BUCKET = 2**26  # bytes that travel at a time


class Replicas:
    """What an Updater does across processes that hold the same parameters."""

    def own(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        """{parameter: the part of it that this process steps}: none is held in parts."""
        return {}

    def add_up(self, parameters: list[nn.Parameter], sums: dict[nn.Parameter, Tensor]) -> None:
        """Gradients become their sums over all processes.

        Where this process has no gradient of a parameter and another one has, it counts as zero; where nobody has, it
        stays none, as in one process.
        """
        here = [p in sums or p.grad is not None for p in parameters]
        gradients = []
        for parameter, mine, someones in zip(parameters, here, any_of_each(here), strict=True):
            if someones and not mine and sums:  # the others' gradients are float32 sums too
                sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
            elif someones and not mine:
                parameter.grad = torch.zeros_like(parameter)
            if someones:
                gradients.append(sums.get(parameter, parameter.grad))
        _add_up(gradients)

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from the norm of those here: they are all here."""
        return norm


def _add_up(tensors: list[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, in place and in buckets."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET or tensor.dtype != bucket[0].dtype):
            _send(bucket)
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        _send(bucket)


def _send(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])
