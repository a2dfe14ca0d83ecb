"""`burnish plan`: what it reads and prints, with no torch for its help, no GPU and no weights."""

import json
import subprocess
import sys

import pytest

from burnish.cli import CONFIGS, main
from burnish.config.errors import UserError
from burnish.verbs.plan import parse


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A YAML file for a model of which only config.json is there."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("plan")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "llama")  # fmt: skip
    lines = [f"model_name_or_path: {folder / 'llama'}", "use_peft: true", "lora_dropout: 0.0"]
    lines += ["lora_target_modules: all-linear", "max_length: 262144", "per_device_train_batch_size: 1"]
    (folder / "run.yaml").write_text("\n".join(lines))
    return str(folder / "run.yaml")


def plan(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_plan_of_a_run(capsys, run_file):
    text = plan(capsys, run_file, "--card", "h200")
    topics = [line.split()[0] for line in text.splitlines() if line and not line.startswith(" ")]
    assert topics[:5] == ["model", "card", "rates", "batch", "state"] and topics[-1] == "use"
    assert "41,943,040 of 8,072,204,288 parameters trained" in text and "assumed" in text
    assert "262,144 tokens in one sequence (max_length; no data file to read)" in text
    (marked,) = [line for line in text.splitlines() if line.startswith(">")]
    assert "attention kept" in marked
    last = text.splitlines()[-1]
    assert "gradient_checkpointing: true" in last and "keep_attention: true" in last
    refused = [line for line in text.splitlines() if line.startswith("no ")]
    assert refused and all("needs" in line and "longest" in line for line in refused)
    assert len(plan(capsys, run_file, "--card", "h200", "--all").splitlines()) > len(text.splitlines())


def test_json_has_every_option_in_bytes(capsys, run_file):
    found = json.loads(plan(capsys, run_file, "--card=h200", "--json", "--lengths=65536,65_536"))
    assert found["lengths"] == [65536, 65536] and len(found["options"]) > 30
    for option in found["options"]:
        assert option["peak_bytes"] == max(sum(phase.values()) for phase in option["bytes"].values())
    keys = found["chosen"].items()
    chosen = next(o for o in found["options"] if all(o[k] == v for k, v in keys) and not o["refused"])
    quickest = min(o["seconds"] for o in found["options"] if not o["refused"])
    assert chosen["seconds"] <= 1.01 * quickest


def test_a_card_that_is_too_small_says_how_far_it_goes(capsys, run_file):
    text = plan(capsys, run_file, "--card", "rtx4090")
    assert ">" not in text and text.splitlines()[-1].startswith("fits") and "up to" in text.splitlines()[-1]


def test_a_sweep_plans_each_value(capsys, run_file):
    text = plan(capsys, run_file, "--card", "h200", "--sweep", "max_length=16384,131072,4194304")
    rows = text.splitlines()[5:]
    assert rows[0].split()[0] == "max_length" and "no checkpoints" in rows[1] and "attention kept" in rows[2]
    assert rows[3].startswith("no ") and "max_length=4194304" in rows[3]
    again = [int(row.split("%")[0].split()[-1]) for row in rows[1:3]]  # per cent of the operations
    assert again[0] == 0 < again[1]


def test_lengths_come_from_data_that_can_be_read(capsys, tiny_model, chat_file):
    words = [f"model_name_or_path={tiny_model}", f"dataset_name={chat_file}", "max_length=64", "--card=h100"]
    words.append("per_device_train_batch_size=3")
    text = plan(capsys, *words)
    assert f"the heaviest of {chat_file}, tokenized" in text and "in 3 sequences" in text
    from burnish.config.fields import SFTConfig
    from burnish.run.rows import read_batches

    config = SFTConfig(
        model_name_or_path=tiny_model, dataset_name=chat_file, max_length=64, per_device_train_batch_size=3
    )
    heaviest = max(len(batch.input_ids) for batch in read_batches(config).epoch(0))
    assert f"{heaviest:,} tokens in 3 sequences" in text


def test_preferences_are_two_sequences_a_row(capsys, run_file):
    text = plan(capsys, "dpo", run_file, "--card", "h200", "max_length=4096", "per_device_train_batch_size=2")
    assert "16,384 tokens in 4 sequences" in text and "by the model without its adapter" in text


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--frob"], "unknown option --frob"),
        (["--card"], "--card needs a value"),
        (["--host", "much"], "--host much can't be read"),
        (["--lengths", "8,0"], "--lengths 8,0 can't be read"),
        (["--sweep", "max_length="], "--sweep max_length= can't be read"),
        (["a.yaml", "b.yaml"], "two files"),
    ],
)
def test_words_that_it_does_not_take(words, match):
    with pytest.raises(UserError, match=match):
        parse(words, CONFIGS)


def test_mistakes_are_one_line(capsys, run_file):
    for words, said in (
        (["--card", "h2000"], "unknown card h2000"),
        (["max_length=null"], "how long are the sequences"),
        (["model_name_or_path=/nowhere"], "/nowhere"),
        (["learning_rte=1"], "learning_rate"),
    ):
        assert main(["plan", run_file, *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_help_needs_no_torch(tmp_path):
    code = "import sys; from burnish.cli import main; main(['plan', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: burnish plan")


def test_the_file_may_have_an_equals_sign_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r=8.yaml").write_text("seed: 1\n")
    request = parse(["max_length=9", "r=8.yaml"], CONFIGS)
    assert (request.path, request.words) == ("r=8.yaml", ["max_length=9"])
