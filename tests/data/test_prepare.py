"""Every format against a row-by-row construction with the tokenizer itself; cutting, dropping, counting, refusals."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest

from burnish.config.errors import UserError
from burnish.data.prepare import prepare

USER = ["What is two and two?", "the cat", "weather in Paris", "é漢 \n\n x"]
REPLY = ["It is four.", "sat on the mat", " I do not know.\n", "y"]
CHATS = [
    [{"role": "user", "content": u}, {"role": "assistant", "content": r}] for u, r in zip(USER, REPLY, strict=True)
]
TEXTS = [u + " " + r for u, r in zip(USER, REPLY, strict=True)]


@pytest.fixture
def run(tokenizer, make_config, tmp_path):
    def run(rows, tok=tokenizer, formatting_func=None, vocab_size=None, train=True, **changes):
        return prepare(
            rows,
            tok,
            make_config(**changes),
            train=train,
            cache_dir=tmp_path / "cache",
            formatting_func=formatting_func,
            vocab_size=vocab_size,
        )

    return run


def listed(examples):
    bounds = examples.offsets.tolist()
    return [
        (examples.ids[a:b].tolist(), examples.trained[a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def trained_text(tokenizer, examples):
    """What each row trains, decoded."""
    rows = [[i for i, flag in zip(ids, flags, strict=True) if flag] for ids, flags in listed(examples)]
    return [tokenizer.decode(ids) for ids in rows]


def test_text_is_ended_once(run, tokenizer):
    rows = [{"text": text} for text in TEXTS] + [{"text": TEXTS[0] + "<|im_end|>"}]
    examples, report = run(rows)
    eos = tokenizer.eos_token_id
    expected = [tokenizer(text)["input_ids"] + [eos] for text in [*TEXTS, TEXTS[0]]]
    assert listed(examples) == [(ids, [True] * len(ids)) for ids in expected]
    assert report.trained_tokens == sum(len(ids) - 1 for ids in expected)
    assert (report.stopped_rows, report.rows, report.format) == (5, 5, "text")


def test_plain_text_goes_without_bos_and_eos_where_dataset_kwargs_say_so(run, make_tokenizer):
    """Each of the two alone and both, with the cache between them; a conversation is its template's in any case."""
    tokenizer = make_tokenizer(bos=True)
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    plain = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    pair = {"prompt": USER[0], "completion": " " + REPLY[0]}
    for special, end in ((True, True), (False, True), (True, False), (False, False)):
        asked = {"add_special_tokens": special, "append_concat_token": end}
        whole = bos * special + plain + eos * end
        examples, _ = run([{"text": TEXTS[0]}], tok=tokenizer, dataset_kwargs=asked)
        assert listed(examples) == [(whole, [True] * len(whole))]
        examples, _ = run([pair], tok=tokenizer, dataset_kwargs=asked)
        ((ids, flags),) = listed(examples)
        assert ids == whole and sum(flags) == len(tokenizer(pair["completion"], add_special_tokens=False)[0]) + end
        examples, _ = run([{"messages": CHATS[0]}], tok=tokenizer, dataset_kwargs=asked)
        assert listed(examples)[0][0] == tokenizer.apply_chat_template(CHATS[0])["input_ids"]


def test_text_field_and_formatting_func(run, tokenizer):
    examples, _ = run([{"body": "the cat"}], dataset_text_field="body")
    ids = tokenizer("the cat")["input_ids"] + [tokenizer.eos_token_id]
    assert listed(examples)[0][0] == ids
    made, report = run([{"a": "the", "b": "cat"}], formatting_func=lambda row: f"{row['a']} {row['b']}")
    assert listed(made)[0][0] == ids and report.format == "text"
    with pytest.raises(UserError, match="formatting_func returned a list"):
        run([{"a": 1}], formatting_func=lambda row: ["x"])
    with pytest.raises(UserError, match="completion_only_loss"):
        run([{"a": "x"}], formatting_func=lambda row: "x", completion_only_loss=True)


def test_messages_are_what_the_template_tokenizes(run, tokenizer):
    examples, report = run([{"messages": chat} for chat in CHATS])
    expected = [tokenizer.apply_chat_template(chat)["input_ids"] for chat in CHATS]
    assert listed(examples) == [(ids, [True] * len(ids)) for ids in expected]
    assert report.stopped_rows == len(CHATS)
    assert report.template == "tokenizer"


def test_sharegpt_is_messages(run):
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS]
    assert listed(run(shared)[0]) == listed(run([{"messages": chat} for chat in CHATS])[0])


def test_assistant_only_trains_the_reply_and_its_end(run, tokenizer, make_tokenizer):
    expected = [reply + "<|im_end|>" for reply in REPLY]
    rows = [{"messages": chat} for chat in CHATS]
    examples, _ = run(rows, assistant_only_loss=True)
    assert trained_text(tokenizer, examples) == expected
    assert listed(examples)[0][0] == tokenizer.apply_chat_template(CHATS[0])["input_ids"]
    marked = tokenizer.chat_template.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
    )
    assert marked != tokenizer.chat_template
    for trim in (False, True):  # the end-of-turn token lies outside these marks and is trained all the same
        tok = make_tokenizer(template=marked, trim=trim)
        assert trained_text(tok, run(rows, tok=tok, assistant_only_loss=True)[0]) == expected
        tok = make_tokenizer(trim=trim)
        assert trained_text(tok, run(rows, tok=tok, assistant_only_loss=True)[0]) == expected


def prompt_completion(tokenizer, prompt, whole, only=True):
    start = 0
    while start < min(len(prompt), len(whole)) and prompt[start] == whole[start]:
        start += 1
    return whole, [t >= start or not only for t in range(len(whole))]


@pytest.mark.parametrize("only", [None, True, False])
def test_prompt_completion_starts_where_the_tokens_part(run, tokenizer, only):
    rows = [{"prompt": u, "completion": r} for u, r in zip(USER, REPLY, strict=True)]
    examples, report = run(rows, completion_only_loss=only)
    eos = tokenizer.eos_token_id
    expected = [
        prompt_completion(
            tokenizer, tokenizer(u)["input_ids"], tokenizer(u + r)["input_ids"] + [eos], only is not False
        )
        for u, r in zip(USER, REPLY, strict=True)
    ]
    assert listed(examples) == expected
    merged = sum(tokenizer(u + r)["input_ids"][: len(tokenizer(u)["input_ids"])] != tokenizer(u)["input_ids"]
                 for u, r in zip(USER, REPLY, strict=True))  # fmt: skip
    assert report.boundary_moved == merged


@pytest.mark.parametrize("assistant_only", [False, True])
def test_prompt_completion_messages(run, tokenizer, assistant_only):
    rows = [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
    examples, _ = run(rows, assistant_only_loss=assistant_only)
    for (ids, flags), chat in zip(listed(examples), CHATS, strict=True):
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        whole, expected = prompt_completion(tokenizer, prompt, tokenizer.apply_chat_template(chat)["input_ids"])
        if assistant_only:
            expected[-1] = False  # the newline after the end token is the template's
        assert (ids, flags) == (whole, expected)


def test_tools_and_template_arguments_reach_the_template(run, make_tokenizer):
    tok = make_tokenizer(
        template="{{ (tools or []) | tojson }}{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}, {"name": "g", "parameters": {"y": {"type": "str"}}}]
    row = {"messages": CHATS[0], "tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    text = json.dumps(tools) + "glad" + USER[0] + REPLY[0]
    want = tok(text)["input_ids"]
    assert listed(run([row], tok=tok)[0])[0][0] == want
    assert listed(run([{**row, "tools": json.dumps(tools)}], tok=tok)[0])[0][0] == want
    arrow = datasets.Dataset.from_list([row])
    assert "None" in str(arrow[0]["tools"]), "Arrow no longer fills schemas: this test has lost its point"
    assert listed(run(arrow, tok=tok)[0])[0][0] == want


def test_already_tokenized_rows(run):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [9, 10, 11, 5], "completion_mask": [0, 1, 1, 1], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 0, 1]},
        {"input_ids": [5, 6]},
    ]
    examples, report = run(rows, vocab_size=12)
    assert listed(examples) == [
        ([5, 6, 7, 8], [False, False, True, True]),
        ([10, 11, 5], [True, True, True]),
        ([5, 6, 7], [False, False, True]),
        ([5, 6], [True, True]),
    ]
    assert report.trained_tokens == 2 + 2 + 1 + 1
    untold, _ = run(rows, completion_only_loss=False)
    assert listed(untold)[1] == ([10, 11, 5], [True, True, True])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 12]}, "row 1: token id 12 is outside the vocabulary of 12"),
        ({"input_ids": [5, -1]}, "row 1: .*no token id"),
        ({"input_ids": [5, 6], "labels": [5]}, "row 1: labels has 1 entries, input_ids 2"),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, "row 1: labels must repeat input_ids"),
        ({"input_ids": [5, 6], "seq_lengths": [1, 1]}, "row 1: this row is packed already"),
        ({"input_ids": "ab"}, "row 1: .*lists of integers"),
    ],
)
def test_bad_tokenized_rows(run, row, message):
    with pytest.raises(UserError, match=message):
        run([{"input_ids": [5, 6]}, row], vocab_size=12)


def test_cutting_is_counted_and_ends_nothing_that_goes_on(run, tokenizer):
    rows = [{"text": "a" * n} for n in (3, 4, 5, 9)]  # "a" is one token here, EOS one more
    assert len(tokenizer("a" * 9)["input_ids"]) == 9
    a, eos = tokenizer("a")["input_ids"][0], tokenizer.eos_token_id
    examples, report = run(rows, max_length=5)
    assert [ids for ids, _ in listed(examples)] == [[a] * 3 + [eos], [a] * 4 + [eos], [a] * 5, [a] * 5]
    assert report.cut_rows == [2, 3]
    assert (report.tokens_lost, report.trained_lost, report.stopped_rows) == (1 + 5, 1 + 5, 2)
    assert report.quantiles == {"p50": 5, "p90": 6, "p99": 6, "max": 10}
    kept_end, report = run(rows, max_length=5, truncation_mode="keep_end")
    assert [ids for ids, _ in listed(kept_end)][2:] == [[a] * 4 + [eos]] * 2
    assert (report.stopped_rows, report.trained_tokens) == (4, 3 + 4 + 4 + 4)


def test_packing_that_divides_rows_cuts_none(run):
    rows = [{"text": "a" * 30}]
    for strategy, cut in (("bfd", 1), ("bfd_split", 0), ("wrapped", 0)):
        examples, report = run(rows, packing=True, packing_strategy=strategy, max_length=10)
        assert len(report.cut_rows) == cut
        assert len(examples.ids) == (10 if cut else 31)
        assert report.packs == (1 if cut else 4)
        assert report.fill == pytest.approx((10 if cut else 31) / (10 * report.packs))
        whole, evaluated = run(
            rows, packing=True, packing_strategy=strategy, max_length=10, eval_packing=False, train=False
        )
        assert len(whole.ids) == 10 and evaluated.packs is None


def test_rows_that_train_on_nothing_are_dropped_by_number(run):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a" * 40, "completion": "b"},
        {"prompt": "a", "completion": ""},
        {"prompt": "", "completion": ""},
    ]
    examples, report = run(rows, max_length=20)
    assert examples.rows.tolist() == [0]
    assert report.dropped == [
        (1, "all trained tokens lie beyond max_length 20"),
        (2, "no trained tokens"),
        (3, "no tokens"),
    ]
    assert "dropped 1: all trained tokens lie beyond max_length 20 (row 1)" in report.lines()
    with pytest.raises(UserError, match="no row trains on anything .no tokens: rows 0, 1"):
        run([{"text": ""}, {"text": ""}])


def test_padding_that_equals_eos_changes_nothing(run, make_tokenizer):
    tok = make_tokenizer()
    rows = [{"messages": chat} for chat in CHATS]
    before = listed(run(rows, tok=tok, assistant_only_loss=True)[0])
    tok.pad_token = tok.eos_token
    assert listed(run(rows, tok=tok, assistant_only_loss=True)[0]) == before


def test_one_bos(run, make_tokenizer):
    tok = make_tokenizer(bos=True)
    bos = tok.bos_token_id
    for text in ("the cat", "<s>the cat"):
        examples, report = run([{"text": text}], tok=tok)
        assert listed(examples)[0][0].count(bos) == 1
        assert report.doubled_bos == text.startswith("<s>")
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    ids = listed(run([{"messages": CHATS[0]}], tok=tok)[0])[0][0]
    assert ids == tok.apply_chat_template(CHATS[0])["input_ids"] and ids.count(bos) == 1
    examples, report = run([{"text": ""}, {"text": "a"}], tok=tok)
    assert report.dropped == [(0, "no trained tokens")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set is empty"),
        ([{"question": "a", "answer": "b"}], r"row 0: unrecognised columns: answer, question. Accepted: .*\| text \|"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference rows: use burnish dpo"),
        ([{"text": "a"}, {"messages": CHATS[0]}], "row 1: this row is messages .*before it are text"),
        ([{"text": "a"}, {"text": None}], "row 1: unrecognised columns"),
        ([{"text": 3}], "row 0: text must be text"),
        ([{"messages": "hello"}], "row 0: messages must be a list"),
        ([{"messages": []}], "row 0: messages must be a list"),
        ([{"prompt": "a", "completion": CHATS[0]}], "row 0: prompt and completion must both"),
        ([{"messages": [{"content": "a"}]}], "row 0: message 0 has no role"),
        ([{"messages": [{"role": "user"}]}], r"row 0: message 0 \(user\) has no content"),
        ([{"messages": CHATS[0], "tools": "{"}], "row 0: tools is not JSON"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(run, rows, message):
    with pytest.raises(UserError, match=message):
        run(rows)


def test_tokenizers_and_settings_that_are_refused(run, make_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        run([{"messages": CHATS[0]}], tok=make_tokenizer(template=None))
    without = make_tokenizer()
    without.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        run([{"text": "a"}], tok=without)
    with pytest.raises(UserError, match="assistant_only_loss needs conversations"):
        run([{"text": "a"}], assistant_only_loss=True)
    with pytest.raises(UserError, match="completion_only_loss needs prompt .* use assistant_only_loss"):
        run([{"messages": CHATS[0]}], completion_only_loss=True)
    with pytest.raises(UserError, match="unknown truncation_mode"):
        run([{"text": "a"}], truncation_mode="middle")
    with pytest.raises(UserError, match="max_length=1 leaves no token"):
        run([{"text": "a"}], max_length=1)


def test_report_lines(run):
    rows = [{"messages": chat, "source": "x"} for chat in CHATS]
    _, report = run(rows, max_length=16, packing=True)
    lines = report.lines()
    assert lines[0].startswith("4 rows  messages format  template: tokenizer   p50 ")
    assert lines[1].endswith(f"replies ending in EOS {report.stopped_rows}/4   cut {len(report.cut_rows)}")
    assert any(line.startswith("cut to max_length 16: ") for line in lines)
    assert "columns not used: source" in lines
    assert lines[-1] == f"packed into {report.packs} sequences of 16 ({100 * report.fill:.1f}% full)"


def test_all_tokenizer_paths_agree(run, tokenizer, monkeypatch):
    from burnish.data.tokenize import RowTokenizer

    rows = [{"text": text} for text in TEXTS]
    fast = listed(run(rows)[0])
    original = RowTokenizer.encode

    def without_backend(self, texts, *, special):
        self._backend = None
        return original(self, texts, special=special)

    monkeypatch.setattr(RowTokenizer, "encode", without_backend)
    assert listed(run([*rows, {"text": "x"}])[0])[:-1] == fast  # one more row: another cache entry


def test_json_lines_need_neither_datasets_nor_pandas(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    code = f"""
import sys, types
from transformers import PreTrainedTokenizerFast
from burnish.data.prepare import prepare
config = types.SimpleNamespace(dataset_text_field="text", max_length=64, packing=False, completion_only_loss=None,
                               assistant_only_loss=False, dataset_kwargs=None)
tok = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tok")!r})
examples, _ = prepare({str(tmp_path / "a.jsonl")!r}, tok, config, cache_dir={str(tmp_path / "c")!r})
assert len(examples) == 4
print([name for name in ("datasets", "pandas", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_examples_are_compact(run):
    examples, _ = run([{"text": text} for text in TEXTS])
    assert (examples.ids.dtype, examples.trained.dtype, examples.offsets.dtype) == (np.int32, np.bool_, np.int64)
