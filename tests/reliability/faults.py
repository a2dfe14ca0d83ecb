"""Runs to be disturbed, the disturbances, and what must hold after: helpers of the tests beside this."""

import errno
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from burnish import SFTConfig
from burnish import checkpoint as disk
from burnish.config.errors import UserError

STEPS = 6
FULL, DENIED, READ_ONLY, BROKEN = errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO


def settings(folder, model, rows, **given) -> SFTConfig:
    common = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return SFTConfig(str(folder), model_name_or_path=str(model), dataset_name=str(rows), **{**common, **given})


def assert_same(folder: Path, whole: Path) -> None:
    """The same weights bit for bit, and every step once in the log with the same loss."""
    ours, theirs = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        for f in (folder, whole)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [*range(1, STEPS + 1)]


def assert_one_line(error: UserError, *words: str) -> None:
    assert "\n" not in str(error) and "Traceback" not in str(error)
    assert error.where and error.mend
    for word in words:
        assert word in str(error), str(error)


def good(folder: Path) -> list[str]:
    return [path.name for path in disk.checkpoints(folder) if not disk.damage(path)]


def cut_to(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(share):
    def harm(path):
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * share), len(data) - 1)] ^= 0x10
        path.write_bytes(data)

    return harm


def in_its_place(make):
    def harm(path):
        path.unlink()
        make(path)

    return harm


HARMS = {
    "empty": cut_to(0),
    "half": cut_to(0.5),
    "bit at the start": flip(0.0),
    "bit in the middle": flip(0.5),
    "bit at the end": flip(1.0),
    "missing": lambda path: path.unlink(),
    "a folder": in_its_place(Path.mkdir),
    "a link to nothing": in_its_place(lambda path: path.symlink_to("nowhere")),
}


def failing(monkeypatch, target, number: int, code: int, only=lambda *given: True):
    """Make the n-th call of `target` (module path and name) that `only` wants, and all after it, fail with `code`."""
    room, name = target
    honest, seen = getattr(room, name), 0

    def call(*given, **named):
        nonlocal seen
        if only(*given):
            seen += 1
            if seen >= number:
                raise OSError(code, os.strerror(code), str(given[0]) if given else None)
        return honest(*given, **named)

    monkeypatch.setattr(room, name, call)
