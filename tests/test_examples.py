"""The examples run: long documents from installed packages and a tiny run on them, kernels in transformers' Trainer,
two runs compared."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from burnish.config.fields import SFTConfig
from burnish.config.load import load
from burnish.run import train

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "long_context"
FILES = sorted(FOLDER.glob("*.yaml"))
SIZES = {"128k": 131072, "256k": 262144, "1m": 1048576}


@pytest.fixture(scope="module")
def sources():
    """The script's functions."""
    return runpy.run_path(str(FOLDER / "sources.py"))


def rows(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def make_site(folder: Path) -> None:
    """Packages a (two files and a sub-package), small (too short), b (one long file); a folder that is no package."""
    for name, text in {
        "b/__init__.py": "b = '\u2028'\n" + "x = 1\n" * 2000,
        "a/zeta.py": "z = 2\n" * 300,
        "a/__init__.py": "",
        "a/sub/__init__.py": "s = 3\n" * 400,
        "a/data.txt": "no code",
        "small/__init__.py": "pass\n",
        "plain/file.py": "y = 4\n" * 2000,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "a" / "latin.py").write_bytes("ä = 1\n".encode("latin-1"))


def test_a_package_is_a_document_of_whole_files(sources, tmp_path):
    make_site(tmp_path / "site")
    found = {}
    for limit in (10**6, 4000, 3000):
        target = tmp_path / f"{limit}.jsonl"
        sources["main"]([str(target), "--site", str(tmp_path / "site"), "--characters", str(limit)])
        found[limit] = rows(target)
    sub, zeta = "# a/sub/__init__.py\n" + "s = 3\n" * 400 + "\n", "# a/zeta.py\n" + "z = 2\n" * 300 + "\n"
    whole_b = "# b/__init__.py\nb = '\u2028'\n" + "x = 1\n" * 2000 + "\n"
    assert found[10**6] == [f"# a/__init__.py\n\n{sub}{zeta}", whole_b]
    assert found[4000] == [f"# a/__init__.py\n\n{sub}", whole_b[:4000]], "zeta doesn't fit as a whole"
    assert found[3000] == [f"# a/__init__.py\n\n{sub}", whole_b[:3000]]


def test_the_packages_here_give_long_documents_and_the_same_again(sources, tmp_path):
    for name in ("one", "two"):
        sources["main"]([str(tmp_path / name), "--packages", "12", "--characters", "50000"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    texts = rows(tmp_path / "one")
    assert len(texts) == 12 and max(map(len, texts)) <= 50000
    import transformers

    assert 40_000 < len(sources["document"](Path(transformers.__file__).parent, 50_000)) <= 50_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configurations_load_and_say_what_their_names_say(path):
    config = load(SFTConfig, path)
    kind, size = path.stem.split("_")
    assert config.packing and config.dataset_name == "sources.jsonl" and config.gradient_accumulation_steps == 1
    assert config.per_device_train_batch_size == 1
    assert config.max_length == SIZES.get(size, 8192)
    assert config.use_peft == (kind == "lora") and config.optimizer_in_bwd == (kind != "lora")
    line = next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{path.name}`" in line)
    assert f"{config.max_length:,}" in line and (kind == "lora" or f"`{config.optim}`" in line)
    if kind != "tiny":
        assert f"on {config.model_name_or_path.partition('/')[2]} " in line.replace("of ", "on ")


def test_every_size_is_there_for_both_ways_of_training():
    assert {path.stem for path in FILES} == {f"{kind}_{size}" for kind in ("lora", "full") for size in SIZES} | {
        "tiny_cpu"
    }


def test_the_readmes_commands_name_files_that_exist():
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"examples/long_context/[\w.]+", text))
    assert named and all((FOLDER.parent.parent / name).is_file() for name in named)


def test_the_tiny_one_trains_on_the_sources_of_this_machine(sources, tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / "tiny_cpu.yaml", tmp_path)
    sources["main"](["sources.jsonl", "--packages", "6", "--characters", "6000"])
    config = load(SFTConfig, "tiny_cpu.yaml", [f"model_name_or_path={tiny_model}", "learning_rate=1e-2"])
    result = train(config)
    records = [json.loads(line) for line in (tmp_path / "out/long-context-tiny/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert result.global_step == 3 and losses[-1] < losses[0]
    assert records[0]["num_tokens"] > 2048, "a pack of several tiles"
    assert (tmp_path / "out/long-context-tiny/model.safetensors").is_file()


def test_kernels_in_the_trainer_of_transformers_change_no_loss(tiny_model, tmp_path, monkeypatch, capsys):
    """The script as it is, and again without the patch."""
    import burnish

    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} times the cat " * 5}) + "\n" for n in range(20))
    )
    script = runpy.run_path(str(FOLDER.parent / "patching" / "train_with_transformers.py"))
    given = (tiny_model, str(tmp_path / "train.jsonl"))
    patched = script["main"](*given, str(tmp_path / "patched"), 3)
    assert "linear_cross_entropy" in capsys.readouterr().out
    monkeypatch.setattr(burnish, "patch", lambda model: None)
    monkeypatch.setattr(burnish, "unpatch", lambda model: None)
    assert patched == pytest.approx(script["main"](*given, str(tmp_path / "plain"), 3), rel=1e-4)
    assert (tmp_path / "patched" / "model.safetensors").is_file()


def test_two_runs_of_the_benchmark_example_can_be_compared(tiny_model, chat_file, tmp_path, monkeypatch, capsys):
    from burnish.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    base = str(FOLDER.parent / "benchmark" / "base.yaml")
    words = [f"model_name_or_path={tiny_model}", f"dataset_name={chat_file}", "max_steps=2", "logging_steps=1"]
    assert main(["sft", base, *words]) == 0
    packed = ["packing=true", "per_device_train_batch_size=1", "max_length=512", "output_dir=out/packed"]
    assert main(["sft", base, *words, *packed]) == 0
    capsys.readouterr()
    assert main(["compare", "out/padded", "out/packed"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("packing", "max_length", "tokens a second")), shown
