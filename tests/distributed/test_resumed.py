"""Checkpoints of several processes, resumed on another number of them; a process that dies; one message."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import SFTConfig
from burnish import checkpoint as disk
from burnish.run import train

pytestmark = pytest.mark.distributed
STEPS = 6


def settings(folder: Path, model: str, rows: str, **keys) -> SFTConfig:
    return SFTConfig(
        str(folder),
        **{
            "model_name_or_path": model,
            "dataset_name": rows,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_length": 64,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "bf16": False,
            "use_cpu": True,
            **keys,
        },
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = Path(folder).glob("*model.safetensors")
    return load_file(file)


def same_losses(ours: list[dict], theirs: list[dict]) -> None:
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), one["step"]


@pytest.fixture(scope="module", params=["ddp", "fsdp", "fsdp async", "fsdp lora"])
def halfway(request, tmp_path_factory, tiny_model, chat_file, ranks):
    """(folder of a run of two processes that stopped after step 3, its keys), and the same run undisturbed."""
    keys = {"parallel": request.param.split()[0]}
    if "async" in request.param:
        keys |= {"async_save": True}
    if "lora" in request.param:
        keys |= {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    folder = tmp_path_factory.mktemp("halfway")
    whole, half = (settings(folder / name, tiny_model, chat_file, **keys) for name in ("whole", "half"))

    def body() -> None:
        train(whole)
        from burnish.run import assemble

        run = assemble(half)
        run.callbacks.append(_StopAfter(3))
        run.train()

    ranks(2, body).finish()
    return folder, keys


class _StopAfter:
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, config, state, control, **extra) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_goes_on_with_any_number_of_processes(size, halfway, ranks, records, tiny_model, chat_file, tmp_path):
    folder, keys = halfway
    if size == 1:
        keys = {key: value for key, value in keys.items() if key != "parallel"}
    config = settings(
        tmp_path / "run", tiny_model, chat_file, resume_from_checkpoint=str(folder / "half" / "checkpoint-3"), **keys
    )
    if size == 1:
        train(config)
    else:
        ranks(size, lambda: train(config)).finish()
    same_losses(records(tmp_path / "run"), records(folder / "whole")[3:])
    ours, theirs = weights(tmp_path / "run"), weights(folder / "whole")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if size == 2:
            assert torch.equal(ours[name], value), name
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)  # Adam divides by what is nearly zero


def test_one_process_s_run_goes_on_in_parts(ranks, records, tiny_model, chat_file, tmp_path):
    whole = settings(tmp_path / "whole", tiny_model, chat_file, gradient_accumulation_steps=2)
    train(whole)
    config = settings(
        tmp_path / "run",
        tiny_model,
        chat_file,
        parallel="fsdp",
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
    )
    ranks(2, lambda: train(config)).finish()
    same_losses(records(tmp_path / "run"), records(tmp_path / "whole")[3:])


def test_the_final_folder_is_plain_transformers(halfway, tiny_model):
    from transformers import AutoModelForCausalLM

    folder, keys = halfway
    if "use_peft" in keys:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder / "whole")
        assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
        return
    model, info = AutoModelForCausalLM.from_pretrained(folder / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights(folder / "whole").values())
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_in_a_checkpoint_is_a_pickle(halfway):
    folder, keys = halfway
    files = [path for path in (folder / "half" / "checkpoint-3").rglob("*") if path.is_file()]
    assert any(path.parent.name == "shards" for path in files) == (keys["parallel"] == "fsdp")
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert disk.damage(folder / "half" / "checkpoint-3") == ""


def test_a_killed_process_takes_the_run_down_with_one_line_and_a_restart_ends_the_same(
    tiny_model, chat_file, tmp_path, records
):
    def command(name: str, *words: str) -> list[str]:
        plain = {
            "output_dir": tmp_path / name,
            "model_name_or_path": tiny_model,
            "dataset_name": chat_file,
            "max_steps": 40,
            "save_steps": 5,
            "logging_steps": 1,
            "max_length": 64,
            "use_cpu": "true",
            "nproc": 2,
            "parallel": "fsdp",
        }
        return [sys.executable, "-m", "burnish", "sft", *(f"{k}={v}" for k, v in plain.items()), *words]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BURNISH_CACHE": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    options = {"env": environment, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command("whole"), timeout=150, **options)
    assert done.returncode == 0, done.stderr
    assert "burnish:" not in done.stderr and "Traceback" not in done.stderr

    def kill_one(name: str, *words: str) -> tuple[int, str]:
        process = subprocess.Popen(command(name, *words), **options)
        deadline = time.monotonic() + 120
        while not (tmp_path / name / "checkpoint-5").is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        ranks = [pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[0], signal.SIGKILL)
        began = time.monotonic()
        _, error = process.communicate(timeout=120)
        assert time.monotonic() - began < 60
        return process.returncode, error

    code, error = kill_one("killed")
    assert code == 128 + signal.SIGKILL
    lines = error[error.index("burnish:") :].splitlines()
    assert "Traceback" not in error and len(lines) == 2 and "process 1 was" in lines[0] and "SIGKILL" in lines[0], error
    newest = disk.checkpoints(tmp_path / "killed")[-1]
    assert disk.damage(newest) == ""
    again = subprocess.run(command("killed"), timeout=150, **options)
    assert again.returncode == 0, again.stderr

    code, error = kill_one("restarted", "max_restarts=1")
    assert code == 0, error

    for name in ("killed", "restarted"):
        ours, theirs = weights(tmp_path / name), weights(tmp_path / "whole")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
        steps = [record["step"] for record in records(tmp_path / name)]
        assert steps == list(range(1, 41)), name


def test_a_mistake_is_shown_once(tiny_model, tmp_path):
    command = [sys.executable, "-m", "burnish", "sft", f"output_dir={tmp_path / 'run'}", "nproc=2", "use_cpu=true"]
    command += ["max_restarts=2"]  # which a mistake doesn't get
    command += [f"model_name_or_path={tiny_model}", f"dataset_name={tmp_path / 'absent.jsonl'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "absent.jsonl" in done.stderr, done.stderr


def test_a_signal_to_the_one_who_started_them_lets_all_save_and_stop_for_good(tiny_model, chat_file, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "burnish", "sft", f"output_dir={run}", "nproc=2", "use_cpu=true", "save_steps=2"]
    command += [f"model_name_or_path={tiny_model}", f"dataset_name={chat_file}", "max_steps=9999", "max_restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    deadline = time.monotonic() + 90
    while not (run / "checkpoint-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM and not error, error
    assert "stop     SIGTERM" in said and said.count("resume   burnish sft") == 1
    newest = disk.checkpoints(run)[-1]
    assert disk.damage(newest) == "" and f"saved    {newest}" in said
