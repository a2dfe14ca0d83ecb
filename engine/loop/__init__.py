"""The training loop, and evaluation. Nothing else in burnish calls backward.

`fit` runs windows of micro-batches: the loss sum of each is divided by the count of the whole window, known before its
first forward, so accumulation, packing and batch size can't change what a loss means. Nothing on a CUDA device is read
back outside the log gate. `TrainState` is what a checkpoint must hold to go on exactly.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from burnish.config.fields import in_steps
from burnish.data.batch import Batch, Batches
from burnish.data.stream import StreamBatches
from burnish.loop.gate import Gate, refuse_non_finite
from burnish.loop.state import Control, Hooks, Stopped, TrainState
from burnish.metrics import Log, memory_gib, step_line
from burnish.objectives import Objective
from burnish.optim.updater import Updater


def steps_per_epoch(batches: Batches | StreamBatches, config) -> int:
    return math.ceil(len(batches) / config.gradient_accumulation_steps)


def total_steps(batches: Batches | StreamBatches, config) -> int:
    """Updates of the whole run: max_steps, or num_train_epochs passes."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * steps_per_epoch(batches, config)))


def fit(
    model: nn.Module,
    batches: Batches | StreamBatches,
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

    `state` is moved along; `control` is what callbacks set. Raises NonFinite when a logged loss or gradient norm is not
    finite (on the CPU every step is looked at, on CUDA the log gate's).
    """
    device = next(model.parameters()).device
    size = config.gradient_accumulation_steps
    per_epoch = len(batches)
    model.train()
    rehearsed = _rehearse(objective, updater, device, hooks)
    gate = Gate(model, config, state)
    hooks = _settling(hooks, gate)
    began, first = time.perf_counter(), state.global_step
    hooks.notify("on_train_begin")
    if state.evaluation_owed:
        _pay(state, control, config, hooks)
    while state.global_step < state.max_steps and not control.should_training_stop:
        windows = _windows(batches, state, size)
        while True:
            waiting = time.perf_counter()
            window = next(windows, None)
            if window is None:
                break
            gate.waited += time.perf_counter() - waiting
            with hooks.window():
                loss = _train_window(window, objective, device, gate)
            if not rehearsed and state.global_step == first and device.type == "cuda":
                hooks.measured(memory_gib())
            norm = updater.step()
            _advance(state, window, per_epoch)
            gate.losses.append(loss)
            if device.type == "cpu":
                refuse_non_finite(loss, norm, state, window)
            hooks.notify("on_step_end")
            rate = (time.perf_counter() - began) / (state.global_step - first)
            _after_step(state, control, config, hooks, log, gate, loss, norm, updater, rate, window)
            if state.global_step >= state.max_steps or control.should_training_stop or control.should_epoch_stop:
                break
        ended = window is None or state.micro_batch >= per_epoch or control.should_epoch_stop
        control.should_epoch_stop = False
        if control.interrupted:
            break
        if ended:
            state.epoch_index, state.micro_batch = state.epoch_index + 1, 0
        _after_epoch(state, control, config, hooks)
    hooks.notify("on_train_end")


def _every(interval: float, state: TrainState) -> bool:
    """Whether this step ends an interval given in steps, or below 1 as a share of all steps."""
    return state.global_step % max(1, in_steps(interval, state.max_steps)) == 0


def _windows(batches: Batches | StreamBatches, state: TrainState, size: int) -> Iterator[list[Batch]]:
    """The rest of the current epoch in windows of `size` micro-batches (the last may hold fewer)."""
    window: list[Batch] = []
    for batch in batches.epoch(state.epoch_index, skip=state.micro_batch):
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _train_window(window: list[Batch], objective: Objective, device, gate: Gate) -> Tensor:
    """Forward and backward of one window; returns its loss (already divided by the window's count)."""
    count = max(1, sum(objective.count(batch) for batch in window))  # a window may train on nothing
    total = torch.zeros((), dtype=torch.float32, device=device)
    for batch in window:
        gate.count(batch)
    placed = [batch.to(device) for batch in window]
    shared = objective.window(placed)
    for batch in placed:
        loss_sum, metrics = objective.step(batch, shared)
        loss = loss_sum / count
        loss.backward()
        total += loss.detach()
        gate.accumulator.add(metrics)
    return total


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
    """The hooks, with the gate settled before each checkpoint."""
    save = hooks.save
    if save is None:
        return hooks

    def settled(metrics: dict[str, float] | None, asked: bool) -> None:
        gate.settle()
        save(metrics, asked)

    return replace(hooks, save=settled)


def _advance(state: TrainState, window: list[Batch], per_epoch: int) -> None:
    state.global_step += 1
    state.micro_batch += len(window)
    state.epoch = state.epoch_index + state.micro_batch / per_epoch
    state.num_tokens += sum(len(batch.input_ids) for batch in window)


def _after_step(state, control, config, hooks, log, gate, loss, norm, updater, rate, window) -> None:
    """The gates that follow an update: log, evaluate, save."""
    step, last = state.global_step, state.global_step >= state.max_steps
    first = config.logging_first_step and step == 1
    if _every(config.logging_steps, state) or first or control.should_log or last:
        control.should_log = False
        refuse_non_finite(gate.losses[-1], norm, state, window)
        record = gate.record(norm, updater.learning_rate)
        state.log_history.append(record)
        log.write(record)
        log.say("step", step_line(step, state.max_steps, record, rate * (state.max_steps - step)))
        hooks.notify("on_log", logs=record)
    metrics, saved = None, False
    interval = config.eval_steps or config.logging_steps
    due = config.eval_strategy == "steps" and (_every(interval, state))
    if hooks.evaluate and (due or control.should_evaluate):
        control.should_evaluate = False
        metrics = _evaluated(state, hooks)
    due = config.save_strategy == "steps" and (_every(config.save_steps, state) or last)
    asked = hooks.saving() or control.should_save
    if hooks.save and (due or asked):
        refuse_non_finite(loss, norm, state, window)  # a broken model must not push out a good checkpoint
    if hooks.save and (due or asked or (config.save_strategy == "best" and metrics)):
        control.should_save = False
        hooks.save(metrics, asked)
        saved = asked
    if not last and hooks.stopping():
        refuse_non_finite(loss, norm, state, window)
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
    metrics = _evaluated(state, hooks) if config.eval_strategy == "epoch" and hooks.evaluate else None
    if state.evaluation_owed:
        _stop(control, hooks)
        return
    if hooks.save and (config.save_strategy == "epoch" or (config.save_strategy == "best" and metrics)):
        hooks.save(metrics, False)
    hooks.notify("on_epoch_end")
