"""What a run, a check and a mistake look like on the screen, word for word; numbers and the device are masked.

Whole commands in processes of their own, so that what libraries print at import or at exit is seen too. After a wanted
change: look at what the failing test prints, and write it into tests/golden.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def masked(text, folder):
    """Numbers as N and times as TIME; without the number of threads and torch's version."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"CPU, \d+ threads", "CPU", text)
    text = re.sub(r"torch \S+$", "torch N", text, flags=re.MULTILINE)
    text = re.sub(r"^memory   freed memory.*\n", "", text, flags=re.MULTILINE)  # glibc only
    text = re.sub(r"\b\d\d:\d\d:\d\d\b", "TIME", text)
    return re.sub(r"(?<![\w.])-?\d[\d,]*(\.\d+)?(e[-+]\d+)?%?(?!\w)", "N", text)


@pytest.fixture
def folder(tmp_path, tiny_model, chat_rows):
    """A folder with rows of three kinds, as a user would have it, the model beside them."""
    (tmp_path / "model").symlink_to(tiny_model)
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows)
    (tmp_path / "train.jsonl").write_text(rows)
    unanswered = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "train2.jsonl").write_text(rows + json.dumps(unanswered) + "\n")
    common = "model_name_or_path: model\nuse_cpu: true\nmax_length: 64\npacking: true\nassistant_only_loss: true\n"
    run = "output_dir: out\ndataset_name: train.jsonl\nlogging_steps: 2\nmax_steps: 4\ntest_split_size: 6\n"
    (tmp_path / "run.yaml").write_text(common + run + "eval_strategy: epoch\nsave_steps: 2\n")
    bad = "learning_rte: 1e-4\ndataset_name: train2.jsonl\nmax_steps: 0\nfp16: true\n"
    (tmp_path / "bad.yaml").write_text(common + bad)
    return tmp_path


def output(command, folder, **more):
    """Exit code and everything that a command writes, both streams in their order."""
    ours = ("BURNISH", "PYTHON", "TRANSFORMERS", "DATASETS", "TQDM", "HF_HUB_DISABLE")  # set by a main() run in here
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"BURNISH_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("run", 0, ["sft", "run.yaml"]),
        ("check", 0, ["check", "run.yaml"]),
        ("check_bad", 2, ["check", "bad.yaml"]),
        ("mistake", 2, ["sft", "bad.yaml"]),
    ],
)
def test_the_screen(name, code, words, folder):
    found, text = output([sys.executable, "-m", "burnish", *words], folder)
    assert masked(text, folder) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert found == code


NOISY = """
import logging, sys, warnings
import burnish.run.rows as rows
from burnish.cli import main

plain = rows.read_data
def noisy(*given, **named):
    import datasets, torch, transformers
    transformers.utils.logging.get_logger("transformers.modeling_utils").warning("transformers grumbles")
    datasets.utils.logging.get_logger("datasets.builder").warning("datasets grumbles")
    logging.getLogger("torch.distributed").error("torch grumbles")
    logging.getLogger("somebody.else").warning("another grumbles")
    warnings.warn("a warning\\nof two lines", FutureWarning)
    return plain(*given, **named)

import burnish.run
burnish.run.read_data = noisy
sys.exit(main(sys.argv[1:]))
"""


def test_what_libraries_say_goes_to_the_log_and_not_to_the_screen(folder):
    def run(**more):
        words = ["sft", "run.yaml", "overwrite_output_dir=true", "max_steps=1"]
        return output([sys.executable, "-c", NOISY, *words], folder, **more)[1]

    assert "grumbles" not in (out := run()) and "a warning" not in out
    kept = (folder / "out" / "log.txt").read_text()
    for line in (
        "library  transformers.modeling_utils: transformers grumbles",
        "library  datasets.builder: datasets grumbles",
        "library  torch.distributed: torch grumbles",
        "library  somebody.else: another grumbles",
        "library  FutureWarning: a warning of two lines",
    ):
        assert f"{line}\n" in kept
    assert "transformers grumbles" in run(BURNISH_DEBUG="1"), "a debugging run shows it where it comes"
