"""`merge` and `chat`: a merged model says what base and adapter said, or isn't written; answers are the model's."""

import io
import json

import pytest
import torch

from burnish import DPOConfig, RewardConfig, SFTConfig, UserError
from burnish.cli import main
from burnish.run import train
from burnish.verbs import merge as merging
from burnish.verbs.chat import talkers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def adapted_run(folder, model, rows, kind=SFTConfig, **given):
    settings = {"learning_rate": 2e-2, "max_steps": 4, "max_length": 64, "save_strategy": "no", "lora_r": 4}
    settings |= {"model_name_or_path": model, "dataset_name": rows, "use_peft": True, "bf16": False}
    train(kind(str(folder), lora_target_modules="all-linear", lora_dropout=0.0, **settings, **given))
    return folder


@pytest.fixture
def pair_file(tmp_path, chat_rows):
    rows = [
        {"prompt": [ask], "chosen": [reply], "rejected": [other["messages"][1]]}
        for (ask, reply), other in zip((row["messages"] for row in chat_rows), chat_rows[1:], strict=False)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_a_merged_model_is_the_adapter_in_plain_transformers(tmp_path, tiny_model, chat_file, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = adapted_run(tmp_path / "run", tiny_model, chat_file)
    assert main(["merge", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "mean KL" in shown and "32 rows" in shown or "rows," in shown
    ids = torch.arange(40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untouched = logits(base, ids)
    adapted = logits(PeftModel.from_pretrained(base, run), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), ids)
    assert (adapted - untouched).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template
    assert main(["merge", str(run)]) == 2
    assert "merged: is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "unit"), [(DPOConfig, "mean KL"), (RewardConfig, "max |Δscore|")])
def test_preference_and_reward_adapters_merge(tmp_path, tiny_model, pair_file, kind, unit, capsys):
    run = adapted_run(tmp_path / "run", tiny_model, pair_file, kind)
    assert main(["merge", str(run)]) == 0
    assert unit in capsys.readouterr().out
    assert (run / "merged" / "model.safetensors").is_file()


def test_a_merge_that_changes_the_model_is_refused_and_leaves_nothing(tmp_path, tiny_model, chat_file, monkeypatch):
    from peft.tuners.lora import LoraModel

    run = adapted_run(tmp_path / "run", tiny_model, chat_file)
    honest = LoraModel.merge_and_unload

    def spoiling(self, **given):
        merged = honest(self, **given)
        merged.get_input_embeddings().weight.data.add_(torch.randn(400, 32) * 0.3)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoiling)
    with pytest.raises(UserError, match="merged model differs"):
        merging.merge(str(run), [])
    assert not list(run.glob("*merged*"))


def test_the_difference_is_kl_and_log_prob_by_their_formulas(tiny_model):
    from transformers import AutoModelForCausalLM

    from burnish.data.batch import Examples, collate

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    examples = Examples(
        ids=torch.arange(3, 33).int().numpy(),
        trained=torch.ones(30, dtype=torch.bool).numpy(),
        offsets=torch.tensor([0, 12, 30]).numpy(),
        rows=torch.arange(2).numpy(),
    )
    batch = collate(examples, [(0, 0, 12), (1, 0, 18)])
    first, second = torch.randn(28, 32, dtype=torch.double), torch.randn(28, 32, dtype=torch.double)
    with torch.no_grad():
        found = merging.difference(model.double(), [batch], [first], [second], scores=False)
        p, q = (model.lm_head(hidden).log_softmax(-1) for hidden in (first, second))
    own = batch.labels[batch.valid][:, None]
    assert (found.rows, found.tokens) == (2, 28)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found.largest == pytest.approx((p - q).gather(1, own).abs().max().item(), rel=1e-5)
    assert merging.Difference(1, 1, float("nan"), float("nan")).too_much


def test_what_cannot_be_merged_is_one_line(tmp_path, tiny_model, capsys):
    assert main(["merge", tiny_model]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["merge", str(tmp_path)]) == 2
    assert "not an adapter's configuration" in capsys.readouterr().err


def reply_of(model, tokenizer, turns, count):
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**prompt, max_new_tokens=count, do_sample=False, pad_token_id=2)
    return tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_chat_answers_as_base_and_as_tuned(tmp_path, tiny_model, chat_file, capsys, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = adapted_run(tmp_path / "run", tiny_model, chat_file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ask = {"role": "user", "content": "the quick brown fox"}
    plain = reply_of(base, tokenizer, [ask], 12)
    tuned = reply_of(PeftModel.from_pretrained(base, run), tokenizer, [ask], 12)
    assert plain != tuned
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown fox\n"))
    capsys.readouterr()
    assert main(["chat", str(run), "base=true", "max_new_tokens=12"]) == 0
    _, first, second = capsys.readouterr().out.replace("[tuned]", "[base]").split("[base]")
    assert (first.strip(), second.strip()) == (plain, tuned)


def test_a_second_question_comes_after_the_first(tmp_path, tiny_model, chat_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    (talker,) = talkers(tiny_model, beside=False)
    first = talker.answer("seven small cats", 6, 0.0)
    second = talker.answer("a green hill", 6, 0.0)
    turns = [{"role": "user", "content": "seven small cats"}, {"role": "assistant", "content": first}]
    assert second == reply_of(model, tokenizer, [*turns, {"role": "user", "content": "a green hill"}], 6)


def test_chat_refuses_what_it_does_not_understand(tmp_path, tiny_model, capsys):
    assert main(["chat", tiny_model, "bse=true"]) == 2
    assert "'bse=true' is not understood" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
