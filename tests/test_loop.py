"""The loop against plain PyTorch: what a packed batch means, what accumulation means, what an update is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from burnish.config.fields import SFTConfig
from burnish.data.batch import Batches, Examples, collate
from burnish.logprobs import token_nll, token_scores
from burnish.loop import fit, total_steps
from burnish.loop.evaluation import evaluate
from burnish.loop.gate import NonFinite
from burnish.loop.state import Control, Hooks, TrainState
from burnish.metrics import Log, step_line
from burnish.model.attention import register
from burnish.model.head import read_head
from burnish.model.patch import patch
from burnish.objectives import sft
from burnish.optim.updater import Updater, cast_parameters

LENGTHS = [9, 2, 17, 5, 30, 11, 3, 8, 14, 6, 21]


@pytest.fixture
def model(tiny_model):
    return load(tiny_model)


def load(folder, patched=True):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=register() if patched else "eager", dtype=torch.float32
    )
    if patched:
        patch(model)
    return model


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Rows of random tokens; the second half of each is trained on."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 400, n) for n in LENGTHS]
    trained = [np.arange(n) >= n // 2 for n in LENGTHS]
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return Examples(
        np.concatenate(ids).astype(np.int32), np.concatenate(trained), offsets.astype(np.int64), np.arange(len(LENGTHS))
    )


def settings(**given) -> SFTConfig:
    base = {"logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential", "bf16": False}
    return SFTConfig("unused", **{**base, "gradient_checkpointing": False, "lr_scheduler_type": "constant", **given})


def row(examples: Examples, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row as a padded trainer would see it: input_ids and unshifted labels, [1, L]."""
    span = slice(examples.offsets[i], examples.offsets[i + 1])
    ids = torch.from_numpy(examples.ids[span].astype(np.int64))
    return ids[None], torch.where(torch.from_numpy(examples.trained[span]), ids, -100)[None]


def plain_nll(model, examples, rows) -> torch.Tensor:
    """Sum of the negative log-likelihood of `rows`, each through the model's own forward, logits and all."""
    total = torch.zeros(())
    for i in rows:
        ids, labels = row(examples, i)
        logits = model(input_ids=ids).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(got: dict, want: dict, tolerance: float) -> None:
    for name in want:
        error = (got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_packed_equals_separate_and_the_plain_model(tiny_model, model, examples):
    rows = [0, 2, 4, 1]
    head = read_head(model)
    batch = collate(examples, [(i, 0, LENGTHS[i]) for i in rows])
    packed, _ = token_nll(model, head, batch)
    packed.backward()
    packed_grads = gradients(model)

    model.zero_grad()
    separate = sum(token_nll(model, head, collate(examples, [(i, 0, LENGTHS[i])]))[0] for i in rows)
    separate.backward()
    assert abs(packed.item() - separate.item()) <= 1e-6 * abs(separate.item())
    assert_same_gradients(packed_grads, gradients(model), 1e-6)

    plain = load(tiny_model, patched=False)
    expected = plain_nll(plain, examples, rows)
    expected.backward()
    assert abs(packed.item() - expected.item()) <= 1e-6 * abs(expected.item())
    assert_same_gradients(packed_grads, gradients(plain), 2e-6)


def test_fused_loss_equals_the_objective_on_log_probs(model, examples):
    head, batch = read_head(model), collate(examples, [(4, 0, 30), (2, 0, 17)])
    fused, scores = token_nll(model, head, batch)
    fused.backward()
    fused_grads = gradients(model)
    model.zero_grad()
    general = token_scores(model, head, batch)
    loss, count, _ = sft.nll(general.logps, batch)
    loss.backward()
    assert count == batch.num_valid == len(batch.valid)
    assert torch.equal(scores.logps, general.logps)
    assert torch.equal(scores.correct, general.correct)
    torch.testing.assert_close(fused, loss, rtol=1e-6, atol=0)
    assert_same_gradients(fused_grads, gradients(model), 1e-6)


def test_dft_weighs_each_token_by_its_own_probability(model, examples):
    batch = collate(examples, [(4, 0, 30)])
    logps = token_scores(model, read_head(model), batch).logps.detach().double().requires_grad_()
    loss, _, _ = sft.dft(logps, batch)
    loss.backward()
    trained = batch.labels != -100
    expected = torch.where(trained, -logps.detach() * logps.detach().exp(), 0.0).sum()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(logps.grad[trained], -logps.detach().exp()[trained])


def test_document_a_changes_no_bit_of_document_b(model, examples):
    head, batch = read_head(model), collate(examples, [(2, 0, 17), (4, 0, 30)])
    before = token_scores(model, head, batch).logps[17:]
    batch.input_ids[:17] = 5
    batch.labels[:17] = torch.where(batch.labels[:17] == -100, -100, 5)
    after = token_scores(model, head, batch).logps[17:]
    assert torch.equal(before, after)


def run(folder, examples, config, hooks=None) -> tuple[torch.nn.Module, TrainState]:
    model = load(folder)
    objective = sft.objective(model, read_head(model), config)
    batches = Batches(examples, config)
    state = TrainState(max_steps=total_steps(batches, config))
    updater = Updater(model, {}, config, state.max_steps)
    fit(
        model,
        batches,
        objective,
        updater,
        config,
        state=state,
        control=Control(),
        hooks=hooks or Hooks(),
        log=Log(None, quiet=True),
    )
    return model, state


@pytest.mark.parametrize(
    "given",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_accumulation_changes_nothing(tiny_model, examples, given):
    whole, whole_state = run(tiny_model, examples, settings(per_device_train_batch_size=8, num_train_epochs=2))
    split, split_state = run(tiny_model, examples, settings(num_train_epochs=2, **given))
    assert whole_state.global_step == split_state.global_step == 4  # 11 rows: 8 + 3, twice
    for a, b in zip(whole_state.log_history, split_state.log_history, strict=True):
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert math.isclose(a[key], b[key], rel_tol=2e-6), key
    for (name, a), (_, b) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-7, msg=name)


def test_steps_equal_plain_pytorch(tiny_model, examples):
    config = settings(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        warmup_steps=2,
        num_train_epochs=3,
    )
    trained, state = run(tiny_model, examples, config)
    plain = load(tiny_model, patched=False)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    windows = [list(range(6)), list(range(6, 11))] * 3
    for step, rows in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step / 2 if step < 2 else (6 - step) / 4)
        targets = sum(int((row(examples, i)[1][:, 1:] != -100).sum()) for i in rows)
        loss = plain_nll(plain, examples, rows) / targets
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        logged = state.log_history[step]
        assert math.isclose(logged["loss"], loss.item(), rel_tol=2e-5)
        assert math.isclose(logged["grad_norm"], norm.item(), rel_tol=1e-4)
    for (name, a), (_, b) in zip(trained.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_evaluation_weighs_every_token_alike(model, examples):
    config = settings(per_device_eval_batch_size=2)
    metrics = evaluate(
        model, Batches(examples, config, train=False).epoch(0), sft.objective(model, read_head(model), config)
    )
    with torch.no_grad():
        total = plain_nll(model, examples, range(len(LENGTHS)))
    count = sum(int((row(examples, i)[1][:, 1:] != -100).sum()) for i in range(len(LENGTHS)))
    assert math.isclose(metrics["eval_loss"], total.item() / count, rel_tol=1e-6)
    model.train()
    evaluate(model, Batches(examples, config, train=False).epoch(0), sft.objective(model, read_head(model), config))
    assert model.training  # the mode before comes back


def test_callbacks_can_stop_and_ask(tiny_model, examples):
    seen = []

    def notify(event, **extra):
        seen.append(event)

    evaluations = []
    hooks = Hooks(evaluate=lambda: evaluations.append(1) or {"eval_loss": 1.0}, notify=notify)
    config = settings(per_device_train_batch_size=4, num_train_epochs=2, eval_strategy="epoch")
    _, state = run(tiny_model, examples, config, hooks)
    assert state.global_step == 6 and state.epoch == 2.0 and len(evaluations) == 2
    assert seen[:3] == ["on_train_begin", "on_epoch_begin", "on_step_begin"] and seen[-1] == "on_epoch_end"
    assert seen.count("on_step_end") == 6 and seen.count("on_log") == 6


def test_a_loss_that_is_no_number_stops_before_it_spreads(tiny_model, examples):
    config = settings(per_device_train_batch_size=4, learning_rate=1e30, max_grad_norm=0, max_steps=5)
    with pytest.raises(NonFinite, match=r"step \d, rows \d.*: loss"):
        run(tiny_model, examples, config)


def test_float32_masters_receive_what_bfloat16_would_lose(tiny_model, examples):
    """Updates far below a bfloat16 weight's spacing must add up on the master and reach the weight in the end."""
    config = settings(per_device_train_batch_size=11, learning_rate=1e-5, max_steps=60, num_train_epochs=60)
    model = load(tiny_model)
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = cast_parameters(model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.dtype == torch.float32 for b in model.buffers())
    updater = Updater(model, masters, config, 60)
    objective, batches = sft.objective(model, read_head(model), config), Batches(examples, config)
    state = TrainState(max_steps=60)
    fit(model, batches, objective, updater, config, state=state, control=Control(), hooks=Hooks(), log=Log(None, True))
    for (name, parameter), master in zip(model.named_parameters(), updater.updated, strict=True):
        assert torch.equal(parameter, master.to(torch.bfloat16)), name
        moved = (master - reference[name]).abs().max()
        assert moved > 3e-4, f"{name} moved {moved}: 60 updates of 1e-5 add up to 6e-4"


def test_a_line_of_a_reward_model_counts_no_trained_tokens():
    record = {"loss": 0.7, "learning_rate": 1e-4, "grad_norm": 1.0, "tok_s": 1200.0, "mem_gib": 0.5, "data_wait": 0.0}
    assert "1,200 tok/s (900 trained)  0.5 GiB" in step_line(1, 3, {**record, "tok_s_trained": 900.0}, 1.0)
    assert "1,200 tok/s  0.5 GiB" in step_line(1, 3, {**record, "tok_s_trained": 0.0}, 1.0)
