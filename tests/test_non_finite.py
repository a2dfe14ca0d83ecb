"""A loss or gradient that is no number: nothing of it is applied, the rows are named and kept, and can be run again."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import SFTConfig, SFTTrainer
from burnish.config.errors import UserError
from burnish.loop.gate import Gate, NonFinite
from burnish.optim.updater import Updater, cast_parameters
from burnish.training.broken import load_batches
from burnish.verbs.replay import replay

BAD = 4  # the step whose gradient is broken


def settings(folder, model, rows, **given) -> SFTConfig:
    common = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_length": 64,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
    }
    return SFTConfig(str(folder), model_name_or_path=model, dataset_name=rows, **{**common, **given})


def poisoned(trainer, value=math.nan, step=BAD):
    """Break the gradient of one matrix at one step."""
    name, target = next((n, p) for n, p in trainer.model.named_parameters() if "layers.1.mlp.up_proj" in n)
    target.register_hook(lambda g: torch.full_like(g, value) if trainer.state.global_step == step - 1 else g)
    return name


@pytest.fixture(scope="module")
def before(tmp_path_factory, tiny_model, chat_file):
    """Weights and optimizer of the run after the last sound step, and every step's rows."""
    folder = tmp_path_factory.mktemp("before") / "run"
    stop = {"max_steps": 8, "save_strategy": "steps", "save_steps": BAD - 1}
    trainer = SFTTrainer(args=settings(folder, tiny_model, chat_file, **stop))
    trainer.train()
    stored = folder / f"checkpoint-{BAD - 1}"
    return load_file(stored / "model.safetensors"), load_file(stored / "optimizer.safetensors")


class Optimizers:
    """Keeps the Updater that a run makes."""

    def __init__(self, monkeypatch):
        self.made, plain = [], Updater.__init__

        def kept(updater, *given, **named):
            plain(updater, *given, **named)
            self.made.append(updater)

        monkeypatch.setattr(Updater, "__init__", kept)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("told", [False, True], ids=["read on the host", "told on the device"])
def test_nothing_of_a_broken_step_is_applied(tmp_path, tiny_model, chat_file, before, monkeypatch, value, told):
    """Told, the run goes on to the log gate at step 7, over sound gradients; then it names step 4 all the same."""
    every = 7 if told else 1
    seen = Optimizers(monkeypatch)
    if told:
        monkeypatch.setattr(Updater, "told", property(lambda self: True, lambda self, value: None), raising=False)
        look = Gate.look
        monkeypatch.setattr(Gate, "look", lambda self: self._state.global_step % every or look(self))
    trainer = SFTTrainer(args=settings(tmp_path / "run", tiny_model, chat_file, logging_steps=every))
    poisoned(trainer, value)
    with pytest.raises(NonFinite, match=rf"step {BAD}, rows \d.* gradient norm (nan|inf)") as error:
        trainer.train()
    assert trainer.state.global_step == (every if told else BAD)
    weights, moments = before
    for name, tensor in trainer.model.state_dict().items():
        if name in weights:
            assert torch.equal(tensor, weights[name]), name
    now = seen.made[0].state()[0]
    assert now.keys() == moments.keys() and all(torch.equal(now[name], moments[name]) for name in now)
    assert ("nor were the 3 updates after it" in str(error.value)) == told
    kept = load_batches(tmp_path / "run" / f"non_finite-{BAD}.safetensors")
    rows = sorted(row for batch in kept for row in batch.rows)
    assert len(kept) == 2 and ", ".join(map(str, rows)) in str(error.value)


def test_the_rows_kept_are_those_that_were_trained_on(tmp_path, tiny_model, chat_file):
    trainer = SFTTrainer(args=settings(tmp_path / "run", tiny_model, chat_file))
    poisoned(trainer)
    seen = []
    objective = trainer.run.objective
    step = objective.step
    object.__setattr__(objective, "step", lambda batch, window: seen.append(batch) or step(batch, window))
    with pytest.raises(NonFinite):
        trainer.train()
    kept = load_batches(tmp_path / "run" / f"non_finite-{BAD}.safetensors")
    for ours, theirs in zip(kept, seen[-2:], strict=True):
        assert ours.rows == theirs.rows and torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


def test_a_sound_step_is_the_same_told_or_not(tiny_model):
    """The flag that says all is well changes no bit."""
    from transformers import AutoModelForCausalLM

    ends = []
    for told in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        updater = Updater(model, cast_parameters(model, torch.bfloat16), SFTConfig("unused", max_steps=9), 9)
        updater.told = told
        for number in range(4):
            for parameter in model.parameters():
                parameter.backward(torch.randn_like(parameter) * (number + 1))
            updater.step(torch.tensor(1.0))
        ends.append([tensor.clone() for tensor in updater.state()[0].values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_gradients_that_are(tiny_model, loss):
    from transformers import AutoModelForCausalLM

    for optim in ("adamw_torch_fused", "adamw_torch", "adamw_bf16", "adamw_bf16 told", "sgd", "adafactor"):
        optim, _, told = optim.partition(" ")
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        masters = cast_parameters(model, torch.bfloat16, optim)
        updater = Updater(model, masters, SFTConfig("unused", optim=optim, max_steps=9), 9)
        updater.told = bool(told)
        first = [p.detach().clone() for p in model.parameters()]
        for value in (loss, 1.0):
            for parameter in model.parameters():
                parameter.backward(torch.ones_like(parameter))
            assert updater.step(torch.tensor(value)).isnan()
        assert all(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True)), optim


def test_no_checkpoint_is_written_of_it_and_the_same_command_comes_back_to_it(tmp_path, tiny_model, chat_file):
    stop = {"save_strategy": "steps", "save_steps": 2}
    for _ in range(2):
        trainer = SFTTrainer(args=settings(tmp_path / "run", tiny_model, chat_file, **stop))
        poisoned(trainer)
        with pytest.raises(NonFinite, match=f"step {BAD}"):
            trainer.train()
        found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert found == ["checkpoint-2"]
    lines = (tmp_path / "run" / "log.txt").read_text()
    assert lines.count("at step 2 of 8") == 1


def test_clipped_steps_are_counted(tmp_path, tiny_model, chat_file):
    """The share of the steps since the last log, whatever number of them: that of the norms above the limit."""

    def records(name, **given) -> list[dict]:
        trainer = SFTTrainer(args=settings(tmp_path / name, tiny_model, chat_file, **given))
        trainer.train()
        return [record for record in trainer.state.log_history if "loss" in record]

    limit = sorted(record["grad_norm"] for record in records("free", max_grad_norm=0))[4]
    each = records("each", max_grad_norm=limit)
    assert [r["grad_clipped"] for r in each] == [float(r["grad_norm"] > limit) for r in each]
    (whole,) = records("whole", max_grad_norm=limit, logging_steps=8)
    assert 0 < whole["grad_clipped"] < 1
    assert whole["grad_clipped"] == sum(r["grad_clipped"] for r in each) / 8
    assert all(record["grad_clipped"] == 0 for record in records("never", max_grad_norm=0, logging_steps=4))


def test_evaluations_and_checkpoints_are_not_counted_as_training(tmp_path, tiny_model, chat_file, monkeypatch):
    """Time spent in an evaluation after every step must not show in tok_s."""
    import time

    from burnish.training import Run

    common = {"logging_steps": 4, "test_split_size": 6, "max_steps": 4}
    trainer = SFTTrainer(args=settings(tmp_path / "plain", tiny_model, chat_file, **common))
    trainer.train()
    plain = next(r["tok_s"] for r in trainer.state.log_history if "loss" in r)
    evaluate = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda self: time.sleep(0.4) or evaluate(self))
    slow = settings(tmp_path / "slow", tiny_model, chat_file, eval_strategy="steps", eval_steps=1, **common)
    trainer = SFTTrainer(args=slow)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    record = next(r for r in trainer.state.log_history if "loss" in r)
    assert seconds > 1.6 and record["tok_s"] > plain / 3  # with the seconds in it, it would be under a fifth


@pytest.fixture
def overflowing(tmp_path, tiny_model, chat_rows):
    """(model folder, data file): a model whose first layer overflows on the token ~, which only row 7 has."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer("~")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[token, 0] = 10
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight[0] = 0  # so that attention gives nobody else a first coordinate
        layer.mlp.gate_proj.weight[0, 0] = layer.mlp.up_proj.weight[0, 0] = 1e25
    model.save_pretrained(folder)
    rows = json.loads(json.dumps(chat_rows))
    rows[7]["messages"][0]["content"] = "the ~ jumps"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder), str(file), token


def test_replay_names_token_row_and_layer(tmp_path, overflowing, capsys):
    """Adapters: the gradients of the huge weights themselves would be infinite for every row."""
    model, rows, token = overflowing
    lora = {"use_peft": True, "lora_target_modules": ["q_proj"]}
    given = {"gradient_accumulation_steps": 1, "max_steps": 20, **lora}
    trainer = SFTTrainer(args=settings(tmp_path / "run", model, rows, **given))
    with pytest.raises(NonFinite, match=r"rows .*\b7\b.*: loss nan.*burnish check --replay .*safetensors") as error:
        trainer.train()
    file = str(error.value).split("--replay ")[1].split()[0]
    capsys.readouterr()
    Path(rows).unlink()  # a replay doesn't need the data any more
    assert replay(file) == 0
    said = capsys.readouterr().out
    assert "forward  in" in said and "layers.0.mlp" in said and f"('~', id {token}) of row 7" in said, said


def test_replay_names_the_gradient_that_breaks(tmp_path, tiny_model, chat_file, capsys, monkeypatch):
    """A backward that gives inf at one position, in the run and in the replay."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    honest = LlamaDecoderLayer.forward

    def breaking(self, hidden_states, *given, **named):
        out = honest(self, hidden_states, *given, **named)
        if self.self_attn.layer_idx == 0 and torch.is_grad_enabled():
            out.register_hook(lambda g: g.index_fill(1, torch.tensor([5]), torch.inf))
        return out

    trainer = SFTTrainer(args=settings(tmp_path / "run", tiny_model, chat_file, gradient_checkpointing=False))
    poisoned(trainer)
    with pytest.raises(NonFinite):
        trainer.train()
    file = tmp_path / "run" / f"non_finite-{BAD}.safetensors"
    assert replay(file) == 1, "the poison was this test's, not the model's"
    assert "finite   forward, loss and backward" in capsys.readouterr().out
    monkeypatch.setattr(LlamaDecoderLayer, "forward", breaking)
    assert replay(file) == 0
    said = capsys.readouterr().out
    row = load_batches(file)[0].rows[0]
    assert "backward in model.layers.0" in said and "token 5 " in said and f"of row {row}" in said, said


@pytest.mark.parametrize("harm", ["missing", "no json", "torn"])
def test_replay_of_what_is_no_kept_batch_is_one_clear_line(tmp_path, harm):
    file = tmp_path / "non_finite-3.safetensors"
    if harm != "missing":
        file.write_bytes(b"torn")
    if harm == "torn":
        file.with_suffix(".json").write_text("[]")
    with pytest.raises(UserError, match="holds no kept rows"):
        replay(file)


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_every_objective_s_rows_can_be_run_again(tmp_path, tiny_model, chat_rows, capsys, objective):
    """Pairs, ratings and the mismatched sequences of KTO come back as they were."""
    import burnish

    rows = []
    for number, row in enumerate(chat_rows):
        prompt, reply = row["messages"][:1], row["messages"][1:]
        other = chat_rows[(number + 1) % len(chat_rows)]["messages"][1:]
        pair = {"prompt": prompt, "chosen": reply, "rejected": other}
        rows.append({"prompt": prompt, "completion": reply, "label": number % 2 == 0} if objective == "kto" else pair)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[objective]
    config = getattr(burnish, f"{kind}Config")(
        str(tmp_path / "run"), model_name_or_path=tiny_model, dataset_name=str(file), max_length=64, max_steps=4,
        per_device_train_batch_size=4, save_strategy="no", logging_steps=1, bf16=False,
    )  # fmt: skip
    trainer = getattr(burnish, f"{kind}Trainer")(args=config)
    poisoned(trainer, step=2)
    seen, step = [], trainer.run.objective.step
    object.__setattr__(
        trainer.run.objective, "step", lambda batch, window: seen.append((batch, step(batch, window))) or seen[-1][1]
    )
    with pytest.raises(NonFinite, match="step 2"):
        trainer.train()
    path = tmp_path / "run" / "non_finite-2.safetensors"
    (kept,) = load_batches(path)
    for field in dataclasses.fields(kept):
        ours, theirs = getattr(kept, field.name), getattr(seen[-1][0], field.name)
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, field.name
    assert replay(path) == 1
    assert "does not happen again" in capsys.readouterr().out
