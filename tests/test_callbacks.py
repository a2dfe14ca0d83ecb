"""transformers' callbacks work: which events come, in which order, with what, and what a callback may change."""

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl

from burnish import SFTConfig, SFTTrainer, UserError

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Every event with the step at which it came, and what came with it."""

    def __init__(self):
        self.seen, self.logs, self.given = [], [], {}


def recording(event):
    def record(self, args, state, control, **given):
        self.seen.append((event, state.global_step))
        self.given[event] = set(given)
        if event == "on_log":
            self.logs.append(given["logs"])

    return record


for event in EVENTS:
    if event not in ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_predict", "on_push_begin"):
        setattr(Recorder, event, recording(event))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tiny_model, chat_rows):
    def made(*callbacks, folder="out", **given) -> SFTTrainer:
        given = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "learning_rate": 1e-3, **given}
        config = SFTConfig(folder, per_device_train_batch_size=2, **given)
        return SFTTrainer(
            tiny_model, config, train_dataset=chat_rows[:8], eval_dataset=chat_rows[:4], callbacks=list(callbacks)
        )

    return made


def steps(recorder, event) -> list[int]:
    return [step for name, step in recorder.seen if name == event]


def test_events_come_as_with_transformers(run):
    recorder = Recorder()
    trainer = run(recorder, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)
    assert recorder.seen == [("on_init_end", 0)]
    trainer.train()
    without = [entry for entry in recorder.seen if entry[0] != "on_prediction_step"]
    step = [("on_step_begin", 0), ("on_step_end", 1), ("on_step_begin", 1), ("on_step_end", 2)]
    second = [("on_log", 2), ("on_log", 2), ("on_evaluate", 2)]
    first = [("on_init_end", 0), ("on_train_begin", 0), ("on_epoch_begin", 0), *step, *second, ("on_step_begin", 2)]
    assert without[: len(first)] == first
    assert steps(recorder, "on_epoch_begin") == [0, 4] and steps(recorder, "on_epoch_end") == [4, 6]
    assert steps(recorder, "on_save") == [4, 6] and steps(recorder, "on_evaluate") == [2, 4, 6]
    assert steps(recorder, "on_prediction_step") == [2, 4, 6]
    assert without[-2:] == [("on_log", 6), ("on_train_end", 6)]
    assert "train_runtime" in recorder.logs[-1] and "eval_loss" in recorder.logs[1] and "loss" in recorder.logs[0]
    common = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}
    assert common <= recorder.given["on_step_end"]
    assert "metrics" in recorder.given["on_evaluate"]


class Set(TrainerCallback):
    """Sets flags of control: {(event, step): {flag: value}}."""

    def __init__(self, plan):
        self.plan = plan

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def act(args, state, control, **given):
            for flag, value in self.plan.get((name, state.global_step), {}).items():
                setattr(control, flag, value)

        return act


def test_flags_ask_for_what_the_configuration_does_not(run, tmp_path):
    recorder = Recorder()
    asked = Set({
        ("on_step_end", 1): {"should_log": True},
        ("on_step_end", 2): {"should_evaluate": True},
        ("on_step_end", 3): {"should_save": True},
    })  # fmt: skip
    asked.plan["on_step_begin", 1] = {"should_log": True}
    run(recorder, asked, logging_steps=100).train()
    assert [log.get("step") for log in recorder.logs if "loss" in log] == [1, 2, 4]
    assert steps(recorder, "on_evaluate") == [2] and steps(recorder, "on_save") == [3]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_flags_take_back_what_the_configuration_asks_for(run):
    recorder = Recorder()
    never = Set({
        ("on_step_end", 2): {"should_log": False, "should_evaluate": False, "should_save": False},
        ("on_step_end", 3): {"should_evaluate": False},
    })  # fmt: skip
    given = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    run(recorder, never, **given).train()
    assert [log["step"] for log in recorder.logs if "loss" in log] == [1, 3, 4]
    assert steps(recorder, "on_evaluate") == [1, 4] and steps(recorder, "on_save") == [4]


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_epoch_end", "on_evaluate"])
def test_training_stops_when_a_callback_says_so(run, event):
    given = {"eval_strategy": "steps", "eval_steps": 2} if event == "on_evaluate" else {}
    step = 4 if event == "on_epoch_end" else 2
    trainer = run(Set({(event, step): {"should_training_stop": True}}), max_steps=8, **given)
    assert trainer.train().global_step == step == trainer.state.global_step


def test_an_epoch_stops_when_a_callback_says_so(run):
    recorder = Recorder()
    trainer = run(recorder, Set({("on_step_end", 1): {"should_epoch_stop": True}}), max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert steps(recorder, "on_epoch_begin") == [0, 1, 5], "the epoch after it is whole again"


def test_an_epoch_s_end_can_ask_for_an_evaluation_and_a_checkpoint(run, tmp_path):
    recorder = Recorder()
    run(recorder, Set({("on_epoch_end", 4): {"should_evaluate": True, "should_save": True}})).train()
    assert steps(recorder, "on_evaluate") == [4] and steps(recorder, "on_save") == [4]


def test_a_control_object_that_is_returned_counts(run):
    class Returns(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            return TrainerControl(should_training_stop=state.global_step == 3)

    recorder = Recorder()
    trainer = run(Returns(), recorder, max_steps=8)
    assert trainer.train().global_step == 3
    assert [log["step"] for log in recorder.logs if "loss" in log] == [], "the new object asks for no log"


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before, as the trainer sees it."""

    def __init__(self):
        self.loss = 1.0

    def on_evaluate(self, args, state, control, metrics, **given):
        self.loss += 1
        metrics["eval_loss"] = self.loss


@pytest.mark.parametrize("save", ["no", "steps"])
def test_early_stopping(run, save, tmp_path):
    """The first value is the best; patience 2 ends the run two evaluations later."""
    recorder = Recorder()
    given = {"load_best_model_at_end": True, "save_steps": 1} if save == "steps" else {"metric_for_best_model": "loss"}
    trainer = run(
        Worse(), EarlyStoppingCallback(2), recorder, max_steps=8, eval_strategy="steps", eval_steps=1,
        save_strategy=save, **given,
    )  # fmt: skip
    assert trainer.train().global_step == 3
    assert trainer.state.best_metric == 2.0 and steps(recorder, "on_evaluate") == [1, 2, 3]
    assert trainer.state.best_model_checkpoint == (None if save == "no" else "checkpoint-1")


def test_early_stopping_goes_on_counting_in_a_resumed_run(run):
    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **given):
            if state.global_step == 2:
                raise KeyboardInterrupt

    given = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given |= {"load_best_model_at_end": True}
    with pytest.raises(BaseException, match=""):
        run(Worse(), EarlyStoppingCallback(3), Kill(), **given).train()
    worse = Worse()
    worse.loss = 10.0
    trainer = run(worse, EarlyStoppingCallback(3), **given)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4, "one bad evaluation before, two after"


def test_early_stopping_without_a_metric_is_one_line(run):
    with pytest.raises(UserError, match="^EarlyStoppingCallback: EarlyStoppingCallback requires metric_for_best_model"):
        run(EarlyStoppingCallback()).train()


def test_transformers_own_callbacks_print(run, capfd):
    run(PrinterCallback, ProgressCallback(), eval_strategy="epoch").train()
    out = capfd.readouterr()
    assert "'loss': " in out.out and "'eval_loss': " in out.out and "'train_runtime': " in out.out
    assert "4/4" in out.err


def test_what_is_never_called_is_said(run, capsys):
    class Gradients(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **given): ...

    run(Gradients)
    said = capsys.readouterr()
    assert "Gradients.on_optimizer_step is never called" in said.out + said.err


def test_callbacks_can_be_added_and_removed(run):
    first, second = Recorder(), Recorder()
    trainer = run(first)
    trainer.add_callback(second)
    trainer.add_callback(PrinterCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(first)
    trainer.train()
    assert first.seen == [("on_init_end", 0)] and steps(second, "on_step_end") == [1, 2, 3, 4]
    assert trainer.run.callbacks == [second]


def test_what_a_callback_does_to_its_logs_stays_with_it(run):
    class Drops(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **given):
            logs.clear()

    trainer = run(Drops(), eval_strategy="epoch")
    trainer.train()
    for name in ("loss", "eval_loss", "train_runtime"):
        assert any(name in record for record in trainer.state.log_history), name


def test_state_and_args_have_what_callbacks_read(run):
    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            assert state.is_world_process_zero and state.is_local_process_zero and not state.is_hyper_param_search
            assert state.num_input_tokens_seen == state.num_tokens > 0 and state.max_steps == 4
            assert args.output_dir == "out" and args.world_size == 1 and args.to_dict()["logging_steps"] == 2

    run(Reads()).train()
