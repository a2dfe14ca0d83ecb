"""What a step adds up to: times, tokens and sums until the log gate reads them; and the guard against no numbers."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.data.batch import Batch
from burnish.data.share import Share
from burnish.loop.state import TrainState
from burnish.metrics import Accumulator, memory_gib, peak_flops, step_flops
from burnish.parallel.world import gather, total, world


class NonFinite(UserError):
    """A loss or gradient norm that is not a number: the run stops, and says at which step and on which rows."""


Broken = Callable[[int, list[Batch]], str]


class Gate:
    """Times, tokens and sums since the last log; `record`, `look` and `settle` alone read the device.

    broken  (step, its micro-batches) -> a file that holds them for a replay, or ""
    """

    def __init__(self, model: nn.Module, config, state: TrainState, broken: Broken = lambda step, batches: ""):
        self.accumulator = Accumulator()
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._batches: list[Callable[[], list[Batch]]] = []
        self._summed = 0  # how many losses are in train_loss_sum already
        self._looked = 0  # how many steps were found to be numbers
        self._broken, self._max_norm = broken, config.max_grad_norm or math.inf
        self.away = 0.0  # seconds of the run that went into evaluations and checkpoints
        self.since = time.perf_counter()
        self.waited = 0.0
        self.tokens = self.trained = 0
        self.flops = 0.0
        self.imbalance = 1.0  # the worst since the last log
        self._model, self._state, self._peak = model, state, peak_flops()

    def count(self, window: Share) -> None:
        """Note what this process's part of a window holds; before it goes to a device."""
        self.imbalance = max(self.imbalance, window.imbalance)
        for batch in window.batches:
            if batch.counted:
                self.tokens += len(batch.input_ids)
                self.trained += batch.num_valid
                if self._peak:
                    squares = int((batch.cu_seqlens.diff().long() ** 2).sum())
                    self.flops += step_flops(self._model, len(batch.input_ids), squares)

    def step(self, loss: Tensor, norm: Tensor, batches: Callable[[], list[Batch]]) -> None:
        """Note an update. batches: gives its micro-batches again, should they be asked for."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._batches.append(batches)

    def elsewhere(self, seconds: float) -> None:
        """So long no step was worked on."""
        self.away += seconds
        self.since += seconds

    def look(self) -> None:
        """Raises NonFinite for the first update since the last look whose loss or norm is not a number."""
        fresh = [*self._losses[self._looked :], *self._norms[self._looked :]]
        if not fresh:
            return
        values = torch.stack([value.double() for value in fresh]).tolist()
        count = len(fresh) // 2
        for number, (loss, norm) in enumerate(zip(values[:count], values[count:], strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._refuse(loss, norm, self._looked + number)
        self._looked += count

    def _refuse(self, loss: float, norm: float, number: int) -> None:
        after = len(self._losses) - 1 - number
        step = self._state.global_step - after
        batches = self._batches[number]()
        rows = sorted({row for batch in batches if batch.counted for row in batch.rows})
        rows = sorted({*gather(torch.tensor(rows, dtype=torch.int64))[0].tolist()})  # whoever speaks speaks for all
        shown = ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        file = self._broken(step, batches)
        others = "; each process has kept its own rows" if world().size > 1 else ""
        lost = f"; it was not applied, nor were the {after} updates after it" if after else ""
        raise NonFinite(
            f"loss {loss}, gradient norm {norm}{lost}",
            where=f"step {step}, rows {shown}",
            mend=f"burnish check --replay {file} says where it begins{others}" if file else "Look at those rows",
        )

    def settle(self) -> None:
        """Bring train_loss_sum up to date for a checkpoint between two logs: a resumed run doesn't see these steps."""
        if self._losses:
            self._add(torch.stack([loss.double() for loss in self._losses]).tolist())

    def _add(self, losses: list[float]) -> None:
        for loss in losses[self._summed :]:  # one by one: the sum is the same wherever it was cut
            self._state.train_loss_sum += loss
        self._summed = len(losses)

    def record(self, learning_rate: float) -> dict[str, float]:
        """The numbers since the last record, and a new beginning. Raises NonFinite as `look` does."""
        self.look()
        values = torch.stack([value.double() for value in (*self._losses, *self._norms)]).tolist()
        losses, norms = values[: len(self._losses)], values[len(self._losses) :]
        seconds = max(time.perf_counter() - self.since, 1e-9)
        self._add(losses)
        tokens, trained, flops = total(
            torch.tensor([self.tokens, self.trained, self.flops], dtype=torch.float64)
        ).tolist()
        record = {
            "loss": sum(losses) / len(losses),
            "grad_norm": norms[-1],
            "grad_clipped": sum(norm > self._max_norm for norm in norms) / len(norms),
            "learning_rate": learning_rate,
            **self.accumulator.take(total),
            "num_tokens": self._state.num_tokens,
            "epoch": self._state.epoch,
            "step": self._state.global_step,
            "tok_s": tokens / seconds,
            "tok_s_trained": trained / seconds,
            "mem_gib": memory_gib(),
            "data_wait": self.waited / seconds,
        }
        if self._peak:
            record["mfu"] = flops / seconds / self._peak / world().size
        if world().size > 1:
            record["imbalance"] = self.imbalance
        self._losses, self._norms, self._batches = [], [], []
        self._summed, self._looked, self.since = 0, 0, time.perf_counter()
        self.waited, self.tokens, self.trained, self.flops, self.imbalance = 0.0, 0, 0, 0.0, 1.0
        return record
