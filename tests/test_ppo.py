"""PPOTrainer: whole steps against plain transformers in float64, KL of 0, a toy task, and what a user can get wrong."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from burnish import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    UserError,
    create_reference_model,
)
from burnish.model.head import evaluating
from burnish.ppo import trainer as module
from burnish.ppo.update import pack_rows, read

VOCAB = 64
SMALL = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-3}


def llama(seed: int = 0, **given) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **given}
    tokens = {"eos_token_id": 1, "pad_token_id": 2, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **shape, **tokens
    )
    return LlamaForCausalLM(config)


def with_head(seed: int = 0, peft_config=None, **given) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        llama(seed, **given), summary_dropout_prob=0.0, peft_config=peft_config
    )


def lora():
    import peft

    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def some_rows(count: int = 4, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    noise = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (2, count), generator=noise).tolist()
    return tuple([torch.randint(3, VOCAB, (n,), generator=noise) for n in side] for side in sizes)


def alone(model, head, query: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, values) of a response's tokens, one row through plain transformers."""
    out = model(torch.cat([query, response])[None], output_hidden_states=True)
    states = slice(len(query) - 1, len(query) + len(response) - 1)
    logps = out.logits[0, states].log_softmax(-1)
    values = out.hidden_states[-1][0, states] @ head.weight[0] + head.bias
    return logps.gather(1, response[:, None])[:, 0], -(logps.exp() * logps).sum(-1), values


def test_packed_rows_say_what_the_rows_alone_say():
    queries, responses = some_rows(6)
    plain, ours = llama(), with_head()
    head = copy.deepcopy(ours.v_head.summary)
    trainer = PPOTrainer(PPOConfig(batch_size=6, mini_batch_size=6), ours)
    batch = pack_rows(list(zip(queries, responses, strict=True)), torch.device("cpu"))
    with torch.no_grad():
        found = read(trainer.model.pretrained_model, batch)
        got = found.logps, found.entropy, trainer.model.v_head(found.hidden)
        rows = [alone(plain, head, q, r) for q, r in zip(queries, responses, strict=True)]
    for name, numbers, expected in zip(("log-probs", "entropy", "values"), got, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(
            numbers, torch.cat(expected), rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert [len(r) for r in responses] != sorted(len(r) for r in responses)


def by_hand(model, head, reference, queries, responses, scores, masks, config, epochs) -> dict[str, float]:
    """PPO of one mini-batch an epoch, in float64, row by row and token by token; plain SGD. Changes both models."""
    rows = list(zip(queries, responses, strict=True))
    with torch.no_grad():
        old = [alone(model, head, *row) for row in rows]
        ref = [alone(reference, head, *row)[0] for row in rows]
        if config.kl_penalty == "full":
            pairs = [[m(torch.cat(row)[None]).logits[0].log_softmax(-1) for m in (model, reference)] for row in rows]
            every = [(p.exp() * (p - q)).sum(-1) for p, q in pairs]
            kl = [k[len(q) - 1 : len(q) + len(r) - 1] for k, (q, r) in zip(every, rows, strict=True)]
        else:
            shape = {"kl": lambda x: x, "abs": torch.abs, "mse": lambda x: x * x / 2}[config.kl_penalty]
            kl = [shape(o[0] - r) for o, r in zip(old, ref, strict=True)]
        used = np.array(scores, dtype=np.float64)
        if config.use_score_scaling:
            used = (used - (used.mean() if config.use_score_norm else 0)) / used.std(ddof=1)
        if config.score_clip:
            used = used.clip(-config.score_clip, config.score_clip)
        rewards = [-config.init_kl_coef * k * m for k, m in zip(kl, masks, strict=True)]
        for row, mask, score in zip(rewards, masks, used, strict=True):
            row[int(mask.nonzero().max())] += score
        flat = torch.cat(masks).bool()
        if config.whiten_rewards:
            numbers = torch.cat(rewards)[flat]
            scale = (numbers.var() + 1e-8).sqrt()
            rewards = [((r - numbers.mean()) / scale + numbers.mean()) * m for r, m in zip(rewards, masks, strict=True)]
        values = [o[2] * m for o, m in zip(old, masks, strict=True)]
        gains = []
        for v, r in zip(values, rewards, strict=True):
            after = torch.cat([v[1:], v.new_zeros(1)])
            delta, n = r + config.gamma * after - v, len(v)
            gl = config.gamma * config.lam
            gains.append(torch.stack([sum(gl ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]))
        returns = torch.cat([g + v for g, v in zip(gains, values, strict=True)])[flat]
        gain = torch.cat(gains)[flat]
        gain = (gain - gain.mean()) / (gain.var() + 1e-8).sqrt()
        logps0, values0 = torch.cat([o[0] for o in old])[flat], torch.cat([o[2] for o in old])[flat]
    seen = []
    for _ in range(epochs):
        now = [alone(model, head, *row) for row in rows]
        logps, v = (torch.cat([n[part] for n in now])[flat] for part in (0, 2))
        ratio, c = (logps - logps0).exp(), config.cliprange
        policy = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - c, 1 + c)).mean()
        near = torch.minimum(torch.maximum(v, values0 - config.cliprange_value), values0 + config.cliprange_value)
        value = 0.5 * torch.maximum((v - returns) ** 2, (near - returns) ** 2).mean()
        seen.append({"policy": policy.item(), "value": value.item(), "total": (policy + config.vf_coef * value).item(),
                     "kl": (logps0 - logps).mean().item(), "error": ((v - returns) ** 2).mean().item()})  # fmt: skip
        parameters = [*model.parameters(), *head.parameters()]
        for parameter, slope in zip(
            parameters, torch.autograd.grad(policy + config.vf_coef * value, parameters), strict=True
        ):
            parameter.data -= 0.05 * slope
    means = {name: np.mean([each[name] for each in seen]).item() for name in seen[0]}
    return means | {"objective": np.mean([(k * m).sum().item() for k, m in zip(kl, masks, strict=True)]).item()}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kl_penalty": "abs", "gamma": 0.9, "lam": 0.8, "whiten_rewards": True},
        {"kl_penalty": "mse", "use_score_scaling": True, "use_score_norm": True, "score_clip": 0.7},
        {"kl_penalty": "full", "use_score_scaling": True, "cliprange": 0.02, "cliprange_value": 0.01, "vf_coef": 0.5},
    ],
    ids=lambda given: "-".join(given) or "defaults",
)
@pytest.mark.parametrize("micro", [1, 2], ids=["whole", "accumulated"])
def test_a_step_is_the_formulas_in_float64(given, micro):
    """Losses, statistics and every updated weight, with masked tokens, a reference of its own, several epochs, and the
    same whether an update's rows come in one mini-batch or in two of unequal token counts."""
    queries, responses = some_rows(4, seed=3)
    masks = [torch.ones(len(r)) for r in responses]
    longest = max(range(4), key=lambda row: len(responses[row]))
    masks[longest][[0, 2, -1]] = 0
    scores = [1.0, -0.5, 2.0, 0.25]
    sizes = {"batch_size": 4, "mini_batch_size": 4 // micro, "gradient_accumulation_steps": micro, "ppo_epochs": 3}
    config = PPOConfig(**sizes, **given, ratio_threshold=1e6)
    model, plain, reference = with_head(0), llama(0).double(), llama(7)
    head = copy.deepcopy(model.v_head.summary).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = PPOTrainer(config, model, copy.deepcopy(reference), optimizer=sgd)
    stats = trainer.step(queries, responses, scores, masks)
    expected = by_hand(
        plain, head, reference.double(), queries, responses, scores, [m.double() for m in masks], config, 3
    )
    theirs = {**plain.state_dict(), "v.weight": head.weight, "v.bias": head.bias}
    ours = model.pretrained_model.state_dict()
    ours |= {"v.weight": model.v_head.summary.weight, "v.bias": model.v_head.summary.bias}
    start = llama(0).state_dict()
    for name, weight in ours.items():
        torch.testing.assert_close(
            weight.double(), theirs[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n} {m}"
        )
    moved = max((ours[name] - start[name]).abs().max().item() for name in start)
    assert moved > 0.01, "the update is far above the tolerance"
    assert stats["objective/kl"] == pytest.approx(expected["objective"], rel=1e-4)
    assert stats["objective/kl_coef"] == 0.2
    if micro == 1:
        for name in ("policy", "value", "total"):
            assert stats[f"ppo/loss/{name}"] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
        assert stats["ppo/policy/policykl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
        assert stats["ppo/val/error"] == pytest.approx(expected["error"], rel=1e-3)
    error = sorted((-0.2, stats["objective/kl"] / 6.0 - 1, 0.2))[1]
    assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 + error * 4 / 10000), rel=1e-9)


@pytest.mark.parametrize("penalty", ["kl", "abs", "mse", "full"])
@pytest.mark.parametrize("adapted", [False, True], ids=["copy", "adapter"])
def test_a_policy_that_is_its_reference_has_a_kl_of_exactly_0(penalty, adapted):
    model = with_head(peft_config=lora() if adapted else None)
    trainer = PPOTrainer(PPOConfig(**SMALL, kl_penalty=penalty), model)
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    assert bool(base) == adapted and (trainer.ref_model is model) == adapted
    first = trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
    assert first["objective/kl"] == 0.0 and not first["objective/kl_dist"].any()
    assert first["ppo/mean_non_score_reward"] == 0.0
    second = trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
    assert second["objective/kl"] != 0.0, "the policy moved, the reference did not"
    np.testing.assert_array_equal(first["objective/ref_logprobs"], second["objective/ref_logprobs"])
    for name, value in model.named_parameters():
        assert name not in base or torch.equal(value, base[name]), name


def test_dropout_does_not_come_between_the_log_probs_of_a_step():
    """GPT-2's own dropouts of 0.1 are off; the value head's is on for the update alone."""
    tokens = {"bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **tokens)
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain, summary_dropout_prob=0.5)
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1), model)
    queries, responses = some_rows()
    with torch.no_grad(), evaluating(model):
        values = [alone(plain, model.v_head.summary, q, r)[2] for q, r in zip(queries, responses, strict=True)]
    stats = trainer.step(queries, responses, [1.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(stats["ppo/policy/ratio"], 1.0, rtol=1e-5)
    assert stats["objective/kl"] == 0.0
    assert stats["ppo/val/mean"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert stats["ppo/val/vpred"] != pytest.approx(stats["ppo/val/mean"], rel=1e-2)


def test_gradient_checkpointing_changes_nothing():
    finals = []
    for wanted in (False, True):
        model = with_head()
        if wanted:
            model.gradient_checkpointing_enable()
        trainer = PPOTrainer(PPOConfig(**SMALL), model)
        trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
        finals.append(model.state_dict())
        assert wanted == any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_ppo_raises_the_reward_of_a_toy_task():
    """The reward is the share of token 7. A random model has it at 1 in 64; 40 steps bring it above a half."""
    config = PPOConfig(batch_size=32, mini_batch_size=32, learning_rate=1e-2, init_kl_coef=0.02, ppo_epochs=2)
    trainer = PPOTrainer(config, with_head(num_hidden_layers=1))
    noise, means = torch.Generator().manual_seed(0), []
    for _ in range(40):
        sizes = torch.randint(2, 6, (32,), generator=noise).tolist()
        queries = [torch.randint(3, VOCAB, (size,), generator=noise) for size in sizes]
        responses = trainer.generate(
            queries, batch_size=32, return_prompt=False, do_sample=True, max_new_tokens=6, top_k=0.0, min_length=-1
        )
        scores = [(response == 7).float().mean() for response in responses]
        stats = trainer.step(queries, responses, scores)
        means.append(stats["ppo/mean_scores"])
    assert np.mean(means[:5]) < 0.1 and np.mean(means[-5:]) > 0.5
    assert np.mean(means[-5:]) > np.mean(means[15:20]) > np.mean(means[:5])
    assert stats["ppo/val/var_explained"] > 0.1, "the value head has learnt what comes"


def test_a_mini_batch_far_off_is_skipped_and_said(capsys):
    trainer = PPOTrainer(PPOConfig(**SMALL, ratio_threshold=0.5), with_head())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert capsys.readouterr().err.count("mean ratio 1 is above 0.5: mini-batch skipped") == 4


def test_early_stopping_ends_the_epochs(monkeypatch):
    runs = []

    def spy(*given):
        runs.append(found := optimize(*given))
        return found

    optimize = module.optimize
    monkeypatch.setattr(module, "optimize", spy)
    for target in (None, 1e3, 2e-4):
        given = {} if target is None else {"early_stopping": True, "target_kl": target}
        PPOTrainer(PPOConfig(**SMALL, seed=1, **given), with_head()).step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
    moved = [each["policy/policykl"].item() for each in runs[0]]
    passed = [number for number, kl in enumerate(moved) if kl > 1.5 * 2e-4]
    assert 0 < passed[0] < 3
    assert [len(run) for run in runs] == [4, 4, passed[0] + 1]


def test_max_grad_norm_and_the_schedule():
    model = with_head()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, max_grad_norm=1e-3)
    trainer = PPOTrainer(config, model, optimizer=sgd, lr_scheduler=schedule)
    for expected in (1e-3, 5e-4):
        before = [p.detach().clone() for p in model.parameters()]
        stats = trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])
        step = math.sqrt(
            sum((p - b).double().square().sum().item() for p, b in zip(model.parameters(), before, strict=True))
        )
        assert step == pytest.approx(expected, rel=2e-3) and stats["ppo/learning_rate"] == expected * 1e3


def test_the_same_seed_gives_the_same_bits():
    finals = []
    for _ in range(2):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(llama(), v_head_init_strategy="normal")
        trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3, seed=5), model)
        queries, _ = some_rows()
        responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=5)
        trainer.step(queries, responses, [1.0, 0.0, 0.5, 2.0])
        finals.append((responses, model.state_dict()))
    (first, weights), (second, others) = finals
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_reference_that_shares_layers():
    model = with_head()
    trainer = PPOTrainer(PPOConfig(**SMALL), model, num_shared_layers=1)
    ours, theirs = (m.pretrained_model.model for m in (model, trainer.ref_model))
    pairs = [*zip(ours.named_parameters(), theirs.parameters(), strict=True)]
    for (name, own), other in pairs:
        shared = name.startswith(("embed_tokens", "layers.0."))
        assert (own is other) == shared == (not own.requires_grad) and not other.requires_grad, name
    assert trainer.step(*some_rows(), [1.0, 0.0, 0.5, 2.0])["objective/kl"] == 0.0
    assert create_reference_model(llama()).training is False
    with pytest.raises(UserError, match=r"num_shared_layers: the model has 2 layers"):
        create_reference_model(model, num_shared_layers=3)


# ---- generation


def test_queries_of_all_lengths_get_the_responses_they_get_alone():
    queries, _ = some_rows(7, seed=2)
    plain, trainer = llama(), PPOTrainer(PPOConfig(**SMALL), with_head())
    given = {"do_sample": False, "max_new_tokens": 8}
    alone = [plain.generate(query[None], **given, eos_token_id=None, pad_token_id=2)[0].tolist() for query in queries]
    eos = alone[0][len(queries[0]) + 2]  # a token that does come
    expected = []
    for query, whole in zip(queries, alone, strict=True):
        ends = [place for place in range(len(query), len(whole)) if whole[place] == eos]
        expected.append(whole[: ends[0] + 1] if ends else whole)
    given["eos_token_id"] = eos
    assert [row.tolist() for row in trainer.generate(queries, batch_size=3, **given)] == expected
    bare = trainer.generate(queries, batch_size=7, return_prompt=False, **given)
    assert [row.tolist() for row in bare] == [w[len(q) :] for q, w in zip(queries, expected, strict=True)]
    assert trainer.generate(queries[0], **given).tolist() == [expected[0]]
    assert expected != alone, "some response ends before its time"
    assert trainer.model.training


def test_an_end_of_sequence_in_the_query_ends_no_response():
    trainer = PPOTrainer(PPOConfig(**SMALL), with_head())
    query = torch.tensor([5, 1, 6])
    whole = trainer.generate([query], do_sample=False, max_new_tokens=3, eos_token_id=1)[0]
    assert whole[:3].tolist() == [5, 1, 6] and len(whole) > 3


@pytest.mark.parametrize("adapted", [False, True], ids=["copy", "adapter"])
def test_the_references_responses(adapted):
    trainer = PPOTrainer(
        PPOConfig(**{**SMALL, "learning_rate": 0.1}), with_head(peft_config=lora() if adapted else None)
    )
    queries, responses = some_rows()
    before = trainer.generate(queries, do_sample=False, max_new_tokens=8)
    trainer.step(queries, responses, [1.0, 0.0, 0.5, 2.0])
    now, theirs = trainer.generate(queries, do_sample=False, max_new_tokens=8, generate_ref_response=True)
    assert [row.tolist() for row in theirs] == [row.tolist() for row in before]
    assert [row.tolist() for row in now] != [row.tolist() for row in before]
