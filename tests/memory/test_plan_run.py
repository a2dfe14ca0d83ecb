"""The plan inside a run: what is said before it, the heaviest batch first, and what running out of memory becomes."""

import pytest
import torch
from metering import build

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.memory.forecast import asked, forecast, memory_for
from burnish.memory.plan import Load
from burnish.memory.settings import Memory
from burnish.run import assemble

CPU = torch.device("cpu")


@pytest.fixture
def started(tmp_path, tiny_model, chat_file):
    """started(**keys): an assembled run of a tiny model on chat rows."""
    count = iter(range(99))

    def make(**keys):
        folder = tmp_path / str(next(count))
        common = {"max_length": 64, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "bf16": False}
        common |= {"per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 1e-2, "max_grad_norm": 0}
        return assemble(
            SFTConfig(str(folder), model_name_or_path=tiny_model, dataset_name=chat_file, **{**common, **keys})
        )

    return make


def losses(run):
    run.train()
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_peft": True, "lora_dropout": 0.3, "gradient_accumulation_steps": 2},
        {"optimizer_in_bwd": True},
        {"optim": "adamw_bf16", "bf16": True, "gradient_accumulation_steps": 2},
    ],
    ids=["full", "dropout", "in backward", "bf16"],
)
def test_the_heaviest_batch_first_leaves_no_trace(started, keys, capsys):
    """Losses after it are the same bits: nothing was updated, no gradient left, no random number drawn."""
    plain = losses(started(**keys))
    capsys.readouterr()
    rehearsed = losses(started(**keys, heaviest_batch_first=True))
    assert rehearsed == plain and len(set(plain)) == 3
    said = capsys.readouterr().out
    assert "memory   planned" in said and "memory   heaviest batch: " in said
    assert said.index("heaviest batch") < said.index("step     1/3")


def test_the_heaviest_batch_is_the_one_with_most_tokens(started):
    batches = started().batches
    sizes = [len(batch.input_ids) for batch in batches.epoch(0)]
    assert len(batches.heaviest(0).input_ids) == max(sizes) > min(sizes)


def test_on_the_cpu_nothing_runs_first_unless_asked(started):
    run = started()
    assert run.plan.rehearsal(run.batches, None) is None
    assert run.plan.rehearsal(run.batches, True) is not None


def test_a_gpu_runs_the_heaviest_first_where_it_does_not_come_first(started):
    run = started()
    object.__setattr__(run.plan.setup.place, "cuda", True)
    heaviest = run.batches.heaviest(0)
    first = next(run.batches.epoch(0))
    found = run.plan.rehearsal(run.batches, None)
    assert (found is None) == (len(first.input_ids) >= len(heaviest.input_ids))


def test_out_of_memory_says_what_was_planned_and_what_fits(started, monkeypatch):
    run = started(gradient_checkpointing=False)

    def fail(batch, window):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    object.__setattr__(run.objective, "step", fail)
    with pytest.raises(UserError) as caught:
        run.train()
    plan, error = run.plan, caught.value
    assert "predicted" in error.what and plan.option.largest()[0] in error.what
    assert "CUDA out of memory" in error.where
    setting, other = error.mend.removeprefix("Fits: ").split("; ")
    assert setting.startswith("as set up to ") and "gradient_checkpointing: true" in other
    most = [int(part.split(" up to ")[1].split()[0].replace(",", "")) for part in (setting, other)]
    assert most[1] > most[0] > 1000
    assert plan.measured is None or plan.measured > 0


def test_other_errors_stay_as_they_are(started):
    run = started()

    def fail(batch, window):
        raise RuntimeError("shapes do not fit")

    object.__setattr__(run.objective, "step", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run.train()


def test_auto_lets_the_plan_choose(started):
    assert started(memory="auto").memory.memory == Memory(False)  # a tiny model has room for all of it
    kept = started(memory="config", checkpoint_segment=2, tile_tokens=0, keep_attention=True)
    assert kept.memory.memory == Memory(True, 2, True)


def test_keys_left_open_are_the_plans_on_a_gpu():
    open_keys = SFTConfig(activation_offloading=True, checkpoint_segment=2)
    found = asked(open_keys, cuda=True)
    assert len(found) == 4 and {(m.keep_attention, bool(m.tile)) for m in found} == {
        (keep, tile) for keep in (False, True) for tile in (False, True)
    }
    assert all(m.offload and m.segment == 2 for m in found)
    closed = SFTConfig(keep_attention=False, tile_tokens=4096)
    assert asked(closed, cuda=True) == [Memory(True, 1, False, 4096)]
    assert len(asked(open_keys, cuda=False)) == 1


def test_models_that_the_planner_does_not_know_run_unplanned():
    model = build("llama")
    del model.model.layers[0].mlp.gate_proj
    config = SFTConfig(gradient_checkpointing=False)
    memory, plan, line = memory_for(config, model, None, CPU)
    assert not memory.checkpointing and plan is None and "no training data" in line

    class Batches:
        pass

    memory, plan, line = memory_for(config, model, Batches(), CPU)
    assert plan is None and "not planned: " in line and "gated MLPs" in line
    with pytest.raises(UserError, match="gated MLPs"):
        memory_for(SFTConfig(memory="auto"), model, Batches(), CPU)


def test_streams_are_planned_by_their_keys():
    config = SFTConfig(max_length=16, per_device_train_batch_size=3)
    found = forecast(config, build("llama"), object(), CPU)
    assert found.option.load == Load((16, 16, 16)) and found.fits and "for 48 tokens" in found.line()
