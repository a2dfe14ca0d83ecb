"""Writes that fail, in every file of a run: it stops with one clear line, or goes on and says so.

The last good checkpoint loads, and the run that goes on from it ends bit for bit like one that nobody disturbed.
"""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import BROKEN, DENIED, FULL, HARMS, READ_ONLY, assert_one_line, assert_same, failing, good, settings

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.run import train

FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.usefixtures("cache")

WRITES = {  # what fails, in which call of it, and the checkpoints that must be whole after
    "optimizer and generators": ((disk, "save_file"), lambda *given: True, {1: [], 3: [2], 5: [2, 4]}),
    "the flush": ((disk.os, "fsync"), lambda *given: True, {2: [], 20: [2], 40: [2, 4]}),
    "the rename": ((disk.os, "rename"), lambda a, b: "checkpoint" in str(b), {1: [], 2: [2], 3: [2, 4]}),
    "state.json": ((Path, "write_text"), lambda path, *_: path.name == "state.json", {1: [], 2: [2], 3: [2, 4]}),
    "the manifest": ((Path, "write_text"), lambda path, *_: path.name == "manifest.json", {1: [], 2: [2]}),
    "the folder": ((Path, "mkdir"), lambda path, *_: ".writing-checkpoint" in path.name, {1: [], 2: [2]}),
}
CASES = [(what, n, (FULL, DENIED, BROKEN)[at]) for what, (_, _, ns) in WRITES.items() for at, n in enumerate(ns)]


@pytest.mark.parametrize(("what", "number", "code"), CASES)
def test_a_checkpoint_that_cannot_be_written(tmp_path, tiny_model, chat_file, whole, monkeypatch, what, number, code):
    target, only, counts = WRITES[what]
    config = settings(tmp_path / "run", tiny_model, chat_file)
    with monkeypatch.context() as patch:
        failing(patch, target, number, code, only)
        with pytest.raises(UserError) as error:
            train(config)
    assert_one_line(error.value, os.strerror(code), str(tmp_path / "run"))
    left = good(tmp_path / "run")
    if what != "the flush":  # how many files are flushed is not promised
        assert left == [f"checkpoint-{step}" for step in counts[number]]
        if left:
            assert f"goes on from {left[-1]}" in str(error.value)
    assert not list((tmp_path / "run").glob(".writing*")), "what was written of it takes no room"
    train(config)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("code", [FULL, DENIED, READ_ONLY])
@pytest.mark.parametrize("record", [1, 4])
def test_metrics_that_cannot_be_written_stop_the_run(tmp_path, tiny_model, chat_file, whole, monkeypatch, code, record):
    config = settings(tmp_path / "run", tiny_model, chat_file)
    with monkeypatch.context() as patch:
        failing(patch, (Path, "open"), record, code, lambda path, mode="r", **_: (path.name, mode) == METRICS)
        with pytest.raises(UserError) as error:
            train(config)
    assert_one_line(error.value, "metrics.jsonl", os.strerror(code))
    train(config)
    assert_same(tmp_path / "run", whole)


METRICS = ("metrics.jsonl", "a")


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, tiny_model, chat_file, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        failing(patch, (Path, "open"), 20, FULL, lambda path, mode="r", **_: (path.name, mode) == ("log.txt", "a"))
        train(settings(tmp_path / "run", tiny_model, chat_file))
    assert capsys.readouterr().err.count("log.txt misses lines (No space left on device)") == 1
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("call", ["replace", "rename", "mkdir"])
def test_a_final_model_that_cannot_be_written(tmp_path, tiny_model, chat_file, whole, monkeypatch, call):
    """The steps are done and saved: the same call writes the model."""
    config = settings(tmp_path / "run", tiny_model, chat_file)
    with monkeypatch.context() as patch:
        if call == "mkdir":
            failing(patch, (Path, "mkdir"), 1, FULL, lambda path, *_: path.name == ".writing-model")
        else:  # the last file moved in is the weights
            failing(patch, (disk.os, "replace"), 1, FULL, lambda a, b: str(b).endswith("model.safetensors"))
        with pytest.raises(UserError) as error:
            train(config)
    assert_one_line(error.value, "No space left", "last checkpoint has the weights")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert good(tmp_path / "run")[-1] == "checkpoint-6"
    train(config)
    assert_same(tmp_path / "run", whole)


def test_a_token_cache_that_cannot_be_written_is_one_line(tmp_path, tiny_model, chat_file, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError) as error:
        train(settings(tmp_path / "run", tiny_model, chat_file))
    assert_one_line(error.value, "cannot write the token cache", "BURNISH_CACHE")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["empty", "half", "bit in the middle", "bit at the end", "missing"])
def test_a_damaged_token_cache_is_made_anew(tmp_path, tiny_model, chat_file, whole, monkeypatch, harm):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    train(settings(tmp_path / "one", tiny_model, chat_file))
    ids = next((tmp_path / "cache").rglob("ids.npy"))
    sound = ids.read_bytes()
    HARMS[harm](ids)
    train(settings(tmp_path / "two", tiny_model, chat_file))
    assert_same(tmp_path / "two", whole)
    assert next((tmp_path / "cache").rglob("ids.npy")).read_bytes() == sound


# ---- the machine's own refusals, in a process of its own


def in_child(prepare, config, log) -> int:
    """Exit code of `burnish sft` on `config` in a forked process after prepare(); its stderr is in `log`."""

    def body():
        from burnish.cli import main

        torch.set_num_threads(1)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        words = [f"{key}={json.dumps(value)}" for key, value in config.items()]
        prepare()
        code = main(["sft", *words])
        sys.stderr.flush()
        os._exit(code)

    process = FORK.Process(target=body, daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


def said_in(log) -> list[str]:
    """The lines of ours; progress bars are there because transformers was imported before the command quieted it."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("burnish: ")]


def words(folder, model, rows) -> dict:
    config = settings(folder, model, rows)
    return {key: getattr(config, key) for key, origin in config.origins.items() if origin != "default"}


@pytest.mark.parametrize("size", [1000, 12_000, 50_000, 120_000, 200_000])
def test_files_that_may_not_grow(tmp_path, tiny_model, chat_file, whole, size):
    """RLIMIT_FSIZE: the kernel refuses the write, inside whichever library it is."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    log = tmp_path / "stderr"
    assert in_child(limit, words(tmp_path / "run", tiny_model, chat_file), log) == 2, log.read_text()
    (line,) = said_in(log)
    assert "File too large" in line and str(tmp_path / "run") in line
    train(settings(tmp_path / "run", tiny_model, chat_file))
    assert_same(tmp_path / "run", whole)


def as_nobody():
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def readable(path: Path) -> Path:
    """The path, which now every user may enter and read."""
    for part in [*path.rglob("*"), path, *path.parents]:
        if part.stat().st_uid == os.getuid() and part.stat().st_mode & 0o777 == 0o700:
            part.chmod(0o755)
        elif part.is_file():
            part.chmod(0o644)
    return path


@pytest.mark.parametrize("mode", ["run", "parent", "a checkpoint"])
def test_a_read_only_run_folder(tmp_path, stopped, tiny_model, chat_file, whole, mode, monkeypatch):
    """Another user's, or write-protected: one line; as soon as it may be written, the run goes on."""
    for path in (Path(tiny_model), Path(chat_file), stopped):
        readable(path)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    folder = stopped
    if mode == "parent":
        folder = tmp_path / "mine" / "run"
        folder.parent.mkdir(mode=0o555)
    elif mode == "run":
        folder.chmod(0o555)
    else:  # the checkpoint can't be read
        (folder / "checkpoint-4" / "state.json").chmod(0o000)
        (folder / "checkpoint-2" / "state.json").chmod(0o000)
    log = tmp_path / "stderr"
    assert in_child(as_nobody, words(folder, tiny_model, chat_file), log) == 2, log.read_text()
    *others, line = said_in(log)
    assert not others and "Permission denied" in line and str(folder) in line
    for path in (folder.parent, folder):
        if path.exists():
            path.chmod(0o755)
    for step in (2, 4):
        if (file := folder / f"checkpoint-{step}" / "state.json").exists():
            file.chmod(0o644)
    train(settings(folder, tiny_model, chat_file))
    assert_same(folder, whole)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a file system needs root")
@pytest.mark.parametrize("kilobytes", [60, 500, 1000])
def test_a_disk_that_is_really_full(tmp_path, tiny_model, chat_file, whole, kilobytes):
    place = tmp_path / "small"
    place.mkdir()
    size = f"size={kilobytes}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        config = settings(place / "run", tiny_model, chat_file)
        with pytest.raises(UserError) as error:
            train(config)
        assert_one_line(error.value, "No space left on device", str(place))
        before = good(place / "run")
        assert kilobytes < 400 or before, "there was room for one"
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        train(config)
        assert_same(place / "run", whole)
    finally:
        subprocess.run(["umount", place], check=True)
