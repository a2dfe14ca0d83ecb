"""Curves as inline SVG: what `report` and `compare` draw. No script, no font and no file beside the page."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 30
STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 12px; }
svg.curve { width: 100%; height: auto; }
svg.curve text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg.curve text.title { font-size: 13px; font-weight: 600; }
svg.curve .grid { stroke: var(--line); stroke-width: 1; }
svg.curve polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
svg.curve .s0 { stroke: var(--first); } svg.curve .s1 { stroke: var(--second); }
svg.curve circle.s0 { fill: var(--first); } svg.curve circle.s1 { fill: var(--second); }
svg.curve text.s0 { fill: var(--first); stroke: none; } svg.curve text.s1 { fill: var(--second); stroke: none; }
"""
Series = Sequence[tuple[float, float]]  # (step, value), in order of steps


def curve(title: str, series: dict[str, Series]) -> str:
    """One chart of up to two named series over the same steps; '' where there is no finite point to draw."""
    drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return ""
    x_low, x_high = _span([x for x, _ in every])
    y_low, y_high = _span([y for _, y in every])
    ticks = nice_ticks(y_low, y_high)
    y_low, y_high = min(y_low, ticks[0]), max(y_high, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.5g}</text>')
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        parts.append(f'<text x="{place(x, y_low)[0]:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">step {x:g}</text>')
    for index, (name, points) in enumerate(drawn.items()):
        placed = [place(x, y) for x, y in points]
        if len(placed) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="s{index}" points="{line}"/>')
        if len(placed) <= 30:
            parts += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
        if len(drawn) > 1:
            label = f'<text class="s{index}" x="{WIDTH - RIGHT}" y="{14 + 13 * index}" text-anchor="end">'
            parts.append(f"{label}{escape(name)}</text>")
    body = "".join(parts)
    return f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def nice_ticks(low: float, high: float, wanted: int = 3) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], at least `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= raw * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def _span(values: list[float]) -> tuple[float, float]:
    """Lowest and highest, never the same."""
    low, high = min(values), max(values)
    margin = abs(low) * 0.05 or 1.0
    return (low, high) if high > low else (low - margin, high + margin)
