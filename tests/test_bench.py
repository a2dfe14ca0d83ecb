"""The benchmark suite: every case runs, wrong results have no figure, counts are right, time is kept, pages true."""

import json
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from burnish import cli
from burnish.verbs import bench
from burnish.verbs.bench import aims, cases, cpu_head, elementwise, gate, heads, layers, measure, pages
from burnish.verbs.bench.ops import BACKWARD, BOTH, FORWARD, INFERENCE, Case, gradients, make_inputs, outputs, upstream
from burnish.verbs.bench.suite import Suite, add_shares

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_s": 1e10, "matmul_flop_s": 1e11}
TINY = {"N": 64, "H": 16, "V": 64, "I": 32, "K": 16, "D": 16, "length": 32, "outs": (8, 6, 4)}
SMALL = cases.small_cases()


def tiny(case: Case) -> Case:
    """The case at a size that takes no time; the gate has a smaller N, so that the timed shape has rows of its own."""

    def shrink(shape: dict, **more) -> dict:
        kept = {name: TINY.get(name, value) for name, value in shape.items()} | more
        if "outs" in shape:
            kept["outs"] = TINY["outs"][: len(shape["outs"])]
        return kept

    op = replace(case.op, gate=shrink(case.op.gate, N=32))
    return replace(case, op=op, shape=shrink(case.shape))


def suite(seconds: float = 1.0) -> Suite:
    return Suite(CPU, torch.float32, measure.Clock(seconds))


def with_way(case: Case, name: str, function) -> Case:
    ways = {"burnish": case.op.ways["burnish"], "transformers": case.op.ways["transformers"]}
    return replace(case, op=replace(case.op, ways=ways | {name: lambda: function}))


NORM = tiny(next(case for case in SMALL if case.op.name == "rms_norm"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_every_case_is_right_and_timed(case):
    """Also that no way of ours, of torch or of TRL breaks: only packages that aren't there may be left out."""
    record = suite(60.0).run(tiny(case), 10000)
    assert record["red"] == {} and record["cut"] is None
    assert set(record["phases"]) == set(case.phases)
    excuses = ("not installed: ", "runs on GPUs only", "it gives a loss", "it has no such op", "left to GPUs")
    for name, why in record["left_out"].items():
        assert why.startswith(excuses), f"{name}: {why}"
    measured = {name for phase in record["phases"].values() for name in phase["ways"]}
    assert measured | set(record["left_out"]) == set(case.op.ways)
    assert {"burnish", "eager torch"} <= measured or {"burnish", "transformers"} <= measured or "peft" in measured


def test_the_tables_have_the_same_ops_and_name_every_case_once():
    large = cases.gpu_cases()
    assert {case.op.name for case in large} == {case.op.name for case in SMALL}
    for table in (large, SMALL):
        assert len({case.label for case in table}) == len(table)
        assert all(next(iter(case.op.ways)) == "burnish" for case in table)
    tokens = {case.shape["N"] for case in large if case.op.name == "linear_cross_entropy"}
    assert min(tokens) == 1024 and max(tokens) == 131072


# ---- the gate


def broken_result(x, weight):
    return elementwise.eager_norm(x, weight) * (1 + 1e-3)


class OffGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-3)


def broken_gradient(x, weight):
    return elementwise.eager_norm(OffGradient.apply(x), weight)


def broken_later(x, weight):
    """Right at the gate's 32 rows; at the case's, the last ones are wrong."""
    y = elementwise.eager_norm(x, weight)
    return torch.cat((y[:60], y[60:] * 1.01))


def not_a_number(x, weight):
    return elementwise.eager_norm(x, weight) * float("nan")


BUGS = [broken_result, broken_gradient, broken_later, not_a_number]


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_peer_has_no_figure_and_says_why(bug):
    record = suite().run(with_way(NORM, "a peer", bug), 10000)
    assert "differ" in record["red"]["a peer"]
    assert record["phases"] and all(set(p["ways"]) == {"burnish", "transformers"} for p in record["phases"].values())


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_ours_turns_the_gate_red_and_the_op_has_no_figure_at_all(bug):
    ways = {"burnish": lambda: bug, "transformers": lambda: elementwise.eager_norm}
    record = suite().run(replace(NORM, op=replace(NORM.op, ways=ways)), 10000)
    assert record["phases"] == {} and "differ" in record["red"]["burnish"]


def test_what_is_near_enough_for_a_peer_is_not_for_us():
    def rough(x, weight):
        return elementwise.eager_norm(x, weight) * (1 + 5e-5)

    assert gate.check(NORM.op, rough, False, CPU, torch.float32)[1] is None
    assert "more than 1e-05" in gate.check(NORM.op, rough, True, CPU, torch.float32)[1]


def test_the_command_prints_and_writes_no_figure_of_a_red_op(monkeypatch, tmp_path, capsys):
    ways = {"burnish": lambda: broken_gradient, "transformers": lambda: elementwise.eager_norm}
    monkeypatch.setattr(cases, "small_cases", lambda: [replace(NORM, op=replace(NORM.op, ways=ways))])
    assert cli.main(["bench", "only=rms_norm", f"out={tmp_path}", "small=true"]) == 1
    printed = capsys.readouterr().out
    page = (tmp_path / f"{name_of(tmp_path)}.md").read_text()
    assert "RED: gradient 1 differs" in printed and "of the ceiling" not in printed
    assert "burnish: gradient 1 differs" in page and "| rms_norm" not in page


def name_of(folder) -> str:
    (name,) = {path.stem for path in folder.iterdir()}
    return name


OPS = list({case.op.name: tiny(case).op for case in SMALL}.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_gate_passes_what_is_right_in_either_type(op, dtype):
    """On a GPU the type is bfloat16: its limits hold for burnish's CPU path, which rounds where the kernels round."""
    error, red = gate.check(op, op.ways["burnish"](), True, CPU, dtype)
    assert red is None and 0 < error < max(op.limits[0], gate.FLOAT32[0])


def test_a_failure_of_a_peer_is_a_line_and_one_of_ours_is_red():
    def fails(x, weight):
        raise RuntimeError("no such kernel\nand a long story")

    record = suite().run(with_way(NORM, "a peer", fails), 10000)
    assert record["left_out"]["a peer"] == "RuntimeError: no such kernel" and record["phases"]
    ours = replace(NORM, op=replace(NORM.op, ways={"burnish": lambda: fails}))
    record = suite().run(ours, 10000)
    assert record["red"] == {"burnish": "RuntimeError: no such kernel"} and not record["phases"]


def test_what_works_in_place_harms_nobody():
    """Liger's units write their gradients over gate and up: here everything is overwritten."""

    def greedy(x, weight):
        y = elementwise.eager_norm(x, weight)
        y.register_hook(lambda _: x.data.zero_())
        return y

    case = with_way(NORM, "a peer, in place", greedy)
    inputs = make_inputs(case.op, case.shape, CPU, torch.float32)
    before = inputs[0].detach().clone()
    runner = measure.Runner(case, "a peer, in place", greedy, inputs, torch.float32)
    for _ in range(2):
        prepare, work = runner.phase(BOTH)
        prepare()
        assert torch.equal(runner.inputs[0], before)
        work(None)
        assert not runner.inputs[0].any() and torch.equal(inputs[0], before)


# ---- counts


def counted(op, shape, phase) -> int:
    """Floating-point operations of the definition's products, as torch counts them."""
    inputs = make_inputs(op, shape, CPU, torch.float32)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        outs = outputs(op.definition(*inputs))
    with backward:
        if op.wanted:
            gradients(op, inputs, outs, upstream(outs, torch.float32))
    totals = {FORWARD: (forward,), INFERENCE: (forward,), BACKWARD: (backward,), BOTH: (forward, backward)}
    return sum(counter.get_total_flops() for counter in totals[phase])


HEAD = {"N": 48, "H": 16, "V": 80}
FEATURED = {"N": 32, "Hq": 4, "Hk": 2, "D": 16, "length": 32}


@pytest.mark.parametrize(
    ("op", "shape", "phase", "times"),
    [
        (heads.CROSS_ENTROPY, HEAD, BOTH, 1),
        (heads.LOGPROB, HEAD, BOTH, 1),
        (heads.DPO, HEAD, BOTH, 1),
        (heads.FROZEN, HEAD, BOTH, 1),
        (heads.FORWARD_ONLY, HEAD, INFERENCE, 1),
        (layers.ATTENTION, FEATURED, FORWARD, 2),  # eager torch multiplies the masked half too
        (layers.LORA_QKV, {"N": 32, "K": 16, "outs": (8, 6, 4)}, FORWARD, 1),
        (layers.LORA_QKV, {"N": 32, "K": 16, "outs": (8, 6, 4)}, BACKWARD, 1),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_operations_are_those_of_the_products(op, shape, phase, times):
    assert op.count(shape, phase, 4)[1] * times == counted(op, shape, phase)


def test_ignored_tokens_count_nothing():
    half = heads.MASKED.count(HEAD | {"valid": 0.5}, BOTH, 2)
    assert half[1] == heads.CROSS_ENTROPY.count(HEAD | {"N": 24}, BOTH, 2)[1]
    labels = make_inputs(heads.MASKED, HEAD | {"valid": 0.5}, CPU, torch.float32)[2]
    assert int((labels != heads.IGNORED).sum()) == 24


MOVERS = [
    case for case in SMALL if case.phases == (FORWARD, BACKWARD) and case.op.count(case.shape, FORWARD, 4)[1] == 0
]


@pytest.mark.parametrize("case", MOVERS, ids=lambda case: case.label)
def test_bytes_are_those_of_the_tensors(case):
    """What the forward reads and writes, but for vectors; the backward what it must read again, and its results."""
    case = tiny(case)
    op = case.op
    inputs = make_inputs(op, case.shape, CPU, torch.float32)
    outs = outputs(op.definition(*inputs))

    def size(tensors) -> int:
        large = [t for t in tensors if t.dim() > 1 and t.shape[-1] * t.shape[0] < t.numel() or t.dim() == 2]
        return sum(t.numel() * t.element_size() for t in large)

    turning = op.name in ("rope", "qk_norm_rope")
    read = inputs[:2] if turning else inputs  # cos and sin are one head of 40
    assert op.count(case.shape, FORWARD, 4)[0] == size(read) + size(outs)
    again = {"rope": [], "add_rms_norm": [outs[-1]]}.get(op.name, read)  # add_rms_norm reads the sum, not its parts
    made = read[:1] if op.name == "add_rms_norm" else read  # one gradient serves both parts of the sum
    assert op.count(case.shape, BACKWARD, 4)[0] == size(outs) + size(again) + size(made)


# ---- time


def test_a_sample_is_the_work_without_what_comes_before():
    watch = measure.Stopwatch(CPU)
    taken = watch.sample(lambda: time.sleep(0.05), lambda _: time.sleep(0.01))
    assert 0.01 <= taken < 0.04


class PretendGPU:
    """What Stopwatch asks of torch.cuda, noted in order; an event's time is the number of notes before it."""

    def __init__(self, monkeypatch):
        self.notes: list[str] = []
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                outer.notes.append("event")
                self.at = len(outer.notes)

            def synchronize(self):
                outer.notes.append("wait")

            def elapsed_time(self, other):
                return other.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.notes.append("busy"), raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.notes.append("wait"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: self.notes.append("reset"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 700)


def test_on_a_gpu_the_events_stand_around_the_work_alone(monkeypatch):
    device = PretendGPU(monkeypatch)
    watch = measure.Stopwatch(CPU)
    watch.on_gpu = True
    taken = watch.sample(lambda: device.notes.append("before"), lambda _: device.notes.append("work"))
    assert device.notes == ["busy", "before", "event", "work", "event", "wait"]
    assert taken == 2 / 1e3  # milliseconds
    device.notes.clear()
    assert watch.extra_memory(lambda: device.notes.append("work")) == 600
    assert device.notes == ["wait", "reset", "work", "wait"]


def test_ways_take_turns_and_start_in_turn():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    taken = measure.take_turns(samples, 0.0, measure.Clock(60.0))
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys("abc", measure.FEWEST_ROUNDS)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_rounds_follow_from_the_time_a_round_takes():
    assert measure.rounds_for(1.0, 10.0) == 10
    assert measure.rounds_for(1.0, 0.0) == measure.FEWEST_ROUNDS
    assert measure.rounds_for(1e-6, 10.0) == measure.MOST_ROUNDS


def test_what_does_not_fit_is_cut_and_says_so():
    slow = {"a": lambda: time.sleep(0.02)}
    assert measure.take_turns(slow, 1.0, measure.Clock(0.03)) is None
    record = suite(0.0).run(NORM, 1)
    assert record["cut"] == "time" and not record["phases"]


def test_a_way_that_is_not_ready_in_time_is_left_out_from_then_on(monkeypatch):
    monkeypatch.setattr("burnish.verbs.bench.suite.WARM_UP_SECONDS", 3.0)

    def slow(x, weight):
        time.sleep(60)

    runs = suite(60.0)
    began = time.perf_counter()
    first = runs.run(with_way(NORM, "peer, one way", slow), 10000)
    second = runs.run(with_way(NORM, "peer, another way", slow), 10000)
    assert time.perf_counter() - began < 30
    assert first["left_out"] == {"peer, one way": "not ready after 3 s"} and first["phases"]
    assert second["left_out"] == {"peer, another way": "was not ready in time before"} and second["phases"]


# ---- what is said about it


def record(op, shape, phase, seconds, **more):
    ways = {
        name: {"seconds": value, "fastest": value, "slowest": value, "rounds": 3} for name, value in seconds.items()
    }
    flops = 6.0 * shape["N"] * shape.get("valid", 1) * shape["H"] * shape["V"] if "V" in shape else 0.0
    measured = {"bytes": 1e9, "flops": flops, "ways": ways}
    case = {"op": op, "case": f"{shape['N']} tokens", "shape": shape, "phases": {phase: measured}}
    case |= {"errors": {}, "left_out": {"CCE": "runs on GPUs only"}, "red": {}, "cut": None, **more}
    add_shares(case, CEILINGS)
    return case


def result(*records, **more):
    made = {
        "card": "A <card>",
        "device": "cuda",
        "small": False,
        "dtype": "bfloat16",
        "cases": list(records),
        "load": 0.5,
    }
    made |= {"versions": {"torch": "2", "quack": None}, "ceilings": CEILINGS, **more}
    return made | {"aims": aims.aims(made)}


LLAMA = {"N": 8192, "H": 4096, "V": 128256}


def test_aims_are_met_or_missed_by_how_much():
    floor = 6 * 8192 * 4096 * 128256 / CEILINGS["matmul_flop_s"]
    shown = result(
        record("linear_cross_entropy", LLAMA, BOTH, {"burnish": floor / 0.9}, extra_bytes={"burnish": 2 << 30}),
        record("linear_cross_entropy", LLAMA | {"N": 16384}, BOTH, {"burnish": 2 * floor / 0.8}),
        record("linear_cross_entropy", LLAMA | {"N": 1024}, BOTH, {"burnish": 1.0}),  # too few tokens for the aim
        record("linear_cross_entropy", LLAMA | {"N": 32768, "valid": 0.25}, BOTH, {"burnish": 1.2 * floor / 0.9}),
        record("rms_norm", {"N": 16384, "H": 4096}, FORWARD, {"burnish": 0.2}),
    )
    found = {(line["aim"].split(":")[0], line["where"]): line for line in shown["aims"]}
    head = found["linear_cross_entropy", "8192 tokens"]
    assert found["linear_cross_entropy, 25 % valid labels", "32768 tokens"]["value"] == pytest.approx(1.2)
    assert not found["linear_cross_entropy, 25 % valid labels", "32768 tokens"]["met"]
    assert ("linear_cross_entropy", "1024 tokens") not in found
    missed = found["linear_cross_entropy", "16384 tokens"]
    assert missed["value"] == pytest.approx(0.8) and missed["met"] is False
    assert "missed, 0.8 for 0.88: linear_cross_entropy" in pages.aim_line(missed)
    moved = found["rms_norm, forward", "16384 tokens"]
    assert moved["value"] == pytest.approx(0.5) and moved["met"] is False  # 1 GB in 0.2 s of 10 GB/s
    assert found["rms_norm, backward", "16384 tokens"]["met"] is None
    assert pages.aim_line(found["rope, forward", "-"]).startswith("not measured: ")
    # the last line of 8192 tokens is the memory's
    assert head["limit"] == 1.0 and head["value"] == pytest.approx((2 << 30) / aims.memory_limit(LLAMA))
    assert aims.memory_limit(LLAMA) / 2**30 == pytest.approx(
        (8192 * 128256 * 2 + 128256 * 4096 * 6 + 8192 * 4096 * 4 + 3e8) / 2**30
    )


def test_shares_are_of_the_higher_ceiling():
    shown = result(record("rms_norm", {"N": 16384, "H": 4096}, FORWARD, {"burnish": 0.2}))
    bench._raise_ceilings(shown, {"copy_bytes_s": 2e10, "matmul_flop_s": 1e10})
    assert shown["ceilings"] == {"copy_bytes_s": 2e10, "matmul_flop_s": 1e11}
    assert shown["cases"][0]["phases"][FORWARD]["ways"]["burnish"]["share"] == pytest.approx(0.25)


def test_peers_that_are_ahead_are_named_with_their_factor():
    shown = result(record("linear_cross_entropy", LLAMA, BOTH, {"burnish": 1.0, "quack": 0.8, "TRL": 1.5, "L": 0.99}))
    (line,) = aims.behind(shown)
    assert line["peer"] == "quack" and line["factor"] == pytest.approx(1.25)
    page = pages.markdown(shown)
    assert "quack is 1.25 times as fast" in page and "TRL 1.50x" in page
    assert "CCE: runs on GPUs only (linear_cross_entropy)" in page and "quack None" not in page


def test_the_plot_has_a_dot_for_every_way():
    shown = result(
        record("linear_cross_entropy", LLAMA, BOTH, {"burnish": 200.0, "TRL & Co": 400.0}),
        record("rms_norm", {"N": 4, "H": 4}, FORWARD, {"burnish": 0.2}),
    )
    root = ElementTree.fromstring(pages.plot(shown))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 and "TRL & Co: 400.00 s, 65%" in titles
    assert any("A <card>" in (text.text or "") for text in root.iter("{http://www.w3.org/2000/svg}text"))


def test_the_head_on_the_cpu_holds_no_logits():
    """Workers of their own, and what they report is true: the same loss, and plain logits take at least their size."""
    shape = {"N": 512, "H": 32, "V": 32768}
    study = cpu_head.study(0.0, threads=1, shape=shape)
    ways = study["ways"]
    torch.manual_seed(0)
    x, weight = torch.randn(512, 32), torch.randn(32768, 32) * 32**-0.5
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.double().T, torch.randint(0, 32768, (512,))).item()
    assert set(ways) == set(cpu_head.WAYS) and study["rounds"] == 1, "no time: one round all the same"
    for way, figures in ways.items():
        assert figures["loss"] == pytest.approx(loss, rel=1e-5), way
    logits = shape["N"] * shape["V"] * 4
    assert ways["logits + cross_entropy"]["extra_bytes"] >= 2 * logits
    shown = result(device="cpu", small=True, cpu_head=study)
    time_line, memory_line = shown["aims"]
    assert time_line["limit"] == 1.05 and memory_line["limit"] == 0.15
    plain = ways["logits + cross_entropy"]
    assert memory_line["value"] == pytest.approx(ways["burnish"]["extra_bytes"] / plain["extra_bytes"])


def test_the_command_runs_an_op_and_writes_its_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "small_cases", lambda: [NORM])
    assert cli.main(["bench", "only=rms", f"out={tmp_path}", "small=true", "minutes=0.5"]) == 0
    name = name_of(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".svg"} and name.endswith("small")
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert torch.__version__.startswith(written["versions"]["torch"]) and written["ceilings"]["copy_bytes_s"] > 0
    figures = written["cases"][0]["phases"][FORWARD]
    floor = figures["bytes"] / written["ceilings"]["copy_bytes_s"]
    assert figures["ways"]["burnish"]["share"] == pytest.approx(floor / figures["ways"]["burnish"]["seconds"], rel=1e-3)
    assert written["cases"][0]["errors"]["burnish"] < 1e-5
    assert "rms_norm, 1k x 512" in capsys.readouterr().out
    assert cli.main(["bench", "only=nothing"]) == 2
    assert "no op starts with nothing. One of: rms_norm" in capsys.readouterr().err


def test_results_go_into_a_clone_or_below_the_current_folder(monkeypatch, tmp_path):
    root = bench.results_folder()
    assert root.parts[-2:] == ("benchmarks", "results") and (root.parent.parent / "pyproject.toml").exists()
    installed = tmp_path / "lib" / "burnish" / "verbs" / "bench" / "__init__.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    assert str(bench.results_folder()) == "out/bench"
