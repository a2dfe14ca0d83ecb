"""What burnish set out to reach, and whether a run of the suite shows it: one line an aim, met or missed by how much.

The head's memory aim: C x V x 2 + V x H x 6 + N x H x 4 bytes + 300 MB. C = min(N, max(4096, 2 H)) rows of bfloat16
exponentials, the weight's gradient as a float32 sum and as bfloat16, and the rows' gradients.
"""

from typing import Any

from burnish.verbs.bench.heads import valid_tokens
from burnish.verbs.bench.ops import BACKWARD, BOTH, FORWARD, INFERENCE
from burnish.verbs.bench.suite import OURS

MB = 1e6
HEAD_SHARES = (  # op, phase, least share of the ceiling
    ("linear_cross_entropy", BOTH, 0.88),
    ("linear_logprob, frozen head", BOTH, 0.85),
    ("linear_logprob, forward only", INFERENCE, 0.90),
)
MOVERS = ("rms_norm", "rope", "swiglu", "qk_norm_rope")
MOVER_SHARES = ((FORWARD, 0.90), (BACKWARD, 0.85))
NOISE = 1.02  # a peer that is less than this ahead is level
CPU_HEAD = (("seconds", "time", 1.05), ("extra_bytes", "peak memory", 0.15))

Record = dict[str, Any]


def aims(result: Record) -> list[Record]:
    """Every aim that this device can show: {"aim", "where", "value", "limit", "met"}; value None if not measured."""
    cases = [case for case in result["cases"] if case["phases"]]
    lines: list[Record] = []
    if result["device"] == "cuda" and not result["small"]:
        lines += _head_shares(cases) + _head_memory(cases) + _masked(cases) + _movers(cases)
    if result.get("cpu_head"):
        lines += _cpu_head(result["cpu_head"])
    return lines


def behind(result: Record) -> list[Record]:
    """Where a peer is ahead of burnish: {"where", "peer", "factor"}; factor: burnish's time over the peer's."""
    found = []
    for case in result["cases"]:
        for phase, measured in case["phases"].items():
            ways = measured["ways"]
            for peer, figures in ways.items():
                factor = ways[OURS]["seconds"] / figures["seconds"]
                if peer != OURS and factor > NOISE:
                    found.append({"where": _where(case, phase), "peer": peer, "factor": factor})
    return found


def _where(case: Record, phase: str) -> str:
    return f"{case['op']}, {case['case']}, {phase}" if phase not in case["op"] else f"{case['op']}, {case['case']}"


def _line(aim: str, where: str, value: float | None, limit: float, least: bool) -> Record:
    met = None if value is None else value >= limit if least else value <= limit
    return {"aim": aim, "where": where, "value": value, "limit": limit, "met": met}


def _share(case: Record, phase: str) -> float | None:
    measured = case["phases"].get(phase)
    return measured["ways"][OURS]["share"] if measured else None


def _head_shares(cases: list[Record]) -> list[Record]:
    lines = []
    for op, phase, least in HEAD_SHARES:
        aim = f"{op}: at least {least:.0%} of the products' ceiling (N >= 4096, H >= 2048)"
        large = [
            case
            for case in cases
            if case["op"] == op
            and case["shape"]["N"] >= 4096
            and case["shape"]["H"] >= 2048
            and "valid" not in case["shape"]
        ]
        lines += [_line(aim, case["case"], _share(case, phase), least, True) for case in large]
        if not large:
            lines.append(_line(aim, "no such case was measured", None, least, True))
    return lines


def memory_limit(shape: Record) -> float:
    """Bytes; see the module."""
    tokens, hidden, vocab = valid_tokens(shape), shape["H"], shape["V"]
    chunk = min(tokens, max(4096, 2 * hidden))
    return chunk * vocab * 2 + vocab * hidden * 6 + tokens * hidden * 4 + 300 * MB


def _head_memory(cases: list[Record]) -> list[Record]:
    aim = "linear_cross_entropy: extra memory over its formula, at most 1"
    return [
        _line(aim, case["case"], case["extra_bytes"][OURS] / memory_limit(case["shape"]), 1.0, False)
        for case in cases
        if case["op"] == "linear_cross_entropy" and "extra_bytes" in case
    ]


def _masked(cases: list[Record]) -> list[Record]:
    """25 % valid labels against as many tokens alone."""
    aim = "linear_cross_entropy, 25 % valid labels: time over that of those tokens alone, at most 1.15"
    lines = []
    for case in cases:
        shape = case["shape"]
        if case["op"] != "linear_cross_entropy" or shape.get("valid") != 0.25:
            continue
        alone = {**shape, "N": valid_tokens(shape)}
        del alone["valid"]
        same = next((other for other in cases if other["op"] == case["op"] and other["shape"] == alone), None)
        value = None
        if same is not None:
            value = case["phases"][BOTH]["ways"][OURS]["seconds"] / same["phases"][BOTH]["ways"][OURS]["seconds"]
        lines.append(_line(aim, case["case"], value, 1.15, False))
    return lines or [_line(aim, "no such case was measured", None, 1.15, False)]


def _movers(cases: list[Record]) -> list[Record]:
    lines = []
    for op in MOVERS:
        case = next((case for case in cases if case["op"] == op), None)  # the first of an op is the 16k x 4096 one
        for phase, least in MOVER_SHARES:
            aim = f"{op}, {phase}: at least {least:.0%} of the copy's bandwidth"
            lines.append(_line(aim, case["case"] if case else "-", _share(case, phase) if case else None, least, True))
    return lines


def _cpu_head(study: Record) -> list[Record]:
    plain, ours = study["ways"]["logits + cross_entropy"], study["ways"][OURS]
    return [
        _line(
            f"head on the CPU: {word} over plain logits + cross-entropy, at most {limit}",
            study["case"],
            ours[key] / plain[key],
            limit,
            False,
        )
        for key, word, limit in CPU_HEAD
    ]
