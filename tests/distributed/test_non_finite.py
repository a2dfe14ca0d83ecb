"""A gradient that is no number on one of two processes: both stop, before the update, and keep what they had."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import SFTConfig
from burnish.loop.gate import NonFinite
from burnish.run import assemble
from burnish.training.broken import load_batches
from burnish.verbs.replay import replay

pytestmark = pytest.mark.distributed
BAD = 3


def settings(folder: Path, model: str, rows: str, parallel: str) -> SFTConfig:
    return SFTConfig(
        str(folder),
        model_name_or_path=model,
        dataset_name=rows,
        learning_rate=5e-3,
        per_device_train_batch_size=3,
        max_length=64,
        max_steps=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=BAD - 1,
        bf16=False,
        use_cpu=True,
        parallel=parallel,
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_process_stops_before_the_update(parallel, ranks, tiny_model, chat_file, tmp_path, capsys):
    folder = tmp_path / "run"

    def body() -> None:
        from burnish.parallel.world import world

        run = assemble(settings(folder, tiny_model, chat_file, parallel))
        step = run.objective.step

        def broken(batch, window):
            loss, metrics = step(batch, window)
            if world().rank == 1 and run.state.global_step == BAD - 1:
                loss.register_hook(lambda gradient: gradient * math.nan)  # the loss itself is sound
            return loss, metrics

        object.__setattr__(run.objective, "step", broken)
        try:
            run.train()
        except NonFinite as error:
            (tmp_path / f"said-{world().rank}").write_text(str(error))
        else:
            raise AssertionError("it went on")

    ranks(2, body).finish()
    for rank in range(2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert f"step {BAD}, rows " in said and "gradient norm nan" in said and "loss nan" not in said
    files = [folder / f"non_finite-{BAD}.safetensors", folder / f"non_finite-{BAD}-rank1.safetensors"]
    rows = [{row for batch in load_batches(file) for row in batch.rows} for file in files]
    assert rows[0] and rows[1] and not rows[0] & rows[1], "each its own"
    kept, before = load_file(folder / f"non_finite-{BAD}" / "model.safetensors"), stored(folder)
    assert kept.keys() >= before.keys() and all(torch.equal(kept[name], before[name]) for name in before)
    for file in files:
        assert replay(file) == 1, "the poison was this test's"
        assert "does not happen again" in capsys.readouterr().out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the last sound step, from the checkpoint, which may be in parts."""
    found = folder / f"checkpoint-{BAD - 1}"
    if (found / "model.safetensors").is_file():
        return load_file(found / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    parts = sorted((found / "shards").glob("*.safetensors"))
    for name, pieces in _pieces(parts).items():
        if name.startswith("model."):
            tensors[name.removeprefix("model.")] = torch.cat(pieces)
    return tensors


def _pieces(parts: list[Path]) -> dict[str, list[torch.Tensor]]:
    pieces: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, tensor in load_file(part).items():
            pieces.setdefault(name, []).append(tensor)
    return pieces
