"""The stopwatch: one sample of one phase, rounds over all ways in turn, peak memory, ceilings, and the time left.

On a GPU a sample starts with a cold cache, and the device is kept busy while the host queues the work, so that what
is measured is the device, unless a way itself waits for the device. Ways take turns and medians are compared.
"""

import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from burnish.verbs.bench.ops import BACKWARD, BOTH, FORWARD, INFERENCE, Case, gradients, outputs, upstream

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
FLUSH_BYTES = 256 << 20  # more than any GPU's last-level cache
HEAD_START = 2_000_000  # cycles, about a millisecond, in which the host queues a forward and a backward
IN_PLACE = ", in place"


class Clock:
    """Seconds until the suite must have ended."""

    def __init__(self, seconds: float):
        self.started = time.perf_counter()
        self.seconds = seconds

    def left(self) -> float:
        return self.seconds - self.spent()

    def spent(self) -> float:
        return time.perf_counter() - self.started


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken this long, at the main thread's next Python instruction."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Times work on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def sample(self, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float:
        """Seconds that `work(prepare())` takes, without `prepare`."""
        if not self.on_gpu:
            state = prepare()
            began = time.perf_counter()
            result = work(state)
            seconds = time.perf_counter() - began
            del result
            return seconds
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        state = prepare()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work(state)
        stop.record()
        stop.synchronize()
        del result, state
        return start.elapsed_time(stop) / 1e3

    def extra_memory(self, work: Callable[[], Any]) -> int | None:
        """Bytes that `work` adds at its peak, its results included; None on the CPU, where nobody counts them."""
        if not self.on_gpu:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def settle(self) -> None:
        """Free what a failed or finished way left behind."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


class Runner:
    """One way at one case: its function, its inputs, and how to run a phase of it."""

    def __init__(self, case: Case, name: str, function: Callable, inputs: tuple, dtype: torch.dtype):
        self.case, self.function, self.inputs = case, function, inputs
        self.pristine: tuple | None = None
        if IN_PLACE in name:
            self.pristine = inputs
            self.inputs = tuple(_copy(t) for t in inputs)
        self.dtype = dtype
        self.grads: tuple[Tensor, ...] = ()
        self._given: tuple[Tensor, ...] = ()

    def refresh(self) -> None:
        """Put back what a way that works in place has overwritten."""
        if self.pristine is None:
            return
        with torch.no_grad():
            for mine, clean in zip(self.inputs, self.pristine, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(clean)
            self._given = tuple(g.clone() for g in self.grads)

    def outs(self) -> tuple[Tensor, ...]:
        return outputs(self.function(*self.inputs))

    def back(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.grads:
            self.grads = upstream(outs, self.dtype)
        given = self.grads if self.pristine is None else self._given or tuple(g.clone() for g in self.grads)
        return gradients(self.case.op, self.inputs, outs, given)

    def phase(self, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """(what comes before, what is timed)."""
        if name == BACKWARD:
            return self._fresh_outs, self.back
        if name == BOTH:
            return self.refresh, lambda _: self.back(self.outs())
        if name == INFERENCE:
            return self.refresh, self._inference
        assert name == FORWARD
        return self.refresh, lambda _: self.outs()

    def _fresh_outs(self) -> tuple[Tensor, ...]:
        self.refresh()
        return self.outs()

    def _inference(self, _: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.outs()

    def whole(self) -> Any:
        """Everything the case times, once."""
        if not self.case.op.wanted:
            return self._inference(None)
        outs = self.outs()
        return outs, self.back(outs)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def rounds_for(seconds_a_round: float, share: float) -> int:
    """How many rounds fit into `share` seconds, within the limits."""
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(share / max(seconds_a_round, 1e-9))))


def take_turns(samples: dict[str, Callable[[], float]], share: float, clock: Clock) -> dict[str, list[float]] | None:
    """Seconds of each way, round by round, starting with another one each time; about `share` seconds in all.

    None where not even the fewest rounds fit into the time that is left.
    """
    began = time.perf_counter()
    first = {name: sample() for name, sample in samples.items()}
    a_round = time.perf_counter() - began
    if a_round * FEWEST_ROUNDS > clock.left():
        return None
    taken: dict[str, list[float]] = {name: [] for name in samples}
    names = list(samples)
    for number in range(rounds_for(a_round, share)):
        if number >= FEWEST_ROUNDS and clock.left() < a_round:
            break
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            taken[name].append(samples[name]())
    del first  # the first round warmed up
    return taken


def ceilings(watch: Stopwatch, dtype: torch.dtype, small: bool) -> dict[str, float]:
    """What this machine reaches: bytes a second of a large copy, FLOP/s of a large product. Medians."""
    count, size = (16 << 20, 1024) if small else (1 << 30, 8192)
    generator = torch.Generator(watch.device).manual_seed(0)
    source = torch.randint(0, 100, (count,), device=watch.device, dtype=torch.int32, generator=generator)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=watch.device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def median(work: Callable[[], Any]) -> float:
        return statistics.median([watch.sample(lambda: None, lambda _: work()) for _ in range(12)][2:])

    copied = median(lambda: target.copy_(source))
    multiplied = median(lambda: torch.mm(a, b, out=out))
    return {
        "copy_bytes_s": 2 * source.numel() * source.element_size() / copied,
        "matmul_flop_s": 2 * size**3 / multiplied,
    }
