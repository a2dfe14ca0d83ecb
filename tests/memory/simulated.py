"""A simulated asynchronous device: a stream of computation and free copies, carried out in random order.

Nothing that is told happens at once. The computation goes through its queue in order; a copy may start as soon as the
events it was told to wait for are done, poisons its target when it starts (NaN) and writes it when it ends; memory that
is let go is poisoned as soon as the computation gets to what was told after. Whatever reads too early, or is written
over too soon, reads NaN.
"""

import random
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class Event:
    def __init__(self, done: bool = False):
        self.done = done


class Copy:
    def __init__(self, source: Tensor, target: Tensor, after: list[Event], slow: bool):
        self.source, self.target, self.after, self.slow = source, target, after, slow
        self.started, self.event = False, Event()

    def advance(self) -> None:
        if not self.started:
            self.target.fill_(float("nan"))
            self.started = True
        else:
            self.target.copy_(self.source)
            self.event.done = True


class SimulatedDevice:
    """Copies for an Arena. `run` tells the computation something; `drain` lets everything told happen."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.queue: deque[Event | Callable[[], None]] = deque()
        self.copies: list[Copy] = []
        self.buffers = 0

    # what the arena calls

    def event(self) -> Event:
        event = Event()
        self.queue.append(lambda: setattr(event, "done", True))
        return event

    def copy_out(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        memory = torch.empty(0, dtype=source.dtype)  # the storage stays; the arena's own tensor decides whose it is
        memory.set_(source.untyped_storage(), source.storage_offset(), source.shape, source.stride())
        weakref.finalize(source, self.queue.append, lambda: memory.fill_(float("nan")))
        return self._copy(memory, target, after)

    def copy_in(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        return self._copy(source, target, after)

    def wait(self, event: Event) -> None:
        self.queue.append(event)

    def host(self, size: int) -> tuple[Tensor, str]:
        self.buffers += 1
        return torch.full((size // 4,), float("nan")).view(torch.uint8), "simulated"

    def free(self, buffer: Tensor) -> None:
        self.drain()
        self.buffers -= 1

    # what a test calls

    def run(self, what: Callable[[], None]) -> None:
        self.queue.append(what)
        self.happen(self.random.randrange(6))

    def given_back(self, buffers: list[Tensor]) -> None:
        """The computation gets this memory: at that point no copy into it may still come."""
        ours = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        late = [copy.event for copy in self.copies if copy.target.untyped_storage().data_ptr() in ours]

        def reused() -> None:
            assert all(event.done for event in late), "given back while a copy into it was under way"

        self.queue.append(reused)

    def happen(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def drain(self) -> None:
        while self.queue or self.copies:
            assert self._step(), "everything waits for something that can't happen"

    def _copy(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        copy = Copy(source, target, after, slow=self.random.random() < 0.15)
        self.copies.append(copy)
        return copy.event

    def _step(self) -> bool:
        """One thing that can happen now, chosen at random; slow copies wait for long. False if nothing can."""
        ready = [copy for copy in self.copies if all(event.done for event in copy.after)]
        head = self.queue[0] if self.queue else None
        goes_on = head is not None and (not isinstance(head, Event) or head.done)
        if not ready and not goes_on:
            return False
        quick = [copy for copy in ready if not copy.slow or self.random.random() < 0.01]
        if goes_on and (not quick or self.random.random() < 0.5):
            what = self.queue.popleft()
            if not isinstance(what, Event):
                what()
        else:
            copy = self.random.choice(quick or ready)
            copy.advance()
            if copy.event.done:
                self.copies.remove(copy)
        return True


class EagerDevice(SimulatedDevice):
    """The same for real computation, which happens when it is told: only copies are late, until they are waited for."""

    def event(self) -> Event:
        return Event(done=True)

    def copy_out(self, source: Tensor, target: Tensor, after: list[Event]) -> Event:
        self.happen(self.random.randrange(4))
        return self._copy(source, target, after)

    def wait(self, event: Event) -> None:
        while not event.done:
            assert self._step()
