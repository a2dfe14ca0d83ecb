"""Pieces that objectives share: the completion mask, LD-DPO's weights, bounded powers, and the sharp log-probs."""

import numpy as np
import pytest
import torch

from burnish.data.batch import Examples, collate
from burnish.logprobs import token_scores
from burnish.model.attention import register
from burnish.model.head import read_head
from burnish.objectives.sequences import completion, completion_sums, counts, owners, power_limit, power_reward


def test_counts_and_owners(toy):
    batch = toy.pack([([1, 2, 3, 4], 2, 2), ([5], 1, 1), ([6, 7, 8], 1, 1)])
    assert counts(completion(batch), batch).tolist() == [2, 0, 2]
    assert owners(batch).tolist() == [0] * 4 + [1] + [2] * 3


def test_prompts_with_labels_are_no_completions(toy):
    batch = toy.pack([([1, 2, 3, 4], 1, 2), ([6, 7, 8], 1, 1)])
    assert (batch.labels != -100).sum() == 5 and completion(batch).tolist() == [
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    batch.completion = None
    assert completion(batch).tolist() == (batch.labels != -100).tolist()


def test_ld_alpha_by_hand(toy):
    """Completions of 2 and 4 tokens: the longer one's last two count a quarter."""
    batch = toy.pack(
        [([9, 1, 2, 3, 4], 1, 1), ([9, 9, 5, 6], 2, 2)], chosen=torch.tensor([0]), rejected=torch.tensor([1])
    )
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, 0.0, 0.0, -16.0, -32.0, 0.0])
    assert completion_sums(logps, batch).tolist() == [-15.0, -48.0]
    assert completion_sums(logps, batch, 0.25).tolist() == [-6.0, -48.0]
    assert completion_sums(logps, batch, 1.0).tolist() == [-15.0, -48.0]
    assert completion_sums(logps, batch, 0.0).tolist() == [-3.0, -48.0]


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 1e-9, 0.7])
def test_power_reward_keeps_its_limit_and_its_range(alpha):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    wanted = x if abs(alpha) < 1e-8 else (torch.exp(alpha * x) - 1) / alpha
    torch.testing.assert_close(power_reward(x, alpha), wanted, rtol=1e-8, atol=1e-12)
    far = torch.tensor([-1e6, 1e6], requires_grad=True)
    value = power_reward(far, alpha)
    value.square().sum().backward()
    assert value.square().isfinite().all() and far.grad.isfinite().all()
    assert power_limit(torch.float32) == pytest.approx(40.36, abs=0.01)


def test_sharp_log_probs_give_the_sum_of_squared_probabilities(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=register(), dtype=torch.float32)
    rng = np.random.default_rng(0)
    examples = Examples(
        rng.integers(3, 400, 20).astype(np.int32), np.arange(20) % 3 != 0, np.array([0, 12, 20]), np.arange(2)
    )
    batch = collate(examples, [(0, 0, 12), (1, 0, 8)])
    scores = token_scores(model, read_head(model), batch, sharp=True)
    logits = torch.cat([model(input_ids=batch.input_ids[a:b][None]).logits[0] for a, b in ((0, 12), (12, 20))])
    wanted = logits.double().softmax(-1).square().sum(-1).log()[batch.valid]
    got = (2 * scores.logps - scores.sharp)[batch.valid]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    assert not scores.sharp.requires_grad and scores.logps.requires_grad
    untrained = torch.ones(20, dtype=torch.bool).index_fill(0, batch.valid, False)
    assert scores.sharp[untrained].abs().max() == 0
