"""The suite's cases under pytest-benchmark, for looking at one op while working on it.

    pytest benchmarks --benchmark-only -k rms_norm

The cases, the ways and the gate are those of `burnish bench`, which also takes turns, counts bytes and writes results.
One group a case and phase; a way whose gate is red fails, one that can't run here is skipped with its reason.
"""

import pytest
import torch

from burnish.verbs.bench.cases import gpu_cases, small_cases
from burnish.verbs.bench.measure import Clock
from burnish.verbs.bench.ops import make_inputs
from burnish.verbs.bench.suite import Suite

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
CASES = gpu_cases() if GPU else small_cases()
EACH = [
    pytest.param(case, phase, name, id=f"{case.label}-{phase}-{name}".replace(" ", "_"))
    for case in CASES
    for phase in case.phases
    for name in case.op.ways
]


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite(DEVICE, DTYPE, Clock(float("inf")))


@pytest.mark.parametrize(("case", "phase", "name"), EACH)
def test_op(benchmark, suite, case, phase, name):
    benchmark.group = f"{case.label}, {phase}"
    record = {"left_out": {}, "red": {}, "errors": {}}
    runner = suite.admit(case, name, make_inputs(case.op, case.shape, DEVICE, DTYPE), record)
    if name in record["left_out"]:
        pytest.skip(record["left_out"][name])
    assert not record["red"]
    prepare, work = runner.phase(phase)

    def timed(state):
        work(state)
        if GPU:
            torch.cuda.synchronize()

    moved, flops = case.op.count(case.shape, phase, DTYPE.itemsize)
    benchmark.extra_info.update(bytes=moved, flops=flops)
    benchmark.pedantic(timed, setup=lambda: ((prepare(),), {}), rounds=5, warmup_rounds=1)
