"""A run that is told to stop loses nothing: the same command goes on from there and ends bit for bit the same."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from burnish import SFTConfig, UserError
from burnish.cli import main
from burnish.interrupt import Interrupt
from burnish.run import train

STEPS = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def settings(folder, model, rows, **given) -> SFTConfig:
    base = {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_length": 64, "logging_steps": 1}
    base |= {"save_strategy": "no", "max_steps": STEPS, "gradient_checkpointing": False, "bf16": False}
    return SFTConfig(str(folder), **{**base, "model_name_or_path": model, "dataset_name": rows, **given})


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same_weights(first, second) -> bool:
    a, b = weights(first), weights(second)
    return all(torch.equal(a[name], b[name]) for name in a)


def steps_of(folder) -> list[int]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


class At:
    """A callback that does something at the end of some steps."""

    def __init__(self, actions):
        self.actions = actions

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.actions:
            self.actions.pop(state.global_step)()


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_and_the_same_call_goes_on(tmp_path, tiny_model, chat_file, number, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(whole, tiny_model, chat_file))
    config = settings(broken, tiny_model, chat_file)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    result = train(config, callbacks=[At({3: send(number)})])
    assert (result.interrupted, result.global_step) == (number, 3)
    assert f"{number.name}: stopping after this step" in capsys.readouterr().out
    assert not (broken / "model.safetensors").exists()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert train(config).interrupted is None
    assert same_weights(whole, broken)
    assert steps_of(broken) == list(range(1, STEPS + 1))


def test_every_way_of_stopping_at_once_ends_the_same(tmp_path, tiny_model, chat_file):
    """Accumulation, an epoch's end, evaluation under way, the best checkpoint: all in one run, stopped at each step."""
    given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 2}
    given |= {"test_split_size": 12, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    given |= {"save_steps": 4, "load_best_model_at_end": True, "max_steps": -1, "per_device_eval_batch_size": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(whole, tiny_model, chat_file, **given))
    config = settings(broken, tiny_model, chat_file, **given)
    stops = 0
    while not (broken / "model.safetensors").exists():
        stops += 1
        train(config, callbacks=[At({stops: send(signal.SIGTERM)})])
    assert stops >= 10
    assert same_weights(whole, broken)
    assert steps_of(broken) == steps_of(whole)
    evaluated = [
        [
            record
            for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in record
        ]
        for folder in (whole, broken)
    ]
    first, second = ([(r["step"], r["eval_loss"]) for r in records if "loss" not in r] for records in evaluated)
    assert first == second


def test_files_stop_and_save_from_outside(tmp_path, tiny_model, chat_file):
    folder = tmp_path / "run"
    actions = {2: (folder / "SAVE").touch, 5: (folder / "STOP").touch}
    result = train(settings(folder, tiny_model, chat_file), callbacks=[At(actions)])
    assert (result.interrupted, result.global_step) == (0, 5)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert not (folder / "SAVE").exists() and not (folder / "STOP").exists()


def test_a_second_ctrl_c_stops_now(tmp_path, tiny_model, chat_file):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path / "run", tiny_model, chat_file), callbacks=[At({3: twice})])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_another_configuration_is_refused_with_the_difference(tmp_path, tiny_model, chat_file):
    folder = tmp_path / "run"
    train(settings(folder, tiny_model, chat_file), callbacks=[At({3: send(signal.SIGTERM)})])
    with pytest.raises(UserError, match=r"learning_rate \(0.005, now 0.01\) differ"):
        train(settings(folder, tiny_model, chat_file, learning_rate=1e-2))
    train(settings(folder, tiny_model, chat_file, learning_rate=1e-2, overwrite_output_dir=True))
    assert steps_of(folder) == list(range(1, STEPS + 1))


def test_what_was_killed_before_its_first_checkpoint_starts_anew_and_what_ended_stays(tmp_path, tiny_model, chat_file):
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(settings(folder, tiny_model, chat_file), callbacks=[At({3: lambda: 1 / 0})])
    train(settings(folder, tiny_model, chat_file))
    assert steps_of(folder) == list(range(1, STEPS + 1))
    with pytest.raises(UserError, match="already holds a run or a model"):
        train(settings(folder, tiny_model, chat_file))


def test_the_command_prints_how_to_go_on(tmp_path, tiny_model, chat_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        f"model_name_or_path: {tiny_model}\ndataset_name: {chat_file}\noutput_dir: run one\nmax_steps: 50\n"
        "max_length: 64\nbf16: false\nlogging_steps: 1\nsave_strategy: 'no'\n"
    )
    Path("run one").mkdir()
    Path("run one", "STOP").touch()
    assert main(["sft", "run.yaml", "output_dir=run one"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "resume   burnish sft run.yaml 'output_dir=run one'"
    monkeypatch.setattr(Interrupt, "stopping", lambda self: setattr(self, "number", signal.SIGTERM) or True)
    assert main(["sft", "run.yaml", "output_dir=run one"]) == 128 + signal.SIGTERM
