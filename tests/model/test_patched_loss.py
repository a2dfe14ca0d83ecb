"""`model(input_ids, labels=...)` of a patched model: the fused loss in training, the model's own forward otherwise."""

import pytest
import torch

from burnish.config.errors import UserError
from burnish.model.patch import patch


def pair(tiny, name="llama", **settings):
    original, patched = tiny(name, **settings), tiny(name, **settings)
    patch(patched)
    return original, patched


def assert_same_loss(original, patched, **inputs):
    expected, got = original(**inputs), patched(**inputs)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    assert got.logits is None
    expected.loss.backward()
    got.loss.backward()
    for (key, a), b in zip(original.named_parameters(), patched.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 5e-6 * a.grad.abs().max(), key


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_num_items_in_batch_divides_the_sum(tiny, batch, items):
    assert_same_loss(*pair(tiny), **batch, num_items_in_batch=items)


def test_shifted_labels_and_another_ignore_index(tiny, batch):
    labels = batch.pop("labels")
    shifted = labels.roll(-1, dims=1)
    shifted[:, -1] = -100
    assert_same_loss(*pair(tiny), **batch, labels=labels, shift_labels=shifted)
    original, patched = pair(tiny, "gemma2")
    labels = labels.masked_fill(labels == -100, 5)
    assert_same_loss(original, patched, **batch, labels=labels, ignore_index=5)


def test_positional_arguments_embeddings_and_tuples(tiny, batch):
    original, patched = pair(tiny)
    expected = original(**batch).loss
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    torch.testing.assert_close(patched(ids, mask, labels=labels).loss, expected, rtol=1e-6, atol=0)
    embedded = patched.get_input_embeddings()(ids)
    got = patched(inputs_embeds=embedded, attention_mask=mask, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)
    assert len(got.hidden_states) == 3
    (loss,) = patched(**batch, return_dict=False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_nothing_to_train_on_gives_zero_and_zero_gradients(tiny, batch):
    _, patched = pair(tiny)
    loss = patched(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in patched.parameters())


def test_logits_come_back_wherever_they_are_asked_for(tiny, batch):
    original, patched = pair(tiny)
    labels = batch.pop("labels")
    for options in ({}, {"logits_to_keep": 3}):
        assert patched(**batch, **options).logits.shape == original(**batch, **options).logits.shape
    patched.eval()
    original.eval()
    with torch.no_grad():
        got, expected = patched(**batch, labels=labels), original(**batch, labels=labels)
    assert got.logits.shape == (2, 11, 97)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)


def test_the_models_own_loss_runs_when_it_is_not_the_plain_one(tiny, batch):
    _, patched = pair(tiny)
    patched.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    output = patched(**batch)
    assert torch.equal(output.loss, output.logits.square().mean())
    refused = tiny("llama")
    refused.loss_function = patched.loss_function
    assert patch(refused).skipped == [
        ("LlamaForCausalLM", "the model's loss_function is not transformers' ForCausalLMLoss")
    ]


def test_hooks_on_the_output_layer_run(tiny, batch):
    original, patched = pair(tiny)
    seen = []
    patched.lm_head.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(patched(**batch).loss, original(**batch).loss, rtol=1e-6, atol=0)
    assert seen


def test_router_losses_stay_the_models_own(tiny, batch):
    original, patched = pair(tiny, "mixtral")
    expected, got = (model(**batch, output_router_logits=True) for model in (original, patched))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-6, atol=0)
    with_router = tiny("mixtral", output_router_logits=True)
    assert any("load-balancing" in reason for _, reason in patch(with_router).skipped)


def test_a_label_outside_the_vocabulary_is_an_error(tiny, batch):
    _, patched = pair(tiny)
    batch["labels"][0, 6] = 97
    with pytest.raises((ValueError, IndexError, UserError), match="97"):
        patched(**batch)


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_own_trainer(tiny, tmp_path, bf16):
    """Accumulation (num_items_in_batch), evaluation and accelerate's mixed precision on top of a patched model."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (8, 9), generator=generator)
    labels = ids.clone()
    for row in range(8):
        labels[row, : row % 4] = -100
    rows = [{"input_ids": ids[row], "labels": labels[row]} for row in range(8)]
    histories = []
    for model in pair(tiny):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, bf16=bf16, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        steps = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        histories.append([number for step in steps for number in step] + [trainer.evaluate()["eval_loss"]])
    assert len(histories[0]) == 5
    assert histories[1] == pytest.approx(histories[0], rel=3e-3 if bf16 else 1e-5)
