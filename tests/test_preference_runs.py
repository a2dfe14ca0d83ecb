"""Whole preference runs on a tiny model: references, accumulation, caches, resuming, what is saved."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

import burnish
from burnish import UserError

BASE = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 4,
    "gradient_checkpointing": False,
}
PAIRED = ("DPO", "CPO", "ORPO", "Reward")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pairs() -> list[dict]:
    """24 prompts; the chosen reply is of short words that the rejected one never has."""
    rng = random.Random(3)
    good, bad = "the fox over and ten cats a".split(), "quick brown jumps lazy counts seven watch".split()
    return [
        {
            "prompt": [{"role": "user", "content": f"case {number} {rng.choice(good)} {rng.choice(bad)}"}],
            "chosen": [{"role": "assistant", "content": " ".join(rng.choices(good, k=rng.randint(2, 9)))}],
            "rejected": [{"role": "assistant", "content": " ".join(rng.choices(bad, k=rng.randint(2, 9)))}],
        }
        for number in range(24)
    ]


def trainer(name, folder, model, rows, eval_rows=None, peft_config=None, **given):
    config = getattr(burnish, f"{name}Config")(str(folder), **{**BASE, **given})
    extra = {"peft_config": peft_config} if peft_config is not None else {}
    return getattr(burnish, f"{name}Trainer")(model, args=config, train_dataset=rows, eval_dataset=eval_rows, **extra)


def losses(run) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@pytest.mark.parametrize("name", [*PAIRED, "KTO", "BCO"])
def test_every_objective_learns_the_preference(tmp_path, tiny_model, pairs, name):
    run = trainer(name, tmp_path / "run", tiny_model, pairs[:16], pairs[16:], max_steps=30, test_split_size=None)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    if name == "Reward":
        assert after["eval_accuracy"] >= 0.75
    elif name in ("KTO", "BCO"):
        assert after["eval_rewards/chosen"] > after["eval_rewards/rejected"]
    else:
        assert after["eval_rewards/accuracies"] >= 0.75


def references(tmp_path, tiny_model):
    """Ways to a reference that is the policy before training."""
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "a copy": ({}, {}),
        "a second model": ({"ref_model": tiny_model}, {}),
        "adapter off": ({"peft_config": adapter}, {}),
        "cached": ({}, {"precompute_ref_log_probs": True}),
    }


@pytest.mark.parametrize("way", ["a copy", "a second model", "adapter off", "cached"])
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_a_policy_equal_to_its_reference_has_log_ratios_of_zero(tmp_path, tiny_model, pairs, name, way):
    objects, given = references(tmp_path, tiny_model)[way]
    config = getattr(burnish, f"{name}Config")(str(tmp_path / "run"), **{**BASE, **given, "max_steps": 1})
    run = getattr(burnish, f"{name}Trainer")(tiny_model, args=config, train_dataset=pairs, **objects)
    run.train()
    first = run.state.log_history[0]
    assert math.isclose(first["loss"], math.log(2) if name == "DPO" else 0.5, rel_tol=1e-6)
    exact = 0.0 if way != "cached" else 1e-5  # the cached sums come from batches of other shapes
    assert abs(first["rewards/chosen"]) <= exact and abs(first["rewards/rejected"]) <= exact


@pytest.mark.parametrize("name", [*PAIRED, "KTO", "BCO"])
def test_accumulation_and_token_budgets_change_nothing(tmp_path, tiny_model, pairs, name):
    rows = pairs[:8]
    if name in ("KTO", "BCO"):  # mismatched completions come from the micro-batch, so the window is what must agree
        rows = [row for row in pairs[:8]]
    common = {"train_sampling_strategy": "sequential", "max_steps": 3, "max_grad_norm": 0.5}
    if name == "KTO":
        common["loss_type"] = "apo_zero_unpaired"
    count = 16 if name in ("KTO", "BCO") else 8
    whole = trainer(name, tmp_path / "whole", tiny_model, rows, per_device_train_batch_size=count, **common)
    split = trainer(
        name,
        tmp_path / "split",
        tiny_model,
        rows,
        per_device_train_batch_size=count // 4,
        gradient_accumulation_steps=4,
        **common,
    )
    whole.train(), split.train()
    for a, b in zip(whole.state.log_history, split.state.log_history, strict=True):
        for key in ("loss", "grad_norm"):
            if key in a:
                assert math.isclose(a[key], b[key], rel_tol=2e-5), (key, a["step"])
    for (parameter, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6, msg=parameter)


def test_cached_reference_sums_are_the_reference(tmp_path, tiny_model, pairs):
    def run(folder, **given):
        made = trainer("DPO", tmp_path / folder, tiny_model, pairs, max_steps=6, num_train_epochs=1, **given)
        made.train()
        return made

    live, cached = run("live"), run("cached", precompute_ref_log_probs=True)
    for a, b in zip(losses(live), losses(cached), strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)
    kept = list((tmp_path / "cache" / "reference").iterdir())
    again = run("again", precompute_ref_log_probs=True)
    assert losses(again) == losses(cached)
    assert list((tmp_path / "cache" / "reference").iterdir()) == kept, "the second run read what the first had written"
    run("other rows", precompute_ref_log_probs=True, max_prompt_length=9)
    run("other loss", precompute_ref_log_probs=True, ld_alpha=0.5)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 3


def test_other_weights_are_another_reference(tmp_path, tiny_model, pairs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        next(model.parameters())[5] += 0.1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    for number, name in enumerate((tiny_model, str(tmp_path / "other")), 1):
        trainer("DPO", tmp_path / f"run{number}", name, pairs, precompute_ref_log_probs=True)
        assert len(list((tmp_path / "cache" / "reference").iterdir())) == number


RESUMABLE = {
    "reference that moves": ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}),
    "running mean": ("BCO", {}),
    "mismatched completions": ("KTO", {}),
    "new score layer": ("Reward", {}),
    "new score layer beside an adapter": ("Reward", {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}),
    "adapter": ("DPO", {"use_peft": True, "lora_target_modules": "all-linear", "precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize(("name", "given"), RESUMABLE.values(), ids=RESUMABLE)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path, tiny_model, pairs, name, given):
    whole = trainer(name, tmp_path / "whole", tiny_model, pairs, max_steps=7, **given)
    whole.train()
    trainer(
        name, tmp_path / "parts", tiny_model, pairs, max_steps=7, save_strategy="steps", save_steps=3, **given
    ).train()
    resumed = trainer(name, tmp_path / "parts", tiny_model, pairs, max_steps=7, **given)
    resumed.train(str(tmp_path / "parts" / "checkpoint-3"))
    for (parameter, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), parameter
    assert losses(whole) == losses(resumed)


def test_a_reward_model_scores_alike_under_plain_transformers(tmp_path, tiny_model, pairs):
    run = trainer("Reward", tmp_path / "run", tiny_model, pairs, pairs[:4], max_steps=3)
    run.train()
    run.save_model()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    chats = [row["prompt"] + row[side] for row in pairs[:4] for side in ("chosen", "rejected")]
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        scores = model(**encoded).logits[:, 0]
    assert math.isclose(run.evaluate()["eval_margin"], (scores[::2] - scores[1::2]).mean().item(), rel_tol=1e-4)


def test_mistakes_about_references_are_named(tmp_path, tiny_model, pairs):
    def fails(name, match, **objects):
        given = objects.pop("given", {})
        config = getattr(burnish, f"{name}Config")(str(tmp_path / "run"), **{**BASE, **given})
        with pytest.raises(UserError, match=match):
            getattr(burnish, f"{name}Trainer")(tiny_model, args=config, train_dataset=pairs, **objects)

    fails("DPO", "nothing would use the reference", ref_model=tiny_model, given={"reference_free": True})
    fails("DPO", "both given", ref_model=tiny_model, given={"use_peft": True, "lora_target_modules": "all-linear"})
    fails("DPO", "no adapter old", given={"ref_adapter_name": "old"})
    with pytest.raises(UserError, match="args is a SFTConfig"):
        burnish.DPOTrainer(tiny_model, args=burnish.SFTConfig("x"), train_dataset=pairs)


def test_references_that_could_not_follow_are_refused(tmp_path, tiny_model, pairs):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fails(match, model, **given):
        objects = {name: given.pop(name) for name in ("peft_config", "ref_model") if name in given}
        config = burnish.DPOConfig(str(tmp_path / "run"), **{**BASE, **given})
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        with pytest.raises(UserError, match=match):
            burnish.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer, **objects)

    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    fails("can't follow a policy with adapters", tiny_model, sync_ref_model=True, peft_config=adapter)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    fails("is the model that is trained", model, ref_model=model)


def test_an_adapter_on_or_off_is_another_cached_reference(tmp_path, tiny_model, pairs):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter, adapter_name="policy")
    model.add_adapter("old", adapter)
    found = []
    for given in ({"ref_adapter_name": "old"}, {}):
        config = burnish.DPOConfig(
            str(tmp_path / "run"), **BASE, model_adapter_name="policy", precompute_ref_log_probs=True, **given
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        made = burnish.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
        found.append(made.run.batches.reference)
    assert abs(found[0] - found[1]).max() > 1e-3


def test_a_named_adapter_is_saved_and_resumed(tmp_path, tiny_model, pairs):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def made():
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter, adapter_name="policy")
        config = burnish.DPOConfig(
            str(tmp_path / "run"), **{**BASE, "save_strategy": "steps", "save_steps": 2}, model_adapter_name="policy"
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        return burnish.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)

    whole, resumed = made(), made()
    whole.train()
    resumed.train(str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_named_adapter_is_the_reference(tmp_path, tiny_model, pairs):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), adapter, adapter_name="policy")
    model.add_adapter("old", adapter)
    old = {name: p.detach().clone() for name, p in model.named_parameters() if ".old." in name}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".policy." in name:
                p.copy_(old[name.replace(".policy.", ".old.")])
    from transformers import AutoTokenizer

    config = burnish.DPOConfig(str(tmp_path / "run"), **BASE, model_adapter_name="policy", ref_adapter_name="old")
    run = burnish.DPOTrainer(
        model, args=config, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(tiny_model)
    )
    run.train()
    first, last = (losses(run)[i] for i in (0, -1))
    assert math.isclose(first, math.log(2), rel_tol=1e-6) and last < first
    for name, p in run.model.named_parameters():
        assert ".old." not in name or torch.equal(p, old[name]), "the reference must stay as it was"


def test_the_command_line_trains_pairs(tmp_path, tiny_model, pairs):
    from burnish import cli

    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = [f"{key}={value}" for key, value in {**BASE, "output_dir": tmp_path / "run"}.items()]
    words += [f"model_name_or_path={tiny_model}", f"dataset_name={rows}", "loss_type=ipo", "test_split_size=4"]
    assert cli.main(["dpo", *words, "eval_strategy=steps", "eval_steps=2"]) == 0
    records = [json.loads(line) for line in (Path(tmp_path) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= set(
        records[0]
    )
    assert "eval_rewards/accuracies" in records[2] or any("eval_rewards/accuracies" in r for r in records)
