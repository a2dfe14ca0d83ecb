"""What a step adds up to: times, tokens and sums until the log gate reads them; and the guard against no numbers."""

import math
import time

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.data.batch import Batch
from burnish.loop.state import TrainState
from burnish.metrics import Accumulator, memory_gib, peak_flops, step_flops


class NonFinite(UserError):
    """A loss or gradient norm that is not a number: the run stops, and says at which step and on which rows."""


class Gate:
    """Times, tokens and sums since the last log; `record` is the only place that reads the device."""

    def __init__(self, model: nn.Module, config, state: TrainState):
        self.accumulator = Accumulator()
        self.losses: list[Tensor] = []
        self._summed = 0  # how many of them are in train_loss_sum already
        self.since = time.perf_counter()
        self.waited = 0.0
        self.tokens = self.trained = 0
        self.flops = 0.0
        self._model, self._state, self._peak = model, state, peak_flops()

    def count(self, batch: Batch) -> None:
        self.tokens += len(batch.input_ids)
        self.trained += batch.num_valid
        if self._peak:
            self.flops += step_flops(
                self._model, len(batch.input_ids), int((batch.cu_seqlens.diff().long() ** 2).sum())
            )

    def settle(self) -> None:
        """Bring train_loss_sum up to date for a checkpoint between two logs: a resumed run doesn't see these steps."""
        if self.losses:
            self._add(torch.stack([loss.double() for loss in self.losses]).tolist())

    def _add(self, losses: list[float]) -> None:
        for loss in losses[self._summed :]:  # one by one: the sum is the same wherever it was cut
            self._state.train_loss_sum += loss
        self._summed = len(losses)

    def record(self, norm: Tensor, learning_rate: float) -> dict[str, float]:
        values = torch.stack([*(loss.double() for loss in self.losses), norm.double()]).tolist()
        grad_norm, losses = values[-1], values[:-1]
        seconds = max(time.perf_counter() - self.since, 1e-9)
        self._add(losses)
        record = {
            "loss": sum(losses) / len(losses),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **self.accumulator.take(),
            "num_tokens": self._state.num_tokens,
            "epoch": self._state.epoch,
            "step": self._state.global_step,
            "tok_s": self.tokens / seconds,
            "tok_s_trained": self.trained / seconds,
            "mem_gib": memory_gib(),
            "data_wait": self.waited / seconds,
        }
        if self._peak:
            record["mfu"] = self.flops / seconds / self._peak
        self.losses, self._summed, self.since = [], 0, time.perf_counter()
        self.waited, self.tokens, self.trained, self.flops = 0.0, 0, 0, 0.0
        return record


def refuse_non_finite(loss: Tensor, norm: Tensor, state: TrainState, window: list[Batch]) -> None:
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        rows = sorted({row for batch in window for row in batch.rows})
        shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        raise NonFinite(
            f"loss {loss.item()}, gradient norm {norm.item()}",
            where=f"step {state.global_step}, rows {shown}",
            mend="Resume from the last checkpoint with a lower learning_rate, or look at those rows",
        )
