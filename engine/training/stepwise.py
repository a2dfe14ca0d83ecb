"""Training whose rows come one update at a time, from a script that does something of its own in between.

The run has no training data; each `step` is a window of the loop: forward and backward of its micro-batches, divided by
the count of them all, one update, one record.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.config.fields import in_steps
from burnish.data.batch import IGNORE, Batch, Examples, collate
from burnish.data.packing import whole_rows
from burnish.data.share import Share
from burnish.kernels import use
from burnish.loop import train_window
from burnish.loop.gate import Gate
from burnish.metrics import memory_gib
from burnish.model.neftune import noisy_embeddings
from burnish.optim.updater import Updater
from burnish.parallel.world import world
from burnish.training import Run
from burnish.training.broken import keep_broken
from burnish.training.checkpoints import Saves
from burnish.training.folder import refuse_overwriting

_ENDLESS = ("constant", "constant_with_warmup")


class Stepwise:
    """The optimizer and the state of such a run, made at its first step.

    Without max_steps the learning rate stays as it is after warm-up; UserError where the configuration asks for another
    schedule, for several processes, or for updates inside backward.
    """

    def __init__(self, run: Run):
        config = run.config
        if world().size > 1:
            raise UserError("rows that come by step are trained on by one process", where="nproc", mend="Set nproc: 1")
        if config.optimizer_in_bwd:
            raise UserError("a step may be several micro-batches", where="optimizer_in_bwd", mend="Delete it")
        refuse_overwriting(config)
        # gradients are added up in float32, however many micro-batches the first step has
        settings = {"gradient_accumulation_steps": 2}
        if config.max_steps < 1 and config.lr_scheduler_type not in _ENDLESS:
            if config.origins["lr_scheduler_type"] != "default":
                raise UserError(
                    f"the schedule {config.lr_scheduler_type} needs an end",
                    where=config.origins["lr_scheduler_type"],
                    mend="Set max_steps, or lr_scheduler_type: constant_with_warmup",
                )
            settings["lr_scheduler_type"] = "constant_with_warmup"  # type: ignore[assignment]
            run.log.say("schedule", "the learning rate stays constant after warm-up: there is no max_steps")
        mine = dataclasses.replace(config, **settings)
        self.run, self.config = run, config
        self.updater = Updater(run.model, run.masters, mine, max(config.max_steps, 1), *run.optimizers)
        run.stepping = {"optimizer": self.updater.optimizer, "lr_scheduler": self.updater.schedule}
        run.state.max_steps = max(config.max_steps, 0)
        with disk.writing(run.folder):
            run._open_folder(new=True)
        run.notify("on_train_begin")
        self.gate = Gate(run.model, config, run.state, lambda step, batches: keep_broken(run, step, batches))

    def step(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """One update on all rows (ids [n], labels [n]: what each token is to be, or -100); its record.

        Raises UserError where nothing is trained, and beyond max_steps; NonFinite where the loss is no number.
        """
        run, state = self.run, self.run.state
        if 0 < self.config.max_steps <= state.global_step:
            raise UserError(f"all {self.config.max_steps} steps are done", where="max_steps", mend="Raise max_steps")
        size = self.config.per_device_train_batch_size
        batches = [batch_of(rows[at : at + size], at) for at in range(0, len(rows), size)]
        if not any(batch.num_valid for batch in batches):
            raise UserError("nothing to train on: every label is -100, or the first of its row", where="labels")
        window = Share(batches, len(batches), sum(len(batch.input_ids) for batch in batches), 1.0)
        run.model.train()
        run.notify("on_step_begin")
        noise = noisy_embeddings(run.model, self.config.neftune_noise_alpha)
        with use(self.config.kernels), noise, run.memory.step():
            device = next(run.model.parameters()).device
            loss = train_window(run.model, window, run.objective, device, self.gate)
            norm = self.updater.step(loss)
        state.global_step += 1
        state.num_tokens += window.tokens
        self.gate.step(loss, norm, lambda: batches)
        self.gate.look()
        run.notify("on_step_end")
        record = self.gate.record(self.updater.learning_rate)
        state.log_history.append(record)
        run.log.write(record)
        rate = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  |g| {record['grad_norm']:.3f}"
        run.log.say("step", f"{state.global_step}  {rate}  {record['tok_s']:,.0f} tok/s  {memory_gib():.1f} GiB")
        run.notify("on_log", logs=dict(record))
        self._follow()
        return dict(record)

    def _follow(self) -> None:
        """Evaluate and save, as often as the configuration says or a callback asks."""
        config, control, state = self.config, self.run.control, self.run.state

        def due(interval: float) -> bool:
            return state.global_step % max(1, in_steps(interval, state.max_steps)) == 0

        metrics = None
        asked, control.should_evaluate = control.should_evaluate, False
        scheduled = config.eval_strategy == "steps" and due(config.eval_steps or config.logging_steps)
        if self.run.eval_batches is not None and (asked or scheduled):
            metrics = self.run.evaluate()
        asked, control.should_save = control.should_save, False
        if asked or (config.save_strategy == "steps" and due(config.save_steps)):
            self.gate.settle()
            Saves(self.run, self.updater).save(metrics, asked)


def batch_of(rows: list[tuple[np.ndarray, np.ndarray]], first: int) -> Batch:
    """Rows (ids [n], labels [n], any token or -100) as one packed batch; reports call them first, first + 1, ..."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids, _ in rows], out=offsets[1:])
    wanted = np.concatenate([labels for _, labels in rows]).astype(np.int64)
    examples = Examples(
        ids=np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        trained=wanted != IGNORE,
        offsets=offsets,
        rows=np.arange(first, first + len(rows)),
    )
    batch = collate(examples, whole_rows(examples.lengths).pieces)
    batch.labels[batch.valid] = torch.from_numpy(wanted)[batch.valid + 1]  # collate has the tokens themselves
    return batch


def check_config(config: Any) -> None:
    """Raises UserError for keys that only make sense with training data."""
    for name in ("save_strategy", "eval_strategy"):
        if getattr(config, name) in ("epoch", "best"):
            raise UserError(
                f"{name} {getattr(config, name)}: there are no epochs, and no end to look for a best at",
                where=config.origins[name],
                mend="Use steps or no",
            )
