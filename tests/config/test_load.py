"""A YAML file and key=value words become one configuration; every mistake names its file and line."""

import dataclasses

import pytest
import torch
import yaml

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.load import dump, load


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write run.yaml into an empty current folder; returns its name, as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return "run.yaml"

    return write


def test_file_and_words_and_where_each_value_came_from(write):
    path = write("# a run\nmodel_name_or_path: org/model\n\nlearning_rate: 1e-4\nmax_length: 512\n")
    config = load(SFTConfig, path, ["max_length=2048", "packing=true", "eval_strategy=no"])
    assert (config.model_name_or_path, config.learning_rate, config.max_length) == ("org/model", 1e-4, 2048)
    assert config.packing is True and config.eval_strategy == "no" and config.seed == 42
    places = {name: place for name, place in config.origins.items() if place != "default"}
    assert places == {
        "model_name_or_path": "run.yaml:2",
        "learning_rate": "run.yaml:4",
        "max_length": "command line",
        "packing": "command line",
        "eval_strategy": "command line",
    }


def test_older_names_in_a_file_and_in_words(write):
    """As TRL's own files have them; values that ask for nothing are taken, the rest is noted for the log."""
    path = write("max_seq_length: 512\nfp16: false\nuse_liger: true\nevaluation_strategy: epoch\n")
    config = load(SFTConfig, path, ["per_gpu_train_batch_size=2", "group_by_length=true"])
    assert (config.max_length, config.eval_strategy, config.per_device_train_batch_size) == (512, "epoch", 2)
    assert config.origins["max_length"] == "run.yaml:1" and len(config.notes) == 5
    with pytest.raises(UserError, match="command line: max_seq_length is an older name of max_length, which is set as"):
        load(SFTConfig, None, ["max_seq_length=5", "max_length=5"])


def test_words_alone_and_an_empty_file(write):
    assert load(SFTConfig, None, ["seed=7"]).seed == 7
    assert load(SFTConfig, write("# nothing yet\n")) == SFTConfig()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("chat_template_path=2024", "2024"),
        ("chat_template_path=null", None),
        ("eos_token=</s>", "</s>"),
        ("eos_token=[EOS]", "[EOS]"),
        ("eos_token=*end*", "*end*"),
        ("eos_token=a: b", "a: b"),
        ("output_dir=true", "true"),
        ("model_name_or_path=C=D", "C=D"),
        ("resume_from_checkpoint=true", True),
        ("resume_from_checkpoint=out/checkpoint-1", "out/checkpoint-1"),
        ("report_to=[none]", ["none"]),
        ('model_init_kwargs={"revision": "v2"}', {"revision": "v2"}),
        ("learning_rate=2e-5", 2e-5),
        ("max_length=null", None),
    ],
)
def test_words_are_read_as_yaml_or_as_text_where_the_key_takes_text(word, expected):
    value = getattr(load(SFTConfig, None, [word]), word.split("=")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rte: 1e-4\n", "run.yaml:2: unknown key learning_rte. Did you mean learning_rate?"),
        ("zzz: 1\n", "run.yaml:1: unknown key zzz. burnish sft --help-all lists every key"),
        ("fp16: true\n", "run.yaml:1: fp16 is not taken: float16 needs loss scaling"),
        ("max_seq_length: 9\nmax_length: 8\n", "run.yaml:1: max_seq_length is an older name of max_length, which"),
        ("max_seq_length: 1\n", "run.yaml:1: max_length must be at least 2, got 1"),
        (
            "do_predict: true\nseed: 1\ntf32: true\npackin: true\n",
            "run.yaml:1: do_predict is not taken: the verb says what is done. Delete it. "
            "Also not taken: tf32 (run.yaml:3), packin (run.yaml:4)",
        ),
        ("seed: 1\n\nseed: 2\n", "run.yaml:3: seed is set twice, first at run.yaml:1. Keep one"),
        ("model_init_kwargs:\n  a: 1\n  a: 2\n", "run.yaml:3: a is set twice, first at run.yaml:2. Keep one"),
        ("seed: 1\nlearning_rate: quick\n", "run.yaml:2: learning_rate must be number, got 'quick'"),
        ("learning_rate:\n", "run.yaml:1: learning_rate must be number, got None"),
        ("max_length: null\nseed: 1\npacking: true\n", "run.yaml:3 and run.yaml:1: packing needs max_length"),
        ("seed: [1\n", "run.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", "run.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("- seed\n", "run.yaml:1: must hold `key: value` lines"),
        ("eos_token: !!python/object:os.system x\n", "run.yaml:1: not valid YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file_name_file_and_line(write, text, message):
    with pytest.raises(UserError) as error:
        load(SFTConfig, write(text))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rte=1"], "command line: unknown key learning_rte. Did you mean learning_rate?"),
        (["--learning_rate", "1"], "command line: '--learning_rate' is not key=value. Write learning_rate=VALUE"),
        (["--learning_rate=1"], "command line: '--learning_rate=1' is not key=value. Write learning_rate=1"),
        (["seed"], "command line: 'seed' is not key=value. Write seed=VALUE"),
        (["seed=1", "seed=2"], "command line: seed is given twice. Keep one"),
        (["seed=x"], "command line: seed must be whole number, got 'x'"),
        (["seed="], "command line: seed must be whole number, got ''"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(UserError) as error:
        load(SFTConfig, None, words)
    assert str(error.value) == message


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        load(SFTConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="can't be read as text"):
        load(SFTConfig, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(UserError, match="can't be read as text"):
        load(SFTConfig, tmp_path / "binary.yaml")


def test_dump_reads_back_and_shows_origins(write):
    config = load(SFTConfig, write("seed: 5\nlearning_rate: 1e-7\n"), ["output_dir=a # b: 'c'\nd", "eos_token=no"])
    config.model_init_kwargs = {"a": [1, {"b": "x y"}], "c": "null"}
    text = dump(config)
    lines = {line.split(":")[0]: line for line in text.splitlines()}
    assert len(lines) == len(text.splitlines()) == len(dataclasses.fields(SFTConfig)), "one key a line"
    assert lines["seed"].split("#")[1].strip() == "run.yaml:1"
    assert lines["eos_token"].split("#")[1].strip() == "command line"
    assert lines["max_length"].split("#")[1].strip() == "default"
    assert load(SFTConfig, write(text)) == config


def test_dump_writes_a_torch_dtype_as_its_name():
    text = dump(SFTConfig(model_init_kwargs={"dtype": torch.bfloat16}))
    assert yaml.safe_load(text)["model_init_kwargs"] == {"dtype": "bfloat16"}
