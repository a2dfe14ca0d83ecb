"""Checkpoints: whole or refused, rotated without losing the best, generators put back."""

import json
import random

import numpy as np
import pytest
import torch

from burnish import checkpoint as disk
from burnish.config.errors import UserError


class Weights(torch.nn.Linear):
    """Stands for a model where only the folder matters."""

    def save_pretrained(self, folder):
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, f"{folder}/model.safetensors")


def write(folder, step):
    torch.manual_seed(step)
    tensors = {"optimizer.0.exp_avg": torch.randn(4)}
    return disk.save_checkpoint(folder, step, Weights(3, 2), None, (tensors, {"groups": []}), {"global_step": step})


def test_what_was_written_is_read_back(tmp_path):
    folder = write(tmp_path, 7)
    state, tensors = disk.load_state(folder)
    assert state["global_step"] == 7 and state["updater"] == {"groups": []}
    torch.manual_seed(7)
    assert torch.equal(tensors["optimizer.0.exp_avg"], torch.randn(4))
    model = Weights(3, 2)
    disk.load_weights(model, folder)
    torch.manual_seed(7)
    torch.randn(4)
    assert torch.equal(model.weight, Weights(3, 2).weight)
    assert disk.damage(folder) == ""
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "the temporary folder is gone"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def altered(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncated, altered, lambda path: path.unlink()], ids=["truncated", "altered", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(tmp_path, harm, name):
    write(tmp_path, 2)
    newest = write(tmp_path, 10)
    if name == "manifest.json" and harm is altered:
        harm = truncated  # an altered byte of white space in JSON is no damage
    harm(newest / name)
    assert name in disk.damage(newest)
    found, passed_over = disk.find_checkpoint(tmp_path, True)
    assert found.name == "checkpoint-2" and len(passed_over) == 1 and "checkpoint-10" in passed_over[0]
    with pytest.raises(UserError, match=name):
        disk.find_checkpoint(tmp_path, str(newest))


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        disk.find_checkpoint(tmp_path / "never", True)
    with pytest.raises(UserError, match="no such checkpoint"):
        disk.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
    newest = write(tmp_path, 1)
    truncated(newest / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint-1: model.safetensors"):
        disk.find_checkpoint(tmp_path, True)


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write(tmp_path, 1)
    with pytest.raises(UserError, match=r"bias is \(2,\), the model has \(5,\)"):
        disk.load_weights(Weights(3, 5), folder)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path):
    write(tmp_path, 1)

    class Full(Weights):
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(UserError, match=r"checkpoint-2: can't be written \(No space.*goes on from checkpoint-1"):
        disk.save_checkpoint(tmp_path, 2, Full(3, 2), None, ({}, {}), {})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "what was written of it is gone"
    assert disk.find_checkpoint(tmp_path, True)[0].name == "checkpoint-1"
    assert [p.name for p in disk.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_refusal_is_told_whichever_library_met_it_and_no_other_error_is_hidden(tmp_path):
    from torch.distributed.checkpoint.api import CheckpointException

    full = OSError(28, "No space left on device")
    for error in (
        full,
        Exception("No space left on device (os error 28)"),  # as tokenizers has it
        CheckpointException("save", {1: (full, None)}),  # as torch has it, of checkpoints in parts
    ):
        with pytest.raises(UserError, match=r"here: can't be written \(No space left"), disk.writing("here"):
            raise error
    for other in (ValueError("a mistake of ours"), CheckpointException("save", {0: (KeyError("x"), None)})):
        with pytest.raises(type(other)), disk.writing("here"):
            raise other


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [(2, None, [30, 100]), (1, None, [100]), (2, 10, [10, 100]), (1, 10, [10, 100]), (None, None, [10, 20, 30, 100])],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, keep, left):
    for step in (10, 20, 30, 100):
        write(tmp_path, step)
    disk.rotate(tmp_path, limit, [tmp_path / f"checkpoint-{step}" for step in (100, keep) if step])
    assert [p.name for p in disk.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_rotation_never_deletes_what_was_just_written(tmp_path):
    """Resumed at step 2 of a run that had gone to 8: the new checkpoint-3 is older by number and must stay."""
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    assert len(disk.set_aside(tmp_path, 2)) == 3
    disk.rotate(tmp_path, 1, [write(tmp_path, 3)])
    assert [p.name for p in disk.checkpoints(tmp_path)] == ["checkpoint-3"]
    assert disk.find_checkpoint(tmp_path, True)[0].name == "checkpoint-3"


def test_files_in_sub_folders_are_held_too(tmp_path):
    class Nested(Weights):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")

    folder = disk.save_checkpoint(tmp_path, 1, Nested(3, 2), None, ({"x": torch.ones(1)}, {}), {})
    assert disk.damage(folder) == ""
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messagez }}")
    assert "tools.jinja" in disk.damage(folder)


def test_generators_go_on_where_they_were(tmp_path):
    draw = lambda: (random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())  # noqa: E731
    draw()
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    disk.restore_rng(folder, state["rng"])
    expected = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    disk.restore_rng(folder, state["rng"])
    assert draw() == expected
