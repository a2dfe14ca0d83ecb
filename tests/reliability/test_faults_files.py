"""Files of a run that are not what they were, or not what they seem: one clear line or a recovery that is told.

The last good checkpoint loads, and the run that goes on from it ends bit for bit like one that nobody disturbed.
Nothing that is read runs code.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from faults import DENIED, HARMS, assert_one_line, assert_same, failing, good, settings

from burnish import SFTConfig
from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.run import train

pytestmark = pytest.mark.usefixtures("cache")

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer.json", "config.json"]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_serves(stopped, name, harm):
    newest = stopped / "checkpoint-4"
    HARMS[harm](newest / name)
    found, passed_over = disk.find_checkpoint(stopped, True)
    assert found.name == "checkpoint-2" and len(passed_over) == 1
    assert f"checkpoint-4: {name}" in passed_over[0]
    with pytest.raises(UserError) as error:
        disk.find_checkpoint(stopped, str(newest))
    assert_one_line(error.value, name, "checkpoint-4")
    state, tensors = disk.load_state(found)
    assert state["global_step"] == 2 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


MANIFESTS = {
    "empty": "",
    "torn": '{"state.json": {"bytes": 1',
    "no json": "\x00\xff not json",
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "nothing in it": "{}",
    "lists of nothing": '{"state.json": null}',
    "no checksum": '{"state.json": {"bytes": 3}}',
    "other types": '{"state.json": {"bytes": "3", "sha256": 7}}',
    "a file outside": '{"state.json": {"bytes": 1, "sha256": ""}, "../../evil": {"bytes": 1, "sha256": ""}}',
    "nested": "[" * 100_000,
    "a name with a null": '{"a\\u0000b": {"bytes": 1, "sha256": ""}, "state.json": {"bytes": 1, "sha256": ""}}',
}


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none_is_damage(stopped, text):
    (stopped / "checkpoint-4" / "manifest.json").write_text(MANIFESTS[text])
    found, passed_over = disk.find_checkpoint(stopped, True)
    assert found.name == "checkpoint-2" and "checkpoint-4" in passed_over[0]


@pytest.mark.parametrize("harm", ["bit in the middle", "half", "missing", "manifest", "both", "the newer ones"])
def test_a_run_goes_on_from_what_is_whole_and_ends_the_same(stopped, tiny_model, chat_file, whole, capsys, harm):
    newest = stopped / "checkpoint-4"
    if harm == "manifest":
        (newest / "manifest.json").write_text("[]")
    elif harm == "both":  # a log torn in the middle too
        HARMS["half"](newest / "model.safetensors")
        with (stopped / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 5, "lo\n[1]\n\x80')
    elif harm == "the newer ones":
        shutil.copytree(newest, stopped / "checkpoint-5")
        for step in (4, 5):
            HARMS["empty"](stopped / f"checkpoint-{step}" / "optimizer.safetensors")
    else:
        HARMS[harm](newest / "optimizer.safetensors")
    train(settings(stopped, tiny_model, chat_file))
    assert_same(stopped, whole)
    assert "checkpoint-4" in capsys.readouterr().err, "what was passed over is said"
    assert "at step 2 of 6" in (stopped / "log.txt").read_text()


def test_no_good_checkpoint_at_all_is_one_line_and_nothing_is_deleted(stopped, tiny_model, chat_file):
    for step in (2, 4):
        HARMS["half"](stopped / f"checkpoint-{step}" / "model.safetensors")
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(UserError) as error:
        train(settings(stopped, tiny_model, chat_file))
    assert_one_line(error.value, "no whole checkpoint", "checkpoint-2", "checkpoint-4")
    assert sorted(path.name for path in stopped.iterdir()) == before


# ---- what vanishes, and what isn't what it seems


@pytest.mark.parametrize("when", ["before", "on resuming"])
@pytest.mark.parametrize("what", ["data", "model"])
def test_a_vanished_file_is_one_line(tmp_path, stopped, tiny_model, chat_file, whole, what, when):
    rows, model = shutil.copy(chat_file, tmp_path / "rows.jsonl"), shutil.copytree(tiny_model, tmp_path / "model")
    folder = stopped if when == "on resuming" else tmp_path / "new"
    place = Path(rows) if what == "data" else Path(model)
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        train(settings(folder, model, rows))
    assert str(place) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists() and good(stopped) == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / "elsewhere").rename(place)
    train(settings(folder, model, rows))
    assert_same(folder, whole)


def test_a_data_file_may_vanish_while_it_is_trained_on(tmp_path, tiny_model, chat_file, whole):
    from burnish.run import assemble

    rows = shutil.copy(chat_file, tmp_path / "rows.jsonl")
    run = assemble(settings(tmp_path / "run", tiny_model, rows))
    Path(rows).unlink()
    run.train()
    run.save_model()
    assert_same(tmp_path / "run", whole)


def test_changed_rows_are_another_run(tmp_path, stopped, tiny_model, chat_file):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(reversed(Path(chat_file).read_text().splitlines(keepends=True))))
    with pytest.raises(UserError) as error:
        train(settings(stopped, tiny_model, rows))
    assert_one_line(error.value, "the rows differ")


def test_a_checkpoint_that_is_a_file_is_none(stopped, tiny_model, chat_file, whole):
    """Where the next checkpoint should go, it is in the way; elsewhere nobody minds."""
    (stopped / "checkpoint-6").write_text("not a folder")
    (stopped / "checkpoint-99").write_text("not a folder")
    with pytest.raises(UserError) as error:
        train(settings(stopped, tiny_model, chat_file))
    assert_one_line(error.value, "checkpoint-6", "can't be written", "goes on from checkpoint-4")
    (stopped / "checkpoint-6").unlink()
    train(settings(stopped, tiny_model, chat_file))
    assert_same(stopped, whole)


@pytest.mark.parametrize("link", ["checkpoint-6", ".writing-checkpoint-6", "checkpoint-2"])
def test_links_are_not_followed_to_what_is_not_the_runs(tmp_path, stopped, tiny_model, chat_file, whole, link):
    """Rotation and saving take away links, never what they point to."""
    others = tmp_path / "others"
    if link == "checkpoint-2":  # moved to another disk, say
        (stopped / link).rename(others)
    else:
        others.mkdir()
        (others / "precious").write_text("precious")
    (stopped / link).symlink_to(others)
    before = sorted(path.name for path in others.iterdir())
    config = settings(stopped, tiny_model, chat_file, save_total_limit=1)
    try:
        train(config)
    except UserError as error:
        assert_one_line(error, "checkpoint-6")
        (stopped / link).unlink()
        train(config)
    assert sorted(path.name for path in others.iterdir()) == before
    assert_same(stopped, whole)


def test_rotation_keeps_the_old_ones_while_the_new_one_is_damaged(stopped, tiny_model, chat_file, monkeypatch, capsys):
    """A disk that gives back other bytes than it was given."""
    honest = disk._finish

    def torn(run_dir, aside, final):
        honest(run_dir, aside, final)
        HARMS["bit in the middle"](final / "optimizer.safetensors")

    monkeypatch.setattr(disk, "_finish", torn)
    train(settings(stopped, tiny_model, chat_file, save_total_limit=1))
    assert good(stopped) == ["checkpoint-2", "checkpoint-4"]
    assert "checksum); the older checkpoints stay" in capsys.readouterr().err


def test_rotation_that_may_not_delete_goes_on(stopped, tiny_model, chat_file, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        failing(patch, (shutil, "rmtree"), 1, DENIED, lambda path, **_: Path(path).name == "checkpoint-2")
        train(settings(stopped, tiny_model, chat_file, save_total_limit=1))
    assert "checkpoint-2 can't be deleted (Permission denied)" in capsys.readouterr().err
    assert_same(stopped, whole)


@pytest.mark.parametrize("name", ["../../../outside", "/tmp/outside", ".."])
def test_no_template_or_adapter_writes_outside_of_the_folder(tmp_path, tiny_tokenizer, name):
    """A downloaded tokenizer may name its templates as it likes; each becomes a file of that name."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", name: "{{ messages }}"}
    target = tmp_path / "a" / "b" / "c"
    target.mkdir(parents=True)
    with pytest.raises(UserError, match="is no name of a file"):
        disk.save_model(torch.nn.Linear(1, 1), tokenizer, target)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- nothing that is read can run code


class Planted:
    """As a pickle, it creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_pickles_are_not_read(tmp_path, stopped, tiny_model, chat_file, whole):
    trap = tmp_path / "trap"
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "pytorch_model.bin"):
        torch.save({"weight": Planted(trap)}, stopped / "checkpoint-4" / name)
    torch.save(Planted(trap), stopped / "checkpoint-4" / "state.pkl")
    with pytest.raises(Exception):  # noqa: B017  # the trap is one
        torch.load(stopped / "checkpoint-4" / "optimizer.pt", weights_only=True)
    train(settings(stopped, tiny_model, chat_file))
    assert_same(stopped, whole)
    assert not trap.exists()
    torch.load(stopped / "checkpoint-4" / "optimizer.pt", weights_only=False)
    assert trap.exists(), "it would have gone off"


def test_a_model_that_is_a_pickle_is_refused(tmp_path, tiny_model, chat_file):
    trap, model = tmp_path / "trap", Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    torch.save({"weight": Planted(trap)}, model / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        train(settings(tmp_path / "run", model, chat_file))
    assert_one_line(error.value, "pickle", "pytorch_model.bin")
    assert not trap.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run(tmp_path, tiny_model, chat_file, file):
    trap, model = tmp_path / "trap", Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "code.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n")
    settings_of = json.loads((model / file).read_text())
    settings_of |= {"model_type": "never_heard_of"} if file == "config.json" else {"tokenizer_class": "Own"}
    own = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T"] * 2}
    settings_of["auto_map"] = own
    (model / file).write_text(json.dumps(settings_of))
    try:
        train(settings(tmp_path / "run", model, chat_file))
    except UserError as error:
        assert str(model) in str(error) and "\n" not in str(error)
    assert not trap.exists()
    assert SFTConfig("unused").trust_remote_code is False
