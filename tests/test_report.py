"""`report` and `compare` read a run's files and draw what is in them; the pages need nothing beside themselves."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from burnish.cli import main
from burnish.config.errors import UserError
from burnish.verbs.curves import BOTTOM, HEIGHT, TOP, curve, nice_ticks
from burnish.verbs.runfiles import read_run


def make_run(folder, *, rate="1e-4", losses=(3.0, 2.0, 1.0), finished=True):
    folder.mkdir()
    rows = [
        {"loss": loss, "eval_loss": loss + 0.5, "step": 10 * (i + 1), "epoch": 0.1, "tok_s": 100.0 + i, "mem_gib": 2.0}
        for i, loss in enumerate(losses)
    ]
    if finished:
        rows.append({"train_loss": 2.0, "train_runtime": 12.0, "num_tokens": 5000, "step": 30, "epoch": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"learning_rate: {rate}  # run.yaml:3\nmodel_name_or_path: <b>&  # command line\nseed: 42  # default\n"
    (folder / "config.yaml").write_text(text)
    (folder / "log.txt").write_text(
        "verb     dpo\ndata     32 rows  p50 812 tokens\nwarning  odd < thing\nstep     1/3\n"
    )
    return folder


class Page(HTMLParser):
    """Tags in order; a page that isn't closed properly, or that reaches out, fails here."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.polylines = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload"} & set(names)
        if tag != "meta":
            self.open.append(tag)
        if tag == "line":
            self.open.pop()

    def handle_startendtag(self, tag, attributes):
        if tag == "polyline":
            self.polylines.append(dict(attributes)["points"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_the_runs_numbers_and_nothing_from_outside(tmp_path):
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    for word in ("2.0000", "12.0", "101", "2.00 GiB", "run.yaml:3", "<b>&", "32 rows  p50 812 tokens", "odd < thing"):
        assert word in page.words, word
    assert "seed" not in page.words  # a default
    assert "http" not in text
    assert f"burnish dpo {folder / 'config.yaml'} output_dir={folder}-again" in page.words
    markdown = (folder / "report.md").read_text()
    assert "| loss | 3 | 1 | 1 | 3 |" in markdown
    assert "| learning_rate | 1e-4 | run.yaml:3 |" in markdown


def test_a_curve_goes_through_its_values():
    page = Page(curve("loss", {"loss": [(0, 2.0), (5, float("nan")), (10, 1.0), (20, 3.0)], "eval_loss": [(0, 2.5)]}))
    (line,) = page.polylines
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx((x2 - x0) / 2, abs=0.1)
    assert y1 == pytest.approx(HEIGHT - BOTTOM)
    assert y2 == pytest.approx(TOP)
    assert y0 == pytest.approx((y1 + y2) / 2, abs=0.1)
    assert curve("loss", {"loss": [(1, float("inf"))]}) == ""
    assert not Page(curve("loss", {"loss": [(1, 7.0)]})).polylines  # one point has no line, and no division by 0


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1e-9, 3e-5), (-4.0, 7.0), (0.999, 1.0), (1e6, 9e8)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)
    digits = {re.sub(r"0+$", "", f"{abs(b - a):.0e}"[0]) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert digits <= {"1", "2", "5"}


def test_compare_shows_what_differs(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", rate="2e-4", losses=(3.0, 2.5), finished=False)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["a", "b"] in rows
    assert ["learning_rate", "1e-4", "2e-4"] in rows
    assert ["mean training loss", "2.0000", "-"] in rows
    assert not any(row[0] in ("seed", "model_name_or_path") for row in rows)
    page = Page((tmp_path / "b" / "compare.html").read_text())
    assert len(page.polylines) == 2 * 4  # loss, eval_loss, tok_s and mem_gib of both


def test_a_torn_last_line_is_passed_over_and_another_is_an_error(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"loss": 1.')
    assert len(read_run(folder).records) == 3
    metrics.write_text('{"loss": 1.\n' + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a line of JSON"):
        read_run(folder)


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: no metrics.jsonl" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert "Run: burnish compare RUN RUN" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to open the page")
def test_the_page_opens_in_a_browser_with_curves_drawn(tmp_path):
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, f"file://{folder / 'report.html'}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<polyline") == 4
    assert ":CONSOLE(" not in done.stderr
