"""What the blocks of TRL's pages need: data sets with the columns of theirs, a folder of their own, and checks."""

import json
import math

import pytest

QA = [
    ("What falls from the sky?", "rain"),
    ("Who counts to ten?", "the quick fox"),
    ("Which hill?", "a green hill"),
] * 3


@pytest.fixture(scope="session")
def qa() -> list[tuple[str, str]]:
    return QA


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Folders that load_dataset reads, with the columns of the pages' data sets."""
    rows = {
        "imdb": [{"text": f"{q} {a}", "label": 1} for q, a in QA],
        "alpaca": [{"instruction": q, "output": a} for q, a in QA],
        "guanaco": [{"text": f"### Human: {q}### Assistant: {a}### Human: {a}?### Assistant: {q}"} for q, a in QA],
        "qa": [{"question": q, "answer": a} for q, a in QA],
        "capybara": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "source": "x"}
            for q, a in QA
        ],
        "medical": [{"Question": q, "Complex_CoT": "think", "Response": a} for q, a in QA],
    }
    folder = tmp_path_factory.mktemp("data")
    for name, lines in rows.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: str(folder / name) for name in rows}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def trained():
    def check(trainer) -> list[float]:
        """The losses of a finished run, all of them numbers."""
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        assert trainer.state.global_step == trainer.state.max_steps > 0 and losses
        assert all(math.isfinite(loss) for loss in losses)
        return losses

    return check


@pytest.fixture
def rows_of():
    def rows(trainer) -> list[str]:
        """What is trained on, as text, row by row."""
        examples, tokenizer = trainer.run.batches.examples, trainer.processing_class
        bounds = zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
        return [tokenizer.decode(examples.ids[a:b][examples.trained[a:b]]) for a, b in bounds]

    return rows
