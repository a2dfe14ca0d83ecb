"""The optimizer's step inside backward: a parameter is updated as soon as its gradient is whole, which is then freed.

So no more gradients live at once than one operation's backward makes. It is for updates of one micro-batch (a sum over
several isn't whole before the last), and without clipping (the norm of all gradients isn't known before the first).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from burnish.kernels import use

PIECE = 2**20  # elements: on the CPU the norm of a bfloat16 tensor is taken of float32 copies, a piece at a time


def gradient_norm(gradient: Tensor) -> Tensor:
    """The 2-norm as a float32 scalar (float64 of a float64 tensor), whatever the gradient's type."""
    if gradient.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(gradient)
    if gradient.is_cuda:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    pieces = gradient.reshape(-1).split(PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in pieces]))


class InBackward:
    """Steps `optimizer` one parameter at a time; `step` is the hook that runs when a gradient has been added up.

    stepped  what the optimizer steps, in the model's order, in which the norms are added
    masters  {parameter: float32 twin} of `cast_parameters`: the twin is stepped, the parameter follows
    kernels  the configuration's choice of kernels: hooks may run in a thread that doesn't know it

    The arithmetic and the order of every parameter's steps are those of a step after backward, so the weights are the
    same bit for bit. A gradient that isn't finite is not applied, nor is any after it, in this run, and `norm` is NaN,
    at which the loop stops the run. From then on the CPU steps nothing, nor does torch's fused AdamW, which a flag on
    the device tells; other optimizers on CUDA get zeros in place of gradients, without waiting for the device.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stepped: Sequence[nn.Parameter],
        masters: Mapping[nn.Parameter, nn.Parameter],
        kernels: str,
    ):
        self._optimizer, self._stepped, self._masters, self._kernels = optimizer, stepped, masters, kernels
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._norms: dict[Tensor, Tensor] = {}
        device = stepped[0].device
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(self, parameter: Tensor) -> None:
        stepped: Tensor = self._masters.get(parameter, parameter)  # type: ignore[call-overload]
        if stepped is not parameter:
            stepped.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        assert stepped.grad is not None
        self._norms[stepped] = norm = gradient_norm(stepped.grad)
        self._broken |= ~norm.isfinite()
        if stepped.is_cuda or not self._broken:
            stepped.grad.masked_fill_(self._broken, 0)
            if self._groups[stepped].get("fused"):
                self._optimizer.found_inf = self._broken.float()  # type: ignore[attr-defined]
            with use(self._kernels):
                step_alone(self._optimizer, self._groups[stepped], stepped)
        stepped.grad = None
        if stepped is not parameter:
            parameter.copy_(stepped)

    def norm(self) -> Tensor:
        """The norm of all gradients since the last call, NaN if one of this run was not finite; on the device."""
        norms = [self._norms[p] for p in self._stepped if p in self._norms]
        self._norms.clear()
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else self._broken.new_zeros((), dtype=torch.float)
        return total.masked_fill(self._broken, torch.nan)


def step_alone(optimizer: torch.optim.Optimizer, group: dict, parameter: Tensor) -> None:
    """A step of the optimizer as if `parameter`, which `group` holds, were its only one."""
    groups, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
