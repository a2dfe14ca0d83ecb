"""The README, CONTRIBUTING and docs do what they say: commands exist, YAML loads strictly, Python runs, tests are
there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import burnish
from burnish.cli import CONFIGS, VERBS
from burnish.config.fields import SFTConfig
from burnish.config.load import load
from burnish.config.preference import DPOConfig
from burnish.data.formats import detect
from burnish.verbs import demo

OWN = {"preview": ("rows", "html"), "chat": ("base",)}  # words that are a verb's own and no keys of a configuration
ROOT = Path(__file__).resolve().parent.parent
NAMES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCKS = [
    (name, language, code)
    for name, text in PAGES.items()
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
]


def blocks(language: str) -> list:
    found = [pytest.param(code, id=f"{page}-{i}") for i, (page, name, code) in enumerate(BLOCKS) if name == language]
    assert found, f"no {language} block"
    return found


def commands() -> list[list[str]]:
    lines = [line for _, language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_every_block_has_a_language_that_is_checked():
    assert {language for _, language, _ in BLOCKS} == {"bash", "yaml", "python", "text", "json"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words):
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(rest) <= set(targets)
    elif program == "burnish":
        assert rest[0] in VERBS
        words = rest[2:] if rest[1:2] and rest[1] in CONFIGS else rest[1:]
        overrides = [word for word in words if "=" in word]
        load(SFTConfig, None, [word for word in overrides if word.partition("=")[0] not in OWN.get(rest[0], ())])
        files = {word for word in words if word not in overrides and not word.startswith("out/")}
        assert files <= {"run.yaml", "--help", "--replay"}
    elif program == "torchrun":
        assert rest[2:4] == ["-m", "burnish"] and rest[4] in VERBS and rest[5:] == ["run.yaml"]
    elif program == "touch":
        assert all(word.endswith(("/STOP", "/SAVE")) for word in rest)
    elif program.startswith("."):
        assert (ROOT / program).stat().st_mode & 0o100
    else:
        assert words[:2] == ["pip", "install"]


@pytest.mark.parametrize("code", blocks("json"))
def test_json_rows_are_formats_that_burnish_knows(code):
    """A block holds one row a line; each is recognised for what the page says, by one of the readers."""
    kinds = []
    for line in code.splitlines():
        row = json.loads(line)
        if "chosen" in row or "label" in row:
            kinds.append("chosen" in row)
            assert set(row) <= {"prompt", "chosen", "rejected", "completion", "label"}
        else:
            kinds.append(detect(row, "text", "the page"))
    assert kinds == ["messages", "prompt-completion", True, False]


def test_the_demo_writes_the_files_that_it_names(tmp_path):
    """run.yaml and dpo.yaml load strictly, and the pairs are right replies over wrong ones."""
    rows = [demo._row(f"question {n}", f"reply {n // 2}") for n in range(6)]
    for row, pair in zip(rows, demo.pairs_of(rows), strict=True):
        question, reply = row["messages"]
        assert pair["prompt"] == [question] and pair["chosen"] == [reply]
        assert pair["rejected"][0]["content"] in {r["messages"][1]["content"] for r in rows} - {reply["content"]}
    demo._write_run_files(tmp_path, tmp_path / "smollm2")
    first, second = load(SFTConfig, tmp_path / "run.yaml"), load(DPOConfig, tmp_path / "dpo.yaml")
    assert first.output_dir == second.model_name_or_path and second.output_dir != first.output_dir
    assert {second.dataset_name, second.eval_dataset_name} == {
        str(tmp_path / name) for name in ("pairs.jsonl", "held_out_pairs.jsonl")
    }


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_is_a_configuration(code, tmp_path):
    (tmp_path / "run.yaml").write_text(code)
    verb = re.search(r"^# burnish (\w+) ", code)
    config = load(getattr(burnish, CONFIGS[verb[1]]) if verb else SFTConfig, tmp_path / "run.yaml")
    assert sum(origin != "default" for origin in config.origins.values()) == len(re.findall(r"^\w+:", code, flags=re.M))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch, tiny_model, chat_file):
    """As it stands, with only the names of model and data changed."""
    monkeypatch.chdir(tmp_path)
    code = code.replace("Qwen/Qwen3-0.6B", tiny_model).replace("train.jsonl", chat_file)
    names = {"tokens": torch.arange(3, 19).reshape(2, 8)}
    exec(compile(code, "README.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 2 and (tmp_path / "out/script/model.safetensors").exists()
    if "model" in names:
        assert any(parameter.grad is not None for parameter in names["model"].parameters())


def test_named_files_and_tests_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:tests|benchmarks|engine|kernels)/[\w/.]*)`|\]\((\w+\.md)\)", text):
            path = ROOT / (name[0] or name[1])
            assert path.exists(), f"{page}: {path.name}"


def test_the_example_mistake_is_what_is_printed(tmp_path, monkeypatch, capsys):
    from burnish.cli import main

    (line,) = re.findall(r"^burnish: .*$", PAGES["README.md"], flags=re.M)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("seed: 1\npacking: true\nlearning_rte: 1e-4\n")
    assert main(["sft", "run.yaml"]) == 2
    assert capsys.readouterr().err == line + "\n"


def test_contributing_lists_the_rooms_that_the_architecture_test_holds():
    listed = re.search(r"Each line may import only.*?holds it:\n(.*?)\.\n", PAGES["CONTRIBUTING.md"], flags=re.S)
    assert listed
    rooms = [line.split() for line in re.findall(r"`([a-z ]+)`", listed.group(1))]
    source = (ROOT / "tests" / "test_architecture.py").read_text()
    lines = re.search(r"^LINES = \[\n(.*?)^\]", source, flags=re.S | re.M)
    assert lines
    held = [re.findall(r'"(\w+)"', line) for line in lines.group(1).splitlines()]
    assert rooms == [line for line in held if line != ["__main__"]]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 250
