"""Objectives: pure functions on log-probs, and the step that hands them their log-probs.

A pure function is `fn(logps, batch, config) -> (loss_sum, count, metrics)`: a sum, never a mean, because only the loop
divides, by the count of the whole accumulation window. `metrics` maps a name to (sum, weight): device tensors or plain
numbers, whose ratio the log gate takes over all micro-batches of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from burnish.data.batch import Batch

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]


@dataclass(frozen=True)
class Objective:
    """What the loop needs to know of an objective.

    step    (batch, window) -> (loss_sum, metrics); differentiable when gradients are on
    count   batch -> what the loss sum is divided by (trained tokens, pairs, rows), a Python int known beforehand
    window  the batches of one update (on their device) -> what their steps must know of one another (a KL estimate, a
            sorting across the batch, token counts), so that accumulation changes nothing; None for most objectives
    state   tensors that go on from update to update (a running mean): a checkpoint must hold them to go on exactly
    """

    step: Callable[[Batch, Any], tuple[Tensor, Metrics]]
    count: Callable[[Batch], int]
    window: Callable[[list[Batch]], Any] = lambda batches: None
    state: dict[str, Tensor] = field(default_factory=dict)
