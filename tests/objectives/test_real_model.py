"""Objectives on a real (tiny) model in float32: splitting a window changes nothing, and policy = reference is exact."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.config.preference import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from burnish.data.batch import Examples, collate
from burnish.logprobs import token_scores
from burnish.model.attention import register
from burnish.model.head import read_head
from burnish.objectives import odds, preference, unpaired
from burnish.objectives.sequences import completion_sums


@pytest.fixture(scope="module")
def rows() -> Examples:
    """16 rows, chosen and rejected by turns: some prompt, then a completion."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 24, 16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.concatenate([np.arange(n) >= n // 3 for n in lengths])
    return Examples(rng.integers(3, 400, offsets[-1]).astype(np.int32), trained, offsets, np.arange(16))


def load(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=register(), dtype=torch.float32)
    return model, read_head(model)


def batch_of(rows: Examples, first: int, count: int):
    """`count` pairs from pair `first` on, chosen rows first; they are as well rated rows with mismatched ones."""
    numbers = [2 * pair + side for side in (0, 1) for pair in range(first, first + count)]
    batch = collate(rows, [(i, 0, int(rows.lengths[i])) for i in numbers])
    batch.chosen, batch.rejected = torch.arange(count), torch.arange(count, 2 * count)
    batch.rated, batch.mismatched = batch.chosen, batch.rejected
    batch.desirable = torch.arange(first, first + count) % 3 == 0
    tokens = int(batch.cu_seqlens[count])
    batch.edge = tokens, int((batch.valid < tokens).sum())
    return batch


CONFIGS = [
    DPOConfig(),
    DPOConfig(loss_type=["aot", "aot_unpaired", "sft"], ld_alpha=0.5),
    DPOConfig(loss_type="kto_pair"),
    DPOConfig(use_weighting=True, rpo_alpha=0.5),
    CPOConfig(loss_type="simpo", beta=2.0),
    ORPOConfig(),
    KTOConfig(),
    BCOConfig(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'loss_type', '')}")
def test_accumulation_changes_nothing_in_float32(tiny_model, rows, toy, config):
    room = {CPOConfig: odds, ORPOConfig: odds, KTOConfig: unpaired, BCOConfig: unpaired}.get(type(config), preference)
    other, other_head = load(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    ld_alpha = getattr(config, "ld_alpha", None)
    found = []
    for size in (8, 2, 1):
        model, head = load(tiny_model)
        objective = room.objective(
            model, head, config, lambda b: completion_sums(token_scores(other, other_head, b).logps, b, ld_alpha)
        )
        loss, _ = toy.run(objective, [batch_of(rows, i, size) for i in range(0, 8, size)])
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)
        assert (gradient - found[0][1]).norm() < 2e-6 * found[0][1].norm()


@pytest.mark.parametrize("config", [DPOConfig(), KTOConfig(), BCOConfig()], ids=lambda c: type(c).__name__)
def test_a_policy_equal_to_its_reference_has_log_ratios_of_exactly_zero(tiny_model, rows, toy, config):
    """Under gradients and without: the same kernels give the same bits."""
    room = preference if isinstance(config, DPOConfig) else unpaired
    model, head = load(tiny_model)
    reference, reference_head = load(tiny_model)
    objective = room.objective(
        model, head, config, lambda b: completion_sums(token_scores(reference, reference_head, b).logps, b)
    )
    loss, metrics = toy.run(objective, [batch_of(rows, 0, 8)])
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/margins"] == 0.0
    assert metrics.get("kl", 0.0) == metrics.get("delta", 0.0) == 0.0
    assert loss.item() == pytest.approx(0.5 if isinstance(config, KTOConfig) else math.log(2), abs=1e-7)


class Products(TorchDispatchMode):
    """Operations of the products with the head's vocabulary, which no other layer of the tiny model has."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.flops = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1] * (self.vocab in (*a.shape, *b.shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [DPOConfig(), DPOConfig(loss_type="ipo"), CPOConfig(), ORPOConfig(), KTOConfig(), BCOConfig()],
    ids=lambda c: f"{type(c).__name__}-{getattr(c, 'loss_type', '')}",
)
def test_the_head_costs_three_products_a_trained_token(tiny_model, rows, toy, config):
    """6NHV for what is trained and 2NHV for what only goes forward."""
    room = {CPOConfig: odds, ORPOConfig: odds, KTOConfig: unpaired, BCOConfig: unpaired}.get(type(config), preference)
    model, head = load(tiny_model)
    batch = batch_of(rows, 0, 8)
    objective = room.objective(model, head, config, lambda b: torch.zeros(len(b.cu_seqlens) - 1))
    with Products(head.weight.shape[0]) as count:
        toy.run(objective, [batch])
    trained = batch.num_valid if not isinstance(config, KTOConfig) else int((batch.valid < batch.cu_seqlens[8]).sum())
    shape = head.weight.shape[0] * head.weight.shape[1]
    assert count.flops == (6 * trained + 2 * (batch.num_valid - trained)) * shape
