"""The other trainers as scripts for TRL v0.7 to v0.20 make them, and what such scripts give that can't be honoured."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

import burnish
from burnish import SFTConfig, SFTTrainer, UserError
from burnish.config.aliases import OLDER


@pytest.fixture
def pairs(qa) -> list[dict]:
    return [{"prompt": q, "chosen": f" {a}", "rejected": f" not {a}"} for q, a in qa]


@pytest.fixture
def rated(qa) -> list[dict]:
    return [{"prompt": q, "completion": f" {a}", "label": i % 2 == 0} for i, (q, a) in enumerate(qa)]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def arguments(**given) -> TrainingArguments:
    return TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, report_to="none", **given)


def test_dpo_of_v8(model, tiny_model, tokenizer, pairs, trained, capsys):
    """Every argument that the constructor had of its own."""
    dpo_trainer = burnish.DPOTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments(learning_rate=1e-3),
        beta=0.2,
        label_smoothing=0.1,
        loss_type="sigmoid",
        label_pad_token_id=-100,
        padding_value=0,
        truncation_mode="keep_end",
        train_dataset=pairs,
        tokenizer=tokenizer,
        max_length=64,
        max_prompt_length=32,
        max_target_length=16,
        is_encoder_decoder=False,
        disable_dropout=True,
        generate_during_eval=False,
        precompute_ref_log_probs=True,
        dataset_num_proc=2,
        model_init_kwargs=None,
        ref_model_init_kwargs=None,
        model_adapter_name=None,
        ref_adapter_name=None,
        reference_free=False,
        force_use_ref_model=False,
    )
    dpo_trainer.train()
    trained(dpo_trainer)
    config = dpo_trainer.args
    assert (config.beta, config.label_smoothing, config.loss_type) == (0.2, 0.1, ["sigmoid"])
    assert config.truncation_mode == "keep_end"
    assert (config.max_length, config.max_prompt_length, config.max_completion_length) == (64, 32, 16)
    assert config.learning_rate == 1e-3 and config.precompute_ref_log_probs
    said = capsys.readouterr().out
    assert said.count("DPOTrainer(max_target_length=...) is now DPOConfig(max_completion_length=...)") == 1
    assert "padding_value changes nothing here: burnish never pads" in said


def test_dpo_with_an_adapter_and_on_with_it(tiny_model, tokenizer, pairs, trained):
    """The reference is the base without its adapter; a PeftModel that a script brings goes on training."""
    from peft import AutoPeftModelForCausalLM

    given = {"tokenizer": tokenizer, "train_dataset": pairs}
    dpo_trainer = burnish.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model), None, args=arguments(), beta=0.1,
        peft_config=LoraConfig(r=4, target_modules="all-linear"), **given,
    )  # fmt: skip
    dpo_trainer.train()
    trained(dpo_trainer)
    dpo_trainer.save_model("adapter")
    model = AutoPeftModelForCausalLM.from_pretrained("adapter", is_trainable=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = burnish.DPOConfig("on", max_steps=2, learning_rate=1e-2)
    burnish.DPOTrainer(model, args=config, **given).train()
    after = dict(model.named_parameters())
    assert before and any(not torch.equal(after[name], old) for name, old in before.items())


@pytest.mark.parametrize("name", ["CPO", "ORPO", "DPO"])
@pytest.mark.parametrize("argument", ["tokenizer", "processing_class"])
def test_preference_trainers_on_pairs(name, argument, model, tokenizer, pairs, trained):
    config = getattr(burnish, f"{name}Config")(
        output_dir="out", beta=0.1, max_length=64, max_prompt_length=32, max_steps=2, remove_unused_columns=False
    )
    trainer = getattr(burnish, f"{name}Trainer")(
        model=model, args=config, train_dataset=pairs, eval_dataset=pairs[:2], **{argument: tokenizer}
    )
    trainer.train()
    trained(trainer)
    assert "eval_loss" in trainer.evaluate()


def test_kto(model, tokenizer, rated, trained):
    training_args = burnish.KTOConfig(
        "out", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, max_steps=2, per_device_train_batch_size=4
    )
    kto_trainer = burnish.KTOTrainer(
        model,
        ref_model=None,
        args=training_args,
        train_dataset=rated,
        tokenizer=tokenizer,
        model_adapter_name=None,
        ref_adapter_name=None,
    )
    kto_trainer.train()
    trained(kto_trainer)


@pytest.mark.parametrize("own", [True, False], ids=["RewardConfig", "TrainingArguments"])
def test_reward(tiny_model, tokenizer, pairs, trained, own):
    """v0.8 took tokenized pairs and max_length as an argument."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    rows = []
    for pair in pairs:
        row = {}
        for side in ("chosen", "rejected"):
            tokens = tokenizer(pair["prompt"] + pair[side])
            row |= {f"input_ids_{side}": tokens["input_ids"], f"attention_mask_{side}": tokens["attention_mask"]}
        rows.append(row)
    args = burnish.RewardConfig("out", max_steps=2, max_length=64) if own else arguments()
    older = {} if own else {"max_length": 64}
    trainer = burnish.RewardTrainer(model=model, args=args, tokenizer=tokenizer, train_dataset=rows, **older)
    trainer.train()
    trained(trainer)
    assert trainer.args.max_length == 64


def test_iterative_sft(model, tokenizer, qa):
    trainer = burnish.IterativeSFTTrainer(model, TrainingArguments("out", learning_rate=1e-3), tokenizer)
    for start in (0, 3):
        texts = [f"{question} {answer}" for question, answer in qa[start : start + 3]]
        trainer.step(texts=texts, texts_labels=texts)
    assert trainer.state.global_step == 2
    inputs = [torch.tensor(tokenizer(question)["input_ids"]) for question, _ in qa[:2]]
    trainer.step(input_ids=inputs, attention_mask=[torch.ones_like(ids) for ids in inputs], labels=inputs)
    assert len([record for record in trainer.state.log_history if "loss" in record]) == trainer.state.global_step == 3


def test_a_model_made_by_a_function(tiny_model, pairs, qa):
    made = []

    def model_init():
        made.append(AutoModelForCausalLM.from_pretrained(tiny_model))
        return made[-1]

    rows = [{"text": question} for question, _ in qa]
    trainer = SFTTrainer(model_init=model_init, args=SFTConfig("out", max_steps=1), train_dataset=rows)
    assert trainer.model is made[0] and len(made) == 1
    with pytest.raises(UserError, match="^SFTTrainer: model and model_init are both given. Keep one$"):
        SFTTrainer(tiny_model, model_init=model_init, train_dataset=rows)


def test_an_optimizer_of_ones_own(model, tokenizer, qa):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"text": question} for question, _ in qa]
    trainer = SFTTrainer(
        model, SFTConfig("out", max_steps=2, bf16=False), train_dataset=rows, tokenizer=tokenizer,
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "its rate is 0"
    assert trainer.run.stepping["optimizer"] is optimizer


def test_the_end_of_a_reply_is_the_keys(model, tokenizer, qa):
    """eos_token and pad_token apply to a tokenizer that the script brings, too, and to what is generated later."""
    rows = [{"prompt": question, "completion": answer} for question, answer in qa]
    config = SFTConfig("out", max_steps=1, eos_token="<pad>", pad_token="<|im_end|>")
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    examples = trainer.run.batches.examples
    assert (examples.ids[examples.offsets[1:] - 1] == tokenizer.convert_tokens_to_ids("<pad>")).all()
    saved = AutoModelForCausalLM.from_pretrained(trainer.save_model())
    assert saved.config.eos_token_id == 2 and saved.generation_config.eos_token_id[0] == 2
    assert AutoTokenizer.from_pretrained("out").pad_token == "<|im_end|>"
    with pytest.raises(UserError, match=r"^eos_token: '<end>' is not in the tokenizer's vocabulary"):
        SFTTrainer(model, SFTConfig("x", eos_token="<end>"), train_dataset=rows, processing_class=tokenizer)


def test_a_template_of_another_tokenizer_brings_its_end_of_reply(tiny_model, tokenizer, data):
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}"
    other.eos_token = "<pad>"
    other.save_pretrained("other")
    config = SFTConfig("out", chat_template_path="other")
    trainer = SFTTrainer(tiny_model, config, train_dataset=data["capybara"], processing_class=tokenizer)
    assert trainer.processing_class.eos_token == "<pad>"
    assert tokenizer.decode(trainer.run.batches.examples.ids[:40]).startswith("What falls from the sky?<pad>rain<pad>")


REFUSED = [
    ({"compute_metrics": len}, "SFTTrainer(compute_metrics=...): compute_metrics is not taken: there are no logits"),
    ({"preprocess_logits_for_metrics": len}, "preprocess_logits_for_metrics is not taken: there are no logits"),
    ({"compute_loss_func": len}, "Use loss_type, or burnish.kernels in a loop of your own"),
    ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "Use optim, or optimizers=(optimizer, None)"),
    ({"max_seq_len": 12}, "SFTTrainer(max_seq_len=...): unknown key max_seq_len. Did you mean max_length?"),
    ({"tokenizer": 1, "processing_class": 2}, "SFTTrainer: processing_class and tokenizer are both given. Keep one"),
    ({"eval_dataset": {"a": [], "b": []}}, "SFTTrainer(eval_dataset=...): eval_dataset is a dict of 2 sets"),
    ({"args": 3}, "SFTTrainer(args=...): args is a int. Use SFTConfig"),
    ({"args": burnish.DPOConfig("x")}, "SFTTrainer(args=...): args is a DPOConfig. Use SFTConfig"),
    ({"args": arguments(fp16=True)}, "TrainingArguments(fp16=...) of SFTTrainer: fp16 is not taken: float16 needs"),
    ({"args": arguments(label_smoothing_factor=0.1)}, "label_smoothing_factor is not taken: SFT trains on the plain"),
    ({"packing": True, "max_length": 1}, "SFTTrainer(max_length=...): max_length must be at least 2, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_can_not_be_honoured_is_one_line(tiny_model, given, message):
    given = {"train_dataset": [{"text": "a b c"}], **given}
    with pytest.raises(UserError) as error:
        SFTTrainer(tiny_model, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_training_arguments_go_into_the_configuration(tiny_model, qa):
    args = arguments(
        learning_rate=3e-4, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1, seed=7, logging_steps=1,
        eval_strategy="steps", gradient_checkpointing=True, dataloader_num_workers=2, optim="adamw_torch",
    )  # fmt: skip
    rows = [{"text": question} for question, _ in qa]
    trainer = SFTTrainer(tiny_model, args, train_dataset=rows, eval_dataset=rows, max_seq_length=64)
    config = trainer.args
    assert isinstance(config, SFTConfig) and config.output_dir == "out" and config.max_length == 64
    for name in ("learning_rate", "weight_decay", "seed", "logging_steps", "max_steps", "per_device_train_batch_size"):
        assert getattr(config, name) == getattr(args, name), name
    assert (config.lr_scheduler_type, config.optim, config.eval_strategy) == ("cosine", "adamw_torch", "steps")
    assert any("dataloader_num_workers changes nothing here" in note for note in config.notes)
    plain = SFTTrainer(tiny_model, TrainingArguments("plain", report_to="none"), train_dataset=rows).args
    assert plain.learning_rate == TrainingArguments("x").learning_rate != SFTConfig().learning_rate


def test_what_an_older_argument_sets_leaves_the_script_s_configuration_alone(tiny_model, qa):
    config = SFTConfig("out", max_length=32)
    rows = [{"text": question} for question, _ in qa]
    trainer = SFTTrainer(tiny_model, config, train_dataset=rows, max_seq_length=64, packing=True)
    assert (trainer.args.max_length, trainer.args.packing) == (64, True)
    assert (config.max_length, config.packing, config.notes) == (32, False, [])
    assert trainer.args.origins["max_length"] == "SFTTrainer(max_seq_length=...)"


def test_a_collator_that_only_pads_has_nothing_to_do(tiny_model, tokenizer, qa, capsys):
    rows = [{"text": question} for question, _ in qa]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    SFTTrainer(tiny_model, train_dataset=rows, data_collator=collator)
    assert "data_collator DataCollatorForLanguageModeling has nothing to do" in capsys.readouterr().out
    tokenizer.mask_token = "<pad>"
    masks = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.1)
    with pytest.raises(UserError, match="data_collator DataCollatorForLanguageModeling can't be honoured"):
        SFTTrainer(tiny_model, train_dataset=rows, data_collator=masks)


@pytest.mark.parametrize("key", [False, True])
def test_what_scripts_call_after_training(tiny_model, qa, monkeypatch, capsys, key):
    pushed = []

    def push(config, folder, message="by key"):
        pushed.append((folder.name, message))
        return "address"

    for module in ("burnish.trainers.records", "burnish.training.publish"):
        monkeypatch.setattr(importlib.import_module(module), "push", push)
    monkeypatch.setattr("burnish.run.check_hub", lambda config: None)
    rows = [{"text": question} for question, _ in qa]
    config = SFTConfig("out", max_steps=2, push_to_hub=key, hub_model_id="me/model" if key else None)
    trainer = SFTTrainer(tiny_model, config, train_dataset=rows, eval_dataset=rows)
    result = trainer.train()
    assert result.training_loss == result.metrics["train_loss"] > 0 and trainer.is_world_process_zero()
    metrics = result.metrics
    trainer.log_metrics("train", metrics)
    assert f"train_loss {metrics['train_loss']:.4f}" in capsys.readouterr().out
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    assert {"train_loss", "eval_loss"} <= set(json.loads(Path("out/all_results.json").read_text()))
    assert "train_loss" not in json.loads(Path("out/eval_results.json").read_text())
    trainer.save_state()
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 2
    trainer.push_to_hub(commit_message="mine")
    assert pushed == [("out", "by key" if key else "mine")]


def test_the_page_on_moving_names_every_older_name():
    page = (Path(__file__).resolve().parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    assert not [name for name in OLDER if not name.endswith("_kwargs") and f"`{name}`" not in page]


def test_a_peft_config_of_another_kind_is_one_line(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"SFTTrainer\(peft_config=...\): peft_config is a dict. Use peft.LoraConfig"):
        SFTTrainer(tiny_model, train_dataset=[{"text": "a b c"}], args=SFTConfig(str(tmp_path)), peft_config={"r": 4})


def test_packs_that_would_cut_rows_name_the_packing_of_earlier_versions(tiny_model, tmp_path):
    given = {"train_dataset": [{"text": "seven small cats " * 40}] * 4, "packing": True, "max_seq_length": 32}
    config = SFTConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="packing_strategy: wrapped, .* or max_length: [0-9]+ keeps"):
        SFTTrainer(tiny_model, args=config, **given)
    SFTTrainer(tiny_model, args=config, **given, packing_strategy="wrapped")
