"""CPO, SimPO, AlphaPO and ORPO: formulas in float64, ends of the range, windows."""

import random
from decimal import Decimal, getcontext

import pytest
import torch

from burnish.config.preference import CPOConfig, ORPOConfig
from burnish.objectives import odds
from burnish.objectives.odds import cpo_losses, log1mexp, orpo_losses


def s(z):
    return 1 / (1 + torch.exp(-z))


def cpo_by_definition(chosen, rejected, config):
    if config.alpha:
        chosen, rejected = ((1 - torch.exp(x) ** -config.alpha) / config.alpha for x in (chosen, rejected))
    z, e = chosen - rejected, config.label_smoothing
    if config.loss_type == "hinge":
        return torch.clamp(1 - config.beta * z, min=0)
    if config.loss_type == "ipo":
        return (z - 1 / (2 * config.beta)) ** 2
    if config.loss_type != "sigmoid":
        z = z - config.simpo_gamma / config.beta
    return -(1 - e) * torch.log(s(config.beta * z)) - e * torch.log(s(-config.beta * z))


def orpo_by_definition(chosen, rejected, config):
    p, q = torch.exp(chosen), torch.exp(rejected)
    return -config.beta * torch.log(s(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))


def assert_same(function, definition, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value, wanted = function(*leaves), definition(*leaves)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(x.sum(), leaves) for x in (value, wanted))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


CPO = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.4},
    {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.2},
    {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25},
    {"loss_type": "alphapo", "beta": 2.0, "alpha": -0.5},
    {"loss_type": "sigmoid", "alpha": 0.1},
]


def random_logps(n=7, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return (-3 * torch.rand(n, generator=noise, dtype=torch.float64) - 0.05 for _ in range(2))


@pytest.mark.parametrize("given", CPO, ids=str)
def test_cpo_is_the_papers(given):
    config = CPOConfig(**given)
    assert_same(lambda c, r: cpo_losses(c, r, config)[0], lambda c, r: cpo_by_definition(c, r, config), *random_logps())


def test_rewards_of_alphapo_are_the_transformed_ones():
    config = CPOConfig(loss_type="alphapo", alpha=0.3, beta=2.0)
    chosen, rejected = random_logps()
    _, r_chosen, r_rejected = cpo_losses(chosen, rejected, config)
    torch.testing.assert_close(r_chosen, 2 * (1 - chosen.exp() ** -0.3) / 0.3, rtol=1e-12, atol=0)
    torch.testing.assert_close(r_rejected, 2 * (1 - rejected.exp() ** -0.3) / 0.3, rtol=1e-12, atol=0)


def test_orpo_is_the_papers():
    config = ORPOConfig(beta=0.3)
    assert_same(
        lambda c, r: orpo_losses(c, r, config)[0], lambda c, r: orpo_by_definition(c, r, config), *random_logps()
    )


@pytest.mark.parametrize("x", [-700.0, -40.0, -1.0, -0.6931471805599453, -0.5, -1e-3, -1e-9, -1e-14])
def test_log1mexp_is_exact_on_both_ends(x):
    """Against 400 decimal digits."""
    getcontext().prec = 400
    wanted = float((1 - Decimal(x).exp()).ln())
    got = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    assert got == pytest.approx(wanted, rel=1e-14, abs=1e-320)


def test_orpo_near_certainty_keeps_its_limits():
    """As the chosen becomes certain the gradient of -log s(log odds) tends to -odds of the rejected."""
    config = ORPOConfig(beta=1.0)
    chosen = torch.tensor([-1e-6], requires_grad=True)
    rejected = torch.tensor([-1.0])
    orpo_losses(chosen, rejected, config)[0].backward()
    odds_rejected = (rejected.exp() / (1 - rejected.exp())).item()
    assert chosen.grad.item() == pytest.approx(-odds_rejected, rel=1e-3)


EDGES = [0.0, -1e-38, -1e-9, -1e-7, -1e-3, -1.0, -30.0, -1e4]


def test_orpo_stays_finite_at_every_edge():
    chosen, rejected = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)).T.contiguous()
    leaves = [chosen.requires_grad_(), rejected.requires_grad_()]
    value = orpo_losses(*leaves, ORPOConfig())[0]
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)
    same = orpo_losses(torch.tensor([0.0]), torch.tensor([0.0]), ORPOConfig(beta=1.0))[0]
    assert same.item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize(
    "given", [*CPO, {"loss_type": "ipo", "alpha": 0.5}, {"loss_type": "hinge", "alpha": 0.5}], ids=str
)
def test_cpo_stays_finite_at_every_edge(given):
    edges = torch.tensor([0.0, -1e-7, -1.0, -90.0, -1e4, -1e6])
    chosen, rejected = torch.cartesian_prod(edges, edges).T.contiguous()
    leaves = [chosen.requires_grad_(), rejected.requires_grad_()]
    value = cpo_losses(*leaves, CPOConfig(**given))[0]
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)


# ---- the objectives, on a toy model


def pairs_data(n=8, seed=5):
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(11) for _ in range(rng.randint(low, high))]

    return [(tokens(1, 4), tokens(1, 9), tokens(1, 9)) for _ in range(n)]


def batch_of(toy, rows, prompts=False):
    """`prompts`: the chosen prompts have labels too, as ORPO's likelihood wants them."""
    sequences = []
    for prompt, chosen, rejected in rows:
        sequences.append((prompt + chosen, 1 if prompts else len(prompt), len(prompt)))
        sequences.append((prompt + rejected, len(prompt), len(prompt)))
    n = len(rows)
    return toy.pack(sequences, chosen=torch.arange(0, 2 * n, 2), rejected=torch.arange(1, 2 * n, 2))


def mean(values):
    return values.sum() / max(len(values), 1)


@pytest.mark.parametrize("size", [8, 4, 3, 1])
@pytest.mark.parametrize("given", [*CPO, {"loss_type": "simpo", "cpo_alpha": 0.0}, {"cpo_alpha": 0.4}], ids=str)
def test_cpo_windows(toy, monkeypatch, given, size):
    config, rows, model = CPOConfig(**given), pairs_data(), toy.Table(1)
    monkeypatch.setattr(odds, "token_scores", model.token_scores)
    loss, metrics = toy.run(
        odds.objective(model, None, config), [batch_of(toy, rows[i : i + size]) for i in range(0, 8, size)]
    )
    reduce = torch.sum if config.loss_type in ("sigmoid", "hinge") else mean
    chosen, rejected = (torch.stack([reduce(model.logps(r[0] + r[k], len(r[0]))) for r in rows]) for k in (1, 2))
    nll = -mean(torch.cat([model.logps(r[0] + r[1], len(r[0])) for r in rows]))
    wanted = cpo_by_definition(chosen, rejected, config).mean()
    wanted = wanted + (0 if config.loss_type == "alphapo" else config.cpo_alpha) * nll
    (gradient,) = torch.autograd.grad(wanted, model.table)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.table.grad, gradient, rtol=1e-9, atol=1e-13)
    assert metrics["nll_loss"] == pytest.approx(nll.item())
    assert metrics["logps/chosen"] == pytest.approx(chosen.mean().item())


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("size", [8, 4, 3, 1])
def test_orpo_windows(toy, monkeypatch, size, prompts):
    """The odds are those of the completions; the likelihood is that of every labelled token of the chosen."""
    config, rows, model = ORPOConfig(beta=0.3), pairs_data(), toy.Table(1)
    monkeypatch.setattr(odds, "token_scores", model.token_scores)
    batches = [batch_of(toy, rows[i : i + size], prompts) for i in range(0, 8, size)]
    loss, metrics = toy.run(odds.objective(model, None, config), batches)
    chosen, rejected = (torch.stack([mean(model.logps(r[0] + r[k], len(r[0]))) for r in rows]) for k in (1, 2))
    nll = -mean(torch.cat([model.logps(r[0] + r[1], 1 if prompts else len(r[0])) for r in rows]))
    wanted = orpo_by_definition(chosen, rejected, config).mean() + nll
    (gradient,) = torch.autograd.grad(wanted, model.table)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.table.grad, gradient, rtol=1e-9, atol=1e-13)
    p, q = chosen.exp(), rejected.exp()
    log_odds = torch.log(p * (1 - q) / (q * (1 - p)))
    assert metrics["nll_loss"] == pytest.approx(nll.item())
    assert metrics["log_odds_chosen"] == pytest.approx(log_odds.mean().item())
    assert metrics["log_odds_ratio"] == pytest.approx(torch.log(s(log_odds)).mean().item())
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * chosen.mean().item())
    assert metrics["rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())


@pytest.mark.parametrize(
    "config", [ORPOConfig(), CPOConfig(loss_type="simpo"), CPOConfig(loss_type="ipo"), CPOConfig()]
)
def test_a_prompt_that_leaves_no_room_for_its_completion_does_no_harm(toy, monkeypatch, config):
    """TRL 1.16 turns this into a loss of nan, shown as 0.0, and weights of nan."""
    rows, model = [([1, 2, 3], [], []), ([1], [2, 3], [4]), ([5, 6], [], [7])], toy.Table(1)
    monkeypatch.setattr(odds, "token_scores", model.token_scores)
    loss, metrics = toy.run(odds.objective(model, None, config), [batch_of(toy, rows), batch_of(toy, rows[:1])])
    assert loss.isfinite() and model.table.grad.isfinite().all()
    assert all(value == value for value in metrics.values())
