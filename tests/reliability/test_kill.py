"""Real runs in processes of their own, killed at random moments and started again with the same call.

SIGKILL may cost what came after the last checkpoint, and nothing else; SIGTERM costs nothing.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from burnish import SFTConfig
from burnish import checkpoint as disk

STEPS, KILLS, TERMS = 24, 30, 20
FORK = multiprocessing.get_context("fork")  # what a start would import is imported; each run is a process all the same


def settings(folder, model, rows) -> SFTConfig:
    return SFTConfig(
        str(folder),
        model_name_or_path=model,
        dataset_name=rows,
        learning_rate=5e-3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_length=64,
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        test_split_size=10,
        per_device_eval_batch_size=2,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=2,
        bf16=False,
    )


def in_child(config, prepare=lambda: None) -> None:
    """The body of a run's process: nothing on the screen, prepare() first."""
    from burnish.run import train

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    prepare()
    train(config)


def started(config, prepare=lambda: None):
    process = FORK.Process(target=in_child, args=(config, prepare), daemon=True)
    process.start()
    return process


def finished(config) -> None:
    process = started(config)
    process.join(120)
    assert process.exitcode == 0


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def assert_same_run(folder, whole) -> None:
    """The same weights, bit for bit, every step logged once, and with the same loss."""
    ours, theirs = weights(folder), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [
        [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]
        for lines in ((Path(where) / "metrics.jsonl").read_text().splitlines() for where in (folder, whole))
    ]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, chat_file):
    """(folder, seconds) of a run that nobody disturbed."""
    import burnish.run  # noqa: F401  # the children inherit what is imported here

    folder = tmp_path_factory.mktemp("whole") / "run"
    patch = pytest.MonkeyPatch()
    patch.setenv("BURNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
    finished(settings(folder.with_name("warm"), tiny_model, chat_file))
    began = time.perf_counter()
    finished(settings(folder, tiny_model, chat_file))
    yield folder, time.perf_counter() - began
    patch.undo()


def newest(folder) -> int:
    """The step of the newest checkpoint that is whole."""
    sound = [path for path in disk.checkpoints(Path(folder)) if not disk.damage(path)]
    return int(sound[-1].name.split("-")[1]) if sound else 0


def resumed_from(folder) -> list[int]:
    lines = (Path(folder) / "log.txt").read_text().splitlines()
    return [int(line.split(" at step ")[1].split()[0]) for line in lines if line.startswith("resume ")]


def test_killed_at_random_moments_every_run_ends_the_same(tmp_path, tiny_model, chat_file, whole):
    undisturbed, seconds = whole
    rng, kills, number = random.Random(7), 0, 0
    while kills < KILLS:
        number += 1
        config = settings(tmp_path / f"run{number}", tiny_model, chat_file)
        expected = []
        for _ in range(6):
            if (Path(config.output_dir) / "model.safetensors").exists():  # killed when all was done
                break
            process = started(config)
            process.join(rng.uniform(0.1, 1.0) * seconds)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            if (step := newest(config.output_dir)) > 0:
                expected.append(step)
        if not (Path(config.output_dir) / "model.safetensors").exists():
            finished(config)
        assert set(resumed_from(config.output_dir)) <= {*expected}  # none earlier than the newest whole one
        assert_same_run(config.output_dir, undisturbed)


@pytest.mark.parametrize("call", ["burnish.checkpoint.save_file", "os.rename", "shutil.rmtree", "json.dumps"])
def test_killed_inside_a_save_the_checkpoint_before_it_serves(tmp_path, tiny_model, chat_file, whole, call):
    """The process kills itself in the third save, before and after the call, so that half of it is on the disk."""
    for after in (False, True):
        config = settings(tmp_path / f"run{after}", tiny_model, chat_file)
        process = started(config, lambda after=after: kill_in_third_save(call, after))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert newest(config.output_dir) in (8, 12)
        finished(config)
        assert_same_run(config.output_dir, whole[0])


def kill_in_third_save(call: str, after: bool) -> None:
    """Make the first `call` inside the third save of a checkpoint the last thing this process does."""
    import importlib

    from burnish import training

    room, name = call.rsplit(".", 1)
    target = importlib.import_module(room)
    honest_save, honest = training.disk.begin_checkpoint, getattr(target, name)
    saves = 0

    def dying(*args, **given):
        if after:
            honest(*args, **given)
        os.kill(os.getpid(), signal.SIGKILL)

    def save(*args, **given):
        nonlocal saves
        saves += 1
        if saves == 3:
            setattr(target, name, dying)
        return honest_save(*args, **given)

    training.disk.begin_checkpoint = save


def test_terminated_at_random_moments_nothing_is_lost(tmp_path, tiny_model, chat_file, whole):
    undisturbed, seconds = whole
    rng, terms, number = random.Random(11), 0, 0
    while terms < TERMS:
        number += 1
        config = settings(tmp_path / f"run{number}", tiny_model, chat_file)
        for _ in range(5):
            if (Path(config.output_dir) / "model.safetensors").exists():
                break
            process = started(config)
            process.join(rng.uniform(0.3, 1.0) * seconds)
            if process.exitcode is not None:
                break
            logged = last_step(config.output_dir)
            os.kill(process.pid, signal.SIGTERM)
            process.join(60)
            if process.exitcode == 0:
                terms += logged > 0 and newest(config.output_dir) < STEPS  # caught while training, not while starting
                assert newest(config.output_dir) >= logged
        if not (Path(config.output_dir) / "model.safetensors").exists():
            finished(config)
        assert_same_run(config.output_dir, undisturbed)


def last_step(folder) -> int:
    """The last step that metrics.jsonl holds now."""
    log = Path(folder) / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines[:-1]]
    return steps[-1] if steps else 0
