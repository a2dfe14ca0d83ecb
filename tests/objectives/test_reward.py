"""Reward modelling: the formula in float64, the score at the last token, windows, and wrong models."""

import pytest
import torch

from burnish.config.errors import UserError
from burnish.config.preference import RewardConfig
from burnish.data.batch import Examples, collate
from burnish.model.attention import register
from burnish.objectives import reward
from burnish.objectives.reward import reward_losses, score_layer, sequence_scores


@pytest.mark.parametrize("margin", [None, torch.tensor([0.0, 1.0, -0.5, 3.0, 0.2])])
@pytest.mark.parametrize("center", [None, 0.01, 2.0])
def test_value_and_gradient_are_bradley_terry(margin, center):
    noise = torch.Generator().manual_seed(0)
    leaves = [torch.randn(5, generator=noise, dtype=torch.float64).requires_grad_() for _ in range(2)]
    losses = reward_losses(*leaves, margin, RewardConfig(center_rewards_coefficient=center))
    chosen, rejected = leaves
    wanted = -torch.log(
        torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected + (0 if margin is None else margin.double())))
    )
    wanted = wanted + (center or 0) * (chosen + rejected) ** 2
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad(x.sum(), leaves) for x in (losses, wanted))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


def test_extremes_and_equal_scores():
    chosen = torch.tensor([1e5, -1e5, 3.0], requires_grad=True)
    losses = reward_losses(chosen, torch.tensor([-1e5, 1e5, 3.0]), None, RewardConfig(center_rewards_coefficient=0.01))
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    assert losses.isfinite().all() and gradient.isfinite().all()
    same = torch.tensor([2.0])
    assert reward_losses(same, same, None, RewardConfig()).item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("size", [8, 4, 3, 1])
def test_a_window_means_the_same_however_it_is_split(toy, monkeypatch, size):
    noise = torch.Generator().manual_seed(1)
    table = torch.randn(toy.VOCAB, generator=noise, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, toy.VOCAB, (8, 2, 3), generator=noise)
    margin = torch.rand(8, generator=noise)
    config = RewardConfig(center_rewards_coefficient=0.1)
    monkeypatch.setattr(reward, "score_layer", lambda model: None)
    monkeypatch.setattr(reward, "sequence_scores", lambda model, b: table[b.input_ids[b.cu_seqlens[1:].long() - 1]])

    def batch(part):
        n = len(tokens[part])
        rows = [(pair[i].tolist(), 3, 3) for i in (1, 0) for pair in tokens[part]]  # rejected first
        return toy.pack(rows, chosen=torch.arange(n, 2 * n), rejected=torch.arange(n), margin=margin[part])

    batches = [batch(slice(i, i + size)) for i in range(0, 8, size)]
    loss, metrics = toy.run(reward.objective(None, None, config), batches)
    chosen, rejected = table[tokens[:, 0, 2]], table[tokens[:, 1, 2]]
    wanted = (-torch.log(1 / (1 + torch.exp(-(chosen - rejected - margin)))) + 0.1 * (chosen + rejected) ** 2).mean()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(table.grad, torch.autograd.grad(wanted, table)[0], rtol=1e-10, atol=1e-14)
    assert metrics["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert metrics["margin"] == pytest.approx((chosen - rejected).mean().item())
    assert metrics["mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item())
    if size == 8:
        assert metrics["min_reward"] == min(chosen.min(), rejected.min()).item()
        assert metrics["max_reward"] == max(chosen.max(), rejected.max()).item()


def classifier(tiny_model, labels=1):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=labels, dtype=torch.float32, attn_implementation=register()
    )


def test_scores_are_the_models_own_at_each_last_token(tiny_model):
    import numpy as np

    model = classifier(tiny_model)
    rng, lengths = np.random.default_rng(0), [7, 3, 12]
    ids = [rng.integers(3, 400, n) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    examples = Examples(np.concatenate(ids).astype(np.int32), np.zeros(22, dtype=bool), offsets, np.arange(3))
    batch = collate(examples, [(i, 0, n) for i, n in enumerate(lengths)])
    scores = sequence_scores(model, batch)
    for i, row in enumerate(ids):
        alone = model(input_ids=torch.from_numpy(row)[None], attention_mask=None).logits[0, 0]
        torch.testing.assert_close(scores[i], alone, rtol=1e-5, atol=1e-6)
    assert scores.dtype == torch.float32 and scores.requires_grad


def test_models_without_one_score_are_refused(tiny_model):
    from transformers import AutoModelForCausalLM

    with pytest.raises(UserError, match="LlamaForCausalLM does not give one score a sequence"):
        score_layer(AutoModelForCausalLM.from_pretrained(tiny_model))
    with pytest.raises(UserError, match="num_labels=1"):
        reward.objective(classifier(tiny_model, labels=3), None, RewardConfig())
