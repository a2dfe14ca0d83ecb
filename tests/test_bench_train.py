"""benchmarks/train_gpu.py on tiny models: rows have the lengths that are counted, operations are the formula's."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The script as a module; `workers` beside it is imported by that name."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("train_gpu", FOLDER / "train_gpu.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("workers", None)


@pytest.mark.parametrize("tokens", [8192, 256])
def test_rows_have_the_tokens_that_are_counted(bench, tokens):
    tokenizer = bench.make_tokenizer()

    def length(text) -> int:
        return len(tokenizer(text)["input_ids"])

    rows, lengths = bench.make_rows("SFT", tokens, 2)
    assert sum(lengths) == tokens and lengths * 2 == [length(row["text"]) + 1 for row in rows]
    rows, lengths = bench.make_rows("DPO", tokens, 2)
    sides = [length(row["prompt"] + row[side]) + 1 for row in rows for side in ("chosen", "rejected")]
    assert sum(lengths) == tokens and lengths * 2 == sides


def test_operations_of_a_step(bench):
    """Against a count by hand: 2 operations a weight, token and pass, and 4 a head's element and pair of tokens."""
    model = bench.make_model("tiny Llama", "cpu")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # q, o; k, v; gate, up, down
    matrices = 2 * layer + 64 * 1024
    lengths = [64, 192]
    forward = 2 * matrices * 256 + 2 * 4 * 64 * (64**2 + 192**2) / 2
    products = 2 * matrices * 256
    full = bench.step_operations(model, lengths, lora=False, reference=False)
    assert full == pytest.approx(3 * forward)
    assert bench.step_operations(model, lengths, lora=True, reference=False) == pytest.approx(full - products)
    assert bench.step_operations(model, lengths, lora=False, reference=True) == pytest.approx(full + forward)


@pytest.mark.parametrize("case", ["tiny Llama, SFT with LoRA", "tiny Qwen3, DPO"])
def test_burnish_runs_and_trains_the_tokens_that_are_counted(bench, case, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path))
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    found = bench.work("burnish", case, 4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["num_tokens"] for line in lines if "loss" in line]
    assert [b - a for a, b in zip(seen, seen[1:], strict=False)] == [256] * 3 == [found["tokens_a_step"]] * 3
    assert found["steps_timed"] == 2 and found["mfu"] is None and found["peak_gib"] > 0
    assert found["tok_s"] == pytest.approx(256 / found["step_s"])
