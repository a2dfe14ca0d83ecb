"""Experiment trackers: TensorBoard, Weights & Biases, trackio. Only what report_to names is imported, when it is used.

A tracker is a callback (transformers' on_... methods). It gets the records of metrics.jsonl under the names that
transformers gives them (train/loss, eval/loss), so that a dashboard of older runs goes on.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish.config.errors import UserError
from burnish.config.outside import tracker_names
from burnish.metrics import Log

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_SECRET = "hub_token"


def trackers(config: Any, log: Log) -> list["Tracker"]:
    """A callback for each tracker of report_to; none in a process that doesn't speak for all.

    Raises UserError for one that is not installed.
    """
    made = []
    for name in tracker_names(config.report_to):
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(
                f"report_to {name} takes the package {name}, which can't be imported ({error})",
                where=config.origins["report_to"],
                mend=f"pip install {name}, or set report_to: none",
            ) from error
        made.append(Tracker(name, config, log))
    return [] if log.quiet else made


class Tracker:
    """Sends a run's records to one tracker, which is opened by the first of them.

    A tracker that fails (a network that is gone, a full disk) is said once and left out from then on: it must not
    take hours of training with it.
    """

    def __init__(self, name: str, config: Any, log: Log):
        self.name = name
        self._config, self._log = config, log
        self._sink: _Sink | None = None
        self._failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._do(lambda sink: None, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """The record of training steps; an evaluation's comes by on_evaluate."""
        record = {name: value for name, value in (logs or {}).items() if not name.startswith("eval_")}
        if not record.keys() <= {"epoch", "step"}:
            self._send(record, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        self._send(metrics or {}, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything sent so far is kept; a later evaluation opens it again."""
        if self._sink is not None:
            self._do(lambda sink: sink.close(), state)
            self._sink = None

    def _send(self, record: dict, state: Any) -> None:
        numbers = {
            _renamed(name): float(value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if numbers:
            self._do(lambda sink: sink.send(numbers, state.global_step), state)

    def _do(self, act: Callable[["_Sink"], None], state: Any) -> None:
        if self._failed:
            return
        try:
            if self._sink is None:
                self._sink = _SINKS[self.name](self._config, state.global_step)
                self._log.say("tracker", f"{self.name}: {self._sink.place}")
            act(self._sink)
        except Exception as error:  # of a library's own kinds: none of them may end the run
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            self._log.warn(f"{self.name} failed and gets nothing more of this run ({type(error).__name__}: {reason})")


@dataclasses.dataclass
class _Sink:
    """An open tracker. place: where to look at it; send: (numbers by name, step); close: keep what was sent."""

    place: str
    send: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def _tensorboard(config: Any, step: int) -> _Sink:
    """Event files in output_dir/runs, or where TENSORBOARD_LOGGING_DIR says."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(Path(config.output_dir) / "runs")
    writer = SummaryWriter(folder, purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Sink(folder, send, writer.close)


def _wandb(config: Any, step: int) -> _Sink:
    """A run of WANDB_PROJECT, else of the key `project`; one that the script has opened goes on."""
    wandb = importlib.import_module("wandb")
    opened = wandb.run or wandb.init(
        project=os.environ.get("WANDB_PROJECT") or config.project, name=run_name(config), config=settings(config)
    )
    opened.define_metric("train/global_step")
    opened.define_metric("*", step_metric="train/global_step", step_sync=True)
    place = getattr(opened, "url", None) or "offline"
    # wandb closes its run when the process ends: a script may log to it after the training.
    return _Sink(str(place), lambda numbers, step: opened.log({**numbers, "train/global_step": step}), lambda: None)


def _trackio(config: Any, step: int) -> _Sink:
    trackio = importlib.import_module("trackio")
    trackio.init(project=config.project, name=run_name(config), config=settings(config), resume="allow")
    return _Sink(
        f"project {config.project}, run {run_name(config)}",
        lambda numbers, step: trackio.log({**numbers, "train/global_step": step}),
        trackio.finish,
    )


_SINKS: dict[str, Callable[[Any, int], _Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def run_name(config: Any) -> str:
    """The run's name: run_name, or the last part of output_dir."""
    return config.run_name or Path(config.output_dir).resolve().name


def settings(config: Any) -> dict[str, Any]:
    """The whole configuration for a dashboard, without the token."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != _SECRET}


def _renamed(name: str) -> str:
    """eval_loss -> eval/loss, loss -> train/loss."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
