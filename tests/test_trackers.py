"""Trackers get every record of metrics.jsonl when asked, say so when they can't, and never end a run."""

import json
import sys
import types

import pytest

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.load import dump, load
from burnish.metrics import Log
from burnish.run import assemble
from burnish.trackers import run_name, settings, trackers

ROWS = [{"text": f"seven small cats count to {n}"} for n in range(12)]


def config(folder, model, **given) -> SFTConfig:
    common = {"model_name_or_path": model, "max_steps": 4, "logging_steps": 2, "use_cpu": True, "save_strategy": "no"}
    return SFTConfig(str(folder), **common | given)


class FakeWandb(types.ModuleType):
    """What burnish calls of wandb, written down."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.calls, self.url = None, [], "https://example.org/run"

    def init(self, **given):
        self.calls.append(("init", given))
        self.run = self
        return self

    def define_metric(self, *names, **given):
        self.calls.append(("define", names))

    def log(self, numbers):
        self.calls.append(("log", numbers))


class FakeTrackio(types.ModuleType):
    def __init__(self, broken: bool = False):
        super().__init__("trackio")
        self.calls, self.broken = [], broken

    def init(self, **given):
        self.calls.append(("init", given))

    def log(self, numbers):
        self.calls.append(("log", numbers))
        if self.broken:
            raise ConnectionError("the network\nis gone")

    def finish(self):
        self.calls.append(("finish", None))


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sent(fake, name="train/loss") -> dict[int, float]:
    return {c["train/global_step"]: c[name] for kind, c in fake.calls if kind == "log" and name in c}


def test_wandb_gets_the_runs_own_records(tmp_path, tiny_model, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    given = {"report_to": ["wandb"], "run_name": "night", "project": "foxes", "hub_token": "secret"}
    run = assemble(
        config(tmp_path, tiny_model, eval_strategy="steps", **given), train_dataset=ROWS, eval_dataset=ROWS[:3]
    )
    assert fake.calls == [], "nothing is opened before the training begins"
    run.train()
    kind, opened = fake.calls[0]
    assert (kind, opened["project"], opened["name"]) == ("init", "foxes", "night")
    assert opened["config"]["max_steps"] == 4 and "secret" not in str(opened)
    logged = [record for record in records(tmp_path) if "loss" in record]
    evaluated = [record for record in records(tmp_path) if "eval_loss" in record and "train_runtime" not in record]
    assert sent(fake) == {record["step"]: record["loss"] for record in logged} and len(logged) == 2
    assert sent(fake, "train/mem_gib") and sent(fake, "train/tok_s")
    assert sent(fake, "eval/loss") == {record["step"]: record["eval_loss"] for record in evaluated}
    assert len([1 for kind, _ in fake.calls if kind == "init"]) == 1


def test_a_run_that_the_script_opened_goes_on(tmp_path, tiny_model, monkeypatch):
    fake = FakeWandb()
    fake.run = fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assemble(config(tmp_path, tiny_model, report_to="wandb"), train_dataset=ROWS).train()
    assert [kind for kind, _ in fake.calls].count("init") == 0 and len(sent(fake)) == 2


def test_trackio_is_closed_and_opened_again_for_a_later_evaluation(tmp_path, tiny_model, monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run = assemble(config(tmp_path, tiny_model, report_to="trackio"), train_dataset=ROWS, eval_dataset=ROWS[:3])
    run.train()
    assert [kind for kind, _ in fake.calls] == ["init", "log", "log", "log", "finish"]
    assert list(sent(fake, "train/train_loss")) == [4], "the summary came before it was closed"
    assert fake.calls[0][1]["name"] == tmp_path.name and fake.calls[0][1]["resume"] == "allow"
    run.evaluate()
    assert [kind for kind, _ in fake.calls[5:]] == ["init", "log"]


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, tiny_model, monkeypatch, capfd):
    fake = FakeTrackio(broken=True)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    result = assemble(config(tmp_path, tiny_model, report_to="trackio"), train_dataset=ROWS).train()
    assert result.global_step == 4
    assert [kind for kind, _ in fake.calls] == ["init", "log"]
    said = capfd.readouterr().err
    assert said.count("trackio failed and gets nothing more of this run (ConnectionError: the network is gone)") == 1


def test_tensorboard_reads_back_what_was_logged(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("google.protobuf")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assemble(config(tmp_path, tiny_model, report_to="tensorboard"), train_dataset=ROWS).train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({r["step"]: r["loss"] for r in records(tmp_path) if "loss" in r})


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, tiny_model, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(UserError) as error:
        assemble(config(tmp_path, tiny_model, report_to=name), train_dataset=ROWS)
    assert str(error.value).startswith(f"SFTConfig(report_to=...): report_to {name} takes the package {name}, which")
    assert f"pip install {name}, or set report_to: none" in str(error.value)


def test_only_the_process_that_speaks_for_all_reports(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", FakeTrackio())
    given = config(tmp_path, tiny_model, report_to=["trackio", "none", "trackio"])
    assert [tracker.name for tracker in trackers(given, Log(None))] == ["trackio"]
    assert trackers(given, Log(None, quiet=True)) == []


@pytest.mark.parametrize("name", ["mlflow", "all", ["trackio", "comet_ml"]])
def test_other_trackers_are_refused_by_name(name):
    with pytest.raises(UserError, match="is not taken"):
        SFTConfig("out", report_to=name)


def test_a_run_is_named_after_its_folder_unless_it_has_a_name():
    assert run_name(SFTConfig("runs/foxes")) == "foxes" and run_name(SFTConfig("runs/foxes", run_name="b")) == "b"


def test_the_token_is_in_no_file_and_no_dashboard(tmp_path):
    given = SFTConfig(str(tmp_path), hub_token="hf_secret", push_to_hub=True)
    assert "hf_secret" not in dump(given) and "hf_secret" not in str(settings(given))
    (tmp_path / "run.yaml").write_text(dump(given))
    assert load(SFTConfig, tmp_path / "run.yaml").hub_token is None
