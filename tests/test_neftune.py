"""NEFTune: the noise has the strength of the formula for each document of a packed row, and only in training."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish import SFTConfig, SFTTrainer
from burnish.config.errors import UserError
from burnish.data.stream import _collate, _Sequence
from burnish.logprobs import hidden_states
from burnish.model.attention import register
from burnish.model.neftune import add_noise, noisy_embeddings


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=register()).train()


@pytest.fixture
def packed():
    """One row of documents of 3, 40 and 7 tokens."""
    import numpy as np

    made = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 40, 7)]
    return _collate([_Sequence(ids, np.ones(len(ids), dtype=bool), i, 0) for i, ids in enumerate(made)])


def embedded(model, batch, **given) -> torch.Tensor:
    """What the layers got as embeddings [T, d] of one packed forward."""
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
        with_kwargs=True,
    )
    with noisy_embeddings(model, given.pop("alpha", 5.0), **given):
        hidden_states(model, batch)
    handle.remove()
    return seen[0][0]


def test_noise_is_uniform_within_alpha_over_the_root_of_length_times_width():
    edges = torch.tensor([0, 200, 1000, 1016], dtype=torch.int32)
    width, alpha = 512, 7.0
    noise = torch.zeros(1, 1016, width)
    add_noise(noise, alpha, edges)
    for start, stop in [(0, 200), (200, 1000), (1000, 1016)]:
        bound = alpha / math.sqrt((stop - start) * width)
        part = noise[0, start:stop].double()
        count = part.numel()
        assert part.abs().max() <= bound * (1 + 1e-6)
        assert part.abs().max() > bound * (1 - 20 / count)
        # four standard errors of the mean and of the variance of a uniform variable
        assert abs(part.mean()) < 4 * bound / math.sqrt(3 * count)
        assert abs(part.var() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / count)
        assert abs((part.abs() < bound / 2).double().mean() - 0.5) < 4 * math.sqrt(0.25 / count)


def test_without_edges_each_row_is_one_document():
    noise = torch.zeros(3, 50, 64)
    add_noise(noise, 2.0, None)
    bound = 2.0 / math.sqrt(50 * 64)
    assert bound * 0.99 < noise.abs().amax() <= bound * (1 + 1e-6)
    assert not torch.equal(noise[0], noise[1])


def test_a_part_of_a_divided_row_uses_the_lengths_of_the_whole_documents():
    edges = torch.tensor([0, 10, 2000], dtype=torch.int32)
    noise = torch.zeros(1, 1000, 64)
    add_noise(noise, 2.0, edges, part=1)  # tokens 1000 to 2000, all of the document of 1990
    bound = 2.0 / math.sqrt(1990 * 64)
    assert bound * 0.999 < noise.abs().amax() <= bound * (1 + 1e-6)


def test_blocks_don_t_change_the_scale(monkeypatch):
    monkeypatch.setattr("burnish.model.neftune._BLOCK", 3 * 64)
    noise = torch.zeros(1, 100, 64)
    add_noise(noise, 2.0, torch.tensor([0, 50, 100], dtype=torch.int32))
    bound = 2.0 / math.sqrt(50 * 64)
    per_token = noise[0].abs().amax(dim=1)
    assert (per_token > bound * 0.8).all() and (per_token <= bound * (1 + 1e-6)).all()


def test_each_document_of_a_packed_row_gets_the_noise_of_its_own_length(model, packed):
    clean = model.get_input_embeddings()(packed.input_ids)
    noise = embedded(model, packed, alpha=5.0) - clean
    for start, stop in [(0, 3), (3, 43), (43, 50)]:
        bound = 5.0 / math.sqrt((stop - start) * 32)
        assert bound * 0.9 < noise[start:stop].abs().max() <= bound * (1 + 1e-4)


def test_no_noise_in_evaluation_nor_without_gradients_nor_afterwards(model, packed):
    clean = model.get_input_embeddings()(packed.input_ids)
    assert not torch.equal(embedded(model, packed), clean)
    with torch.no_grad():
        assert torch.equal(embedded(model, packed), clean)
    assert torch.equal(embedded(model.eval(), packed), clean)
    model.train()
    assert torch.equal(embedded(model, packed, alpha=None), clean)
    assert torch.equal(embedded(model, packed, alpha=0.0), clean)
    with pytest.raises(RuntimeError), noisy_embeddings(model, 5.0):
        raise RuntimeError
    assert not model.get_input_embeddings()._forward_hooks and not model.model._forward_pre_hooks


def test_gradients_are_those_of_a_sum_with_a_constant(model, packed):
    """Against noise that is added outside, with autograd looking on."""
    hidden = {}
    for way in ("hook", "outside"):
        model.zero_grad()
        torch.manual_seed(3)
        if way == "hook":
            with noisy_embeddings(model, 5.0):
                out = hidden_states(model, packed)
        else:
            noise = torch.zeros(1, 50, 32)
            add_noise(noise, 5.0, packed.cu_seqlens)
            handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out, noise=noise: out + noise)
            out = hidden_states(model, packed)
            handle.remove()
        (out.double() ** 2).sum().backward()
        hidden[way] = out.detach(), model.get_input_embeddings().weight.grad.clone()
    for ours, theirs in zip(hidden["hook"], hidden["outside"], strict=True):
        assert torch.equal(ours, theirs)


def settings(tmp_path, name, **changes):
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2}
    usual |= {"logging_steps": 1, "max_length": 64, "neftune_noise_alpha": 5.0}
    return SFTConfig(output_dir=str(tmp_path / name), **{**usual, **changes})


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_run_with_noise_differs_resumes_bit_for_bit_and_leaves_the_model_clean(tmp_path, tiny_model, chat_file):
    whole = SFTTrainer(tiny_model, settings(tmp_path, "whole"), train_dataset=chat_file)
    hooks = dict(whole.model.get_input_embeddings()._forward_hooks)
    whole.train()
    assert whole.model.get_input_embeddings()._forward_hooks == hooks
    plain = SFTTrainer(tiny_model, settings(tmp_path, "plain", neftune_noise_alpha=None), train_dataset=chat_file)
    plain.train()
    assert whole.state.log_history[0]["loss"] != plain.state.log_history[0]["loss"]
    halved = SFTTrainer(tiny_model, settings(tmp_path, "whole"), train_dataset=chat_file)
    halved.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, halved.model.state_dict()[name]), name
    other = SFTTrainer(tiny_model, settings(tmp_path, "whole", neftune_noise_alpha=6.0), train_dataset=chat_file)
    with pytest.raises(UserError, match=r"neftune_noise_alpha \(5.0, now 6.0\) differ"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_an_older_constructor_s_argument_is_the_same_run(tmp_path, tiny_model, chat_file):
    new = SFTTrainer(tiny_model, settings(tmp_path, "new"), train_dataset=chat_file)
    new.train()
    config = settings(tmp_path, "old", neftune_noise_alpha=None)
    old = SFTTrainer(tiny_model, config, train_dataset=chat_file, neftune_noise_alpha=5.0)
    old.train()
    assert [r["loss"] for r in new.state.log_history[:4]] == [r["loss"] for r in old.state.log_history[:4]]


def test_evaluation_sees_no_noise(tmp_path, tiny_model, chat_file):
    frozen = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    trainer = SFTTrainer(
        tiny_model, settings(tmp_path, "run", **frozen), train_dataset=chat_file, eval_dataset=chat_file
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(losses) >= 5 and set(losses) == {before}


def test_a_negative_strength_is_refused():
    with pytest.raises(UserError, match="neftune_noise_alpha must be at least 0"):
        SFTConfig(neftune_noise_alpha=-1)
