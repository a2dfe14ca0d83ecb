"""What a run says and does after it was stopped or resumed is what it would have been in one go."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

from burnish import SFTConfig, SFTTrainer, UserError
from burnish.checkpoint import MANIFEST, _fingerprint
from burnish.run import train
from burnish.run.rows import read_batches
from burnish.verbs.runfiles import read_run

BASE = {
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 8,
    "gradient_checkpointing": False,
    "bf16": False,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path, tiny_model, chat_file):
    def make(name: str, **given) -> SFTConfig:
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file}
        return SFTConfig(str(tmp_path / name), **{**BASE, **common, **given})

    return make


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_mean_loss_of_a_resumed_run_counts_the_steps_since_the_last_log(settings):
    whole = train(settings("whole", logging_steps=4))
    assert train(settings("parts", logging_steps=4), callbacks=[StopAt(6)]).interrupted
    resumed = train(settings("parts", logging_steps=4))
    assert resumed.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)


def test_a_stopped_trainer_still_evaluates_and_goes_on(settings):
    config = settings("run", test_split_size=6)
    trainer = SFTTrainer(args=config, callbacks=[StopAt(3)])
    assert trainer.train().interrupted == signal.SIGTERM and trainer.state.global_step == 3
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.train().interrupted is None and trainer.state.global_step == 8


def test_the_best_model_of_the_run_that_is_gone_on_with_elsewhere_is_still_found(settings):
    best = {"test_split_size": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best |= {"load_best_model_at_end": True}
    train(settings("first", max_steps=4, **best))
    source = Path(settings("first").output_dir) / "checkpoint-4"
    state = source / "state.json"  # with a best that nothing will beat
    stored = json.loads(state.read_text())
    stored["best_metric"] = 0.0
    state.write_text(json.dumps(stored))
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["state.json"] = _fingerprint(state)
    (source / MANIFEST).write_text(json.dumps(manifest))
    result = train(settings("second", resume_from_checkpoint=str(source), **best))
    assert result.global_step == 8
    assert f"best     {source.parent.resolve()}/checkpoint-" in (result.output_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    "other",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"gradient_checkpointing": True, "checkpoint_segment": 2},
    ],
)
def test_a_run_may_go_on_with_less_memory(settings, other):
    whole = train(settings("whole"))
    assert train(settings("parts"), callbacks=[StopAt(4)]).interrupted
    resumed = train(settings("parts", **other))
    assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]


def test_long_topics_of_the_log_are_facts_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "log.txt").write_text("data     7 rows\nreference a copy of the model\nwarning  slow\n")
    assert read_run(tmp_path).facts == [("data", "7 rows"), ("reference", "a copy of the model"), ("warning", "slow")]


def test_a_preview_without_training_data_is_a_line_and_no_traceback(settings, chat_file):
    with pytest.raises(UserError, match="no training data"):
        read_batches(settings("run", dataset_name=None, eval_dataset_name=chat_file))
