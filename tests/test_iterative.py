"""IterativeSFTTrainer.step: one update on the rows it gets, against transformers' loss and torch's optimizer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from burnish import IterativeSFTTrainer, SFTConfig
from burnish.config.errors import UserError

TEXTS = ["the quick brown fox", "jumps over", "lazy dogs and counts to ten while seven small cats watch"]


def make(tmp_path, tiny_model, tokenizer, name="run", **changes):
    usual = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    config = SFTConfig(output_dir=str(tmp_path / name), **{**usual, **changes})
    return IterativeSFTTrainer(tiny_model, config, tokenizer)


def mean_loss(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean of -log p over all labels of all rows, from the model's logits of each row alone."""
    losses = []
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(labels[1:])
        kept = wanted != -100
        losses.append(-torch.log_softmax(logits, -1)[kept].gather(1, wanted[kept][:, None])[:, 0])
    return torch.cat(losses).mean()


def updates(tiny_model, steps, lr=1e-2, total=8) -> tuple[torch.nn.Module, list[float]]:
    """The definition: AdamW with a linear schedule and clipping, on those means."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for number, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / total)
        loss = mean_loss(model, rows)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def check(trainer, records, tiny_model, steps):
    model, losses = updates(tiny_model, steps)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-4)
    assert [record["step"] for record in trainer.state.log_history] == list(range(1, len(steps) + 1))
    assert [{**record, "tok_s": 0} for record in records] == [{**r, "tok_s": 0} for r in trainer.state.log_history]
    ours = trainer.model.state_dict()
    for name, value in model.state_dict().items():
        assert (ours[name] - value).abs().max() < 2e-4, name


@pytest.mark.parametrize("size", [1, 2, 8])
def test_texts_are_one_update_a_call_whatever_the_micro_batches(tmp_path, tiny_model, tiny_tokenizer, size):
    trainer = make(tmp_path, tiny_model, tiny_tokenizer, per_device_train_batch_size=size)
    steps = []
    records = []
    for texts in (TEXTS, TEXTS[:2], TEXTS[1:]):
        records.append(trainer.step(texts=texts))
        ids = tiny_tokenizer(texts)["input_ids"]
        steps.append([(row, row) for row in ids])
    check(trainer, records, tiny_model, steps)
    assert trainer.state.global_step == 3
    assert trainer.state.num_tokens == sum(len(ids) for rows in steps for ids, _ in rows)


def test_labels_may_be_any_token_and_padding_is_left_out(tmp_path, tiny_model, tiny_tokenizer):
    trainer = make(tmp_path, tiny_model, tiny_tokenizer)
    ids = [torch.tensor([5, 6, 7, 8, 2, 2]), torch.tensor([9, 10, 11, 12, 13, 14])]
    mask = [torch.tensor([1, 1, 1, 1, 0, 0]), torch.ones(6, dtype=torch.long)]
    labels = [torch.tensor([-100, 30, -100, 31, -100, -100]), torch.tensor([9, -100, 11, 40, 41, -100])]
    record = trainer.step(input_ids=ids, attention_mask=mask, labels=labels)
    rows = [([5, 6, 7, 8], [-100, 30, -100, 31]), (ids[1].tolist(), labels[1].tolist())]
    check(trainer, [record], tiny_model, [rows])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}
    assert record["loss"] == pytest.approx(plain(**batch).loss.item(), rel=1e-4)  # as transformers defines it
    assert record["num_tokens"] == 10


def test_texts_labels_are_their_own_tokens(tmp_path, tiny_model, tiny_tokenizer):
    """TRL tokenized `texts` for them."""
    trainer = make(tmp_path, tiny_model, tiny_tokenizer)
    text, other = "abcd", "efgh"
    ids, labels = (tiny_tokenizer(words)["input_ids"] for words in (text, other))
    assert len(ids) == len(labels) and ids != labels
    record = trainer.step(texts=[text], texts_labels=[other])
    check(trainer, [record], tiny_model, [[(ids, labels)]])
    with pytest.raises(UserError, match=r"labels for 4 tokens.*Each token has its label"):
        trainer.step(texts=[text], texts_labels=["efgh xyz"])


@pytest.mark.parametrize("mode", [None, "keep_end", "keep_start"])
def test_long_rows_are_cut_and_said(tmp_path, tiny_model, tiny_tokenizer, mode, capsys):
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=8, learning_rate=1e-2, save_strategy="no")
    trainer = IterativeSFTTrainer(tiny_model, config, tiny_tokenizer, max_length=4, truncation_mode=mode)
    ids = list(range(10, 20))
    record = trainer.step(input_ids=[ids, [3, 4]])
    cut = ids[:4] if mode == "keep_start" else ids[-4:]
    check(trainer, [record], tiny_model, [[(cut, cut), ([3, 4], [3, 4])]])
    assert f"cut 1 of 2 rows to max_length 4 ({mode or 'keep_end'})" in capsys.readouterr().out


def test_without_max_steps_the_learning_rate_stays(tmp_path, tiny_model, tiny_tokenizer, capsys):
    trainer = make(tmp_path, tiny_model, tiny_tokenizer, max_steps=-1, warmup_steps=2)
    rates = [trainer.step(texts=TEXTS)["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2, 1e-2])
    assert "no max_steps" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lr_scheduler_type=...\): the schedule cosine needs an end"):
        make(tmp_path, tiny_model, tiny_tokenizer, "b", max_steps=-1, lr_scheduler_type="cosine").step(texts=TEXTS)


def test_beyond_max_steps_is_an_error(tmp_path, tiny_model, tiny_tokenizer):
    trainer = make(tmp_path, tiny_model, tiny_tokenizer, max_steps=1)
    trainer.step(texts=TEXTS)
    with pytest.raises(UserError, match="all 1 steps are done"):
        trainer.step(texts=TEXTS)


def test_evaluation_checkpoints_callbacks_and_the_log(tmp_path, tiny_model, tiny_tokenizer):
    told = []

    class Listener:
        def on_step_end(self, args, state, control, **given):
            told.append(state.global_step)
            control.should_save = state.global_step == 3

    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    trainer = IterativeSFTTrainer(
        tiny_model, config, tiny_tokenizer, eval_dataset=[{"text": text} for text in TEXTS], callbacks=[Listener()]
    )
    for _ in range(4):
        trainer.step(texts=TEXTS)
    assert told == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    evaluated = [record["step"] for record in trainer.state.log_history if "eval_loss" in record]
    assert evaluated == [2, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    saved = AutoModelForCausalLM.from_pretrained(trainer.save_model(str(tmp_path / "model")))
    for name, value in saved.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_trl_s_constructor_with_training_arguments_and_a_loaded_model(tmp_path, tiny_model, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=5, learning_rate=1e-2, report_to="none")
    trainer = IterativeSFTTrainer(model, args, tiny_tokenizer, (None, None), None, None, 512, "keep_end")
    first = trainer.step(texts=TEXTS)["loss"]
    for _ in range(4):
        last = trainer.step(texts=TEXTS)["loss"]
    assert last < first and trainer.model is model


def test_noise_and_adapters_work_by_step(tmp_path, tiny_model, tiny_tokenizer):
    plain = make(tmp_path, tiny_model, tiny_tokenizer).step(texts=TEXTS)
    noisy = make(tmp_path, tiny_model, tiny_tokenizer, "noisy", neftune_noise_alpha=20.0).step(texts=TEXTS)
    assert plain["loss"] != noisy["loss"]
    adapted = make(tmp_path, tiny_model, tiny_tokenizer, "adapted", use_peft=True, lora_dropout=0.0)
    assert adapted.step(texts=TEXTS)["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    moved = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert moved and all("lora" in name for name in moved)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "both missing"),
        ({"texts": ["a b"], "input_ids": [[1, 2]]}, "both given"),
        ({"texts": []}, "texts has no rows"),
        ({"texts": "one text"}, "list of text"),
        ({"texts": ["a b"], "labels": [[1, 2]]}, "belong to input_ids"),
        ({"input_ids": [[1, 2]], "texts_labels": ["a"]}, "belongs to texts"),
        ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2]]}, "2 input_ids, but 1 of input_ids labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, r"input_ids\[0\]: 3 labels for 2 tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "1 attention_mask for 2 tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "no tokens"),
        ({"input_ids": [[1, 400]]}, "token id 400 is outside the vocabulary of 400"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "label -1 is outside"),
        ({"input_ids": [[[1, 2]]]}, "one row of whole numbers"),
        ({"input_ids": [[0.5, 1.5]]}, "one row of whole numbers"),
        ({"input_ids": [[1]]}, "nothing to train on"),
        ({"input_ids": [[1, 2]], "labels": [[1, -100]]}, "nothing to train on"),
    ],
)
def test_rows_that_don_t_fit_together(trainer_once, given, says):
    with pytest.raises(UserError, match=says):
        trainer_once.step(**given)
    assert trainer_once.state.global_step == 0


@pytest.fixture(scope="module")
def trainer_once(tmp_path_factory, tiny_model, tiny_tokenizer):
    return make(tmp_path_factory.mktemp("once"), tiny_model, tiny_tokenizer)


def test_what_can_t_be_honoured_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(UserError, match="Call step"):
        make(tmp_path, tiny_model, tiny_tokenizer).train()
    with pytest.raises(UserError, match="there are no epochs"):
        make(tmp_path, tiny_model, tiny_tokenizer, save_strategy="epoch")
    with pytest.raises(UserError, match="optimize_device_cache"):
        IterativeSFTTrainer(tiny_model, optimize_device_cache=True)
    with pytest.raises(UserError, match="compute_metrics"):
        IterativeSFTTrainer(tiny_model, None, tiny_tokenizer, compute_metrics=print)
    trainer = make(tmp_path, tiny_model, tiny_tokenizer, optimizer_in_bwd=True, max_grad_norm=0)
    with pytest.raises(UserError, match="optimizer_in_bwd"):
        trainer.step(texts=TEXTS)
