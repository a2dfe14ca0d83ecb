"""DPO: every loss against its formula written out in float64, at the ends of its range, and over windows."""

import math
import random

import pytest
import torch

from burnish.config.preference import DPO_LOSSES, DPOConfig
from burnish.objectives import preference
from burnish.objectives.preference import LOSSES, Pairs, Shared, dpo_losses, share, share_out

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
F_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")


def s(z):
    return 1 / (1 + torch.exp(-z))


def smooth(z, e):
    return -(1 - e) * torch.log(s(z)) - e * torch.log(1 - s(z))


def f_prime(kind, ratio, alpha):
    """f' of the f-divergence at policy over reference, f'(1) = 0 (per-token scores feel that constant)."""
    u = torch.exp(ratio)  # policy over reference
    if kind == "forward_kl":
        return 1 - 1 / u
    if kind == "js_divergence":
        return torch.log(2 * u / (1 + u))
    if kind == "alpha_divergence":
        return (u ** (alpha - 1) - 1) / (alpha - 1) if alpha != 1 else ratio
    return ratio


def by_definition(name, p: Pairs, config) -> torch.Tensor:
    """Mean loss of all pairs, from the papers, pair by pair where nothing else is said."""
    b, e, n = config.beta, config.label_smoothing, len(p.chosen)
    c, r = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    fc, fr = (f_prime(config.f_divergence_type, x, config.f_alpha_divergence_coef) for x in (c, r))
    if name == "aot":
        z = torch.sort(p.chosen - p.rejected).values - torch.sort(p.ref_chosen - p.ref_rejected).values
        return smooth(b * z, e).mean()
    if name == "aot_unpaired":
        return smooth(b * (torch.sort(c).values - torch.sort(r).values), e).mean()
    if name == "sft":
        return p.chosen_nll.sum() / p.chosen_tokens.sum()
    if name == "kto_pair":
        kl_c, kl_r = c.detach().mean().clamp(min=0), r.detach().mean().clamp(min=0)
        return torch.cat([1 - s(b * (c - kl_r)), 1 - s(b * (kl_c - r))]).mean()
    total = 0.0
    for i in range(n):
        z = b * (fc[i] - fr[i])
        mean = fc[i] / p.chosen_tokens[i] - fr[i] / p.rejected_tokens[i]
        total = (
            total
            + {
                "sigmoid": lambda z=z: smooth(z, e),
                "sigmoid_norm": lambda m=mean: smooth(b * m, e),
                "hinge": lambda z=z: torch.clamp(1 - z, min=0),
                "ipo": lambda m=mean: (m - 1 / (2 * b)) ** 2,
                "exo_pair": lambda z=z: s(z) * torch.log(s(z) / (1 - e)) + (1 - s(z)) * torch.log((1 - s(z)) / e),
                "nca_pair": lambda i=i: (
                    -torch.log(s(b * c[i])) - 0.5 * torch.log(1 - s(b * c[i])) - 0.5 * torch.log(1 - s(b * r[i]))
                ),
                "robust": lambda z=z: (-(1 - e) * torch.log(s(z)) + e * torch.log(1 - s(z))) / (1 - 2 * e),
                "bco_pair": lambda i=i: -torch.log(s(b * c[i])) - torch.log(1 - s(b * r[i])),
                "sppo_hard": lambda i=i: (c[i] - 1 / (2 * b)) ** 2 + (r[i] + 1 / (2 * b)) ** 2,
                "apo_zero": lambda i=i: 1 - s(b * c[i]) + s(b * r[i]),
                "apo_down": lambda i=i: s(b * c[i]) + 1 - s(b * (c[i] - r[i])),
                "discopop": lambda z=z: (
                    -torch.log(s(z)) * (1 - s(z / config.discopop_tau)) + torch.exp(-z) * s(z / config.discopop_tau)
                ),
            }[name]()
        )
    return total / n


def random_pairs(n=6, seed=0, dtype=torch.float64) -> Pairs:
    noise = torch.Generator().manual_seed(seed)
    sums = [-20 - 10 * torch.rand(n, generator=noise, dtype=dtype) for _ in range(2)]
    refs = [x + 3 * torch.randn(n, generator=noise, dtype=dtype) for x in sums]
    tokens = [torch.randint(3, 30, (n,), generator=noise) for _ in range(2)]
    return Pairs(*sums, *refs, *tokens, 5 + torch.rand(n, generator=noise, dtype=dtype))


def with_gradients(function, pairs: Pairs):
    leaves = pairs._replace(
        **{name: getattr(pairs, name).clone().requires_grad_() for name in ("chosen", "rejected", "chosen_nll")}
    )
    value = function(leaves)
    inputs = (leaves.chosen, leaves.rejected, leaves.chosen_nll)
    grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return value.detach(), grads


def config_for(loss, **given) -> DPOConfig:
    smoothing = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
    return DPOConfig(loss_type=loss, **{**smoothing, **given})


PLAIN = [(loss, kind) for loss in DPO_LOSSES for kind in (F_DIVERGENCES if loss in F_LOSSES else ("reverse_kl",))]
CASES = [(loss, kind, {}) for loss, kind in PLAIN]
CASES += [(loss, "reverse_kl", {"label_smoothing": 0.2}) for loss in SMOOTHED]
CASES += [("sigmoid", "alpha_divergence", {"f_alpha_divergence_coef": a}) for a in (0.0, 1.0, 1.7)]
CASES += [("discopop", "reverse_kl", {"discopop_tau": 1.5}), ("ipo", "reverse_kl", {"beta": 0.7})]


@pytest.mark.parametrize(("loss", "kind", "given"), CASES)
def test_value_and_gradient_are_the_papers(loss, kind, given):
    config = config_for(loss, f_divergence_type=kind, **{"beta": 0.3, **given})
    pairs = random_pairs()
    value, grads = with_gradients(lambda p: dpo_losses(p, config).mean(), pairs)
    wanted, wanted_grads = with_gradients(lambda p: by_definition(loss, p, config), pairs)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert any(grad.abs().max() > 1e-6 for grad in grads)


def test_every_name_of_the_configuration_has_a_loss():
    assert set(LOSSES) == set(DPO_LOSSES)


def test_conservative_dpo_by_hand():
    """c = -10, r = -12, both references -11: z = 0.1 * 2; label smoothing counts, which TRL 1.16 forgets."""
    one = torch.ones(1, dtype=torch.float64)
    pairs = Pairs(-10 * one, -12 * one, -11 * one, -11 * one, one.long(), one.long(), one)
    plain = math.log1p(math.exp(-0.2))
    assert dpo_losses(pairs, DPOConfig()).item() == pytest.approx(plain, rel=1e-12)
    smoothed = dpo_losses(pairs, DPOConfig(label_smoothing=0.1)).item()
    assert smoothed == pytest.approx(0.9 * plain + 0.1 * (plain + 0.2), rel=1e-12)


def test_mixtures_add_up_with_their_weights():
    pairs = random_pairs()
    config = DPOConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], rpo_alpha=0.5)
    value, grads = with_gradients(lambda p: dpo_losses(p, config).mean(), pairs)
    parts = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    wanted, wanted_grads = with_gradients(
        lambda p: sum(w * by_definition(name, p, config) for name, w in parts.items()), pairs
    )
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    unweighted = DPOConfig(loss_type=["sigmoid", "hinge"])
    torch.testing.assert_close(
        dpo_losses(pairs, unweighted).mean(),
        by_definition("sigmoid", pairs, unweighted) + by_definition("hinge", pairs, unweighted),
        rtol=1e-12,
        atol=0,
    )


def test_wpo_weighs_values_and_gradients_and_has_none_of_its_own():
    pairs, weights = random_pairs(), torch.rand(6, dtype=torch.float64)
    _, grads = with_gradients(lambda p: dpo_losses(p, DPOConfig(), weights=weights).sum(), pairs)
    _, plain = with_gradients(lambda p: dpo_losses(p, DPOConfig()).sum(), pairs)
    torch.testing.assert_close(grads[0], plain[0] * weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_identical_completions_give_log_two(dtype, kind):
    same = torch.tensor([-37.123456], dtype=dtype)
    ref, tokens = torch.tensor([-35.0], dtype=dtype), torch.tensor([7])
    pairs = Pairs(same, same, ref, ref, tokens, tokens, -same)
    for loss in ("sigmoid", "sigmoid_norm"):
        losses = dpo_losses(pairs, DPOConfig(loss_type=loss, f_divergence_type=kind))
        assert losses.item() == torch.tensor(2.0, dtype=dtype).log().item()


EXTREMES = [(0.0, 0.0), (-1e4, 1e4), (1e4, -1e4), (-1e5, -1e5), (1e5, 1e5), (-90.0, 90.0), (300.0, -300.0)]


@pytest.mark.parametrize(("loss", "kind"), PLAIN)
@pytest.mark.parametrize("given", [{}, {"beta": 5.0}])
def test_extreme_ratios_and_empty_completions_stay_finite(loss, kind, given):
    config = config_for(loss, f_divergence_type=kind, **given)
    c, r = torch.tensor(EXTREMES, dtype=torch.float32).T.contiguous()
    zero, few = torch.zeros(len(c)), torch.tensor([0, 4, 0, 5, 6, 0, 2])
    pairs = Pairs(c, r, zero, zero, few, few.flip(0), c.abs())
    value, grads = with_gradients(lambda p: dpo_losses(p, config).sum(), pairs)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    nothing = Pairs(*[torch.zeros(2)] * 4, *[torch.zeros(2, dtype=torch.int64)] * 2, torch.zeros(2))
    value, grads = with_gradients(lambda p: dpo_losses(p, config).sum(), nothing)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_ties_are_matched_once():
    """Three equal ratios must take three different partners, not one partner three times."""
    same = torch.full((3,), -5.0, dtype=torch.float64)
    ref = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    pairs = Pairs(same, same, ref, 0 * ref, *[torch.ones(3, dtype=torch.int64)] * 2, -same)
    assert share(pairs, DPOConfig(loss_type="aot")).reference.tolist() == [-3.0, -2.0, -1.0]


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6])
@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_parts_of_a_window_add_up_to_the_whole(loss, sizes):
    config, pairs = config_for(loss, beta=0.3), random_pairs()
    parts = [Pairs(*fields) for fields in zip(*(field.split(sizes) for field in pairs), strict=True)]

    def in_parts(p):
        cut = [Pairs(*fields) for fields in zip(*(field.split(sizes) for field in p), strict=True)]
        shares = share_out(parts, config)
        return sum(dpo_losses(q, config, known).sum() for q, known in zip(cut, shares, strict=True)) / 6

    value, grads = with_gradients(in_parts, pairs)
    wanted, wanted_grads = with_gradients(lambda p: by_definition(loss, p, config), pairs)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_divergences_of_kto_pair_are_never_negative():
    zero = torch.zeros(2, dtype=torch.float64)
    pairs = Pairs(zero - 3, zero + 2, zero, zero, *[torch.ones(2, dtype=torch.int64)] * 2, zero)
    known = share(pairs, DPOConfig(loss_type="kto_pair"))
    assert (known.chosen_kl.item(), known.rejected_kl.item()) == (0.0, 2.0)


def test_shared_numbers_carry_no_gradient():
    pairs = random_pairs()._replace(chosen=random_pairs().chosen.requires_grad_())
    known = share(pairs, DPOConfig(loss_type=["aot", "aot_unpaired", "kto_pair", "sft"]))
    assert all(field is not None and not field.requires_grad for field in known) and isinstance(known, Shared)


# ---- the objective, on a toy model


def pairs_data(n=8, seed=3):
    """(prompt, chosen, rejected) token lists of uneven lengths."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(11) for _ in range(rng.randint(low, high))]

    return [(tokens(1, 4), tokens(1, 9), tokens(1, 9)) for _ in range(n)]


def batch_of(toy, rows):
    """Chosen and rejected in an order of their own: the pairs are told by the indices."""
    sequences = [(prompt + chosen, len(prompt), len(prompt)) for prompt, chosen, _ in rows]
    sequences += [(prompt + rejected, len(prompt), len(prompt)) for prompt, _, rejected in reversed(rows)]
    n = len(rows)
    return toy.pack(sequences, chosen=torch.arange(n), rejected=torch.arange(2 * n - 1, n - 1, -1))


def sums_by_hand(model, rows, ld_alpha=None) -> Pairs:
    fields = []
    for prompt, *replies in rows:
        short, found = min(map(len, replies)), []
        for reply in replies:
            logps = model.logps(prompt + reply, len(prompt))
            weights = [1.0 if i < short or ld_alpha is None else ld_alpha for i in range(len(reply))]
            found += [(logps * torch.tensor(weights, dtype=torch.float64)).sum()]
        fields.append(found + [-model.logps(prompt + replies[0], len(prompt)).sum()])
    chosen, rejected, nll = map(torch.stack, zip(*fields, strict=True))
    tokens = [torch.tensor([len(row[i]) for row in rows]) for i in (1, 2)]
    return Pairs(chosen, rejected, 0 * chosen, 0 * rejected, *tokens, nll)


def reference_of(model, config):
    """Sums [S] as a reference gives them."""
    from burnish.objectives.sequences import completion_sums

    return lambda batch: completion_sums(model.token_scores(None, None, batch).logps, batch, config.ld_alpha).detach()


WINDOWS = [dict(loss_type=loss, **({"label_smoothing": 0.1} if loss == "exo_pair" else {})) for loss in DPO_LOSSES]
WINDOWS += [
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "loss_type": ["aot", "sft"]},
    {"rpo_alpha": 0.7},
    {"reference_free": True},
    {"loss_type": ["aot_unpaired", "kto_pair", "sft"], "loss_weights": [0.5, 2.0, 1.0]},
]


@pytest.mark.parametrize("size", [8, 4, 3, 1])
@pytest.mark.parametrize("given", WINDOWS, ids=str)
def test_a_window_means_the_same_however_it_is_split(toy, monkeypatch, given, size):
    config, rows = DPOConfig(beta=0.4, **given), pairs_data()
    policy, other = toy.Table(1), toy.Table(2)
    monkeypatch.setattr(preference, "token_scores", policy.token_scores)
    objective = preference.objective(policy, None, config, reference_of(other, config))
    batches = [batch_of(toy, rows[i : i + size]) for i in range(0, 8, size)]
    loss, metrics = toy.run(objective, batches)

    p, ref = sums_by_hand(policy, rows, config.ld_alpha), sums_by_hand(other, rows, config.ld_alpha)
    if not config.reference_free:
        p = p._replace(ref_chosen=ref.chosen.detach(), ref_rejected=ref.rejected.detach())
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    wanted = sum(w * by_definition(name, p, config) for name, w in zip(config.loss_type, weights, strict=True))
    wanted = wanted + (config.rpo_alpha or 0) * by_definition("sft", p, config)
    (gradient,) = torch.autograd.grad(wanted, policy.table)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy.table.grad, gradient, rtol=1e-10, atol=1e-13)

    c, r = 0.4 * (p.chosen - p.ref_chosen), 0.4 * (p.rejected - p.ref_rejected)
    assert metrics["rewards/chosen"] == pytest.approx(c.mean().item())
    assert metrics["rewards/rejected"] == pytest.approx(r.mean().item())
    assert metrics["rewards/margins"] == pytest.approx((c - r).mean().item())
    assert metrics["rewards/accuracies"] == pytest.approx((c > r).double().mean().item())
    assert metrics["logps/chosen"] == pytest.approx(p.chosen.mean().item())
    assert metrics["logps/rejected"] == pytest.approx(p.rejected.mean().item())
    if "sft" in config.loss_type or config.rpo_alpha:
        assert metrics["nll_loss"] == pytest.approx(by_definition("sft", p, config).item())


@pytest.mark.parametrize(
    ("loss", "batches", "forwards"), [("sigmoid", 4, 4), ("sft", 4, 4), ("aot", 1, 1), ("aot", 4, 8)]
)
def test_a_second_forward_pass_is_made_only_where_pairs_must_know_each_other(toy, monkeypatch, loss, batches, forwards):
    policy, asked = toy.Table(1), []
    config = DPOConfig(loss_type=loss)
    monkeypatch.setattr(preference, "token_scores", policy.token_scores)
    reference = reference_of(toy.Table(2), config)
    objective = preference.objective(policy, None, config, lambda batch: asked.append(batch) or reference(batch))
    rows, size = pairs_data(), 8 // batches
    toy.run(objective, [batch_of(toy, rows[i : i + size]) for i in range(0, 8, size)])
    assert policy.forwards == forwards and len(asked) == batches


def test_a_policy_that_is_its_reference_starts_at_log_two(toy, monkeypatch):
    policy, config = toy.Table(1), DPOConfig()
    monkeypatch.setattr(preference, "token_scores", policy.token_scores)
    objective = preference.objective(policy, None, config, reference_of(policy, config))
    loss, metrics = toy.run(objective, [batch_of(toy, pairs_data())])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("size", [8, 2])
def test_wpo_is_the_papers(toy, monkeypatch, size):
    """w = exp(mean over tokens of log p - log sum_v p_v^2), of chosen times rejected, constant."""
    config, rows, policy, other = DPOConfig(use_weighting=True), pairs_data(), toy.Table(1), toy.Table(2)
    monkeypatch.setattr(preference, "token_scores", policy.token_scores)
    objective = preference.objective(policy, None, config, reference_of(other, config))
    loss, _ = toy.run(objective, [batch_of(toy, rows[i : i + size]) for i in range(0, 8, size)])
    p, ref = sums_by_hand(policy, rows), sums_by_hand(other, rows)
    wanted = 0.0
    for i, (prompt, *replies) in enumerate(rows):
        weight = 1.0
        for reply in replies:
            logps = policy.logps(prompt + reply, len(prompt))
            weight = weight * (logps - policy.square_sums(prompt + reply, len(prompt))).mean().exp().detach()
        z = config.beta * (p.chosen[i] - ref.chosen[i] - p.rejected[i] + ref.rejected[i])
        wanted = wanted - weight * torch.log(s(z)) / 8
    (gradient,) = torch.autograd.grad(wanted, policy.table)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(policy.table.grad, gradient, rtol=1e-10, atol=1e-13)


def test_token_metrics_are_over_completions_and_accuracy_over_the_chosen(toy, monkeypatch):
    rows, policy, config = pairs_data(), toy.Table(1), DPOConfig(reference_free=True)
    monkeypatch.setattr(preference, "token_scores", policy.token_scores)
    objective = preference.objective(policy, None, config)
    _, metrics = toy.run(objective, [batch_of(toy, rows[:3]), batch_of(toy, rows[3:])])
    right, chosen, entropies = 0, 0, []
    for prompt, *replies in rows:
        for reply in replies:
            tokens = prompt + reply
            for place in range(len(prompt), len(tokens)):
                logps = policy.table[tokens[place - 1]].log_softmax(-1)
                entropies.append(-(logps.exp() * logps).sum().item())
                if reply is replies[0]:
                    chosen, right = chosen + 1, right + (logps.argmax().item() == tokens[place])
    assert metrics["mean_token_accuracy"] == pytest.approx(right / chosen)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)


def test_an_empty_completion_takes_part_without_harm(toy, monkeypatch):
    """A completion cut to nothing: its sum is 0, its length counts as 1, and the gradients stay numbers."""
    rows = pairs_data()[:3] + [([1, 2, 3], [], [4, 5]), ([1, 2], [3], [])]
    for given in WINDOWS:
        policy, config = toy.Table(1), DPOConfig(**given)
        monkeypatch.setattr(preference, "token_scores", policy.token_scores)
        objective = preference.objective(policy, None, config, reference_of(toy.Table(2), config))
        loss, _ = toy.run(objective, [batch_of(toy, rows)])
        assert loss.isfinite() and policy.table.grad.isfinite().all(), given
