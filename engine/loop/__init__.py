"""The training loop, and evaluation. Nothing else in burnish calls backward.

`fit` runs windows of micro-batches: the loss sum of each is divided by the count of the whole window, known before its
first forward, so accumulation, packing and batch size can't change what a loss means. Nothing on a CUDA device is read
back outside the log gate. `TrainState` is what a checkpoint must hold to go on exactly.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from burnish.config.fields import in_steps
from burnish.data.batch import Batch
from burnish.data.share import Share
from burnish.data.vision import AnyBatches
from burnish.loop.gate import Gate
from burnish.loop.state import Control, Hooks, Stopped, TrainState
from burnish.metrics import Log, cost_of, memory_gib, nothing, step_line
from burnish.objectives import Objective
from burnish.optim.updater import Updater
from burnish.parallel.shards import sync_gradients
from burnish.parallel.world import total, total_count, world

Result = TypeVar("Result")


def window_size(config) -> int:
    """Micro-batches of an update, of all processes together."""
    return config.gradient_accumulation_steps * world().shares


def total_steps(batches: AnyBatches, config, window: int | None = None) -> int:
    """Updates of the whole run: max_steps, or num_train_epochs passes in windows of `window` (window_size)."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * math.ceil(len(batches) / (window or window_size(config)))))


def fit(
    model: nn.Module,
    batches: AnyBatches,
    objective: Objective,
    updater: Updater,
    config,
    *,
    state: TrainState,
    control: Control,
    hooks: Hooks,
    log: Log,
) -> None:
    """Train `model` from `state` to state.max_steps updates.

    `state` is moved along; `control` is what callbacks set. Raises NonFinite when a loss or gradient norm is not
    finite: on the CPU at once, on CUDA at the next log, evaluation or checkpoint. The updater has applied neither that
    step nor one after it.
    """
    device = next(model.parameters()).device
    state.window = state.window or window_size(config)
    per_epoch, cost = len(batches), cost_of(model)
    model.train()
    rehearsed = _rehearse(objective, updater, device, hooks)
    gate = Gate(model, config, state, hooks.broken)
    hooks = _settling(hooks, gate)
    began, first = time.perf_counter(), state.global_step
    hooks.notify("on_train_begin")
    if state.evaluation_owed:
        _pay(state, control, config, hooks)
    while state.global_step < state.max_steps and not control.should_training_stop:
        windows = _begin_epoch(batches, state, control, hooks, cost)
        while True:
            waiting = time.perf_counter()
            window = next(windows, None)
            if window is None:
                break
            gate.waited += time.perf_counter() - waiting
            hooks.notify("on_step_begin")
            with hooks.window():
                loss = train_window(model, window, objective, device, gate)
            if not rehearsed and state.global_step == first and device.type == "cuda":
                hooks.measured(memory_gib())
            norm = updater.step(loss)
            gate.step(loss, norm, _again(batches, state, cost))
            _advance(state, window, per_epoch)
            if device.type == "cpu":
                gate.look()
            due = _ask(state, control, config)
            hooks.notify("on_step_end")
            rate = (time.perf_counter() - began - gate.away) / (state.global_step - first)
            _after_step(state, control, config, hooks, log, gate, updater, rate, due)
            if state.global_step >= state.max_steps or control.should_training_stop or control.should_epoch_stop:
                break
        ended = window is None or state.micro_batch >= per_epoch or control.should_epoch_stop
        if control.interrupted:
            break
        if ended:
            state.epoch_index, state.micro_batch = state.epoch_index + 1, 0
        _after_epoch(state, control, config, hooks)
    gate.look()


def _every(interval: float, state: TrainState) -> bool:
    """Whether this step ends an interval given in steps, or below 1 as a share of all steps."""
    return state.global_step % max(1, in_steps(interval, state.max_steps)) == 0


def _begin_epoch(
    batches: AnyBatches, state: TrainState, control: Control, hooks: Hooks, cost: tuple[float, float]
) -> Iterator[Share]:
    control.should_epoch_stop = False
    hooks.notify("on_epoch_begin")
    return _windows(batches, state, cost)


def _windows(batches: AnyBatches, state: TrainState, cost: tuple[float, float]) -> Iterator[Share]:
    """This process's part of the rest of the current epoch, window by window."""
    own = world()
    return batches.shares(
        state.epoch_index, state.micro_batch, state.window, ranks=own.shares, rank=own.share, cost=cost
    )


def _again(batches: AnyBatches, state: TrainState, cost: tuple[float, float]) -> Callable[[], list[Batch]]:
    """How to get the micro-batches of the coming update once more: where they begin, not the tokens themselves."""
    at = replace(state, log_history=[])
    return lambda: next(_windows(batches, at, cost)).batches


def train_window(model: nn.Module, window: Share, objective: Objective, device, gate: Gate) -> Tensor:
    """Forward and backward of one window; returns its loss, of all processes (already divided by the whole count)."""
    count = total_count(sum(objective.count(batch) for batch in window.batches if batch.counted))
    loss_here = torch.zeros((), dtype=torch.float32, device=device)
    gate.count(window)
    placed = [batch.to(device) for batch in window.batches]
    shared = objective.window(placed)
    for number, batch in enumerate(placed, 1):
        loss_sum, metrics = objective.step(batch, shared)
        loss = loss_sum / max(1, count) if batch.counted else loss_sum * 0.0  # a window may train on nothing
        sync_gradients(model, number == len(placed))
        loss.backward()
        loss_here += loss.detach()
        gate.accumulator.add(metrics if batch.counted else nothing(metrics))
    return total(loss_here)


def _rehearse(objective: Objective, updater: Updater, device, hooks: Hooks) -> bool:
    """Forward and backward of the heaviest micro-batch, if there is one to run first: what doesn't fit fails now.

    Leaves no trace: no update, no gradient, no random number drawn, no running sum moved.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading may have held more
    batch = hooks.heaviest()
    if batch is None:
        return False
    state = {name: value.clone() for name, value in objective.state.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), updater.rehearsing(), hooks.window():
        placed = batch.to(device)
        loss_sum, _ = objective.step(placed, objective.window([placed]))
        (loss_sum / max(1, objective.count(batch))).backward()
    objective.state.update(state)
    hooks.measured(memory_gib())
    return True


def _settling(hooks: Hooks, gate: Gate) -> Hooks:
    """The hooks, with the gate settled before each evaluation and checkpoint, and their time not counted as steps'.

    A step that is no number must not push out a good checkpoint.
    """

    def settled(call: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*given) -> Result:
            gate.look()
            gate.settle()
            began = time.perf_counter()
            try:
                return call(*given)
            finally:
                gate.elsewhere(time.perf_counter() - began)

        return timed

    return replace(
        hooks,
        evaluate=settled(hooks.evaluate) if hooks.evaluate else None,
        save=settled(hooks.save) if hooks.save else None,
    )


def _advance(state: TrainState, window: Share, per_epoch: int) -> None:
    state.global_step += 1
    state.micro_batch += window.micro_batches
    state.epoch = state.epoch_index + state.micro_batch / per_epoch
    state.num_tokens += window.tokens


def _ask(state: TrainState, control: Control, config) -> bool:
    """Ask for what the configuration wants done after this update, for callbacks to see and to take back. Returns
    whether a checkpoint is among it."""
    step, last = state.global_step, state.global_step >= state.max_steps
    first = config.logging_first_step and step == 1
    control.should_log |= _every(config.logging_steps, state) or first or last
    control.should_evaluate |= config.eval_strategy == "steps" and _every(
        config.eval_steps or config.logging_steps, state
    )
    due = config.save_strategy == "steps" and (_every(config.save_steps, state) or last)
    control.should_save |= due
    return due


def _after_step(state, control, config, hooks, log, gate, updater, rate, due) -> None:
    """The gates that follow an update: log, evaluate, save. `due`: the configuration wants a checkpoint here."""
    step, last = state.global_step, state.global_step >= state.max_steps
    if control.should_log:
        control.should_log = False
        record = gate.record(updater.learning_rate)
        state.log_history.append(record)
        log.write(record)
        log.say("step", step_line(step, state.max_steps, record, rate * (state.max_steps - step)))
        hooks.notify("on_log", logs=dict(record))
    metrics, saved = None, False
    if control.should_evaluate:
        control.should_evaluate = False
        metrics = _evaluated(state, hooks) if hooks.evaluate else None
    wanted = control.should_save
    control.should_save = False
    asked = hooks.saving() or (wanted and not due)
    if hooks.save and (wanted or asked or (config.save_strategy == "best" and metrics)):
        hooks.save(metrics, asked)
        saved = asked
    if not last and hooks.stopping():
        gate.look()
        _stop(control, hooks, saved)


def _evaluated(state: TrainState, hooks: Hooks) -> dict[str, float] | None:
    """Metrics of the evaluation set; None, and a debt, where the run is to stop before they are known."""
    state.evaluation_owed = True
    assert hooks.evaluate is not None
    try:
        metrics = hooks.evaluate()
    except Stopped:
        return None
    state.evaluation_owed = False
    return metrics


def _stop(control: Control, hooks: Hooks, saved: bool = False) -> None:
    """Everything into a checkpoint, if it isn't there yet, and out of the loop."""
    if hooks.save and not saved:
        hooks.save(None, True)
    control.interrupted = control.should_training_stop = True


def _pay(state: TrainState, control: Control, config, hooks: Hooks) -> None:
    """The evaluation that the stopped run still owed, and the checkpoint that depends on it."""
    metrics = _evaluated(state, hooks) if hooks.evaluate else None
    if hooks.save and metrics and config.save_strategy != "no" and state.global_step:
        hooks.save(metrics, False)
    if state.evaluation_owed and hooks.stopping():
        _stop(control, hooks)


def _after_epoch(state: TrainState, control: Control, config, hooks: Hooks) -> None:
    """What `epoch` strategies ask for, at the end of an epoch and of the run."""
    control.should_evaluate |= config.eval_strategy == "epoch"
    control.should_save |= config.save_strategy == "epoch"
    hooks.notify("on_epoch_end")
    metrics = _evaluated(state, hooks) if control.should_evaluate and hooks.evaluate else None
    wanted, asked = control.should_save, control.should_save and config.save_strategy != "epoch"
    control.should_evaluate = control.should_save = False
    if state.evaluation_owed:
        _stop(control, hooks)
        return
    if hooks.save and (wanted or (config.save_strategy == "best" and metrics)):
        hooks.save(metrics, asked)
