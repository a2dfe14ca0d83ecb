"""What a benchmark case is made of: an op with its peers, a shape, random inputs, and a count of bytes and operations.

N tokens, H hidden, V vocabulary, I width of the MLP, D head size. Counts are of what any implementation must do: every
input read once, every output written once, every product of matrices done once. Nothing is counted for recomputing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH, INFERENCE = "forward", "backward", "forward + backward", "forward only"

Shape = dict[str, Any]
# A way to compute an op: called without arguments it imports what it needs and returns the function to time. A text
# stands for a peer that has no such op, and says so.
Way = Callable[[], Callable[..., Any]] | str


@dataclass(frozen=True)
class Op:
    """An op and the ways to compute it, burnish's first.

    make        (shape, device, dtype, generator) -> the inputs that every way is called with
    wanted      positions of the inputs whose gradients are made
    by_token    positions of the inputs whose first dimension is N, where an output's row depends on its own row only
    definition  the op in plain torch, in any floating type
    count       (shape, phase, bytes an element) -> (bytes, floating-point operations)
    gate        the small shape at which every way is compared with the definition
    limits      largest error of bfloat16 results, relative, of burnish and of peers
    """

    name: str
    make: Callable[[Shape, torch.device, torch.dtype, torch.Generator], tuple]
    wanted: tuple[int, ...]
    definition: Callable[..., Any]
    count: Callable[[Shape, str, int], tuple[float, float]]
    ways: dict[str, Way]
    gate: Shape
    by_token: tuple[int, ...] = ()
    limits: tuple[float, float] = (4e-3, 3e-2)


@dataclass(frozen=True)
class Case:
    """An op at one shape. `compiled`: torch.compile takes part too (a compilation takes seconds to a minute)."""

    op: Op
    title: str
    shape: Shape
    phases: tuple[str, ...]
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.op.name}, {self.title}"


def outputs(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def make_inputs(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple:
    """Random inputs, the same for the same seed, with gradients asked for where the op wants them."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = op.make(shape, device, dtype, generator)
    return tuple(t.requires_grad_() if place in op.wanted else t for place, t in enumerate(inputs))


def upstream(outs: tuple[Tensor, ...], dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """Random gradients of the outputs (1 for a loss), that `dtype` holds exactly, in each output's own type."""
    made = []
    for number, out in enumerate(outs):
        generator = torch.Generator(out.device).manual_seed(seed + number)
        random = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32)
        made.append(torch.ones_like(out) if out.dim() == 0 else random.to(dtype).to(out.dtype))
    return tuple(made)


def gradients(op: Op, inputs: tuple, outs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outs, [inputs[place] for place in op.wanted], grads)


def randn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)
