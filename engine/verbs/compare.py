"""`burnish compare A B`: what two runs were given differently and what came of it, on the screen and as one page."""

import json
from html import escape
from pathlib import Path

from burnish.verbs.curves import STYLE, curve
from burnish.verbs.report import PAGE, headlines
from burnish.verbs.runfiles import RunFiles, read_run


def compare(first: str | Path, second: str | Path) -> str:
    """The comparison as text; also written as compare.html into the second run's folder. UserError: see read_run."""
    runs = read_run(first), read_run(second)
    page = runs[1].folder / "compare.html"
    page.write_text(as_html(*runs), encoding="utf-8")
    rows = [("", *names(*runs)), *differences(*runs), *outcomes(*runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return f"{text}\ncurves in {page}"


def names(first: RunFiles, second: RunFiles) -> tuple[str, str]:
    """What to call the two: their folders' names, or their paths where those are the same."""
    same = first.name == second.name
    return (str(first.folder), str(second.folder)) if same else (first.name, second.name)


def differences(first: RunFiles, second: RunFiles) -> list[tuple[str, str, str]]:
    """(key, first's value, second's) of every key that differs, output_dir left out."""
    keys = dict.fromkeys([*first.config, *second.config])
    values = [(key, *(_shown(run.config.get(key, (None, ""))[0]) for run in (first, second))) for key in keys]
    return [(key, a, b) for key, a, b in values if a != b and key not in ("output_dir", "resume_from_checkpoint")]


def outcomes(first: RunFiles, second: RunFiles) -> list[tuple[str, str, str]]:
    """(what, first's number, second's) of the headlines that either has."""
    left, right = dict(headlines(first)), dict(headlines(second))
    return [(what, left.get(what, "-"), right.get(what, "-")) for what in dict.fromkeys([*left, *right])]


def as_html(first: RunFiles, second: RunFiles) -> str:
    titles = names(first, second)
    rows = [("", *titles), *differences(first, second), *outcomes(first, second)]
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    charts = (
        curve(metric, {title: run.series(metric) for title, run in zip(titles, (first, second), strict=True)})
        for metric in dict.fromkeys([*first.metrics(), *second.metrics()])
    )
    title = escape(" and ".join(titles))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{PAGE}{STYLE}</style></head><body><h1>{title}</h1>"
        f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
        f'<h2>Curves</h2><div class="curves">{"".join(charts)}</div></body></html>\n'
    )


def _shown(value: object) -> str:
    """As the YAML file has it."""
    return value if isinstance(value, str) else json.dumps(value)
