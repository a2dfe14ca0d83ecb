"""A run that has been assembled: it trains, evaluates, saves and resumes.

`burnish.run` makes a `Run`; the loop does the training; this is what stands between the loop and the disk.
"""

import dataclasses
import json
import math
import shutil
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.config.load import dump
from burnish.data.batch import Batch, Batches
from burnish.data.stream import StreamBatches
from burnish.interrupt import Interrupt
from burnish.kernels import use
from burnish.loop import fit, total_steps
from burnish.loop.evaluation import evaluate
from burnish.loop.state import Control, Hooks, TrainState
from burnish.memory.forecast import Forecast
from burnish.memory.layers import Installed
from burnish.memory.settings import Memory
from burnish.metrics import Log, clock
from burnish.objectives import Objective
from burnish.optim.updater import Updater
from burnish.reference import Reference
from burnish.training.folder import goes_on, refuse_overwriting, trim_log

# What a resumed run may be given otherwise: where things are, how long, how often, how much is logged and kept, and how
# memory is saved: that changes no number (tiles: its last place), and a run that didn't fit must be able to go on.
MAY_CHANGE = frozenset(
    "output_dir overwrite_output_dir report_to model_name_or_path dataset_name eval_dataset_name dataset_config "
    "dataset_train_split dataset_test_split max_steps num_train_epochs per_device_eval_batch_size eval_packing "
    "logging_steps logging_first_step eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit "
    "save_only_model load_best_model_at_end metric_for_best_model greater_is_better resume_from_checkpoint use_cpu "
    "strict_patch trust_remote_code heaviest_batch_first gradient_checkpointing activation_offloading "
    "checkpoint_segment keep_attention tile_tokens memory".split()
)


@dataclass
class RunResult:
    """What a run leaves: the folder, its last metrics, and the number of updates done.

    interrupted  None for a finished run; else the signal that stopped it early, or 0 for a STOP file
    """

    output_dir: Path
    global_step: int
    metrics: dict[str, float]
    interrupted: int | None = None


@dataclass
class Run:
    """Everything a training run needs, ready to train."""

    config: Any
    model: nn.Module
    tokenizer: Any
    batches: Batches | StreamBatches | None
    eval_batches: Batches | StreamBatches | None
    objective: Objective
    reference: Reference | None
    masters: dict
    log: Log
    callbacks: list = field(default_factory=list)
    optimizers: tuple = (None, None)
    state: TrainState = field(default_factory=TrainState)
    control: Control = field(default_factory=Control)
    memory: Installed = field(default_factory=lambda: Installed(Memory(False)))
    plan: Forecast | None = None

    def __post_init__(self) -> None:
        self.interrupt = Interrupt(self.folder, self.log.say)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> RunResult:
        """Train to the end, or on from a checkpoint; an unfinished run in output_dir goes on by itself.

        What the user can mend raises UserError before the first step. A signal or a STOP file ends it early, with
        everything saved (burnish.interrupt).
        """
        with self.interrupt, self.plan.explaining() if self.plan else nullcontext():
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: str | bool | None) -> RunResult:
        self.control = Control()  # an earlier train() may have been stopped
        if self.batches is None:
            raise UserError("there is nothing to train on", where="train_dataset", mend="Give a training data set")
        wanted = resume_from_checkpoint or self.config.resume_from_checkpoint or goes_on(self.config)
        source, passed_over = disk.find_checkpoint(self.folder, wanted) if wanted else (None, [])
        if source is None or source.parent.resolve() != self.folder.resolve():
            refuse_overwriting(self.config)
        for line in passed_over:
            self.log.warn(line)
        self._check_best_metric()
        steps = total_steps(self.batches, self.config)
        updater = Updater(self.model, self.masters, self.config, steps, *self.optimizers)
        self.state.max_steps = steps
        if source is not None:
            self._restore(source, updater)
            for line in disk.set_aside(self.folder, self.state.global_step):
                self.log.warn(line)
        else:
            for path in disk.checkpoints(self.folder):  # overwrite_output_dir: a later resume must not find them
                shutil.rmtree(path)
            for name in disk.WEIGHTS:  # nor may the model of an earlier run pass for this one's
                (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump(self.config), encoding="utf-8")
        trim_log(self.folder / "metrics.jsonl", self.state.global_step)
        self.log.open(self.folder)
        began = time.perf_counter()
        hooks = Hooks(
            evaluate=self.evaluate if self.eval_batches is not None else None,
            save=lambda metrics, asked: self._save(updater, metrics, asked),
            notify=self._notify,
            stopping=self.interrupt.stopping,
            saving=self.interrupt.saving,
            window=self.memory.step,
            heaviest=self._heaviest,
            measured=lambda gib: self.log.say("memory", self.plan.compare(gib)) if self.plan else None,
        )
        with use(self.config.kernels), closing(updater):
            if self.config.eval_on_start and source is None and hooks.evaluate:
                self.state.evaluation_owed = True
            fit(
                self.model,
                self.batches,
                self.objective,
                updater,
                self.config,
                state=self.state,
                control=self.control,
                hooks=hooks,
                log=self.log,
            )
        if self.control.interrupted:
            return RunResult(self.folder, self.state.global_step, {}, self.interrupt.number)
        if self.config.load_best_model_at_end and self._best is not None:
            disk.load_weights(self.model, self._best)
            self.log.say("best", str(self._best))
        return self._finish(time.perf_counter() - began)

    def _finish(self, seconds: float) -> RunResult:
        summary: dict[str, float] = {}
        for record in self.state.log_history:
            summary |= {name: value for name, value in record.items() if name.startswith("eval_")}
        summary |= {
            "train_runtime": seconds,
            "train_loss": self.state.train_loss_sum / max(self.state.global_step, 1),
            "num_tokens": self.state.num_tokens,
            "epoch": self.state.epoch,
            "step": self.state.global_step,
        }
        self.state.log_history.append(summary)
        self.log.write(summary)
        self.log.say(
            "done", f"{self.state.global_step} steps in {clock(seconds)}, mean loss {summary['train_loss']:.4f}"
        )
        return RunResult(self.folder, self.state.global_step, summary)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation set, logged and told to callbacks."""
        if self.eval_batches is None:
            raise UserError("there is nothing to evaluate on", where="eval_dataset", mend="Give an evaluation data set")
        with use(self.config.kernels):
            metrics = evaluate(self.model, self.eval_batches.epoch(0), self.objective, self.interrupt.stopping)
        record = {**metrics, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(record)
        if self.log.path:
            self.log.write(record)
        shown = "  ".join(f"{name[5:]} {value:.4f}" for name, value in metrics.items() if "_per_second" not in name)
        self.log.say("eval", shown)
        self._notify("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, folder: str | Path | None = None) -> Path:
        """Weights (or adapter) and tokenizer into `folder` (default: the run's), as from_pretrained reads them."""
        target = Path(folder or self.folder)
        disk.save_final(self.model, self.tokenizer, target)
        return target

    def _heaviest(self) -> Batch | None:
        return self.plan.rehearsal(self.batches, self.config.heaviest_batch_first) if self.plan else None

    def _notify(self, event: str, **extra) -> None:
        syncs = event == "on_step_end" and self.reference is not None and getattr(self.config, "sync_ref_model", False)
        if syncs and self.state.global_step % self.config.ref_model_sync_steps == 0:
            self.reference.mix_in(self.model, self.config.ref_model_mixup_alpha)  # type: ignore[union-attr]
        for line in self.memory.news():
            self.log.say("memory", line)
        for callback in self.callbacks:
            if (call := getattr(callback, event, None)) is not None:
                call(self.config, self.state, self.control, model=self.model, processing_class=self.tokenizer, **extra)

    def _save(self, updater: Updater, metrics: dict[str, float] | None, asked: bool) -> None:
        """Write a checkpoint; remember it where it is the best so far; delete old ones beyond the limit."""
        path = self.folder / f"checkpoint-{self.state.global_step}"
        better = metrics is not None and self._is_better(metrics)
        if self.config.save_strategy == "best" and not better and not asked:
            return
        if better:
            self.state.best_model_checkpoint = path.name
        updater_state: tuple[dict, dict] = ({}, {})
        if asked or not self.config.save_only_model:
            tensors, scalars = updater.state()
            updater_state = ({**tensors, **self._moving()}, scalars)
        disk.save_checkpoint(
            self.folder, self.state.global_step, self.model, self.tokenizer, updater_state, self._described()
        )
        kept = [path] if self._best is None else [path, self._best]
        disk.rotate(self.folder, self.config.save_total_limit, kept)
        self.log.say("saved", str(path))
        self._notify("on_save")

    def _moving(self) -> dict[str, Tensor]:
        """What else moves as training goes on: the objective's running sums, a reference that follows the policy."""
        tensors = {f"objective.{name}": value for name, value in self.objective.state.items()}
        if self.reference is not None and getattr(self.config, "sync_ref_model", False):
            tensors |= {f"reference.{name}": p.data for name, p in self.reference.model.named_parameters()}
        return tensors

    def _described(self) -> dict:
        """The state, and what it depends on: with other data or settings, resuming would not be the same run."""
        settings = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(self.config)
            if field.name not in MAY_CHANGE
        }
        data = self.batches.fingerprint() if isinstance(self.batches, Batches) else "a stream"
        return {**dataclasses.asdict(self.state), "depends_on": {**settings, "the rows": data}}

    @property
    def _best(self) -> Path | None:
        """The best checkpoint so far, wherever the folder lies now."""
        name = self.state.best_model_checkpoint
        return self.folder / name if name else None

    def _check_best_metric(self) -> None:
        """A metric that evaluations don't have is an error now, not at the first checkpoint."""
        tracks = self.config.load_best_model_at_end or self.config.save_strategy == "best"
        if tracks and self.eval_batches is not None:
            with use(self.config.kernels):
                self._value(evaluate(self.model, [next(iter(self.eval_batches.epoch(0)))], self.objective))

    def _value(self, metrics: dict[str, float]) -> float:
        """The metric that decides which checkpoint is best."""
        name = self.config.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise UserError(
                f"{name} is not among the metrics of an evaluation",
                where="metric_for_best_model",
                mend=f"Use one of {', '.join(metrics)}",
            )
        return metrics[name]

    def _is_better(self, metrics: dict[str, float]) -> bool:
        greater = self.config.greater_is_better
        if greater is None:
            greater = not (self.config.metric_for_best_model or "loss").endswith("loss")
        value, best = self._value(metrics), self.state.best_metric
        if not math.isfinite(value):
            return False
        if best is not None and (value <= best if greater else value >= best):
            return False
        self.state.best_metric = value
        return True

    def _restore(self, source: Path, updater: Updater) -> None:
        """Everything as it was when the checkpoint was written: weights, optimizer, schedule, cursor, generators."""
        stored, tensors = disk.load_state(source)
        scalars, rng = stored.pop("updater"), stored.pop("rng")
        assert self.batches is not None
        if not scalars:
            raise UserError(
                "the checkpoint has no optimizer (save_only_model)",
                where=str(source),
                mend="Use it as model_name_or_path",
            )
        written, now = stored.pop("depends_on"), self._described()["depends_on"]
        other = [name for name in now if written.get(name) != json.loads(json.dumps(now[name]))]
        if other:
            shown = ", ".join(
                name if name == "the rows" else f"{name} ({written.get(name)}, now {now[name]})" for name in other
            )
            raise UserError(
                f"{shown} differ from the run that wrote this checkpoint",
                where=str(source),
                mend="Resume with the configuration in output_dir/config.yaml, or start anew in another output_dir",
            )
        disk.load_weights(self.model, source)
        updater.load(tensors, scalars)
        for name in self.objective.state:
            self.objective.state[name] = tensors[f"objective.{name}"]
        for name, value in self._moving().items():
            if name.startswith("reference."):
                value.copy_(tensors[name])
        disk.restore_rng(source, rng)
        max_steps = self.state.max_steps
        self.state = TrainState(**stored)
        self.state.max_steps = max_steps
        if self._best is not None and not self._best.is_dir():  # gone on with in another folder: it lies beside source
            self.state.best_model_checkpoint = str(source.resolve().parent / self._best.name)
        if self._best is not None and not self._best.is_dir():
            self.log.warn(f"{self._best}, the best checkpoint so far, is gone: the best is looked for anew")
            self.state.best_metric = self.state.best_model_checkpoint = None
        self.log.say("resume", f"{source} at step {self.state.global_step} of {max_steps}")
