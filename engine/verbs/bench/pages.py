"""A run of the suite as people read it: lines on the console, a Markdown table and a plot (SVG)."""

from html import escape
from typing import Any

from burnish.verbs.bench.aims import behind
from burnish.verbs.bench.suite import OURS

Record = dict[str, Any]
COLOURS = ("#c2480c", "#0b62b8", "#5a7d2a", "#8a4fbf", "#b8860b", "#0f8b8d", "#a03060", "#555f68", "#7a5c3e", "#3f6fb5")
ROW, LEFT, WIDTH, TOP = 18, 530, 480, 64


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def case_lines(case: Record) -> list[str]:
    """A case as the console shows it."""
    lines = [f"{case['op']}, {case['case']}"]
    for phase, measured in case["phases"].items():
        lines.append(f"  {phase}: at the ceiling {seconds(measured['floor_seconds'])}")
        ours = measured["ways"][OURS]["seconds"]
        for name, figures in sorted(measured["ways"].items(), key=lambda item: item[1]["seconds"]):
            extra = case.get("extra_bytes", {}).get(name)
            lines.append(
                f"    {name:<26}{seconds(figures['seconds']):>10}  {figures['share']:>4.0%} of the ceiling"
                f"  {figures['seconds'] / ours:5.2f}x" + (f"  {gib(extra)}" if extra is not None else "")
            )
    lines += [f"    {name:<26}RED: {why}" for name, why in case["red"].items()]
    lines += [f"    {name:<26}left out: {why}" for name, why in case["left_out"].items()]
    if case["cut"]:
        lines.append(f"    cut: {case['cut']}")
    return lines


def aim_line(aim: Record) -> str:
    where = f"{aim['aim']} ({aim['where']})"
    if aim["met"] is None:
        return f"not measured: {where}"
    if aim["met"]:
        return f"met, {aim['value']:.3g}: {where}"
    return f"missed, {aim['value']:.3g} for {aim['limit']:.3g}: {where}"


def behind_line(line: Record) -> str:
    return f"{line['peer']} is {line['factor']:.2f} times as fast: {line['where']}"


def _with_unit(result: Record) -> str:
    ceilings = result["ceilings"]
    return (
        f"a large copy moves {ceilings['copy_bytes_s'] / 1e9:,.0f} GB/s, "
        f"a large product does {ceilings['matmul_flop_s'] / 1e12:,.3g} TFLOP/s"
    )


def markdown(result: Record) -> str:
    """One row a case and phase; then aims, peers that are ahead, and what has no figure and why."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"# {result['card']}",
        "",
        f"{result['dtype']}, {versions}. In this run {_with_unit(result)}; shares are of these.",
        "Medians of interleaved rounds on random data. A way has a figure only where its results passed the gate. "
        f"Load of the machine before the run: {result['load']:.1f}."
        + " Small tensors stay in caches, which are faster than the ceiling."
        * result["small"],
        "",
        "| op and shape | phase | burnish | share of the ceiling | extra memory | peers (time over burnish's) |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for phase, measured in case["phases"].items():
            ways = measured["ways"]
            ours = ways[OURS]
            peers = ", ".join(
                f"{name} {figures['seconds'] / ours['seconds']:.2f}x" for name, figures in ways.items() if name != OURS
            )
            extra = case.get("extra_bytes", {}).get(OURS)
            lines.append(
                f"| {case['op']}, {case['case']} | {phase} | {seconds(ours['seconds'])} | {ours['share']:.0%} "
                f"| {gib(extra) if extra is not None else '-'} | {peers or 'none could run here'} |"
            )
    lines += _study_rows(result.get("cpu_head"))
    lines += _section("Aims", [aim_line(aim) for aim in result["aims"]])
    lines += _section("Peers that are ahead", [behind_line(line) for line in behind(result)])
    lines += _section("Red", _reasons(result, "red"))
    lines += _section("Left out", _reasons(result, "left_out"))
    lines += _section("Cut", [f"{c['op']}, {c['case']}: {c['cut']}" for c in result["cases"] if c["cut"]])
    return "\n".join(lines) + "\n"


def _study_rows(study: Record | None) -> list[str]:
    if not study:
        return []
    lines = [
        "",
        f"## The head on the CPU: {study['case']}",
        "",
        "| | forward + backward | extra memory |",
        "|---|---|---|",
    ]
    for name, figures in study["ways"].items():
        lines.append(f"| {name} | {seconds(figures['seconds'])} | {gib(figures['extra_bytes'])} |")
    return lines


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {line}" for line in lines)] if lines else []


def _reasons(result: Record, kind: str) -> list[str]:
    """One line a way and reason, with the cases it holds for where they are not all."""
    where: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for name, why in case[kind].items():
            where.setdefault((name, why), []).append(case["op"])
    return [f"{name}: {why} ({'; '.join(dict.fromkeys(ops))})" for (name, why), ops in where.items()]


def plot(result: Record) -> str:
    """A dot for every way at its share of the ceiling, one line a case and phase; burnish's is the large one."""
    rows = [
        (f"{case['op']}, {case['case']}, {phase}", measured["ways"])
        for case in result["cases"]
        for phase, measured in case["phases"].items()
    ]
    names = list(dict.fromkeys(name for _, ways in rows for name in ways))
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    legend_rows = -(-len(names) // 4)
    top = TOP + 18 * legend_rows
    height = top + ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="#ffffff"/><text x="10" y="22" font-size="15" fill="#1d2329">'
        f"{escape(result['card'])}: share of the measured ceiling</text>",
        f'<text x="10" y="40" fill="#555f68">{escape(_with_unit(result))}; further right is faster</text>',
    ]
    for number, name in enumerate(names):
        left, low = 14 + 225 * (number % 4), 60 + 18 * (number // 4)
        parts.append(f'<circle cx="{left}" cy="{low}" r="{5 if name == OURS else 3.5}" fill="{colour[name]}"/>')
        parts.append(f'<text x="{left + 9}" y="{low + 4}" fill="#1d2329">{escape(name)}</text>')
    for percent in range(0, 101, 20):
        x = LEFT + WIDTH * percent / 100
        parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{height - 24}" stroke="#d9dee3"/>')
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle" fill="#555f68">{percent}%</text>')
    for number, (label, ways) in enumerate(rows):
        y = top + ROW * number + ROW / 2
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end" fill="#1d2329">{escape(label)}</text>')
        for name, figures in sorted(ways.items(), key=lambda item: item[0] == OURS):
            x = LEFT + WIDTH * min(figures["share"], 1.05)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y}" r="{5 if name == OURS else 3.5}" fill="{colour[name]}" '
                f'fill-opacity="0.85"><title>{escape(name)}: {seconds(figures["seconds"])}, {figures["share"]:.0%}'
                "</title></circle>"
            )
    return "\n".join([*parts, "</svg>", ""])
