"""One case after the other: admit the ways that are right, time them in turns, and keep what became of the others."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from burnish.verbs.bench import gate
from burnish.verbs.bench.measure import Clock, Runner, Stopwatch, at_most, take_turns
from burnish.verbs.bench.ops import Case, Op, Way, make_inputs

OURS = "burnish"
COMPILE = "torch.compile"
GPU_ONLY = ("Liger", "CCE", "quack", "flash-attn", "torch varlen_attn", "torch FlexAttention")
WARM_UP_SECONDS = 45.0  # for a way to compile itself and run once


class Suite:
    """What holds for all cases: the device and type, the time left, and the gates that were tried."""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock):
        self.device, self.dtype, self.clock = device, dtype, clock
        self.watch = Stopwatch(device)
        self.gates: dict[tuple[str, str], tuple[float, str | None]] = {}
        self.slow: set[str] = set()  # packages that were not ready in time once: they get no second chance

    def run(self, case: Case, cases_left: int) -> dict[str, Any]:
        """The record of a case: its counts, and of every way figures, or why there are none."""
        record: dict[str, Any] = {
            "op": case.op.name, "case": case.title, "shape": case.shape,
            "phases": {}, "errors": {}, "left_out": {}, "red": {}, "cut": None,
        }  # fmt: skip
        try:
            inputs = make_inputs(case.op, case.shape, self.device, self.dtype)
        except torch.OutOfMemoryError:
            record["cut"] = "the inputs alone need more memory than there is"
            return record
        runners = self._runners(case, inputs, record)
        if runners:
            self._time(case, runners, record, cases_left)
        del runners, inputs
        self.watch.settle()
        return record

    def _runners(self, case: Case, inputs: tuple, record: dict) -> dict[str, Runner]:
        """The ways that can be timed. None at all where burnish's own gate is red: an op that is wrong has no speed."""
        runners: dict[str, Runner] = {}
        for name in case.op.ways:
            if self.clock.left() <= 0:
                record["cut"] = "time"
                break
            runner = self.admit(case, name, inputs, record)
            if runner is not None:
                runners[name] = runner
            elif name == OURS:
                break
        return runners

    def admit(self, case: Case, name: str, inputs: tuple, record: dict) -> Runner | None:
        """A way that is here, is right and has run, ready to be timed; or None, and the record says why."""
        seconds = min(WARM_UP_SECONDS, self.clock.left())
        try:
            with at_most(seconds):
                return self._admit(case, name, case.op.ways[name], inputs, record)
        except TimeoutError as error:
            if name == OURS:
                record["cut"] = "time"
            else:
                record["left_out"][name] = str(error)
                if seconds == WARM_UP_SECONDS:
                    self.slow.add(_package(name))
        except Exception as error:  # a peer may fail in any way; burnish's own failure is as bad as a wrong result
            record["red" if name == OURS else "left_out"][name] = _why(error)
        self.watch.settle()
        return None

    def _admit(self, case: Case, name: str, way: Way, inputs: tuple, record: dict) -> Runner | None:
        """A runner that has run once, or None with the reason in the record."""
        reason = self._absent(case, name, way)
        if reason is not None:
            record["left_out"][name] = reason
            return None
        assert not isinstance(way, str)
        error, red = self._gate(case.op, name, way)
        record["errors"][name] = error
        function = way()
        runner = Runner(case, name, function, inputs, self.dtype)
        red = red or gate.check_rows(case, function, runner.inputs, name == OURS, self.dtype)
        if red is not None:
            record["red"][name] = red
            return None
        runner.refresh()
        runner.whole()
        runner.refresh()
        extra = self.watch.extra_memory(runner.whole)
        if extra is not None:
            record.setdefault("extra_bytes", {})[name] = extra
        return runner

    def _absent(self, case: Case, name: str, way: Way) -> str | None:
        """Why a way takes no part here, or None. A missing package is found out by importing it."""
        if isinstance(way, str):
            return way
        if name == COMPILE and self.device.type == "cpu":
            return "left to GPUs: here it would compile longer than all else takes"
        if name == COMPILE and not case.compiled:
            return "compiled at one shape of the op only, to save time"
        if _package(name) in self.slow:
            return "was not ready in time before"
        if name.startswith(GPU_ONLY) and self.device.type == "cpu":
            try:
                way()
            except TimeoutError:  # an OSError too
                raise
            except (ImportError, OSError) as error:
                return _why(error)
            return "runs on GPUs only"
        return None

    def _gate(self, op: Op, name: str, way: Callable[[], Callable]) -> tuple[float, str | None]:
        """The gate of a way, tried once for all the op's shapes; ops may differ in their small shape only."""
        key = (f"{op.name} {op.gate}", name)
        if key not in self.gates:
            self.gates[key] = gate.check(op, way(), name == OURS, self.device, self.dtype)
        return self.gates[key]

    def _time(self, case: Case, runners: dict[str, Runner], record: dict, cases_left: int) -> None:
        share = max(0.0, self.clock.left()) / max(1, cases_left) / len(case.phases)
        for phase in case.phases:
            samples = {name: self._sampler(runner, phase) for name, runner in runners.items()}
            try:
                taken = take_turns(samples, share, self.clock)
            except torch.OutOfMemoryError as error:
                record["cut"] = _why(error)
                return
            if taken is None:
                record["cut"] = "time"
                return
            moved, flops = case.op.count(case.shape, phase, self.dtype.itemsize)
            figures = {name: _summary(seconds) for name, seconds in taken.items()}
            record["phases"][phase] = {"bytes": moved, "flops": flops, "ways": figures}

    def _sampler(self, runner: Runner, phase: str) -> Callable[[], float]:
        prepare, work = runner.phase(phase)
        return lambda: self.watch.sample(prepare, work)


def _package(name: str) -> str:
    return name.split(",")[0]


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "seconds": statistics.median(ordered),
        "fastest": ordered[0],
        "slowest": ordered[-1],
        "rounds": len(ordered),
    }


def _why(error: BaseException) -> str:
    """One line about an exception."""
    text = str(error).strip().split("\n")[0][:200]
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    return f"{type(error).__name__}: {text}"


def add_shares(record: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Beside each time the share of the measured ceiling: the least time that bytes and operations need, over it."""
    for phase in record["phases"].values():
        floor = max(phase["bytes"] / ceilings["copy_bytes_s"], phase["flops"] / ceilings["matmul_flop_s"])
        phase["floor_seconds"] = floor
        for figures in phase["ways"].values():
            figures["share"] = floor / figures["seconds"]
