"""Corners of a run on several processes: bfloat16, empty parts, a reference that moves, what only one process asks."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import DPOConfig, RewardConfig, SFTConfig
from burnish.config.errors import UserError
from burnish.parallel import store
from burnish.parallel.shards import whole_state
from burnish.parallel.world import least
from burnish.run import assemble, train

pytestmark = pytest.mark.distributed
COMMON = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 64,
    "allow_truncation": True,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "bf16": False,
    "use_cpu": True,
}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 5, "load_best_model_at_end": True}
CORNERS = {
    "masters ddp": (SFTConfig, {"parallel": "ddp", "bf16": True}),
    "masters fsdp": (SFTConfig, {"parallel": "fsdp", "bf16": True}),
    "low bits": (SFTConfig, {"parallel": "ddp", "bf16": True, "optim": "adamw_bf16"}),
    "masters lora": (SFTConfig, {"parallel": "fsdp", "bf16": True, **LORA}),
    "bfloat16 base": (SFTConfig, {"parallel": "fsdp", "bf16": True, "dtype": "bfloat16", **LORA}),
    "moving reference": (DPOConfig, {"parallel": "fsdp", "learning_rate": 1e-3, **MOVING}),
    "one score": (RewardConfig, {"parallel": "fsdp", **LORA}),  # its layer has one row, for two processes
    "best, weights only": (SFTConfig, {"parallel": "fsdp", "bf16": True, "save_only_model": True, **BEST}),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = Path(folder).glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def corners(tmp_path_factory, ranks, tiny_model, chat_file):
    """The folder of runs (corner / one, many, again, alone): one process's, two's, theirs gone on with by two, and one
    of those by one."""
    folder = tmp_path_factory.mktemp("corners")
    rows = [{"prompt": f"say {n}", "chosen": " yes" * (1 + n % 5), "rejected": " no" * (1 + n % 3)} for n in range(23)]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str, run: str, **more):
        kind, keys = CORNERS[name]
        if run in ("one", "alone"):
            keys = {key: value for key, value in keys.items() if key != "parallel"}
        if run in ("again", "alone"):
            more["resume_from_checkpoint"] = str(folder / name / "many" / "checkpoint-2")
        data = chat_file if kind is SFTConfig else str(pairs)
        names = {"model_name_or_path": tiny_model, "dataset_name": data}
        return kind(str(folder / name / run), **{**COMMON, **keys, **names, **more})

    def body() -> None:
        for name in CORNERS:
            train(config(name, "many"))
            if "weights only" not in name:
                train(config(name, "again"))

    running = ranks(2, body)
    for name in CORNERS:
        train(config(name, "one", gradient_accumulation_steps=4))
    running.finish()
    train(config("masters fsdp", "alone"))
    return folder


@pytest.mark.parametrize("name", CORNERS)
def test_a_corner_is_as_on_one_process_and_goes_on_exactly(name, corners, records):
    folder = corners / name
    # in bfloat16 sums of gradients are rounded in other places
    rel = 1e-3 if CORNERS[name][1].get("bf16") else 1e-5
    for ours, theirs in zip(records(folder / "many"), records(folder / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5 * rel), ours["step"]
    many, one = weights(folder / "many"), weights(folder / "one")
    assert {key: value.dtype for key, value in many.items()} == {key: value.dtype for key, value in one.items()}
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, rtol=0.01, atol=5e-4)  # a bfloat16, 4 steps of Adam
    if "weights only" in name:
        (part, *_) = sorted((folder / "many" / "checkpoint-2" / "shards").glob("*.safetensors"))
        assert all(key.startswith("model.") for key in load_file(part))
        return
    again = weights(folder / "again")
    assert all(torch.equal(again[key], value) for key, value in many.items())
    if name == "masters fsdp":
        for ours, theirs in zip(records(folder / "alone"), records(folder / "many")[2:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel), ours["step"]


class _StopOnOne:
    """Of the callbacks of two processes only the second one's asks for an end, as one that looks at the clock might."""

    def on_step_end(self, config, state, control, **extra) -> None:
        control.should_training_stop = os.environ["RANK"] == "1" and state.global_step == 2


class _NoRoom(store.HuggingFaceStorageWriter):
    def write_data(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_one_process_asks_or_meets_all_do(ranks, records, tiny_model, chat_file, tmp_path):
    names = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "parallel": "fsdp"}
    stopped, full = (SFTConfig(str(tmp_path / name), **{**COMMON, **names}) for name in ("stopped", "full"))
    later = SFTConfig(str(tmp_path / "later"), **{**COMMON, **names, "async_save": True})

    def body() -> None:
        rank = int(os.environ["RANK"])
        run = assemble(stopped, callbacks=[_StopOnOne])
        assert run.train().global_step == 2
        assert least(5.0 - rank) == 4.0
        if rank == 1:
            store._writer = lambda folder: _NoRoom(path=str(folder / store.FOLDER), save_distributed=True)
        for config in (full, later):
            with pytest.raises(UserError, match=r"can't be written .No space left on device."):
                train(config)

    ranks(2, body).finish()
    assert [record["step"] for record in records(tmp_path / "stopped")] == [1, 2]
    assert not [*(tmp_path / "full").glob("*checkpoint*"), *(tmp_path / "later").glob("checkpoint*")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_script_s_models_of_other_seeds_become_the_first_process_s(parallel, ranks, tiny_model, chat_file, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def made(seed: int):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))

    config = SFTConfig(str(tmp_path / "run"), parallel=parallel, **COMMON)

    def body() -> None:
        given = {"processing_class": AutoTokenizer.from_pretrained(tiny_model), "train_dataset": chat_file}
        run = assemble(config, model=made(int(os.environ["RANK"])), **given)
        state = whole_state(run.model, keep=True) if parallel == "fsdp" else run.model.state_dict()
        first = made(0).state_dict()
        assert all(torch.equal(state[name], value) for name, value in first.items())

    ranks(2, body).finish()
