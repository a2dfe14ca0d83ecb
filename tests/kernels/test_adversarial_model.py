"""Hard cases of whole models and objectives on top of the ops: tied weights, adapters on the head, preferences.

A test's number is the case's in the project's list of adversarial cases.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from head_cases import CHUNKED, MARKS, error, leaves, loss_oracle, problem, token_oracle

from burnish.config.errors import UserError
from burnish.config.preference import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from burnish.data.batch import Batch
from burnish.kernels import linear_cross_entropy, linear_logprob, use
from burnish.model.head import read_head
from burnish.model.patch import patch
from burnish.objectives.odds import cpo, orpo
from burnish.objectives.preference import dpo, pairs_of
from burnish.objectives.sequences import completion_sums
from burnish.objectives.unpaired import kto_losses

pytestmark = MARKS


def tiny_llama(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


IDS = (torch.arange(20) * 13 % 61).view(2, 10)
LABELS = IDS.masked_fill(torch.arange(10) < 3, -100)


def gradients_of(model):
    model.zero_grad()
    loss = model(IDS, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, want):
    assert error(got[0], want[0]) < 1e-6 and got[1].keys() == want[1].keys()
    for name, grad in got[1].items():
        assert error(grad, want[1][name].double()) < 1e-5, name


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("first", ["head", "embedding"])
def test_case_17_tied_embeddings(backend, first):
    """The weight's gradient is the sum of both ends', whichever arrives first, and again when it accumulates."""
    x, weight, _, labels = problem(5, 6, 13)
    ids = torch.tensor([1, 1, 4, 7, 12])
    (got,), (want,) = leaves(weight), leaves(weight.double())
    for _ in range(2):
        with use(backend):
            loss = linear_cross_entropy(x + F.embedding(ids, got), got, labels)
        extra = F.embedding(ids, got).square().sum()
        (loss + extra if first == "head" else extra + loss).backward()
        (loss_oracle(x + F.embedding(ids, want), want, labels) + F.embedding(ids, want).square().sum()).backward()
    assert error(got.grad, want.grad) < 2e-6


def test_case_17_tied_embeddings_of_a_patched_model():
    model = tiny_llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = gradients_of(model)
    assert patch(model).patched["linear_cross_entropy"] == 1
    same_gradients(gradients_of(model), want)


def adapted(**changes):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(tied=False), LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # away from zero, so that A trains
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.train()


ON_THE_HEAD = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "modules_to_save, both ends": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("changes", ON_THE_HEAD.values(), ids=ON_THE_HEAD)
def test_case_18_adapters_on_the_head_train_or_are_refused_by_name(changes):
    """After patching every adapter on the head still gets the gradient it had; burnish's own runs say no to LoRA."""
    model = adapted(**changes)
    want = gradients_of(model)
    assert any("lm_head" in name and grad.norm() > 1e-3 for name, grad in want[1].items())
    report = patch(model)
    same_gradients(gradients_of(model), want)
    if "modules_to_save" in changes:
        assert report.patched["linear_cross_entropy"] == 1
        assert read_head(model).weight is model.base_model.model.lm_head.modules_to_save["default"].weight
    else:
        assert "linear_cross_entropy" not in report.patched
        assert any("fused head" in reason for _, reason in report.skipped)
        with pytest.raises(UserError, match="lm_head out of lora_target_modules"):
            read_head(model)


def pairs(lengths, labelled, seed=0, hidden=6, vocab=13):
    """(hidden states, weight, batch) of sequences of `lengths`, the last `labelled` tokens of each a completion.

    Even sequences are chosen, odd ones rejected; equal lengths and labels make a pair of equal completions.
    """
    gen = torch.Generator().manual_seed(seed)
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    weight = torch.randn(vocab, hidden, generator=gen)
    states, labels = [], []
    for length, number in zip(lengths, labelled, strict=True):
        gen.manual_seed(length)
        states.append(torch.randn(length, hidden, generator=gen))
        targets = torch.randint(0, vocab, (length,), generator=gen)
        labels.append(targets.masked_fill(torch.arange(length) < length - number, -100))
    labels_ = torch.cat(labels)
    valid = (labels_ != -100).nonzero()[:, 0]
    numbers = torch.arange(len(lengths))
    batch = Batch(
        input_ids=labels_, position_ids=labels_, cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=max(lengths), labels=labels_, num_valid=len(valid), valid=valid, rows=numbers.tolist(),
        chosen=numbers[::2], rejected=numbers[1::2],
    )  # fmt: skip
    return torch.cat(states), weight, batch


def kto(logps, batch, config, reference):
    ratio = completion_sums(logps, batch) - reference
    return kto_losses(ratio, torch.arange(len(ratio)) % 2 == 0, 0.0, config).sum(), len(ratio), {}


OBJECTIVES = {
    "dpo": (dpo, DPOConfig(loss_type=["sigmoid"])),
    "dpo per token": (dpo, DPOConfig(loss_type=["sigmoid_norm"])),
    "ipo": (dpo, DPOConfig(loss_type=["ipo"])),
    "hinge": (dpo, DPOConfig(loss_type=["hinge"])),
    "simpo": (lambda logps, batch, config, ref: cpo(logps, batch, config), CPOConfig(loss_type="simpo")),
    "cpo": (lambda logps, batch, config, ref: cpo(logps, batch, config), CPOConfig()),
    "orpo": (lambda logps, batch, config, ref: orpo(logps, batch, config), ORPOConfig()),
    "kto": (kto, KTOConfig()),
}


def objective_and_gradients(name, x, weight, batch, reference, backend=None):
    """Loss and gradients through the head: on a backend, or without one in float64 over all logits.

    The objective itself runs in float32 (and has its own tests): where ORPO holds log(1 - p) depends on the type.
    """
    function, config = OBJECTIVES[name]
    if backend is None:
        a, w = leaves(x.double(), weight.double())
        logps = token_oracle(a, w, batch.labels)[0].float()
    else:
        a, w = leaves(x, weight)
        with use(backend):
            logps = linear_logprob(a, w, batch.labels)
    loss, _, _ = function(logps, batch, config, reference.to(logps.dtype))
    loss.backward()
    return loss, a.grad, w.grad


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_case_25_masked_and_empty_completions(backend, name):
    """A pair with nothing labelled in one sequence, one with nothing in both, one token against many: all finite, and
    what the loss means in float64."""
    x, weight, batch = pairs([5, 7, 4, 4, 3, 6, 1, 8], [3, 0, 0, 0, 1, 5, 1, 0])
    reference = -torch.arange(8.0) * (torch.tensor([3, 0, 0, 0, 1, 5, 1, 0]) > 0)
    got = objective_and_gradients(name, x, weight, batch, reference, backend)
    want = objective_and_gradients(name, x, weight, batch, reference)
    assert all(torch.isfinite(t).all() for t in got)
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) < 5e-6
    assert (got[1][batch.labels == -100] == 0).all()


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("name", ["dpo", "dpo per token"])
def test_case_25_a_policy_that_is_its_reference_loses_log_two(backend, name):
    """Exactly: log-probs with and without gradients are the same bits, so every log-ratio is 0."""
    x, weight, batch = pairs([5, 7, 6, 6], [3, 4, 4, 4])
    with use(backend), torch.no_grad():
        reference = completion_sums(linear_logprob(x, weight, batch.labels), batch)
    function, config = OBJECTIVES[name]
    for frozen in (False, True):
        a, w = leaves(x, weight)
        with use(backend):
            logps = linear_logprob(a, w.detach() if frozen else w, batch.labels)
        ratios = pairs_of(logps, batch, config, reference)
        assert (ratios.chosen_ratio == 0).all() and (ratios.rejected_ratio == 0).all()
        loss, count, _ = function(logps, batch, config, reference)
        assert loss.item() == count * torch.tensor(2.0).log().item()
        loss.backward()
        assert torch.isfinite(a.grad).all() and a.grad.norm() > 0


@pytest.mark.parametrize("backend", CHUNKED)
def test_case_25_identical_completions(backend):
    """The same sequence as chosen and rejected: log 2 to the last digits, and the pair's gradients cancel."""
    x, weight, batch = pairs([6, 6], [4, 4])
    loss, dx, dw = objective_and_gradients("dpo", x, weight, batch, torch.zeros(2), backend)
    assert abs(loss.item() - math.log(2)) < 1e-6
    assert dw.norm() < 1e-6 and dx.norm() > 1e-2
    assert error(dx[:6], -dx[6:].double()) < 1e-6


@pytest.mark.parametrize("backend", CHUNKED)
def test_case_25_odds_of_near_certainty(backend):
    """ORPO's log odds of a completion of probability 1 - 1e-6: log(1 - p) is exact only where log p is."""
    x, weight, batch = pairs([6, 5], [4, 3])
    trained = (batch.labels != -100)[:6].nonzero()[:, 0]
    rows = weight[batch.labels[trained]]
    x[trained] = 28.0 * rows / rows.square().sum(1, keepdim=True)
    sure = -token_oracle(x.double(), weight.double(), batch.labels)[0][trained]
    assert 0 < sure.max() < 1e-3
    got = objective_and_gradients("orpo", x, weight, batch, torch.zeros(2), backend)
    want = objective_and_gradients("orpo", x, weight, batch, torch.zeros(2))
    assert all(torch.isfinite(t).all() for t in got)
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) < 1e-4
