"""Images: batches of a collator train as the model's own loss says, whatever pads them, and end as any run ends."""

import random

import pytest
import torch

from burnish import SFTTrainer
from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.data.vision import CollatedBatches, ImageCollator, padded_batch
from burnish.logprobs import token_nll
from burnish.model.head import read_head
from burnish.run import assemble

IMAGE, PAD, PATCHES = 399, 2, 4  # an image of 8 x 8 in patches of 4 x 4
SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "dataset_text_field": ""}


def llava():
    """A random LLaVA: two vision layers, two text layers, image tokens of number IMAGE."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=PAD, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def rows(count: int = 12) -> list[dict]:
    """Rows of differing lengths, each with its own picture."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(1)
    return [
        {
            "ids": [5, *[IMAGE] * PATCHES, *[rng.randrange(10, 390) for _ in range(rng.randint(3, 14))], 1],
            "pixels": torch.randn(3, 8, 8, generator=generator),
        }
        for _ in range(count)
    ]


def collate(examples: list[dict], side: str = "right") -> dict:
    """As the guide's: pad, labels are the ids, padding and images masked."""
    longest = max(len(row["ids"]) for row in examples)
    ids = torch.full((len(examples), longest), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(examples):
        place = slice(0, len(row["ids"])) if side == "right" else slice(longest - len(row["ids"]), longest)
        ids[number, place], mask[number, place] = torch.tensor(row["ids"]), 1
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE) | (ids == 5), -100)
    pixels = torch.stack([row["pixels"] for row in examples])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def config(folder, **given) -> SFTConfig:
    common = {"max_steps": 4, "logging_steps": 1, "use_cpu": True, "per_device_train_batch_size": 3, "save_steps": 2}
    return SFTConfig(str(folder), **{"learning_rate": 1e-2, **common, **SKIP, **given})


def losses(run) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_and_every_gradient_are_the_models_own(tmp_path, tiny_tokenizer, side, checkpointing):
    model, twin = llava(), llava()
    twin.set_attn_implementation("sdpa")
    given = collate(rows(5), side)
    loss = twin.train()(**given).loss
    loss.backward()

    run = assemble(
        config(tmp_path, gradient_checkpointing=checkpointing),
        model=model,
        processing_class=tiny_tokenizer,
        train_dataset=rows(),
        data_collator=collate,
    )
    batch = padded_batch(given, list(range(5)))
    assert batch.num_valid == int((given["labels"][:, 1:] != -100).sum())
    assert len(batch.input_ids) == int(given["attention_mask"].sum()), "padding is no token"
    assert batch.cu_seqlens.tolist() == [0, *given["attention_mask"].sum(1).cumsum(0).tolist()]
    total, _ = run.objective.step(batch, None)
    assert total.item() / batch.num_valid == pytest.approx(loss.item(), rel=1e-5)
    (total / batch.num_valid).backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in run.model.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert (parameter.grad - wanted).norm() <= 1e-5 * max(wanted.norm().item(), 1e-3), name


def test_a_run_is_the_plain_loop_with_the_models_own_loss(tmp_path, tiny_tokenizer):
    """Four updates, two micro-batches each, against AdamW on the model's own loss over the same rows."""
    given = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2}
    settings = config(tmp_path, **given)
    data, twin = rows(), llava().train()
    trainer = SFTTrainer(
        model=llava(), args=settings, data_collator=collate, train_dataset=data, processing_class=tiny_tokenizer
    )
    trainer.train()
    batches = CollatedBatches(data, collate, settings)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    order = [batch.rows for batch in batches.epoch(0)]
    assert sorted(sum(order, [])) == list(range(12)) and sum(order, []) != list(range(12))
    expected = []
    for first in (0, 2):
        both = [collate([data[number] for number in part]) for part in order[first : first + 2]]
        counts = [int((each["labels"][:, 1:] != -100).sum()) for each in both]
        loss = sum(twin(**each).loss * count for each, count in zip(both, counts, strict=True)) / sum(counts)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    moved = dict(twin.named_parameters())["model.multi_modal_projector.linear_1.weight"]
    ours = trainer.model.get_parameter("model.multi_modal_projector.linear_1.weight")
    assert torch.allclose(ours, moved, atol=2e-4)


def test_a_picture_changes_the_loss(tmp_path, tiny_tokenizer):
    run = assemble(
        config(tmp_path), model=llava(), processing_class=tiny_tokenizer, train_dataset=rows(), data_collator=collate
    )
    head, given = read_head(run.model), collate(rows(3))
    other = {**given, "pixel_values": given["pixel_values"] * 3 + 1}
    with torch.no_grad():
        first, second = (token_nll(run.model, head, padded_batch(each, [0, 1, 2]))[0] for each in (given, other))
    assert abs(first - second) > 1e-2


def test_a_resumed_run_is_the_run_and_the_model_loads_by_name(tmp_path, tiny_tokenizer):
    common = {"processing_class": tiny_tokenizer, "train_dataset": rows(), "data_collator": collate}
    whole = assemble(config(tmp_path / "a"), model=llava(), eval_dataset=rows(4), **common)
    whole.train()
    again = assemble(config(tmp_path / "b"), model=llava(), **common)
    again.train(str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and losses(again) == losses(whole)
    value = whole.evaluate()["eval_loss"]
    whole.save_model()
    loaded = assemble(config(tmp_path / "c", model_name_or_path=str(tmp_path / "a")), eval_dataset=rows(4), **common)
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    assert loaded.evaluate()["eval_loss"] == pytest.approx(value, rel=1e-5)


def test_adapters_train_on_a_model_with_images(tmp_path, tiny_tokenizer):
    given = {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "max_steps": 6}
    common = {"processing_class": tiny_tokenizer, "train_dataset": rows(), "data_collator": collate}
    run = assemble(config(tmp_path, **given), model=llava(), **common)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()


class Processor:
    """What ImageCollator asks of a processor: image tokens in the ids, one for each patch, and pixels beside them."""

    image_token_id = IMAGE

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        parts = (part for message in messages for part in message["content"])
        return "".join("<image>" if part["type"] == "image" else part["text"] for part in parts) + "<|im_end|>"

    def __call__(self, text, padding, return_tensors, images=None):
        rows = []
        for words in text:
            pieces = words.split("<image>")
            ids = self.tokenizer(pieces[0])["input_ids"]
            for piece in pieces[1:]:
                ids += [IMAGE] * PATCHES + self.tokenizer(piece)["input_ids"]
            rows.append(ids)
        longest = max(map(len, rows))
        made = {
            "input_ids": torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
        }
        pixels = [picture for each in images or [] for picture in each]
        return made | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


def chats(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "seven"}]},
                {"role": "assistant", "content": "cats watch " * (1 + number % 3)},
            ],
            "images": [torch.randn(3, 8, 8, generator=generator)],
        }
        for number in range(count)
    ]  # fmt: skip


def test_conversations_with_images_train_without_a_collator(tmp_path, tiny_tokenizer):
    settings = SFTConfig(str(tmp_path), max_steps=6, logging_steps=1, use_cpu=True, learning_rate=1e-2)
    run = assemble(settings, model=llava(), processing_class=Processor(tiny_tokenizer), train_dataset=chats())
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1


def test_the_collator_trains_text_and_no_image_and_no_padding(tiny_tokenizer):
    made = ImageCollator(Processor(tiny_tokenizer), None)(chats(3))
    ids, labels = made["input_ids"], made["labels"]
    assert made["pixel_values"].shape == (3, 3, 8, 8)
    assert (labels[ids == IMAGE] == -100).all() and (labels[made["attention_mask"] == 0] == -100).all()
    seen = (ids != IMAGE) & (made["attention_mask"] == 1)
    assert torch.equal(labels[seen], ids[seen]) and seen.sum() > 20


def broken(examples):
    raise ZeroDivisionError("no\nway")


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (broken, r"rows \[0\]: the collator failed \(ZeroDivisionError: no way\)"),
        (lambda rows: [1], "the collator returned a list"),
        (lambda rows: {"input_ids": torch.ones(1, 3).long()}, r"has no labels of shape \[rows, length\]"),
        (lambda rows: {**collate(rows), "labels": torch.ones(1, 2).long()}, r"labels \(1, 2\)"),
        (lambda rows: {**collate(rows), "attention_mask": torch.zeros(1, 2).long()}, r"attention_mask \(1, 2\)"),
        (lambda rows: {**collate(rows), "pixel_values": torch.zeros(1, 3, 8, 4)}, "can't run the collator's batch"),
    ],
)
def test_what_is_wrong_with_a_collator_is_one_line_before_training(tmp_path, tiny_tokenizer, collator, message):
    with pytest.raises(UserError, match=message):
        assemble(
            config(tmp_path),
            model=llava(),
            processing_class=tiny_tokenizer,
            train_dataset=rows(),
            data_collator=collator,
        )


def test_a_row_of_padding_is_named():
    given = collate(rows(3))
    given["attention_mask"][1] = 0
    with pytest.raises(UserError, match="row 8: the collator made a row of padding only"):
        padded_batch(given, [7, 8, 9])


@pytest.mark.parametrize(
    "given", [{"packing": True}, {"max_tokens_per_batch": 4096}, {"assistant_only_loss": True}, {"test_split_size": 2}]
)
def test_keys_of_packed_rows_are_refused(tmp_path, tiny_tokenizer, given):
    with pytest.raises(UserError, match=f"{next(iter(given))} is about rows that burnish packs itself"):
        assemble(
            config(tmp_path, **given),
            model=llava(),
            processing_class=tiny_tokenizer,
            train_dataset=rows(),
            data_collator=collate,
        )


def test_what_rows_with_images_need_is_said(tmp_path, tiny_tokenizer):
    settings = SFTConfig(str(tmp_path), use_cpu=True, max_length=8)
    with pytest.raises(UserError, match="rows with images take the model's processor"):
        assemble(settings, model=llava(), processing_class=tiny_tokenizer, train_dataset=chats())
    with pytest.raises(UserError, match="more than max_length 8: images can't be cut"):
        assemble(settings, model=llava(), processing_class=Processor(tiny_tokenizer), train_dataset=chats())
    with pytest.raises(UserError, match="a collator takes rows by their number, train_dataset is a generator"):
        assemble(
            config(tmp_path),
            model=llava(),
            processing_class=tiny_tokenizer,
            train_dataset=(row for row in rows()),
            data_collator=collate,
        )
    with pytest.raises(UserError, match=r"dataset_kwargs num_proc is not taken. Use add_special_tokens, append_conc"):
        SFTConfig("out", dataset_kwargs={"num_proc": 4})
    with pytest.raises(UserError, match="dataset_kwargs add_special_tokens is true or false, not 'no'"):
        SFTConfig("out", dataset_kwargs={"add_special_tokens": "no"})


def test_the_guides_script_runs_with_a_real_processor(tmp_path, tiny_tokenizer):
    """The collator of TRL's guide, a datasets.Dataset with pictures, and the three arguments set afterwards."""
    pytest.importorskip("PIL")
    processor, model, dataset = real_llava(tiny_tokenizer)
    seen = []

    def collate_fn(examples):
        texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        images = [example["images"][0] for example in examples]
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == processor.tokenizer.pad_token_id] = -100
        batch["labels"] = labels
        seen.append(set(batch))
        return batch

    args = SFTConfig(str(tmp_path), max_steps=4, logging_steps=1, use_cpu=True, learning_rate=1e-2)
    args.dataset_text_field = ""
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = SFTTrainer(
        model=model, args=args, data_collator=collate_fn, train_dataset=dataset, tokenizer=processor.tokenizer
    )
    trainer.train()
    assert {"input_ids", "attention_mask", "pixel_values", "labels"} <= seen[0]
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1


def test_the_models_own_processor_is_loaded_for_rows_with_images(tmp_path, tiny_tokenizer):
    pytest.importorskip("PIL")
    processor, model, dataset = real_llava(tiny_tokenizer)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    settings = SFTConfig(str(tmp_path / "run"), max_steps=3, logging_steps=1, use_cpu=True, learning_rate=1e-2)
    trainer = SFTTrainer(model=str(tmp_path / "base"), args=settings, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    assert losses(trainer)[-1] < losses(trainer)[0]
    batch = next(trainer.run.batches.epoch(0))
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.input_ids == image).sum() == PATCHES * len(batch.rows) and not (batch.labels == image).any()
    assert any((tmp_path / "run").glob("*processor*config.json")), "who loads the model needs its processor"


def real_llava(tokenizer):
    """(LlavaProcessor on pillow, a model whose image token it knows, a Dataset of eight coloured squares)."""
    import copy

    import datasets
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    model = llava()
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    rng = np.random.default_rng(0)
    squares = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    chats_ = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a green hill " * (1 + n % 2)}]},
            ],
            "images": [square],
        }
        for n, square in enumerate(squares)
    ]
    return processor, model, datasets.Dataset.from_list(chats_)


def test_images_that_nobody_would_look_at_are_refused(tmp_path, tiny_model):
    """On the way of text rows: from a file, and as prompt and completion."""
    import json

    rows = [{"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "a fox"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**rows[0], "image": "fox.png"}) + "\n")
    given = {"model_name_or_path": tiny_model, "use_cpu": True}
    with pytest.raises(UserError, match="a conversation with image can't be packed as text"):
        assemble(SFTConfig(str(tmp_path / "a"), dataset_name=str(file), **given))
    pair = {"prompt": rows[0]["messages"][:1], "completion": rows[0]["messages"][1:], "images": ["fox.png"]}
    with pytest.raises(UserError, match="a conversation with images can't be packed as text"):
        assemble(SFTConfig(str(tmp_path / "a"), **given), train_dataset=[pair])


def qwen():
    """A random Qwen2-VL: positions in three dimensions, pictures as patches beside a grid."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": PAD, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=398, vision_start_token_id=397,
        vision_end_token_id=396,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def collate_qwen(examples: list[dict]) -> dict:
    made = collate(examples)
    patches = torch.cat([row["pixels"].flatten().repeat(8).view(16, 96) for row in examples])  # 4 x 4 patches a picture
    grid = torch.tensor([[1, 4, 4]] * len(examples))
    return {
        **made,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": (made["input_ids"] == IMAGE).int(),
    }


def test_another_familys_positions_and_pictures_are_its_own(tmp_path, tiny_tokenizer):
    twin, data = qwen().train(), rows(5)
    twin.set_attn_implementation("sdpa")
    run = assemble(
        config(tmp_path), model=qwen(), processing_class=tiny_tokenizer, train_dataset=data, data_collator=collate_qwen
    )
    given = collate_qwen(data)
    loss = twin(**given).loss
    loss.backward()
    batch = padded_batch(given, list(range(5)))
    total, _ = run.objective.step(batch, None)
    (total / batch.num_valid).backward()
    assert total.item() / batch.num_valid == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(twin.named_parameters())
    for name, parameter in run.model.named_parameters():
        wanted = theirs[name].grad
        assert (parameter.grad - wanted).norm() <= 1e-5 * max(wanted.norm().item(), 1e-3), name
