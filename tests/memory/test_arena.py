"""The arena against a simulated asynchronous device: nothing read too early, nothing written over too soon, no leak."""

import copy
import random

import pytest
import torch
from simulated import SimulatedDevice

from burnish.memory.arena import ALIGNMENT, Arena, PlainCopies, rounded

CPU = torch.device("cpu")


class Watched(Arena):
    """Tells its simulated device when landing buffers are let go of."""

    def _let_go_of_landings(self):
        before = [landing.buffer for landing in self._landings if landing.buffer is not None]
        super()._let_go_of_landings()
        if before and all(landing.buffer is None for landing in self._landings):
            self.copies.given_back(before)


class Program:
    """Forwards and backwards of passes of random length and size, told to a simulated device and checked by it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.device = SimulatedDevice(seed)
        self.arena = Watched(CPU, self.device)
        self.checked = 0

    def forward(self):
        """(pass, expected tensors and what stayed on the device of each checkpoint)"""
        count, kept = self.random.randint(1, 7), self.random.randint(0, 2)
        shapes = [(self.random.randint(1, 5), 3), (self.random.randint(1, 7),)][: self.random.randint(1, 2)]
        size = sum(rounded(4 * torch.Size(shape).numel()) for shape in shapes)
        made = self.arena.begin(max(0, count - kept), max(0, count - kept) * size)
        expected = []
        for index in range(count):
            values = [torch.rand(shape) for shape in shapes]
            away, here = [], []
            for value in values:
                tensor = torch.full_like(value, float("nan"))
                self.device.run(lambda tensor=tensor, value=value: tensor.copy_(value))
                if made.put(index, tensor):
                    away.append(value)
                else:
                    here.append((tensor, value))
                del tensor
            expected.append((away, here))
        return made, expected

    def backward(self, made, expected, stop=-1):
        for index in reversed(range(len(expected))):
            if index == stop:
                raise InterruptedError
            away, here = expected[index]
            with made.reading(index) as tensors:
                assert len(tensors) == len(away)
                for tensor, value in [*zip(tensors, away, strict=True), *here]:
                    self.device.run(lambda tensor=tensor, value=value: self.check(tensor, value))

    def check(self, tensor, value):
        assert torch.equal(tensor, value), "read too early, or written over too soon"
        self.checked += 1

    def run(self):
        """Steps of one or two micro-batches: one after the other, nested, side by side, or broken off."""
        for _ in range(4):
            kind = self.random.choice(("plain", "nested", "side by side", "broken", "forgotten"))
            passes = [self.forward() for _ in range(1 if kind in ("plain", "broken") else 2)]
            if kind == "broken":
                with pytest.raises(InterruptedError):
                    self.backward(*passes[0], stop=self.random.randrange(len(passes[0][1])))
                self.arena.abandon()
            elif kind == "forgotten":
                self.backward(*passes.pop())
            elif kind == "side by side":
                self.alternate(*passes)
            else:
                for each in reversed(passes):
                    self.backward(*each)
            passes = each = None
            assert not self.arena.live
        self.device.drain()

    def alternate(self, first, second):
        """Two backwards that take turns, checkpoint by checkpoint."""
        for offset in range(1, 1 + max(len(first[1]), len(second[1]))):
            for made, expected in (first, second):
                if offset <= len(expected):
                    index = len(expected) - offset
                    away, here = expected[index]
                    with made.reading(index) as tensors:
                        for tensor, value in [*zip(tensors, away, strict=True), *here]:
                            self.device.run(lambda tensor=tensor, value=value: self.check(tensor, value))


@pytest.mark.parametrize("block", range(4))
def test_every_schedule_reads_what_was_written(block):
    for seed in range(100 * block, 100 * block + 100):
        program = Program(seed)
        program.run()
        assert program.checked
        program.arena.close()
        assert program.device.buffers == 0


def caught(seeds=range(60)) -> bool:
    """Whether some schedule finds a fault."""
    for seed in seeds:
        program = Program(seed)
        try:
            program.run()
        except AssertionError:
            program.arena._buffer = None  # a device that has failed gives nothing back
            return True
    return False


def test_a_reader_that_does_not_wait_is_caught(monkeypatch):
    monkeypatch.setattr(SimulatedDevice, "wait", lambda self, event: None)
    assert caught()


def test_sources_let_go_before_their_copy_are_caught(monkeypatch):
    monkeypatch.setattr(Arena, "settle", lambda self, slot: slot.sources.clear())
    assert caught()


@pytest.mark.parametrize(
    ("method", "left_out"),
    [("copy_out", "the producer"), ("copy_in", "the copy out"), ("copy_in", "the landing buffer's reader")],
)
def test_a_copy_that_does_not_wait_is_caught(monkeypatch, method, left_out):
    original = getattr(SimulatedDevice, method)
    keep = {"the producer": slice(0, 0), "the copy out": slice(-1, None), "the landing buffer's reader": slice(0, -1)}
    monkeypatch.setattr(
        SimulatedDevice,
        method,
        lambda self, source, target, after: original(self, source, target, after[keep[left_out]]),
    )
    assert caught()


def test_abandoning_without_waiting_is_caught(monkeypatch):
    original = Arena.abandon

    def deaf(self, number=None):
        for slot in self.live:
            slot.arrived = []
        original(self, number)

    monkeypatch.setattr(Arena, "abandon", deaf)
    assert caught(range(200))


def test_the_arena_has_the_size_that_was_asked_for():
    arena = Arena(CPU)
    made = arena.begin(3, 3 * rounded(4 * 33))
    tensors = [torch.rand(33) for _ in range(4)]
    assert [made.put(index, tensor) for index, tensor in enumerate(tensors)] == [True, True, True, False]
    assert arena.capacity == 3 * 144 and arena._buffer.numel() == arena.capacity  # 132 bytes, up to a multiple of 16
    assert [slot.start for slot in arena.live] == [0, 144, 288] and ALIGNMENT == 16


def test_what_does_not_fit_stays_on_the_device_and_the_next_step_grows():
    arena = Arena(CPU)
    first = arena.begin(2, 2 * 64)
    assert first.put(0, torch.rand(16)) and first.put(1, torch.rand(16))
    second = arena.begin(2, 2 * 64)  # while the first is live, so nothing may move
    assert not second.put(0, torch.rand(16)) and arena.capacity == 128 and arena.stayed == 1
    for index in (1, 0):
        with first.reading(index):
            pass
    arena.begin(1, 64)
    assert arena.capacity == 256


def test_sources_are_let_go_in_time_and_landing_buffers_behind_the_last_read():
    """Two checkpoints may be on their way while more are made, even where those stay; none when backward begins."""
    arena = Arena(CPU)
    made = arena.begin(2, 2 * 64)
    for index in range(5):
        made.put(index, torch.rand(16))
        held = [slot.owner[0] for slot in arena.live if slot.sources]
        assert held == [each for each in (0, 1) if index - 2 < each <= index]
    del made
    made = arena.begin(4, 4 * 64)
    for index in range(5):
        made.put(index, torch.rand(16))
    for index in reversed(range(5)):
        with made.reading(index):
            assert not any(slot.sources for slot in arena.live)
            assert sum(landing.buffer is not None for landing in arena._landings) == (1 if index == 4 else 2)
    assert all(landing.buffer is None for landing in arena._landings)


def test_prefetch_runs_ahead_by_one_checkpoint():
    started = []

    class Recorded(PlainCopies):
        def copy_in(self, source, target, after):
            started.append(source.flatten()[0].item())
            super().copy_in(source, target, after)

    arena = Arena(CPU, Recorded())
    made = arena.begin(4, 4 * 16)
    for index in range(5):
        made.put(index, torch.full((4,), float(index)))
    with made.reading(4):  # stayed on the device
        assert started == [3.0]
    with made.reading(3) as (three,):
        assert started == [3.0, 2.0] and three[0] == 3.0
    with made.reading(2) as (two,):
        assert started == [3.0, 2.0, 1.0] and two[0] == 2.0
        assert three[0] != 3.0  # its landing buffer has been filled again: two are enough


def test_a_checkpoint_can_be_read_once():
    arena = Arena(CPU)
    made = arena.begin(1, 16)
    made.put(0, torch.rand(4))
    with made.reading(0):
        pass
    with pytest.raises(RuntimeError, match="retain_graph"), made.reading(0):
        pass


def test_a_pass_that_is_forgotten_frees_its_slots():
    arena = Arena(CPU)
    made = arena.begin(2, 32)
    made.put(0, torch.rand(4))
    assert len(arena.live) == 1
    del made
    assert not arena.live


def test_types_and_strides_come_back():
    arena = Arena(CPU)
    tensors = [
        torch.rand(3, 5).T,
        torch.rand(2, 3).bfloat16(),
        torch.arange(7),
        torch.rand(4, dtype=torch.float64)[::2],
    ]
    made = arena.begin(1, 1000)
    assert all(made.put(0, tensor) for tensor in tensors)
    with made.reading(0) as found:
        for got, want in zip(found, tensors, strict=True):
            assert torch.equal(got, want) and got.dtype == want.dtype and got.data_ptr() % 2 == 0


def test_a_copy_of_an_arena_is_an_arena_of_its_own():
    arena = Arena(CPU)
    arena.begin(1, 64)
    other = copy.deepcopy(arena)
    assert other.capacity == 0 and arena.capacity == 64
