"""Scripts written for TRL v0.20 run with another import line: the code of its SFT page, block by block.

Each test is a block as it stands there; the names of model, data set and output folder are changed to local ones.
"""

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish import SFTConfig, SFTTrainer

# --- v0.20: today's names ----------------------------------------------------------------------------------------


def test_v20_quick_start(tiny_model, data, trained):
    trainer = SFTTrainer(
        model=tiny_model,
        train_dataset=load_dataset(data["capybara"], split="train"),
    )
    trainer.train()
    trained(trainer)
    assert {"loss", "mean_token_accuracy", "learning_rate", "grad_norm", "num_tokens", "epoch"} <= set(
        trainer.state.log_history[0]
    )


@pytest.mark.parametrize(
    "row",
    [
        {"text": "The sky is blue."},
        {
            "messages": [
                {"role": "user", "content": "What color is the sky?"},
                {"role": "assistant", "content": "It is blue."},
            ]
        },
        {"prompt": "The sky is", "completion": " blue."},
        {
            "prompt": [{"role": "user", "content": "What color is the sky?"}],
            "completion": [{"role": "assistant", "content": "It is blue."}],
        },
    ],
    ids=["text", "messages", "prompt-completion", "prompt-completion messages"],
)
def test_v20_formats(tiny_model, row, rows_of):
    trainer = SFTTrainer(tiny_model, SFTConfig("x", max_steps=1), train_dataset=[row] * 2)
    trainer.train()
    text = rows_of(trainer)[0]
    assert "blue." in text and ("sky" in text) == ("prompt" not in row)


def test_v20_rows_brought_to_a_format(tiny_model, data, rows_of):
    dataset = load_dataset(data["medical"])

    def preprocess_function(example):
        return {
            "prompt": [{"role": "user", "content": example["Question"]}],
            "completion": [
                {"role": "assistant", "content": f"<think>{example['Complex_CoT']}</think>{example['Response']}"}
            ],
        }

    dataset = dataset.map(preprocess_function, remove_columns=["Question", "Response", "Complex_CoT"])
    print(next(iter(dataset["train"])))
    trainer = SFTTrainer(tiny_model, SFTConfig("x", max_steps=1), train_dataset=dataset["train"])
    trainer.train()
    assert rows_of(trainer)[0].startswith("<think>think</think>rain")


@pytest.mark.parametrize(
    "given",
    [
        {"model_init_kwargs": {"torch_dtype": torch.bfloat16}},
        {"packing": True},
        {"learning_rate": 1e-4},
    ],
    ids=str,
)
def test_v20_settings(tiny_model, data, given, trained):
    training_args = SFTConfig("x", max_steps=1, **given)
    trainer = SFTTrainer(tiny_model, training_args, train_dataset=load_dataset(data["capybara"], split="train"))
    trainer.train()
    trained(trainer)


def test_v20_assistant_messages_only(tiny_model, data, rows_of, qa):
    training_args = SFTConfig(assistant_only_loss=True)
    trainer = SFTTrainer(tiny_model, training_args, train_dataset=load_dataset(data["capybara"], split="train"))
    assert [row.split("<|im_end|>")[0] for row in rows_of(trainer)] == [answer for _, answer in qa]


def test_v20_adapters_and_on_with_them(tiny_model, data, trained):
    from peft import AutoPeftModelForCausalLM

    dataset = load_dataset(data["capybara"], split="train")
    trainer = SFTTrainer(
        tiny_model,
        train_dataset=dataset,
        peft_config=LoraConfig(),
    )
    trainer.train()
    trained(trainer)
    saved = str(trainer.save_model("adapter"))
    model = AutoPeftModelForCausalLM.from_pretrained(saved, is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig("on", max_steps=2),
        train_dataset=dataset,
    )
    trainer.train()
    trained(trainer)
    assert before and all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_v20_instruction_tuning(tiny_model, data, tmp_path, trained):
    """A base model, the template of another; its checkpoint answers through transformers' pipeline."""
    from transformers import pipeline

    template = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoTokenizer.from_pretrained(tiny_model)
    base.chat_template, base.eos_token = None, "<pad>"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained("base")
    base.save_pretrained("base")
    template.save_pretrained("template")
    trainer = SFTTrainer(
        model="base",
        args=SFTConfig(
            output_dir="instruct",
            chat_template_path="template",
        ),
        train_dataset=load_dataset(data["capybara"], split="train"),
    )
    trainer.train()
    trained(trainer)
    pipe = pipeline("text-generation", model=f"instruct/checkpoint-{trainer.state.global_step}")
    prompt = "<|im_start|>user\nWhat is the capital of France? Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
    response = pipe(prompt, max_new_tokens=2)
    assert response[0]["generated_text"].startswith(prompt[:20])
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    response = pipe(prompt, max_new_tokens=2)
    assert response[0]["generated_text"][-1]["role"] == "assistant"
    assert pipe.tokenizer.eos_token == "<|im_end|>"
    ends = pipe.model.generation_config.eos_token_id
    assert pipe.tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


# --- images: the page of v0.11 and that of v0.20, a tiny LLaVA ----------------------------------------------------


@pytest.fixture
def llava(tiny_tokenizer):
    """(a random model, its processor)."""
    pytest.importorskip("PIL")  # the processor's own need
    import copy

    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = copy.deepcopy(tiny_tokenizer)
    text = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image))
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'] | upper }}: {% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}",
    )
    return model, processor


@pytest.mark.parametrize("page", ["v0.11", "v0.20"])
def test_a_collator_of_ones_own_for_images(llava, page, trained):
    from PIL import Image

    model, processor = llava
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Who is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Barack Obama"}]},
        {"role": "user", "content": [{"type": "text", "text": "What is he famous for?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "He is the 44th President of the United States."}],
        },
    ]
    shown = processor.apply_chat_template(messages, tokenize=False)
    assert shown.startswith("USER: Who is this? <image>ASSISTANT: Barack Obama USER: What is he famous for? ASSISTANT:")
    colours = ("red", "green", "blue", "white")
    train_dataset = [{"images": [Image.new("RGB", (8, 8), colour)], "messages": messages} for colour in colours]

    def collate_fn(examples):
        # Get the texts and images, and apply the chat template
        texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [example["images"][0] for example in examples]

        # Tokenize the texts and process the images
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True)

        # The labels are the input_ids, and we mask the padding tokens in the loss computation
        labels = batch["input_ids"].clone()
        labels[labels == processor.tokenizer.pad_token_id] = -100
        batch["labels"] = labels

        return batch

    collated_data = collate_fn([train_dataset[0], train_dataset[1]])
    assert set(collated_data.keys()) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    args = SFTConfig("out", max_steps=2, per_device_train_batch_size=2, save_strategy="no")
    if page == "v0.11":
        args.dataset_text_field = ""  # needs a dummy field
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    given = {"tokenizer": processor.tokenizer} if page == "v0.11" else {"processing_class": processor}
    trainer = SFTTrainer(
        model=model,
        args=args,
        data_collator=collate_fn,
        train_dataset=train_dataset,
        **given,
    )
    trainer.train()
    trained(trainer)
