"""Training on what follows a template: the masks against a token-by-token reading, in batches, packs and reports."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from burnish import ConstantLengthDataset, DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer
from burnish.config.errors import UserError
from burnish.data.batch import Batches
from burnish.data.completion import Templates, in_context
from burnish.data.prepare import prepare
from burnish.data.stream import StreamBatches

QUESTION, ANSWER = "### Question:", " ### Answer:"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def by_reading(ids, response, instruction):
    """The definition, one token after the other; None where a template is not there."""

    def at(pattern, i):
        return pattern is not None and tuple(ids[i : i + len(pattern)]) == pattern

    found = [i for i in range(len(ids)) if at(response, i)]
    if not found or (instruction is not None and not any(at(instruction, i) for i in range(len(ids)))):
        return None
    if instruction is None:
        return [i >= found[-1] + len(response) for i in range(len(ids))]
    flags, replying = [], False
    for i in range(len(ids)):
        if at(instruction, i):
            replying = False
        if i - len(response) in found:
            replying = not any(at(instruction, j) for j in [i])
        flags.append(replying and not any(j <= i < j + len(response) for j in found))
    return flags


@pytest.mark.parametrize("instruction", [None, (7, 8), (9,)])
def test_masks_are_those_of_reading_token_by_token(instruction):
    rng = random.Random(0)
    seen = {"none": 0, "some": 0}
    for _ in range(2000):
        words = [(1, 2), (7, 8), (9,), (3,), (4,), (1,), (7,)]
        ids = list(itertools.chain(*(rng.choice(words) for _ in range(rng.randint(0, 12)))))
        ours = Templates((1, 2), instruction).trained(np.array(ids, dtype=np.int32))
        wanted = by_reading(ids, (1, 2), instruction)
        seen["none" if wanted is None else "some"] += 1
        assert (None if ours is None else ours.tolist()) == wanted, ids
    assert min(seen.values()) > 200


def row_text(i: int, words: int = 6) -> str:
    rng = random.Random(i)
    names = "the quick brown fox jumps over lazy dogs".split()
    asked, said = (" ".join(rng.choice(names) for _ in range(words)) for _ in range(2))
    return f"{QUESTION} {asked}\n{ANSWER} {said}"


def test_a_batch_is_padded_and_masked_and_eos_stays_a_target_where_it_pads(tiny_tokenizer):
    collator = DataCollatorForCompletionOnlyLM(ANSWER, tokenizer=tiny_tokenizer)
    texts = [row_text(0), row_text(1, 9), "no answer here"]
    rows = [{"input_ids": tiny_tokenizer(text)["input_ids"]} for text in texts]
    batch = collator(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, longest)
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        assert batch["input_ids"][i].tolist() == ids + [tiny_tokenizer.pad_token_id] * (longest - len(ids))
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (longest - len(ids))
        said = texts[i].partition(ANSWER)[2] if i < 2 else ""
        kept = [token for token in batch["labels"][i].tolist() if token != -100]
        assert tiny_tokenizer.decode(kept) == said
    tiny_tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    collator = DataCollatorForCompletionOnlyLM(ANSWER, tokenizer=tiny_tokenizer, ignore_index=-7)
    ended = [row["input_ids"] + [tiny_tokenizer.eos_token_id] for row in rows[:2]]
    labels = collator(ended)["labels"].tolist()
    assert all(tiny_tokenizer.eos_token_id in row for row in labels)
    assert labels[0][: len(ended[0])].count(tiny_tokenizer.eos_token_id) == 1
    assert set(labels[0][len(ended[0]) :]) == {-7}
    tiny_tokenizer.padding_side = "left"
    assert collator(ended)["labels"][0].tolist()[-len(ended[0]) :] == labels[0][: len(ended[0])]


def test_padding_free_is_one_row_whose_positions_restart(tiny_tokenizer):
    rows = [tiny_tokenizer(row_text(i))["input_ids"] for i in range(2)]
    batch = DataCollatorForCompletionOnlyLM([rows[0][0]], tokenizer=tiny_tokenizer, padding_free=True)(rows)
    assert batch["input_ids"].tolist() == [rows[0] + rows[1]]
    assert batch["position_ids"].tolist() == [[*range(len(rows[0])), *range(len(rows[1]))]]
    assert batch["labels"][0, 0] == batch["labels"][0, len(rows[0])] == -100


def trained_text(batch, tokenizer) -> list[str]:
    """What each sequence of a packed batch trains on."""
    edges = batch.cu_seqlens.tolist()
    return [
        tokenizer.decode([token for token in batch.labels[a:b].tolist() if token != -100])
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_every_row_of_a_pack_trains_on_its_answer_only(tiny_tokenizer, packing, stream):
    rows = [{"text": row_text(i)} for i in range(12)]
    wanted = sorted(row["text"].partition(ANSWER)[2] + "<|im_end|>" for row in rows)
    templates = DataCollatorForCompletionOnlyLM(ANSWER, tokenizer=tiny_tokenizer).templates
    config = SFTConfig(packing=packing, max_length=160, per_device_train_batch_size=3, max_steps=100)
    if stream:
        made = iter(StreamBatches(iter_rows(rows), tiny_tokenizer, config, templates=templates).epoch(0))
        found = []
        while len(found) < len(rows):
            found += trained_text(next(made), tiny_tokenizer)
    else:
        examples, report = prepare(rows, tiny_tokenizer, config, templates=templates)
        assert not report.dropped
        found = list(itertools.chain(*(trained_text(b, tiny_tokenizer) for b in Batches(examples, config).epoch(0))))
        again, _ = prepare(rows, tiny_tokenizer, config)  # the cache must not answer for other templates
        assert again.trained.sum() > examples.trained.sum()
    assert sorted(found) == wanted


def iter_rows(rows):
    class Rows:
        def __iter__(self):
            return iter(rows)

    return Rows()


def test_with_an_instruction_template_every_reply_is_trained_on(tiny_tokenizer):
    text = "### Human: the fox ### Assistant: lazy dogs ### Human: over ### Assistant: brown"
    collator = DataCollatorForCompletionOnlyLM(" ### Assistant:", " ### Human:", tokenizer=tiny_tokenizer)
    labels = collator([tiny_tokenizer(" " + text)["input_ids"]])["labels"][0].tolist()
    assert tiny_tokenizer.decode([token for token in labels if token != -100]) == " lazy dogs brown"


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """Writes a space mark before the first word as Llama 2's does, so that a text alone begins with another token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "</s>"])
    backend.train_from_iterator(["### ### User: Assistant: Hello Hi, how can I help you? \n \n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_a_template_that_context_tokenizes_otherwise_is_explained_and_the_ids_to_give_work(spaced_tokenizer):
    prompt = "### User: Hello\n\n### Assistant: Hi, how can I help you?"
    rows = [{"text": prompt}] * 3
    template = "### Assistant:"
    alone = spaced_tokenizer.encode(template, add_special_tokens=False)
    ids = spaced_tokenizer(prompt)["input_ids"]
    collator = DataCollatorForCompletionOnlyLM(template, tokenizer=spaced_tokenizer)
    assert collator.templates.trained(np.array(ids)) is None, "the case to explain"
    with pytest.raises(UserError) as error:
        prepare(rows, spaced_tokenizer, SFTConfig(), templates=collator.templates)
    message = str(error.value)
    assert f"tokens {alone}, not found: in list row 0 its text is tokens" in message and "rows 0, 1, 2" in message
    given = [int(n) for n in message.partition("response_template=[")[2].partition("]")[0].split(",")]
    assert given == list(in_context(np.array(ids), tuple(alone), spaced_tokenizer))
    collator = DataCollatorForCompletionOnlyLM(given, tokenizer=spaced_tokenizer)
    examples, report = prepare(rows, spaced_tokenizer, SFTConfig(), templates=collator.templates)
    assert spaced_tokenizer.decode(examples.ids[: examples.offsets[1]][examples.trained[: examples.offsets[1]]]).strip(
    ) == "Hi, how can I help you?</s>"  # fmt: skip
    assert not report.dropped


def test_rows_without_the_template_are_dropped_and_named(tiny_tokenizer, capsys):
    rows = [{"text": row_text(0)}, {"text": "nothing to see"}, {"text": row_text(2)}]
    collator = DataCollatorForCompletionOnlyLM(ANSWER, tokenizer=tiny_tokenizer)
    _, report = prepare(rows, tiny_tokenizer, SFTConfig(), templates=collator.templates)
    (line,) = [line for line in report.lines() if line.startswith("dropped")]
    assert "response_template ' ### Answer:'" in line and "nor is its text" in line and line.endswith("(row 1)")
    asked = DataCollatorForCompletionOnlyLM(ANSWER, "### Human:", tokenizer=tiny_tokenizer)
    with pytest.raises(UserError, match="instruction_template '### Human:'"):
        prepare(rows[:1], tiny_tokenizer, SFTConfig(), templates=asked.templates)
    assert (collator([tiny_tokenizer(rows[1]["text"])["input_ids"]])["labels"] == -100).all()
    assert "response_template ' ### Answer:'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mlm": True}, "mlm"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"response_template": ""}, "response_template has no tokens"),
        ({"instruction_template": []}, "instruction_template has no tokens"),
        ({"return_tensors": "np"}, "return_tensors"),
    ],
)
def test_what_the_collator_can_t_be_made_of(tiny_tokenizer, given, says):
    with pytest.raises(UserError, match=says):
        DataCollatorForCompletionOnlyLM(**{"response_template": "x", "tokenizer": tiny_tokenizer, **given})


def test_a_trainer_with_the_collator_gives_the_loss_of_the_answers(tmp_path, tiny_model, tiny_tokenizer):
    """Against transformers' own loss on the collator's batch."""
    from transformers import AutoModelForCausalLM

    rows = [{"text": row_text(i)} for i in range(4)]
    collator = DataCollatorForCompletionOnlyLM(ANSWER, tokenizer=tiny_tokenizer)
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, logging_steps=1, packing=True, max_length=400)
    trainer = SFTTrainer(
        tiny_model, config, train_dataset=rows, data_collator=collator, processing_class=tiny_tokenizer
    )
    trainer.train()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).double()
    batch = collator([tiny_tokenizer(row["text"] + "<|im_end|>")["input_ids"] for row in rows])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain(**batch).loss.item(), rel=1e-5)


# ---- formatting_func


PAIRS = [{"question": f"q {i}", "answer": f"the fox {i}"} for i in range(7)]


def one(row):
    return f"### Question: {row['question']}\n ### Answer: {row['answer']}"


def by_index(example):  # the form of TRL v0.7's pages
    output_texts = []
    for i in range(len(example["question"])):
        text = f"### Question: {example['question'][i]}\n ### Answer: {example['answer'][i]}"
        output_texts.append(text)
    return output_texts


def by_zip(example):
    return [one({"question": q, "answer": a}) for q, a in zip(example["question"], example["answer"], strict=True)]


def of_lists_only(example):
    assert isinstance(example["question"], list)
    return by_zip(example)


def texts_of(rows, tokenizer, function, monkeypatch, block=1000):
    monkeypatch.setattr("burnish.data.prepare._BATCH", block)
    examples, _ = prepare(rows, tokenizer, SFTConfig(max_length=None), formatting_func=function)
    return [tokenizer.decode(examples.ids[a:b]) for a, b in itertools.pairwise(examples.offsets)]


@pytest.mark.parametrize("function", [one, by_index, by_zip, of_lists_only])
@pytest.mark.parametrize("rows", [PAIRS, PAIRS[:1]], ids=["rows", "one row"])
@pytest.mark.parametrize("block", [3, 1000])
def test_both_forms_of_formatting_func_give_the_same_texts(tiny_tokenizer, function, rows, block, monkeypatch):
    made = texts_of(rows, tiny_tokenizer, function, monkeypatch, block)
    assert made == [one(row) + "<|im_end|>" for row in rows]


def test_a_single_letter_column_doesn_t_fool_the_detection(tiny_tokenizer, monkeypatch):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    assert texts_of(rows, tiny_tokenizer, by_index, monkeypatch) == [one(row) + "<|im_end|>" for row in rows]


def test_what_a_formatting_func_does_wrong_is_said(tiny_tokenizer):
    def run(function):
        return prepare(PAIRS, tiny_tokenizer, SFTConfig(), formatting_func=function)

    with pytest.raises(UserError, match="row 0: formatting_func returned a list"):
        run(lambda row: [str(row["question"])])
    with pytest.raises(UserError, match="made 4 texts of 7 rows"):
        run(lambda rows: [f"{q}" for q in rows["question"]][:4])
    with pytest.raises(KeyError, match="nowhere"):
        run(lambda row: row["nowhere"])


# ---- ConstantLengthDataset


def test_blocks_are_the_texts_end_to_end(tiny_tokenizer):
    rows = [{"text": row_text(i)} for i in range(20)]
    blocks = list(ConstantLengthDataset(tiny_tokenizer, rows, "text", seq_length=32, shuffle=False))
    stream = list(itertools.chain(*([*tiny_tokenizer(row["text"])["input_ids"], 1] for row in rows)))
    assert tiny_tokenizer.eos_token_id == 1
    assert [block["input_ids"].tolist() for block in blocks] == [
        stream[at : at + 32] for at in range(0, len(stream) // 32 * 32, 32)
    ]
    assert all(
        torch.equal(block["input_ids"], block["labels"]) and block["labels"].dtype == torch.int64 for block in blocks
    )
    bare = ConstantLengthDataset(
        tiny_tokenizer, rows, formatting_func=lambda row: row["text"], seq_length=32, append_concat_token=False
    )
    without = list(itertools.chain(*(tiny_tokenizer(row["text"])["input_ids"] for row in rows)))
    assert sorted(b["input_ids"].tolist() for b in bare) == sorted(
        without[at : at + 32] for at in range(0, len(without) // 32 * 32, 32)
    )


def test_each_read_is_cut_alone_and_what_is_left_of_it_is_dropped(tiny_tokenizer):
    rows = [{"text": row_text(i)} for i in range(6)]
    small = ConstantLengthDataset(
        tiny_tokenizer, rows, "text", seq_length=16, num_of_sequences=1, chars_per_token=0.1, shuffle=False
    )
    wanted = []
    for row in rows:  # one text already has the characters of a read
        ids = [*tiny_tokenizer(row["text"])["input_ids"], 1]
        wanted += [ids[at : at + 16] for at in range(0, len(ids) // 16 * 16, 16)]
    assert [block["input_ids"].tolist() for block in small] == wanted
    assert len(small) == 6
    endless = ConstantLengthDataset(
        tiny_tokenizer,
        rows,
        "text",
        infinite=True,
        seq_length=16,
        num_of_sequences=1,
        chars_per_token=0.1,
        shuffle=False,
    )
    taken = [block["input_ids"].tolist() for block in itertools.islice(endless, 2 * len(wanted))]
    assert taken == wanted + wanted


def test_what_blocks_can_t_be_made_of(tiny_tokenizer):
    with pytest.raises(UserError, match="no text to cut"):
        ConstantLengthDataset(tiny_tokenizer, [])
    with pytest.raises(UserError, match="empty"):
        next(iter(ConstantLengthDataset(tiny_tokenizer, [], "text", infinite=True)))


@pytest.mark.parametrize("infinite", [False, True])
def test_a_trainer_trains_on_blocks(tmp_path, tiny_model, tiny_tokenizer, infinite):
    rows = [{"text": row_text(i)} for i in range(20)]
    blocks = ConstantLengthDataset(tiny_tokenizer, rows, "text", infinite=infinite, seq_length=32)
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, logging_steps=1)
    trainer = SFTTrainer(tiny_model, config, train_dataset=blocks, processing_class=tiny_tokenizer)
    trainer.train()
    assert trainer.state.num_tokens == 2 * 2 * 32
