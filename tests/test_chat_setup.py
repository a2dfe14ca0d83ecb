"""TRL's helpers: a chat format on a base model, another tokenizer's template, a script's model options, seeds; and an
adapter that a script brings goes on training."""

import copy
import random

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

import burnish
from burnish import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, SFTTrainer, clone_chat_template, setup_chat_format
from burnish.config.errors import UserError

CHAT = [
    {"role": "system", "content": "You are helpful"},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "lazy dogs"},
]
CHATML = (
    "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nthe quick fox?<|im_end|>\n"
    "<|im_start|>assistant\nlazy dogs<|im_end|>\n"
)


@pytest.fixture
def base_tokenizer(tiny_tokenizer):
    """The tiny vocabulary without a chat's tokens or template, as a base model has it."""
    import json

    described = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    renamed = {"<|im_start|>": "<a>", "<|im_end|>": "<b>", "<pad>": "<c>"}
    for token in described["added_tokens"]:
        token["content"] = renamed[token["content"]]
    described["model"]["vocab"] = {renamed.get(word, word): n for word, n in described["model"]["vocab"].items()}
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<b>")


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.mark.parametrize("multiple", [None, 64])
def test_chatml_on_a_base_model(model, base_tokenizer, multiple):
    size = len(base_tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    got = setup_chat_format(model, base_tokenizer, resize_to_multiple_of=multiple)
    assert got[0] is model and got[1] is base_tokenizer and len(base_tokenizer) == size + 2
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == (max(size + 2, 400) if multiple is None else -(-max(size + 2, 400) // 64) * 64)
    assert model.config.vocab_size == rows and model.get_output_embeddings().weight.shape[0] == rows
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    start, end = base_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    for holder in (base_tokenizer, model.config, model.generation_config):
        assert {name: getattr(holder, name) for name in tokens} == tokens
    assert base_tokenizer.apply_chat_template(CHAT, tokenize=False) == CHATML
    asking = base_tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asking == CHATML.partition("lazy dogs")[0]
    ids = base_tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids.count(start) == ids.count(end) == 3
    with pytest.raises(UserError, match="unknown format 'other'"):
        setup_chat_format(model, base_tokenizer, format="other")


def test_a_model_with_a_new_chat_format_trains_on_conversations(tmp_path, model, base_tokenizer):
    """Padding is EOS now, and EOS must still be learned."""
    model, tokenizer = setup_chat_format(model, base_tokenizer)
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, logging_steps=1, assistant_only_loss=True)
    trainer = SFTTrainer(model, config, train_dataset=[{"messages": CHAT}] * 2, processing_class=tokenizer)
    (batch,) = list(trainer.run.batches.epoch(0))
    wanted = tokenizer.encode("lazy dogs<|im_end|>", add_special_tokens=False)
    assert batch.labels[batch.valid].tolist() == wanted * 2
    trainer.train()
    assert trainer.state.global_step == 1


def test_cloning_gives_template_tokens_eos_and_one_size(model, base_tokenizer, tiny_model, tmp_path):
    source = AutoTokenizer.from_pretrained(tiny_model)
    source.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    source.save_pretrained(tmp_path / "source")
    size = len(base_tokenizer)
    _, tokenizer, added = clone_chat_template(model, base_tokenizer, str(tmp_path / "source"))
    assert tokenizer.convert_ids_to_tokens(added) == ["<|im_start|>", "<|im_end|>", "<pad>", "<tool>"]
    assert added == list(range(size, size + 4))
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == len(tokenizer) == 448  # the next multiple of 64 from 404
    assert tokenizer.convert_ids_to_tokens(size + 4) == "<extra_id_0>"
    assert tokenizer.eos_token == "<|im_end|>" and model.config.eos_token_id == tokenizer.eos_token_id == added[1]
    assert model.generation_config.eos_token_id == added[1]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == source.apply_chat_template(CHAT, tokenize=False)
    source.chat_template = None
    source.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        clone_chat_template(model, base_tokenizer, str(tmp_path / "bare"))


def test_cloning_twice_and_without_rounding(model, base_tokenizer, tiny_model):
    _, _, added = clone_chat_template(model, base_tokenizer, tiny_model, resize_to_multiple_of=None)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == len(base_tokenizer)
    assert clone_chat_template(model, base_tokenizer, tiny_model, resize_to_multiple_of=None)[2] == []
    assert model.get_input_embeddings().weight.shape[0] == rows == len(base_tokenizer)
    assert len(added) == 3


# ---- a script's model options


def test_a_command_line_fills_the_model_config():
    words = "--model_name_or_path m --use_peft --lora_r 4 --lora_target_modules q_proj v_proj --torch_dtype bfloat16"
    (config,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(words.split())
    assert config.model_name_or_path == "m" and config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.dtype == config.torch_dtype == "bfloat16" and config.model_revision == "main"


def test_the_peft_config_of_the_options():
    assert burnish.get_peft_config(ModelConfig()) is None
    given = {"lora_r": 4, "lora_alpha": 9, "lora_dropout": 0.1, "use_rslora": True, "lora_modules_to_save": ["lm_head"]}
    made = burnish.get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"], **given))
    assert made == peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=9, lora_dropout=0.1, use_rslora=True, modules_to_save=["lm_head"],
        target_modules="all-linear",
    )  # fmt: skip


def test_the_quantization_config_of_the_options(monkeypatch):
    import importlib.util

    installed = [True]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: (
            (object() if installed[0] else None) if name == "bitsandbytes" else find(name)
        )
    )  # fmt: skip
    assert burnish.get_quantization_config(ModelConfig()) is None
    assert burnish.get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit
    options = ModelConfig(load_in_4bit=True, dtype="bfloat16", bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    made = burnish.get_quantization_config(options)
    assert made.load_in_4bit and made.bnb_4bit_use_double_quant and made.bnb_4bit_quant_type == "fp4"
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
    installed[0] = False
    for given in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        with pytest.raises(UserError, match=r"bitsandbytes, which is not installed\. pip install bitsandbytes"):
            burnish.get_quantization_config(ModelConfig(**given))


def test_options_that_contradict_each_other():
    with pytest.raises(UserError, match="load_in_8bit and load_in_4bit"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(UserError, match="dtype float32 and torch_dtype bfloat16"):
        ModelConfig(dtype="float32", torch_dtype="bfloat16")


def test_where_a_quantised_base_goes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert burnish.get_kbit_device_map() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert burnish.get_kbit_device_map() == {"": 3}


def test_a_seed_seeds_every_generator():
    def draw():
        burnish.set_seed(7)
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    first = draw()
    torch.rand(5)
    assert draw() == first


# ---- an adapter that a script brings


@pytest.fixture
def adapted(model):
    """An adapter that has been trained: its output is not 0."""
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_goes_on_training_with_sft(tmp_path, adapted, tiny_model, chat_file, use_peft):
    before = adapters(adapted)
    base = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" not in name}
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, logging_steps=1)
    config.use_peft = use_peft
    plain = copy.deepcopy(adapted)
    trainer = SFTTrainer(
        adapted, config, train_dataset=chat_file, processing_class=AutoTokenizer.from_pretrained(tiny_model)
    )
    start = trainer.run.objective  # the first step's loss is the adapter's, not the bare base's
    batch = next(iter(trainer.run.batches.epoch(0)))
    edges = batch.cu_seqlens.tolist()
    losses = []
    with torch.no_grad():
        for a, b in zip(edges, edges[1:], strict=False):
            logps = plain(batch.input_ids[None, a:b]).logits[0].double().log_softmax(-1)
            kept = batch.labels[a:b] != -100
            losses.append(-logps[kept].gather(1, batch.labels[a:b][kept][:, None]))
    trainer.train()
    assert start is trainer.run.objective
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    after = adapters(trainer.model)
    assert trainer.model is adapted and all(not torch.equal(after[name], before[name]) for name in before)
    for name, value in base.items():
        assert torch.equal(adapted.get_parameter(name), value), name
    folder = trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    assert all(torch.equal(adapters(again)[name], after[name]) for name in after)


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_goes_on_training_with_dpo(tmp_path, adapted, tiny_model, use_peft):
    before = adapters(adapted)
    rows = [
        {"prompt": "the quick fox", "chosen": " jumps", "rejected": " counts"},
        {"prompt": "seven", "chosen": " small cats", "rejected": " hill"},
    ]
    config = DPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=1e-2, logging_steps=1)
    config.use_peft = use_peft
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = copy.deepcopy(adapted)
    trainer = DPOTrainer(adapted, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    margins = []
    for row in rows:
        prompt, whole = (tokenizer(row["prompt"])["input_ids"], {})
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            sums = []
            for off in (False, True):
                with torch.no_grad(), plain.disable_adapter() if off else torch.no_grad():
                    logps = plain(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
                sums.append(logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :].sum())
            whole[side] = sums[0] - sums[1]
        margins.append(0.1 * (whole["chosen"] - whole["rejected"]))
    margins = torch.stack(margins)
    record = trainer.state.log_history[0]
    assert record["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert record["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-5)
    after = adapters(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_frozen_adapter_says_how_to_load_it(tmp_path, adapted, tiny_model, chat_file):
    adapted.save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter"))
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1)
    trained = {"train_dataset": chat_file, "processing_class": AutoTokenizer.from_pretrained(tiny_model)}
    with pytest.raises(UserError, match="is_trainable=True"):
        SFTTrainer(frozen, config, **trained).train()
    with pytest.raises(UserError, match="adapter already"):
        SFTTrainer(adapted, config, peft_config=peft.LoraConfig(task_type="CAUSAL_LM"), **trained)
