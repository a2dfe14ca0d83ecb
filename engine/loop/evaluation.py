"""Metrics of an evaluation set."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from burnish.data.batch import Batch
from burnish.loop.state import Stopped
from burnish.metrics import Accumulator, nothing
from burnish.model.head import evaluating
from burnish.objectives import Objective
from burnish.parallel.world import total, total_count


def evaluate(
    model: nn.Module, batches: Iterable[Batch], objective: Objective, stopping: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """{"eval_loss": ..., "eval_<metric>": ...} over all batches, each weighted by its count. Logits never exist.

    Of several processes each has its own batches, as many as the others, and gets the metrics of all.

    Raises Stopped as soon as `stopping` says so, asked after every batch.
    """
    device = next(model.parameters()).device
    accumulator, began, rows = Accumulator(), time.perf_counter(), 0
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            placed = batch.to(device)
            loss_sum, metrics = objective.step(placed, objective.window([placed]))
            found = {"loss": (loss_sum, objective.count(batch)), **metrics}
            accumulator.add(found if batch.counted else nothing(found))
            rows += len(batch.rows) * batch.counted
            if stopping():
                raise Stopped
    values = accumulator.take(total)
    seconds = time.perf_counter() - began
    return {
        **{f"eval_{name}": value for name, value in values.items()},
        "eval_runtime": seconds,
        "eval_samples_per_second": total_count(rows) / seconds,
    }
