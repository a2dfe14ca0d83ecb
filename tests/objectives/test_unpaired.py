"""KTO, its APO variant and BCO: formulas in float64, one-sided batches, windows, BCO's running shift."""

import random

import pytest
import torch

from burnish.config.preference import BCOConfig, KTOConfig
from burnish.objectives import unpaired
from burnish.objectives.sequences import completion_sums, rated_and_mismatched
from burnish.objectives.unpaired import bco_losses, divergence, kto_losses


def s(z):
    return 1 / (1 + torch.exp(-z))


def by_definition(ratio, desirable, level, config):
    """Each row's loss from the papers. level: KTO's divergence, BCO's shift."""
    losses = []
    for x, good in zip(ratio, desirable.tolist(), strict=True):
        if isinstance(config, BCOConfig):
            z = config.beta * x - level
            losses.append(-torch.log(s(z)) if good else -torch.log(s(-z)))
        elif config.loss_type == "apo_zero_unpaired":
            losses.append(
                config.desirable_weight * (1 - s(config.beta * x)) if good
                else config.undesirable_weight * s(config.beta * x)
            )  # fmt: skip
        else:
            losses.append(
                config.desirable_weight * (1 - s(config.beta * (x - level))) if good
                else config.undesirable_weight * (1 - s(config.beta * (level - x)))
            )  # fmt: skip
    return torch.stack(losses)


CONFIGS = [
    KTOConfig(),
    KTOConfig(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7),
    KTOConfig(loss_type="apo_zero_unpaired", undesirable_weight=2.0),
    BCOConfig(beta=0.4),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["mixed", "all desirable", "all undesirable"])
def test_value_and_gradient_are_the_papers(config, kind):
    noise = torch.Generator().manual_seed(0)
    ratio = (5 * torch.randn(9, generator=noise, dtype=torch.float64)).requires_grad_()
    desirable = {"mixed": torch.rand(9, generator=noise) < 0.5}.get(kind, torch.full((9,), kind == "all desirable"))
    apo = isinstance(config, KTOConfig) and config.loss_type != "kto"
    level = torch.tensor(0.0 if apo else 0.8, dtype=torch.float64)
    losses = (bco_losses if isinstance(config, BCOConfig) else kto_losses)(ratio, desirable, level, config)
    wanted = by_definition(ratio, desirable, level, config)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-14)
    (got,), (want,) = (torch.autograd.grad(x.sum(), ratio) for x in (losses, wanted))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("config", CONFIGS)
def test_extremes_stay_finite(config):
    ratio = torch.tensor([0.0, 1e5, -1e5, 1e5, -1e5], requires_grad=True)
    desirable = torch.tensor([True, True, True, False, False])
    for level in (0.0, 1e5):
        losses = (bco_losses if isinstance(config, BCOConfig) else kto_losses)(ratio, desirable, level, config)
        (gradient,) = torch.autograd.grad(losses.sum(), ratio)
        assert losses.isfinite().all() and gradient.isfinite().all()


def test_the_divergence_is_a_mean_that_is_never_negative_nor_trained():
    ratios = torch.tensor([1.0, 2.0, -0.5], requires_grad=True)
    assert divergence(ratios).item() == pytest.approx(2.5 / 3) and not divergence(ratios).requires_grad
    assert divergence(-ratios).item() == 0.0
    assert divergence(ratios[:0]).item() == 0.0


# ---- the objectives, on a toy model


def rated_data(n=8, seed=7):
    """(prompt, completion, desirable, completion of another prompt)."""
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 4), rng.randint(1, 9)) for _ in range(n)]
    tokens = [tuple([rng.randrange(11) for _ in range(size)] for size in pair) for pair in lengths]
    return [(*tokens[i], i % 3 != 0, tokens[(i + 1) % n][1]) for i in range(n)]


def batch_of(toy, rows, with_mismatched=True):
    sequences = [(prompt + completion, len(prompt), len(prompt)) for prompt, completion, _, _ in rows]
    if with_mismatched:
        sequences += [(prompt + other, len(prompt), len(prompt)) for prompt, _, _, other in rows]
    n = len(rows)
    edge = sum(len(prompt) + len(completion) for prompt, completion, _, _ in rows)
    return toy.pack(
        sequences,
        edge=(edge, sum(len(completion) for _, completion, _, _ in rows)) if with_mismatched else None,
        rated=torch.arange(n),
        desirable=torch.tensor([row[2] for row in rows]),
        mismatched=torch.arange(n, 2 * n) if with_mismatched else None,
    )


def reference_of(model):
    return lambda batch: completion_sums(model.token_scores(None, None, batch).logps, batch).detach()


def ratios_by_hand(policy, other, rows, mismatched=False):
    def ratio(prompt, reply):
        return sum(sign * m.logps(prompt + reply, len(prompt)).sum() for sign, m in ((1, policy), (-1, other)))

    return torch.stack([ratio(row[0], row[3] if mismatched else row[1]) for row in rows])


def split(toy, rows, size, mismatched=True):
    return [batch_of(toy, rows[i : i + size], mismatched) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("swap", [False, True], ids=["kl held at 0", "kl above 0"])
@pytest.mark.parametrize("size", [8, 4, 3, 1])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_window_means_the_same_however_it_is_split(toy, monkeypatch, config, size, swap):
    rows, policy, other = rated_data(), *[toy.Table(seed) for seed in ((2, 1) if swap else (1, 2))]
    monkeypatch.setattr(unpaired, "token_scores", policy.token_scores)
    bco = isinstance(config, BCOConfig)
    objective = unpaired.objective(policy, None, config, reference_of(other))
    loss, metrics = toy.run(objective, split(toy, rows, size, mismatched=not bco))

    ratio = ratios_by_hand(policy, other, rows)
    good = torch.tensor([row[2] for row in rows])
    if bco:
        level = config.beta * ratio.detach().mean()
    else:
        level = ratios_by_hand(policy, other, rows, mismatched=True).detach().mean().clamp(min=0)
    wanted = by_definition(ratio, good, level, config).mean()
    (gradient,) = torch.autograd.grad(wanted, policy.table)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(policy.table.grad, gradient, rtol=1e-10, atol=1e-13)

    assert metrics["rewards/chosen"] == pytest.approx(config.beta * ratio[good].mean().item())
    assert metrics["rewards/rejected"] == pytest.approx(config.beta * ratio[~good].mean().item())
    if bco or config.loss_type == "kto":
        assert metrics["delta" if bco else "kl"] == pytest.approx(level.item(), rel=1e-12, abs=1e-15)
    if size == 8:
        margin = config.beta * (ratio[good].mean() - ratio[~good].mean())
        assert metrics["rewards/margins"] == pytest.approx(margin.item())


def test_kl_is_sometimes_above_and_sometimes_at_zero(toy):
    """What the two cases of the test above are there for."""
    means = [
        ratios_by_hand(toy.Table(a), toy.Table(b), rated_data(), mismatched=True).mean().item()
        for a, b in ((1, 2), (2, 1))
    ]
    assert max(means) > 0.1 and min(means) < -0.1


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_batches_of_one_kind_train_and_leave_out_the_other_kinds_metrics(toy, monkeypatch, config, good):
    rows = [(p, c, good, o) for p, c, _, o in rated_data()]
    policy = toy.Table(1)
    monkeypatch.setattr(unpaired, "token_scores", policy.token_scores)
    loss, metrics = toy.run(unpaired.objective(policy, None, config, reference_of(toy.Table(2))), split(toy, rows, 8))
    assert loss.isfinite() and policy.table.grad.isfinite().all()
    there, absent = ("chosen", "rejected") if good else ("rejected", "chosen")
    assert {f"rewards/{there}", f"logps/{there}"} <= set(metrics)
    assert not {f"rewards/{absent}", f"logps/{absent}", "rewards/margins"} & set(metrics)


def test_mismatched_completions_are_trained_on_nothing_and_seen_by_no_metric(toy, monkeypatch):
    """The same rows with other mismatched completions: with their divergence at 0 both times, all stays the same."""
    rows, policy = rated_data(), toy.Table(1)
    monkeypatch.setattr(unpaired, "token_scores", policy.token_scores)
    objective = unpaired.objective(policy, None, KTOConfig(), reference_of(toy.Table(2)))
    found = []
    for changed in (rows, [(p, c, good, c) for p, c, good, _ in rows]):
        policy.table.grad = None
        found.append((*toy.run(objective, split(toy, changed, 8)), policy.table.grad))
    assert found[0][1]["kl"] == found[1][1]["kl"] == 0.0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-14, atol=0)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-16)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


@pytest.mark.parametrize("size", [4, 2])
def test_bcos_shift_runs_over_all_rewards_of_training(toy, monkeypatch, size):
    config, rows, policy, other = BCOConfig(beta=0.4), rated_data(), toy.Table(1), toy.Table(2)
    monkeypatch.setattr(unpaired, "token_scores", policy.token_scores)
    objective = unpaired.objective(policy, None, config, reference_of(other))
    rewards = config.beta * ratios_by_hand(policy, other, rows).detach()
    _, first = toy.run(objective, split(toy, rows[:4], size, mismatched=False))
    assert first["delta"] == pytest.approx(rewards[:4].mean().item())
    with torch.no_grad():  # evaluation
        batch = batch_of(toy, rows[4:], with_mismatched=False)
        _, seen = objective.step(batch, objective.window([batch]))
    assert seen["delta"][0].item() == pytest.approx(rewards[:4].mean().item())
    kept = {name: value.clone() for name, value in objective.state.items()}
    _, second = toy.run(objective, split(toy, rows[4:], size, mismatched=False))
    assert second["delta"] == pytest.approx(rewards.mean().item())

    resumed = unpaired.objective(policy, None, config, reference_of(other))
    resumed.state.update(kept)
    _, again = toy.run(resumed, split(toy, rows[4:], size, mismatched=False))
    assert again["delta"] == second["delta"]


@pytest.mark.parametrize(
    ("config", "batches", "forwards"),
    [(CONFIGS[0], 1, 2), (CONFIGS[0], 4, 8), (CONFIGS[2], 4, 4), (CONFIGS[3], 1, 1), (CONFIGS[3], 4, 8)],
)
def test_a_second_forward_pass_is_made_only_where_rows_must_know_each_other(
    toy, monkeypatch, config, batches, forwards
):
    """And for KTO each pass is of its own half: rated or mismatched."""
    policy, asked = toy.Table(1), []
    reference = reference_of(toy.Table(2))
    monkeypatch.setattr(unpaired, "token_scores", policy.token_scores)
    objective = unpaired.objective(policy, None, config, lambda batch: asked.append(batch) or reference(batch))
    given = split(toy, rated_data(), 8 // batches, mismatched=config is CONFIGS[0])
    toy.run(objective, given)
    assert policy.forwards == forwards
    tokens = sum(len(batch.input_ids) for batch in given)
    assert sum(len(batch.input_ids) for batch in asked) == tokens


def test_mismatched_completions_go_forward_without_gradients(toy, monkeypatch):
    policy, seen = toy.Table(1), []

    def watched(model, head, batch, **options):
        scores = policy.token_scores(model, head, batch, **options)
        seen.append((len(batch.input_ids), scores.logps.requires_grad))
        return scores

    monkeypatch.setattr(unpaired, "token_scores", watched)
    rows = rated_data()
    objective = unpaired.objective(policy, None, KTOConfig(), reference_of(toy.Table(2)))
    toy.run(objective, split(toy, rows, 4))
    mismatched = sum(len(prompt) + len(other) for prompt, _, _, other in rows)
    rated = sum(len(prompt) + len(completion) for prompt, completion, _, _ in rows)
    assert sum(tokens for tokens, graph in seen if not graph) == mismatched
    assert sum(tokens for tokens, graph in seen if graph) == rated


def test_the_halves_of_a_batch_are_the_sequences_alone(toy):
    rows = rated_data()
    whole = batch_of(toy, rows)
    whole.reference = torch.arange(16.0)
    rated, others = rated_and_mismatched(whole)
    alone = batch_of(toy, rows, with_mismatched=False)
    second = batch_of(toy, [(prompt, other, good, []) for prompt, _, good, other in rows], with_mismatched=False)
    for part, wanted in ((rated, alone), (others, second)):
        for name in ("input_ids", "position_ids", "cu_seqlens", "labels", "valid", "completion"):
            assert torch.equal(getattr(part, name), getattr(wanted, name)), name
        assert part.num_valid == wanted.num_valid and len(part.rows) == len(part.examples) == 8
    assert rated.rows + others.rows == whole.rows and rated.mismatched is None and others.rated is None
    assert torch.equal(rated.reference, torch.arange(8.0)) and torch.equal(others.reference, torch.arange(8.0, 16.0))
