"""PPO's arithmetic against its formulas in float64, by explicit sums and one token after the other."""

import math
import statistics

import pytest
import torch

from burnish.model.head import Head
from burnish.objectives import rl

MASK = [[1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor(MASK, dtype=torch.float64)


def counted(table: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return [
        v
        for row, flags in zip(table.tolist(), mask.tolist(), strict=True)
        for v, m in zip(row, flags, strict=True)
        if m
    ]


def test_means_and_variances_look_at_what_counts(mask):
    table = draw(0, 3, 7)
    numbers = counted(table, mask)
    assert rl.masked_mean(table, mask).item() == pytest.approx(statistics.fmean(numbers), rel=1e-12)
    assert rl.masked_var(table, mask).item() == pytest.approx(statistics.variance(numbers), rel=1e-12)
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert rl.masked_var(draw(1, 1, 2), one).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(mask, shift_mean):
    table = 3 + 5 * draw(0, 3, 7)
    numbers = counted(table, mask)
    mean, scale = statistics.fmean(numbers), math.sqrt(statistics.variance(numbers) + 1e-8)
    white = rl.whiten(table, mask, shift_mean)
    expected = [(v - mean) / scale + (0 if shift_mean else mean) for v in numbers]
    assert counted(white, mask) == pytest.approx(expected, rel=1e-12)
    assert not white[mask == 0].any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.97, 1.0)])
def test_advantages_are_the_explicit_sums(mask, gamma, lam):
    values, rewards = draw(0, 3, 7), draw(1, 3, 7)
    found, returns = rl.advantages(values, rewards, mask, gamma, lam)
    for b in range(3):
        v = [x * m for x, m in zip(values[b].tolist(), MASK[b], strict=True)] + [0.0]
        r = [x * m for x, m in zip(rewards[b].tolist(), MASK[b], strict=True)]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(7)]
        for t in range(7):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 7))
            assert found[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
            assert returns[b, t].item() == pytest.approx(expected + v[t], rel=1e-12, abs=1e-13)


def test_with_lambda_1_returns_are_the_discounted_rewards_to_come():
    values, rewards = draw(0, 1, 5), draw(1, 1, 5)
    _, returns = rl.advantages(values, rewards, torch.ones(1, 5, dtype=torch.float64), 0.9, 1.0)
    expected = [sum(0.9 ** (k - t) * rewards[0, k].item() for k in range(t, 5)) for t in range(5)]
    assert returns[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_padding_behind_a_response_changes_nothing():
    values, rewards, ones = draw(0, 1, 5), draw(1, 1, 5), torch.ones(1, 5, dtype=torch.float64)
    short = rl.advantages(values, rewards, ones, 0.9, 0.8)
    wide = rl.advantages(*(torch.cat([x, draw(2, 1, 3)], 1) for x in (values, rewards)),
                         torch.cat([ones, torch.zeros(1, 3)], 1), 0.9, 0.8)  # fmt: skip
    for a, b in zip(short, wide, strict=True):
        assert torch.equal(a, b[:, :5])


@pytest.mark.parametrize(
    ("penalty", "formula"), [("kl", lambda x: x), ("abs", abs), ("mse", lambda x: x * x / 2)], ids=["kl", "abs", "mse"]
)
def test_estimates_of_a_tokens_kl(penalty, formula):
    logps, reference = -draw(0, 9).abs(), -draw(1, 9).abs()
    expected = [formula(a - b) for a, b in zip(logps.tolist(), reference.tolist(), strict=True)]
    assert rl.token_kl(logps, reference, penalty).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("elements", [1, 100, 2**24])
def test_full_kl_is_the_sum_over_the_vocabulary_in_chunks_of_any_size(monkeypatch, elements):
    monkeypatch.setattr(rl, "_KL_ELEMENTS", elements)
    heads = [Head(draw(s, 40, 8).float(), draw(s + 1, 40).float(), cap, 0.5) for s, cap in ((0, 3.0), (5, None))]
    hidden = [draw(s, 11, 8).float() for s in (2, 3)]
    found = rl.full_kl(hidden[0], heads[0], hidden[1], heads[1])
    logps = []
    for head, states in zip(heads, hidden, strict=True):
        z = 0.5 * (states.double() @ head.weight.double().T + head.bias.double())
        logps.append((z if head.softcap is None else 3 * torch.tanh(z / 3)).log_softmax(-1))
    expected = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)
    assert (expected > 0.1).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_full_kl_of_a_token_that_cannot_come_is_finite():
    bias = torch.zeros(5)
    bias[3] = -math.inf
    head = Head(draw(0, 5, 4).float(), bias, None, 1.0)
    assert rl.full_kl(draw(1, 2, 4).float(), head, draw(1, 2, 4).float(), head).tolist() == [0.0, 0.0]


def test_the_score_goes_to_the_last_token_that_counts(mask):
    kl, scores = draw(0, 3, 7), [2.0, -1.0, 0.5]
    rewards, penalty = rl.token_rewards(kl, torch.tensor(scores, dtype=torch.float64), mask, 0.3)
    last = [max(t for t in range(7) if row[t]) for row in MASK]
    for b in range(3):
        for t in range(7):
            charge = -0.3 * kl[b, t].item() * MASK[b][t]
            assert penalty[b, t].item() == pytest.approx(charge, abs=1e-15)
            assert rewards[b, t].item() == pytest.approx(charge + scores[b] * (t == last[b]), abs=1e-15)


def test_clipped_policy_loss_and_its_gradient():
    """d/d logp of max(-A r, -A clamp(r)) is -A r where r is inside the clip or the clip is worse, else 0."""
    old, clip = -draw(0, 400).abs(), 0.2
    logps = (old + 0.4 * draw(1, 400)).requires_grad_()
    advantages = draw(2, 400)
    loss, clipped = rl.policy_losses(logps, old, advantages, clip)
    loss.sum().backward()
    seen = set()
    for i in range(400):
        a, r = advantages[i].item(), math.exp(logps[i].item() - old[i].item())
        inside = min(max(r, 1 - clip), 1 + clip)
        assert loss[i].item() == pytest.approx(max(-a * r, -a * inside), rel=1e-12)
        assert bool(clipped[i]) == (-a * inside > -a * r)
        assert logps.grad[i].item() == pytest.approx(0.0 if -a * inside > -a * r else -a * r, rel=1e-9)
        seen.add((a > 0, r < 1 - clip, r > 1 + clip))
    assert len(seen) == 6, "every branch is tried"


def test_clipped_value_loss_and_its_gradient():
    """V' has no slope outside of the clip, so the gradient there is 0 where V' is what counts."""
    old, returns, clip = draw(0, 400), draw(1, 400), 0.3
    values = (old + 0.6 * draw(2, 400)).requires_grad_()
    loss, clipped = rl.value_losses(values, old, returns, clip)
    loss.sum().backward()
    outside = 0
    for i in range(400):
        v, o, g = values[i].item(), old[i].item(), returns[i].item()
        near = min(max(v, o - clip), o + clip)
        assert loss[i].item() == pytest.approx(0.5 * max((v - g) ** 2, (near - g) ** 2), rel=1e-12)
        assert bool(clipped[i]) == ((near - g) ** 2 > (v - g) ** 2)
        worse = near != v and (near - g) ** 2 > (v - g) ** 2
        assert values.grad[i].item() == pytest.approx(0.0 if worse else v - g, rel=1e-9)
        outside += worse
    assert 30 < outside < 370


def test_controllers():
    adaptive, fixed = rl.AdaptiveKL(0.2, 6.0, 100.0), rl.FixedKL(0.2)
    expected = 0.2
    for kl, samples in ((0.0, 10), (6.0, 10), (6.6, 20), (100.0, 10), (5.5, 64)):
        error = sorted((-0.2, kl / 6.0 - 1.0, 0.2))[1]
        expected *= 1 + error * samples / 100.0
        adaptive.update(kl, samples)
        fixed.update(kl, samples)
        assert adaptive.value == pytest.approx(expected, rel=1e-14) and fixed.value == 0.2
    assert adaptive.value != pytest.approx(0.2, rel=0.01)


def test_running_moments_are_those_of_everything_seen():
    parts = [1e4 + 3 * draw(seed, size) for seed, size in ((0, 1), (1, 7), (2, 30), (3, 1))]
    running = rl.RunningMoments()
    assert running.std == 1.0
    for n in range(1, 5):
        running.update(parts[n - 1])
        numbers = torch.cat(parts[:n]).tolist()
        assert running.mean == pytest.approx(statistics.fmean(numbers), rel=1e-12)
        assert running.std == pytest.approx(statistics.stdev(numbers) if n > 1 else 1.0, rel=1e-9)
