"""Which evaluation was the best: the metric that decides, and whether a new value beats the one so far."""

import math
from typing import Any

from burnish.config.errors import UserError
from burnish.loop.state import TrainState


def follows(config: Any) -> bool:
    """Whether every evaluation counts, not only those that a checkpoint is saved with: a metric is named, and no
    checkpoint depends on it. EarlyStoppingCallback compares with state.best_metric all the same."""
    depends = config.load_best_model_at_end or config.save_strategy == "best"
    return config.metric_for_best_model is not None and not depends


def value_of(config: Any, metrics: dict[str, float]) -> float:
    """The metric that decides. Raises UserError where evaluations don't have it."""
    name = config.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise UserError(
            f"{name} is not among the metrics of an evaluation",
            where="metric_for_best_model",
            mend=f"Use one of {', '.join(metrics)}",
        )
    return metrics[name]


def improves(config: Any, state: TrainState, metrics: dict[str, float]) -> bool:
    """Whether the checkpoint saved with this evaluation is the best so far."""
    if follows(config):
        return value_of(config, metrics) == state.best_metric
    return is_better(config, state, metrics)


def is_better(config: Any, state: TrainState, metrics: dict[str, float]) -> bool:
    """Whether this evaluation is the best so far, which state.best_metric remembers. One that is no number never is."""
    greater = config.greater_is_better
    if greater is None:
        greater = not (config.metric_for_best_model or "loss").endswith("loss")
    value, best = value_of(config, metrics), state.best_metric
    if not math.isfinite(value):
        return False
    if best is not None and (value <= best if greater else value >= best):
        return False
    state.best_metric = value
    return True
