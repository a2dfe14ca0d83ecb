"""2,000 drawn data sets: every row is tokenized as a second construction says, or named with what is wrong with it."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.config.errors import UserError
from burnish.config.preference import DPOConfig, KTOConfig, RewardConfig
from burnish.data import cache
from burnish.data.preference import prepare_pairs, prepare_unpaired
from burnish.data.prepare import prepare
from burnish.data.read import open_source

NAMES = {"user": "human", "assistant": "gpt"}
SPECIAL = ["<pad>", "<s>", "<eos>", "<|im_start|>", "<|im_end|>"]
BROKEN = [b"\xff", b'"', b"\n", b"\0", b"[", b"NaN", b"\\ud800", b"[" * 9000, b"9" * 5000]
WHOLE = re.compile("no row|data set is empty|no pair|these rows are")  # what is wrong with all rows together


def cases(number):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
    )  # fmt: skip


words = st.sampled_from(
    [
        "the cat",
        "é漢",
        "\n\n",
        " ",
        "  sat",
        "<|im_",
        "end|>",
        "<",
        "\ufdd0",
        "\ufdd1",
        "\ufdd0\ufdd1",
        "\U0001f600",
        *SPECIAL,
    ]
)
clean = st.lists(st.one_of(st.text(max_size=5), words), min_size=1, max_size=4).map("".join).filter(lambda t: t.strip())
plain = clean.filter(lambda text: not any(token in text for token in SPECIAL))
enormous = st.sampled_from(["the cat sat on the mat " * 300, "\u200d" * 3000, " " * 5000, "<" * 4000])
junk = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 500),
        st.sampled_from([2**40, -(2**70), 0.5, float("nan"), "", "\ud800"]),
        st.binary(max_size=3), words, enormous, st.sampled_from(["user", "assistant"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "type"]), inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip


@st.composite
def chats(draw, text=clean, last="assistant"):
    """Turns of user and assistant, perhaps after a system's."""
    roles = ["user", "assistant"] * draw(st.integers(1, 2))
    if last == "user":
        roles = roles[:-1]
    if draw(st.booleans()):
        roles = ["system", *roles]
    return [{"role": role, "content": draw(plain if role == "assistant" else text)} for role in roles]


def rows_of(**columns):
    return st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=4)


@st.composite
def damaged(draw, good):
    """Rows of which one or more hold something else at one place, at any depth, or lack it."""
    rows = copy.deepcopy(draw(good))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(rows))
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = draw(st.sampled_from(list(keys)))
            if isinstance(at[key], (dict, list)) and draw(st.integers(0, 2)):
                at = at[key]
                continue
            if draw(st.booleans()):
                at[key] = draw(junk)
            else:
                del at[key]
            break
    return rows


@pytest.fixture(autouse=True)
def uncached(monkeypatch):
    monkeypatch.setattr(cache, "load", lambda folder: None)
    monkeypatch.setattr(cache, "save", lambda *entry: None)


def listed(examples):
    bounds = examples.offsets.tolist()
    return [
        (examples.ids[a:b].tolist(), examples.trained[a:b].tolist())
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def no_specials(tokenizer, text):
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


def chat_by_hand(tokenizer, messages):
    """ChatML in ids, and which of them a reply is."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[3:])
    ids, written = [], []
    for message in messages:
        reply = message["role"] == "assistant"
        head = no_specials(tokenizer, message["role"] + "\n" + ("" if reply else message["content"]))
        body = no_specials(tokenizer, message["content"]) if reply else []
        if reply:  # no special token lies between, so the two are tokenized as one
            whole = no_specials(tokenizer, message["role"] + "\n" + message["content"])
            if whole != head + body:
                return None
        tail = no_specials(tokenizer, "\n")
        ids += [start, *head, *body, end, *tail]
        written += [False] * (1 + len(head)) + [reply] * (len(body) + 1) + [False] * len(tail)
    return ids, written


@given(data=st.data())
@cases(500)
def test_good_rows_are_tokenized_as_by_hand(data, tokenizer, make_config):
    kind = data.draw(st.sampled_from(["text", "prompt", "messages", "messages prompt", "input_ids"]))
    eos, config = tokenizer.eos_token_id, make_config(max_length=None)
    if kind == "text":
        rows = data.draw(rows_of(text=clean))
        expected = [(tokenizer(row["text"])["input_ids"], 0) for row in rows]
    elif kind == "prompt":
        rows = data.draw(rows_of(prompt=clean, completion=clean))
        expected = []
        for row in rows:
            asked, ids = (
                tokenizer(row["prompt"])["input_ids"],
                tokenizer(row["prompt"] + row["completion"])["input_ids"],
            )
            same = [a == b for a, b in zip(asked, ids, strict=False)]
            expected.append((ids, same.index(False) if False in same else len(asked)))
    elif kind == "input_ids":
        lists = st.lists(st.integers(0, 300), min_size=2, max_size=9)
        rows = data.draw(st.lists(st.fixed_dictionaries(dict(input_ids=lists)), min_size=1, max_size=4))
        assert listed(prepare(rows, tokenizer, config)[0]) == [
            (r["input_ids"], [True] * len(r["input_ids"])) for r in rows
        ]
        return
    else:
        rows = data.draw(rows_of(messages=chats()))
        by_hand = [chat_by_hand(tokenizer, row["messages"]) for row in rows]
        given_rows = rows
        if kind == "messages prompt":
            given_rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        examples, report = prepare(given_rows, tokenizer, make_config(max_length=None, assistant_only_loss=True))
        for hand, (ids, flags) in zip(by_hand, listed(examples), strict=True):
            if hand is None:
                continue
            assert ids == hand[0]
            if kind == "messages":
                assert flags == hand[1]
            else:
                begin = max(i for i in range(len(flags)) if hand[1][i] and (i == 0 or not hand[1][i - 1]))
                assert flags == [flag and i >= begin for i, flag in enumerate(hand[1])]
        asked = ["\0".join(m["content"] for m in row["messages"] if m["role"] != "assistant") for row in rows]
        spelled = [i for i, text in enumerate(asked) if any(token in text for token in SPECIAL)]
        assert report.spelled_rows == spelled
        return
    ended = [(ids if ids[-1] == eos else [*ids, eos], start) for ids, start in expected]
    kept = [(ids, [i >= start for i in range(len(ids))]) for ids, start in ended if len(ids) > max(start, 1)]
    if kept:
        assert listed(prepare(rows, tokenizer, config)[0]) == kept
    else:
        with pytest.raises(UserError, match="no row trains on anything"):
            prepare(rows, tokenizer, config)


def accounted(work, rows):
    """The examples that `work` makes of rows, or None where it names what is wrong."""
    try:
        examples, report = work(rows)
    except UserError as error:
        place = re.search(r"row (\d+)", str(error))
        assert WHOLE.search(str(error)) or (place and int(place[1]) < len(rows)), str(error)
        return None
    assert report.rows_read == len(rows)
    assert sorted({*examples.rows.tolist(), *(row for row, _ in report.dropped)}) == list(range(len(rows)))
    assert all(reason for _, reason in report.dropped)
    assert (examples.lengths > (0 if examples.paired and examples.prompt is None else 1)).all() and len(
        examples.ids
    ) == report.tokens
    return examples


GOOD = {
    "text": rows_of(text=clean),
    "prompt": rows_of(prompt=clean, completion=clean),
    "messages": rows_of(messages=chats()),
    "conversations": rows_of(conversations=chats().map(
        lambda chat: [{"from": NAMES.get(m["role"], m["role"]), "value": m["content"]} for m in chat])),
    "tools": rows_of(messages=chats(), tools=st.just([{"type": "function", "function": {"name": "f"}}]),
                     chat_template_kwargs=st.just({"a": 1})),
    "messages prompt": rows_of(prompt=chats(last="user"), completion=plain.map(
        lambda text: [{"role": "assistant", "content": text}])),
    "input_ids": st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=6).map(lambda ids: {
        "input_ids": ids, "labels": list(ids), "completion_mask": [1] * len(ids), "attention_mask": [1] * len(ids)}),
        min_size=1, max_size=4),
}  # fmt: skip


@given(data=st.data())
@cases(700)
def test_damaged_rows_are_trained_on_alike_or_named(data, tokenizer, make_config):
    rows = data.draw(damaged(GOOD[data.draw(st.sampled_from(sorted(GOOD)))]))
    config = make_config(
        max_length=data.draw(st.sampled_from([None, 16])), assistant_only_loss=data.draw(st.booleans()),
        packing=False, truncation_mode=data.draw(st.sampled_from(["keep_start", "keep_end"])),
    )  # fmt: skip
    untouched = repr(rows)

    def work(some):
        return prepare(some, tokenizer, config, vocab_size=1000)

    examples = accounted(work, rows)
    assert repr(rows) == untouched
    if examples is None:
        return
    for number, made in zip(examples.rows.tolist(), listed(examples), strict=True):
        assert listed(work([rows[number]])[0]) == [made]  # no row changes another


PAIRS = {
    "text": rows_of(prompt=clean, chosen=clean, rejected=clean),
    "no prompt": rows_of(chosen=clean, rejected=clean),
    "messages": rows_of(prompt=chats(last="user"), chosen=plain.map(lambda t: [{"role": "assistant", "content": t}]),
                        rejected=plain.map(lambda t: [{"role": "assistant", "content": t}]), margin=st.just(0.5)),
    "whole": rows_of(chosen=chats(), rejected=chats()),
    "rated": rows_of(prompt=clean, completion=clean, label=st.booleans()),
    "rated messages": rows_of(prompt=chats(last="user"), completion=plain.map(
        lambda t: [{"role": "assistant", "content": t}]), label=st.booleans()),
    "tokens": rows_of(**{f"{side}_input_ids": st.lists(st.integers(0, 300), min_size=1, max_size=5)
                         for side in ("prompt", "chosen", "rejected")}),
}  # fmt: skip


@given(data=st.data())
@cases(500)
def test_damaged_preferences_are_trained_on_alike_or_named(data, tokenizer):
    good = PAIRS[data.draw(st.sampled_from(sorted(PAIRS)))]
    rows = data.draw(st.one_of(good, damaged(good)))
    base = dict(model_name_or_path="x", output_dir="x", max_length=data.draw(st.sampled_from([None, 16])))
    task = data.draw(st.sampled_from(["pairs", "scored", "unpaired"]))

    def work(some):
        if task == "unpaired":
            return prepare_unpaired(some, tokenizer, KTOConfig(**base), vocab_size=1000)
        config = (RewardConfig if task == "scored" else DPOConfig)(**base)
        return prepare_pairs(some, tokenizer, config, scored=task == "scored", vocab_size=1000)

    examples = accounted(work, rows)
    if examples is None:
        return
    made = listed(examples)
    for number in sorted(set(examples.rows.tolist())):
        own = [one for row, one in zip(examples.rows.tolist(), made, strict=True) if row == number]
        assert listed(work([rows[number]])[0]) == own


@given(data=st.data())
@cases(300)
def test_damaged_files_are_read_or_named(data, tokenizer, make_config, tmp_path):
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
    rows = data.draw(GOOD[data.draw(st.sampled_from(["text", "prompt", "messages"]))])
    whole = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    content = bytearray(
        (whole if suffix != ".csv" else "text\n" + "\n".join(row.get("text", "x") for row in rows)).encode()
    )
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 4))
        content[at : at + cut] = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from(BROKEN)))
    path = tmp_path / f"data{suffix}"
    path.write_bytes(bytes(content))
    try:
        read = list(open_source(str(path)).rows())
    except UserError as error:
        assert str(path) in str(error)
        return
    assert all(isinstance(row, dict) for row in read)
    try:
        examples, report = prepare(str(path), tokenizer, make_config(max_length=None))
    except UserError as error:
        assert str(path) in str(error)
        return
    assert report.rows_read == len(read) and len(examples) + len(report.dropped) == len(read)
