"""`burnish report RUN`: one page of a run, as self-contained HTML and as Markdown, from the files it left."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from burnish.verbs.curves import STYLE, curve
from burnish.verbs.runfiles import RunFiles, read_run

PAGE = """
:root { --ink: #1d2329; --paper: #ffffff; --line: #d9dee3; --first: #0b62b8; --second: #c2480c; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde3e9; --paper: #14181c; --line: #343c44; --first: #6db3f8; --second: #f59d5f; --soft: #1d2329; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 2px 14px 2px 0; vertical-align: top;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: 10px; overflow-x: auto; } code { font-family: ui-monospace, monospace; }
"""
FACTS = (
    ("Data", ("data", "eval")),
    ("Memory, kernels and environment", ("burnish", "versions", "memory", "kernels", "reference", "start")),
    ("What needed attention", ("warning", "resume")),
)
# What a reader looks for first, with its unit.
HEADLINES = (
    ("train_loss", "mean training loss", "{:.4f}"),
    ("eval_loss", "loss on the evaluation set", "{:.4f}"),
    ("eval_rewards/accuracies", "reward accuracy on the evaluation set", "{:.3f}"),
    ("step", "updates", "{:,.0f}"),
    ("num_tokens", "tokens seen", "{:,.0f}"),
    ("train_runtime", "seconds of training", "{:,.1f}"),
)


def report(folder: str | Path) -> tuple[Path, Path]:
    """Write report.html and report.md into the run's folder and return their paths. UserError: see read_run."""
    run = read_run(folder)
    html, markdown = run.folder / "report.html", run.folder / "report.md"
    html.write_text(as_html(run), encoding="utf-8")
    markdown.write_text(as_markdown(run), encoding="utf-8")
    return html, markdown


def headlines(run: RunFiles) -> list[tuple[str, str]]:
    """(what, number with unit): the outcome, then speed and memory as medians and peaks of the logged steps."""
    rows = [(what, form.format(run.summary[key])) for key, what, form in HEADLINES if key in run.summary]
    if not run.summary:
        rows.append(("state", "not finished: the last record is of step {:g}".format(*_last_step(run))))
    for metric, what in (("tok_s", "tokens a second, median"), ("tok_s_trained", "trained tokens a second, median")):
        values = sorted(value for _, value in run.series(metric))
        if values:
            rows.append((what, f"{values[len(values) // 2]:,.0f}"))
    if memory := [value for _, value in run.series("mem_gib")]:
        rows.append(("peak memory", f"{max(memory):.2f} GiB"))
    if mfu := [value for _, value in run.series("mfu")]:
        rows.append(("MFU, median", f"{sorted(mfu)[len(mfu) // 2]:.1%}"))
    return rows


def pairs_of_curves(names: list[str]) -> list[tuple[str, list[str]]]:
    """(title, series): a training metric and its evaluation share one chart."""
    charts = [(name, [name, f"eval_{name}"]) for name in names if not name.startswith("eval_")]
    lonely = [name for name in names if name.startswith("eval_") and name[5:] not in names]
    return charts + [(name, [name]) for name in lonely]


def as_html(run: RunFiles) -> str:
    charts = (
        curve(title, {name: run.series(name) for name in series if run.series(name)})
        for title, series in pairs_of_curves(run.metrics())
    )
    changed = [(key, f"{value}", origin) for key, (value, origin) in run.changed().items()]
    body = [
        f"<h1>{escape(run.name)}</h1>",
        _table(headlines(run)),
        f'<h2>Curves</h2><div class="curves">{"".join(charts)}</div>',
        f"<h2>Configuration</h2><p>{len(changed)} keys set, {len(run.config) - len(changed)} defaults; all of them are "
        "in config.yaml.</p>",
        _table(changed),
    ]
    for title, topics in FACTS:
        if facts := _facts(run, topics):
            body.append(f"<h2>{title}</h2>{_table(facts)}")
    body.append(f"<h2>Again</h2><pre><code>{escape(_again(run))}</code></pre>")
    head = f'<meta charset="utf-8"><title>{escape(run.name)}</title><style>{PAGE}{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def as_markdown(run: RunFiles) -> str:
    lines = [f"# {run.name}", "", "| | |", "|---|---|"]
    lines += [f"| {what} | {number} |" for what, number in headlines(run)]
    lines += ["", "## Curves", "", "| metric | first | last | lowest | highest |", "|---|---|---|---|---|"]
    for name in run.metrics():
        values = [value for _, value in run.series(name)]
        lines.append(f"| {name} | {values[0]:.5g} | {values[-1]:.5g} | {min(values):.5g} | {max(values):.5g} |")
    lines += ["", "## Configuration", "", "| key | value | from |", "|---|---|---|"]
    lines += [f"| {key} | {_cell(value)} | {origin} |" for key, (value, origin) in run.changed().items()]
    for title, topics in FACTS:
        if facts := _facts(run, topics):
            lines += ["", f"## {title}", ""] + [f"- {topic}: {text}" for topic, text in facts]
    lines += ["", "## Again", "", "```bash", _again(run), "```", ""]
    return "\n".join(lines)


def _facts(run: RunFiles, topics: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((topic, text) for topic, text in run.facts if topic in topics))


def _last_step(run: RunFiles) -> tuple[float]:
    return (run.records[-1]["step"] if run.records else 0,)


def _again(run: RunFiles) -> str:
    """The command that makes the run anew, in another folder."""
    verb = next((text.split()[0] for topic, text in run.facts if topic == "verb"), "sft")
    return f"burnish {verb} {run.folder / 'config.yaml'} output_dir={run.folder}-again"


def _cell(value: object) -> str:
    return f"{value}".replace("|", "\\|").replace("\n", " ")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
