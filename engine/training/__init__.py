"""A run that has been assembled: it trains, evaluates, saves and resumes.

`burnish.run` makes a `Run`; the loop does the training; this is what stands between the loop and the disk.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.config.load import dump
from burnish.data.batch import Batch
from burnish.data.vision import AnyBatches
from burnish.interrupt import Interrupt
from burnish.kernels import use
from burnish.loop import fit, total_steps, window_size
from burnish.loop.evaluation import evaluate
from burnish.loop.state import Control, Hooks, TrainState
from burnish.memory.forecast import Forecast
from burnish.memory.layers import Installed
from burnish.memory.settings import Memory
from burnish.metrics import Log, clock, cost_of
from burnish.model.neftune import noisy_embeddings
from burnish.objectives import Objective
from burnish.optim.updater import Updater
from burnish.parallel.shards import rest, sharded, whole_state
from burnish.parallel.world import any_of, barrier, world
from burnish.reference import Reference
from burnish.training.best import follows, is_better, value_of
from burnish.training.broken import keep_broken
from burnish.training.callbacks import ANSWERED, agree, heard, tell
from burnish.training.checkpoints import Saves
from burnish.training.folder import clear, goes_on, refuse_overwriting, trim_log
from burnish.training.publish import publish


@dataclass
class RunResult:
    """What a run leaves: the folder, its last metrics, and the number of updates done.

    interrupted  None for a finished run; else the signal that stopped it early, or 0 for a STOP file
    """

    output_dir: Path
    global_step: int
    metrics: dict[str, float]
    interrupted: int | None = None

    @property
    def training_loss(self) -> float:
        """The mean loss of the run's steps, under transformers' name; NaN for a run stopped early."""
        return self.metrics.get("train_loss", math.nan)


@dataclass
class Run:
    """Everything a training run needs, ready to train."""

    config: Any
    model: nn.Module
    tokenizer: Any
    batches: AnyBatches | None
    eval_batches: AnyBatches | None
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
    about: dict[str, str] = field(default_factory=dict)  # hardware, versions: for the model card
    stepping: dict = field(default_factory=dict)  # the optimizer and schedule while training, for callbacks
    across: Any = None  # how updates are joined over processes: Replicas, Shards, or None for one process

    def __post_init__(self) -> None:
        self.callbacks = heard(self.callbacks, self.log)
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
        source = self._source(resume_from_checkpoint)
        self._check_best_metric()
        window = (source and disk.load_state(source)[0].get("window")) or window_size(self.config)
        steps = total_steps(self.batches, self.config, window)
        mine = dataclasses.replace(self.config, gradient_accumulation_steps=math.ceil(window / world().shares))
        rest(self.model)  # an evaluation before this has left parameters whole, which no optimizer steps
        updater = Updater(self.model, self.masters, mine, steps, *self.optimizers, across=self.across)
        self.stepping = {"optimizer": updater.optimizer, "lr_scheduler": updater.schedule}
        if not (updater.told or updater.parameters[0].device.type == "cpu" or self.config.optimizer_in_bwd):
            self.log.say("guard", "this optimizer is told of a gradient that is no number by a wait before each update")
        self.state.max_steps, self.state.window = steps, window
        if world().rank:
            torch.manual_seed(self.config.seed + world().rank)  # until now all drew the same
        saves = Saves(self, updater)
        if source is not None:
            saves.restore(source)
        barrier()  # all have found and read what the first one may now set aside
        if world().main:
            with disk.writing(self.folder):
                self._open_folder(new=source is None)
        barrier()
        began = time.perf_counter()
        hooks = Hooks(
            evaluate=self._evaluate_and_compare if self.eval_batches is not None else None,
            save=saves.save,
            notify=self._followed(saves),
            stopping=self._stopping,
            saving=lambda: any_of(self.interrupt.saving()),
            window=self.memory.step,
            heaviest=self._heaviest,
            measured=lambda gib: self.log.say("memory", self.plan.compare(gib)) if self.plan else None,
            broken=lambda step, batches: keep_broken(self, step, batches),
        )
        noise = noisy_embeddings(self.model, self.config.neftune_noise_alpha, world().slice)
        with use(self.config.kernels), closing(updater), noise:
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
            saves.settle()
        if self.control.interrupted:
            self.notify("on_train_end")
            return RunResult(self.folder, self.state.global_step, {}, self.interrupt.number or 0)
        if self.config.load_best_model_at_end and saves.best is not None:
            saves.load_weights(saves.best)
            self.log.say("best", str(saves.best))
        return self._finish(time.perf_counter() - began)

    def _source(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to go on from, if there is one to. Raises UserError where a run would be overwritten."""
        wanted = asked or self.config.resume_from_checkpoint or goes_on(self.config)
        source, passed_over = disk.find_checkpoint(self.folder, wanted) if wanted else (None, [])
        if source is None or source.parent.resolve() != self.folder.resolve():
            refuse_overwriting(self.config)
        for line in passed_over:
            self.log.warn(line)
        return source

    def _open_folder(self, *, new: bool) -> None:
        """The run's folder as this run goes on in it, its configuration, and the log."""
        if new:
            clear(self.folder)
        else:
            for line in disk.set_aside(self.folder, self.state.global_step):
                self.log.warn(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        disk.write_text(self.folder / "config.yaml", dump(self.config))
        trim_log(self.folder / "metrics.jsonl", self.state.global_step)
        self.log.open(self.folder)

    def _followed(self, saves: Saves) -> Callable[..., None]:
        """notify, and after a step the checkpoint that may be ready; after the first, what the start took."""
        began = time.perf_counter()

        def notify(event: str, **extra: Any) -> None:
            self.notify(event, **extra)
            if event == "on_step_end":
                self.log.first_step(time.perf_counter() - began)
                saves.poll()

        return notify

    def _stopping(self) -> bool:
        """Whether somebody asked any of the processes to stop."""
        return any_of(self.interrupt.stopping())

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
        self.notify("on_log", logs=dict(summary))
        self.notify("on_train_end")
        return RunResult(self.folder, self.state.global_step, summary)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation set, logged and told to callbacks."""
        if self.eval_batches is None:
            raise UserError("there is nothing to evaluate on", where="eval_dataset", mend="Give an evaluation data set")
        with use(self.config.kernels):
            metrics = evaluate(self.model, self._eval_share(), self.objective, self._stopping_evaluation)
        record = {**metrics, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(record)
        if self.log.path:
            self.log.write(record)
        shown = "  ".join(f"{name[5:]} {value:.4f}" for name, value in metrics.items() if "_per_second" not in name)
        self.log.say("eval", shown)
        self.notify("on_log", logs=dict(record))
        self.notify("on_evaluate", metrics=metrics)
        return metrics

    def _stopping_evaluation(self) -> bool:
        """Asked after every batch of an evaluation."""
        self.notify("on_prediction_step")
        return self._stopping()

    def _evaluate_and_compare(self) -> dict[str, float]:
        """An evaluation of the loop's, and what it means for state.best_metric where no checkpoint depends on it: after
        the callbacks, because early stopping compares with the best before."""
        metrics = self.evaluate()
        if follows(self.config):
            is_better(self.config, self.state, metrics)
        return metrics

    def save_model(self, folder: str | Path | None = None) -> Path:
        """Weights (or adapter) and tokenizer into `folder` (default: the run's), as from_pretrained reads them."""
        target = Path(folder or self.folder)
        state = whole_state(self.model, keep=world().main) if sharded(self.model) else None
        if world().main:
            disk.save_final(self.model, self.tokenizer, target, state)
            publish(self, target)
        barrier()
        return target

    def _eval_share(self) -> Iterator[Batch]:
        """This process's batches of the evaluation set."""
        own = world()
        assert self.eval_batches is not None
        for share in self.eval_batches.shares(
            0, 0, own.shares, ranks=own.shares, rank=own.share, cost=cost_of(self.model)
        ):
            yield from share.batches

    def _heaviest(self) -> Batch | None:
        return self.plan.rehearsal(self.batches, self.config.heaviest_batch_first) if self.plan else None

    def notify(self, event: str, **extra) -> None:
        """Tell the callbacks (burnish.training.callbacks), and do what follows a step."""
        syncs = event == "on_step_end" and self.reference is not None and getattr(self.config, "sync_ref_model", False)
        if syncs and self.state.global_step % self.config.ref_model_sync_steps == 0:
            self.reference.mix_in(self.model, self.config.ref_model_mixup_alpha)  # type: ignore[union-attr]
        for line in self.memory.news():
            self.log.say("memory", line)
        if self.callbacks:
            given = {"model": self.model, "processing_class": self.tokenizer, "tokenizer": self.tokenizer}
            given |= {"train_dataloader": self.batches, "eval_dataloader": self.eval_batches, **self.stepping}
            tell(self.callbacks, event, self.config, self.state, self.control, **given, **extra)
        if event in ANSWERED:
            agree(self.control)

    def _check_best_metric(self) -> None:
        """A metric that evaluations don't have is an error now, not at the first checkpoint."""
        if self.config.metric_for_best_model and self.eval_batches is not None:
            with use(self.config.kernels):
                value_of(self.config, evaluate(self.model, [next(self._eval_share())], self.objective))
