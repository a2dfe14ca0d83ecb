"""The checkpoints of a run: written by all its processes, kept or deleted, and read again, exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.data.stream import StreamBatches
from burnish.loop.state import TrainState
from burnish.optim.updater import Updater
from burnish.parallel import store
from burnish.parallel.shards import fill, rest, sharded
from burnish.parallel.world import any_of, barrier, world
from burnish.training.best import improves
from burnish.training.callbacks import restore as restore_callbacks
from burnish.training.callbacks import states

if TYPE_CHECKING:
    from burnish.training import Run

# What a resumed run may be given otherwise: where things are, how long, how often, how much is logged and kept, and how
# memory is saved: that changes no number (tiles: its last place), and a run that didn't fit must be able to go on.
MAY_CHANGE = frozenset(
    "output_dir overwrite_output_dir report_to run_name project push_to_hub hub_model_id hub_token hub_private_repo "
    "hub_revision model_name_or_path dataset_name eval_dataset_name dataset_config "
    "dataset_train_split dataset_test_split max_steps num_train_epochs per_device_eval_batch_size eval_packing "
    "logging_steps logging_first_step eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit "
    "save_only_model load_best_model_at_end metric_for_best_model greater_is_better resume_from_checkpoint use_cpu "
    "strict_patch trust_remote_code heaviest_batch_first gradient_checkpointing activation_offloading "
    "checkpoint_segment keep_attention tile_tokens memory nproc parallel sequence_parallel ddp_timeout max_restarts "
    "async_save".split()
)


class Saves:
    """What `run` and its `updater` leave on disk. With async_save the last checkpoint may still be on its way there:
    `poll` after each step, and `settle` at the end.
    """

    def __init__(self, run: Run, updater: Updater):
        self.run, self.updater = run, updater
        self._finish: Callable[[], Path] | None = None  # of a checkpoint that is being written
        self._files: Any = None  # their future

    def save(self, metrics: dict[str, float] | None, asked: bool) -> None:
        """Write a checkpoint; remember it where it is the best so far; delete old ones beyond the limit."""
        path = self.run.folder / f"checkpoint-{self.run.state.global_step}"
        better = metrics is not None and improves(self.run.config, self.run.state, metrics)
        if self.run.config.save_strategy == "best" and not better and not asked:
            return
        if better:
            self.run.state.best_model_checkpoint = path.name
        updater_state: tuple[dict, dict] = ({}, {})
        if asked or not self.run.config.save_only_model:
            tensors, scalars = self.updater.state()
            updater_state = ({**tensors, **self._moving()}, scalars)
        self.settle()
        self._finish = disk.begin_checkpoint(
            self.run.folder,
            self.run.state.global_step,
            self.run.model,
            self.run.tokenizer,
            updater_state,
            self._described(),
            self._writers(updater_state[1] != {}),
        )
        if self._files is None:
            self.settle()

    def poll(self) -> None:
        """Finish the checkpoint that is being written beside the training, if every process has written its part."""
        if self._files is not None and not any_of(not self._files.done()):
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, make it one, and delete old ones beyond the limit."""
        if self._finish is None:
            return
        finish, self._finish, self._files = self._finish, None, None
        path = finish()
        kept = [path] if self.best is None else [path, self.best]
        if world().main:
            for line in disk.rotate(self.run.folder, self.run.config.save_total_limit, kept):
                self.run.log.warn(line)
        self.run.log.say("saved", str(path))
        self.run.notify("on_save")

    def _writers(self, stepped: bool) -> disk.Writers:
        """Who writes a checkpoint: the first process, or each its parts. stepped: with the optimizer's."""
        if world().size == 1:
            return disk.ALONE
        return disk.Writers(
            world().rank, barrier, partial(self._write_parts, stepped) if sharded(self.run.model) else None
        )

    def _write_parts(self, stepped: bool, folder: Path) -> Callable[[], object]:
        """Write this process's parts; returns what waits for them."""
        parts = store.parts(self.run.model, self.updater if stepped else None) | (self._moving() if stepped else {})
        if not self.run.config.async_save:
            store.save(folder, parts)
            return lambda: None
        self._files = store.save_later(folder, parts)
        return store.plainly()(self._files.result)

    def load_weights(self, source: Path) -> None:
        if store.is_sharded(source):
            store.load_weights(source, self.run.model, self.updater)
        else:
            disk.load_weights(self.run.model, source, fill if sharded(self.run.model) else Tensor.copy_)

    def _moving(self) -> dict[str, Tensor]:
        """What else moves as training goes on: the objective's running sums, a reference that follows the policy."""
        tensors = {f"objective.{name}": value for name, value in self.run.objective.state.items()}
        if self.run.reference is not None and getattr(self.run.config, "sync_ref_model", False):
            rest(self.run.reference.model)  # parts, not what a forward left whole
            tensors |= {f"reference.{name}": p.data for name, p in self.run.reference.model.named_parameters()}
        return tensors

    def _described(self) -> dict:
        """The state, and what it depends on: with other data or settings, resuming would not be the same run."""
        settings = {
            field.name: getattr(self.run.config, field.name)
            for field in dataclasses.fields(self.run.config)
            if field.name not in MAY_CHANGE
        }
        settings = json.loads(json.dumps(settings, default=str))  # model_init_kwargs may hold a script's objects
        data = "a stream" if isinstance(self.run.batches, StreamBatches | None) else self.run.batches.fingerprint()
        kept = {"depends_on": {**settings, "the rows": data}, "callbacks": states(self.run.callbacks)}
        return {**dataclasses.asdict(self.run.state), **kept}

    @property
    def best(self) -> Path | None:
        """The best checkpoint so far, wherever the folder lies now."""
        name = self.run.state.best_model_checkpoint
        return self.run.folder / name if name else None

    def restore(self, source: Path) -> None:
        """Everything as it was when the checkpoint was written: weights, optimizer, schedule, cursor, generators."""
        stored, tensors = disk.load_state(source)
        scalars, rng = stored.pop("updater"), stored.pop("rng")
        assert self.run.batches is not None
        if not scalars:
            raise UserError(
                "the checkpoint has no optimizer (save_only_model)",
                where=str(source),
                mend="Use it as model_name_or_path",
            )
        restore_callbacks(self.run.callbacks, stored.pop("callbacks", {}))
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
        rest(self.run.model)
        moving = self._moving()
        if store.is_sharded(source):
            tensors = store.load(source, self.run.model, self.updater, moving)
        else:
            self.load_weights(source)
            for name, value in moving.items():
                fill(value, tensors[name])
            if sharded(self.run.model):
                tensors = store.load_whole(tensors, self.run.model, self.updater)
        self.updater.load(tensors, scalars)
        disk.restore_rng(source, rng, world().rank)
        max_steps, window = self.run.state.max_steps, self.run.state.window
        self.run.state = TrainState(**stored)
        self.run.state.max_steps, self.run.state.window = max_steps, window
        if self.best is not None and not self.best.is_dir():  # gone on with in another folder: it lies beside source
            self.run.state.best_model_checkpoint = str(source.resolve().parent / self.best.name)
        if self.best is not None and not self.best.is_dir():
            self.run.log.warn(f"{self.best}, the best checkpoint so far, is gone: the best is looked for anew")
            self.run.state.best_metric = self.run.state.best_model_checkpoint = None
        self.run.log.say("resume", f"{source} at step {self.run.state.global_step} of {max_steps}")
