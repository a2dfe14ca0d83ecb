"""Scripts written for TRL run with another import line: the code of its SFT pages (v0.7, v0.11, v0.20), block by block.

Each test is a block as it stands there; the names of model, data set and output folder are changed to local ones. Not
here, because they can't run on a CPU or aren't about the trainers: `pip install` lines, BetterTransformer's
`sdp_kernel` (CUDA) and `use_flash_attention_2` with 4-bit weights (CUDA), unsloth's FastLanguageModel (another
library), accelerate's device_map (burnish places models itself), the error message of a template that isn't found
(tests/data/test_completion.py).
"""

import os

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from burnish import DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer, UserError, setup_chat_format

# --- v0.7: settings are arguments of the trainer -----------------------------------------------------------------


def test_v7_quick_start(tiny_model, data, capsys, trained):
    dataset = load_dataset(data["imdb"], split="train")
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=512,
    )
    trainer.train()
    trained(trainer)
    assert trainer.args.max_length == 512
    assert "SFTTrainer(max_seq_length=...) is now SFTConfig(max_length=...)" in capsys.readouterr().out


def test_v7_a_model_made_outside(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=512,
    )
    trainer.train()
    trained(trainer)


def formatting_prompts_func(example):
    output_texts = []
    for i in range(len(example["instruction"])):
        text = f"### Question: {example['instruction'][i]}\n ### Answer: {example['output'][i]}"
        output_texts.append(text)
    return output_texts


def test_v7_completions_only(tiny_model, data, trained, rows_of, qa):
    dataset = load_dataset(data["alpaca"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    response_template = " ### Answer:"
    collator = DataCollatorForCompletionOnlyLM(response_template, tokenizer=tokenizer)
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        formatting_func=formatting_prompts_func,
        data_collator=collator,
    )
    trainer.train()
    trained(trainer)
    assert rows_of(trainer) == [f" {answer}<|im_end|>" for _, answer in qa]


def test_v7_assistant_turns_only(tiny_model, data, trained, rows_of, qa):
    dataset = load_dataset(data["guanaco"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    instruction_template = "### Human:"
    response_template = "### Assistant:"
    collator = DataCollatorForCompletionOnlyLM(
        instruction_template=instruction_template, response_template=response_template, tokenizer=tokenizer, mlm=False
    )
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        dataset_text_field="text",
        data_collator=collator,
    )
    trainer.train()
    trained(trainer)
    assert rows_of(trainer) == [f" {answer} {question}<|im_end|>" for question, answer in qa]


def test_v7_token_ids_as_the_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def print_tokens_with_ids(txt):
        tokens = tokenizer.tokenize(txt, add_special_tokens=False)
        token_ids = tokenizer.encode(txt, add_special_tokens=False)
        print(list(zip(tokens, token_ids)))  # noqa: B905

    prompt = """### User: Hello\n\n### Assistant: Hi, how can I help you?"""
    print_tokens_with_ids(prompt)
    response_template = "### Assistant:"
    print_tokens_with_ids(response_template)
    response_template_with_context = "\n### Assistant:"
    response_template_ids = tokenizer.encode(response_template_with_context, add_special_tokens=False)[1:]
    data_collator = DataCollatorForCompletionOnlyLM(response_template_ids, tokenizer=tokenizer)
    batch = data_collator([{"input_ids": tokenizer.encode(prompt)}])
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == " Hi, how can I help you?"


def test_v7_chat_format(tiny_model, data, trained, rows_of):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    model, tokenizer = setup_chat_format(model, tokenizer)
    trainer = SFTTrainer(
        model, train_dataset=load_dataset(data["capybara"], split="train"), tokenizer=tokenizer, packing=True
    )
    trainer.train()
    trained(trainer)
    assert rows_of(trainer)[0].startswith("<|im_start|>user\nWhat") or rows_of(trainer)[0].startswith("user\nWhat")


def test_v7_data_set_formats(tiny_model, data, trained, rows_of):
    training_args = TrainingArguments("./output", max_steps=2, learning_rate=1e-4, report_to="none")
    dataset = load_dataset("json", data_files=data["capybara"] + "/train.jsonl", split="train")
    trainer = SFTTrainer(
        tiny_model,
        args=training_args,
        train_dataset=dataset,
        packing=True,
    )
    trainer.train()
    trained(trainer)
    instructions = [{"prompt": "<prompt text>", "completion": "<ideal generated text>"}] * 3
    trainer = SFTTrainer(tiny_model, args=SFTConfig("two", max_steps=1), train_dataset=instructions)
    trainer.train()
    assert rows_of(trainer) == ["<ideal generated text><|im_end|>"] * 3


def formatting_questions(example):
    output_texts = []
    for i in range(len(example["question"])):
        text = f"### Question: {example['question'][i]}\n ### Answer: {example['answer'][i]}"
        output_texts.append(text)
    return output_texts


def formatting_func(example):
    text = f"### Question: {example['question']}\n ### Answer: {example['answer']}"
    return text


@pytest.mark.parametrize("form", [formatting_questions, formatting_func])
@pytest.mark.parametrize("packing", [False, True])
def test_v7_formatting(tiny_model, data, form, packing, trained, rows_of, qa):
    dataset = load_dataset(data["qa"], split="train")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        train_dataset=dataset,
        formatting_func=form,
        packing=packing,
    )
    trainer.train()
    trained(trainer)
    assert rows_of(trainer)[0] == f"### Question: {qa[0][0]}\n ### Answer: {qa[0][1]}<|im_end|>"


def test_v7_packing(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        dataset_text_field="text",
        packing=True,
        infinite=False,
        num_of_sequences=1024,
        chars_per_token=3.6,
        dataset_num_proc=2,
        dataset_batch_size=1000,
        eval_packing=False,
    )
    trainer.train()
    trained(trainer)


@pytest.mark.parametrize(
    "given", [{"model_init_kwargs": {"torch_dtype": torch.bfloat16}}, {"torch_dtype": torch.bfloat16}]
)
def test_v7_another_precision(tiny_model, data, given, trained):
    dataset = load_dataset(data["imdb"], split="train")
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        dataset_text_field="text",
        **given,
    )
    trainer.train()
    trained(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


class PeftSavingCallback(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        checkpoint_path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        kwargs["model"].save_pretrained(checkpoint_path)
        if "pytorch_model.bin" in os.listdir(checkpoint_path):
            os.remove(os.path.join(checkpoint_path, "pytorch_model.bin"))


def test_v7_adapters(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    callbacks = [PeftSavingCallback()]
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        dataset_text_field="text",
        torch_dtype=torch.bfloat16,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.train()
    trained(trainer)
    assert os.path.exists(f"trainer_output/checkpoint-{trainer.state.global_step}/adapter_model.safetensors")


def test_v7_adapters_on_8_bit(tiny_model, data, trained):
    pytest.importorskip("bitsandbytes")  # the only test here that needs it
    from transformers import BitsAndBytesConfig

    dataset = load_dataset(data["imdb"], split="train")
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto"
    )
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        dataset_text_field="text",
        peft_config=peft_config,
    )
    trainer.train()
    trained(trainer)


def test_v7_neftune(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=512,
        neftune_noise_alpha=5,
    )
    trainer.train()
    noisy = trained(trainer)
    plain = SFTTrainer(tiny_model, SFTConfig("plain"), train_dataset=dataset)
    plain.train()
    assert noisy != trained(plain)


# --- v0.11: settings are keys of SFTConfig, some under names they no longer have ---------------------------------


def test_v11_quick_start(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    sft_config = SFTConfig(
        dataset_text_field="text",
        max_seq_length=512,
        output_dir="tmp",
    )
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        args=sft_config,
    )
    trainer.train()
    trained(trainer)
    assert trainer.args is sft_config and sft_config.max_length == 512


def test_v11_a_model_made_outside(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sft_config = SFTConfig(output_dir="tmp")
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        args=sft_config,
    )
    trainer.train()
    trained(trainer)


def test_v11_completions_only(tiny_model, data, trained):
    dataset = load_dataset(data["alpaca"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    response_template = " ### Answer:"
    collator = DataCollatorForCompletionOnlyLM(response_template, tokenizer=tokenizer)
    trainer = SFTTrainer(
        model,
        train_dataset=dataset,
        args=SFTConfig(output_dir="tmp"),
        formatting_func=formatting_prompts_func,
        data_collator=collator,
    )
    trainer.train()
    trained(trainer)


def test_v11_assistant_turns_only(tiny_model, data, trained):
    dataset = load_dataset(data["guanaco"], split="train")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    instruction_template = "### Human:"
    response_template = "### Assistant:"
    collator = DataCollatorForCompletionOnlyLM(
        instruction_template=instruction_template, response_template=response_template, tokenizer=tokenizer, mlm=False
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir="tmp",
            dataset_text_field="text",
        ),
        train_dataset=dataset,
        data_collator=collator,
    )
    trainer.train()
    trained(trainer)


def test_v11_data_set_formats_and_packing(tiny_model, data, trained):
    dataset = load_dataset("json", data_files=data["capybara"] + "/train.jsonl", split="train")
    sft_config = SFTConfig(packing=True)
    trainer = SFTTrainer(
        tiny_model,
        args=sft_config,
        train_dataset=dataset,
    )
    trainer.train()
    trained(trainer)
    sft_config = SFTConfig("two", packing=True, dataset_text_field="text", eval_packing=False)
    trainer = SFTTrainer(tiny_model, train_dataset=load_dataset(data["imdb"], split="train"), args=sft_config)
    trainer.train()
    trained(trainer)


@pytest.mark.parametrize("form", [formatting_questions, formatting_func])
def test_v11_formatting(tiny_model, data, form, trained):
    dataset = load_dataset(data["qa"], split="train")
    sft_config = SFTConfig(packing=form is formatting_func)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=sft_config,
        train_dataset=dataset,
        formatting_func=form,
    )
    trainer.train()
    trained(trainer)


def test_v11_another_precision(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    sft_config = SFTConfig(
        model_init_kwargs={
            "torch_dtype": "bfloat16",
        },
        output_dir="tmp",
    )
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        args=sft_config,
    )
    trainer.train()
    trained(trainer)
    assert trainer.model.dtype == torch.bfloat16


def test_v11_adapters(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        args=SFTConfig(output_dir="tmp"),
        peft_config=peft_config,
    )
    trainer.train()
    trained(trainer)
    with pytest.raises(UserError, match="lora_r and peft_config describe two adapters"):
        SFTTrainer(tiny_model, SFTConfig("x", use_peft=True, lora_r=4), train_dataset=dataset, peft_config=peft_config)


def test_v11_model_config(tiny_model, data, trained):
    from burnish import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config

    training_args = SFTConfig("tmp", max_steps=1)
    model_config = ModelConfig(
        model_name_or_path=tiny_model,
        attn_implementation=None,  # or "flash_attention_2"
    )
    torch_dtype = (
        model_config.torch_dtype
        if model_config.torch_dtype in ["auto", None]
        else getattr(torch, model_config.torch_dtype)
    )
    quantization_config = get_quantization_config(model_config)
    model_kwargs = dict(  # noqa: C408
        revision=model_config.model_revision,
        trust_remote_code=model_config.trust_remote_code,
        attn_implementation=model_config.attn_implementation,
        torch_dtype=torch_dtype,
        use_cache=False if training_args.gradient_checkpointing else True,  # noqa: SIM211
        device_map=get_kbit_device_map() if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
    model = AutoModelForCausalLM.from_pretrained(model_config.model_name_or_path, **model_kwargs)
    trainer = SFTTrainer(
        args=training_args,
        train_dataset=load_dataset(data["imdb"], split="train"),
        model=model,
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    trained(trainer)
    training_args = SFTConfig("two", max_steps=1, model_init_kwargs=model_kwargs)
    trainer = SFTTrainer(
        args=training_args,
        train_dataset=load_dataset(data["imdb"], split="train"),
        model=model_config.model_name_or_path,
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    trained(trainer)


def test_v11_neftune_and_liger(tiny_model, data, trained):
    dataset = load_dataset(data["imdb"], split="train")
    sft_config = SFTConfig(
        neftune_noise_alpha=5,
    )
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        args=sft_config,
    )
    trainer.train()
    trained(trainer)
    config = SFTConfig(
        use_liger=True,
    )
    assert config.notes == ["use_liger changes nothing here: burnish's own kernels are always on"]
