"""`preview` shows the batches that training gets: the same tokens, the same targets, the same borders."""

import json

import pytest

from burnish import DPOConfig, SFTConfig
from burnish.cli import main
from burnish.run.rows import read_batches
from burnish.verbs import preview as verb


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pair_file(tmp_path):
    rows = [
        {"prompt": "the quick brown fox", "chosen": " jumps over lazy dogs", "rejected": f" jumps over {word} cats"}
        for word in ("seven", "small", "green", "ten")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(model, rows, **given):
    return SFTConfig("out", model_name_or_path=model, dataset_name=rows, max_length=64, **given)


def test_runs_are_the_batchs_tokens_and_targets(tiny_model, tiny_tokenizer, chat_file):
    config = sft(tiny_model, chat_file, packing=True, assistant_only_loss=True)
    shown, lengths = verb.preview(config, 7)
    batch = next(iter(read_batches(config).epoch(0)))
    sequences = shown[0].sequences
    assert len(sequences) == 7 and len(lengths) == 60
    assert shown[0].tokens == len(batch.input_ids)
    for number, sequence in enumerate(sequences):
        start, stop = batch.cu_seqlens[number : number + 2].tolist()
        assert (sequence.start, sequence.stop, sequence.row) == (start, stop, batch.rows[number])
        assert "".join(run.text for run in sequence.runs) == tiny_tokenizer.decode(batch.input_ids[start:stop])
        targets = batch.labels[start:stop][batch.labels[start:stop] != -100]
        trained = "".join(run.text for run in sequence.runs if run.kind == verb.TRAINED)
        assert trained == tiny_tokenizer.decode(targets)
        assert sequence.trained == len(targets)
        assert all(
            run.special == (run.text in ("<|im_start|>", "<|im_end|>") or "<|im_" in run.text) for run in sequence.runs
        )
    assert batch.position_ids[sequences[1].start] == 0


def test_a_pair_shares_its_prompt(tiny_model, tiny_tokenizer, pair_file):
    config = DPOConfig("out", model_name_or_path=tiny_model, dataset_name=pair_file, max_length=64)
    shown, _ = verb.preview(config, 2)
    chosen, rejected = shown[0].sequences
    assert (chosen.role, rejected.role) == ("chosen", "rejected")
    assert rejected.shared >= len(tiny_tokenizer("the quick brown fox jumps over")["input_ids"]) - 1
    assert f"{rejected.shared} shared with the chosen" in rejected.title
    assert "".join(run.text for run in rejected.runs if run.kind == verb.CONTEXT) == "the quick brown fox"


def test_without_colour_every_kind_is_named_and_with_it_nothing_is_lost(tiny_model, chat_file):
    shown, lengths = verb.preview(sft(tiny_model, chat_file, assistant_only_loss=True), 2)
    plain, coloured = (verb.as_text(shown, lengths, colour) for colour in (False, True))
    assert "context special '<|im_start|>'" in plain and "trained special '<|im_end|>'" in plain
    assert "\x1b" not in plain
    for code in verb.COLOURS.values():
        coloured = coloured.replace(code, "")
    for sequence in shown[0].sequences:
        assert "".join(run.text for run in sequence.runs) in coloured


def test_the_histogram_counts_every_row_once(tiny_model, chat_file):
    _, lengths = verb.preview(sft(tiny_model, chat_file), 1)
    rows = verb.bars(lengths)
    assert sum(count for _, _, count in rows) == 60
    for label, share, count in rows:
        low, high = (int(part.replace(",", "")) for part in label.removesuffix(" tokens").split("-"))
        assert count == ((lengths >= low) & (lengths <= high)).sum()
        assert share == count / max(number for _, _, number in rows)


def test_the_command_and_its_page(tmp_path, tiny_model, chat_file, pair_file, capsys, monkeypatch):
    words = [f"model_name_or_path={tiny_model}", f"dataset_name={chat_file}", "max_length=64"]
    assert main(["preview", *words, "rows=1"]) == 0
    assert "batch 0: " in capsys.readouterr().out
    page = tmp_path / "page.html"
    words = [f"model_name_or_path={tiny_model}", f"dataset_name={pair_file}", "max_length=64"]
    assert main(["preview", "dpo", *words, f"html={page}"]) == 0
    text = page.read_text()
    assert '<span class="trained">' in text and "http" not in text and "<script" not in text
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    assert main(["preview", "dpo", *words, f"html={mine}"]) == 2
    monkeypatch.chdir(tmp_path)
    assert main(["preview", "dpo", *words, "--html"]) == 0
    assert (tmp_path / "preview.html").read_text() == page.read_text()
    assert mine.read_text() == "mine"
    assert main(["preview", *words, "rows=none"]) == 2
    assert "rows=none is no number of rows" in capsys.readouterr().err
