"""Preference rows against a construction with the tokenizer itself: prompts, cutting, reasons, refusals, the cache."""

import json

import datasets
import numpy as np
import pytest

from burnish.config.errors import UserError
from burnish.config.preference import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.data import cache
from burnish.data.batch import Batches
from burnish.data.preference import prepare_pairs, prepare_unpaired
from burnish.data.split import hold_out

ASKED = ["What is two and two?", "the cat", "weather in Paris", "é漢 \n\n x"]
GOOD = ["It is four.", " sat on the mat", "I do not know.\n", "y z"]
BAD = ["It is five.", "s sat", "user assistant", "y"]
TEXTS = [dict(prompt=a, chosen=g, rejected=b) for a, g, b in zip(ASKED, GOOD, BAD, strict=True)]


def turns(role, text):
    return [{"role": role, "content": text}]


CHATS = [
    dict(prompt=turns("user", a), chosen=turns("assistant", g), rejected=turns("assistant", b))
    for a, g, b in zip(ASKED, GOOD, BAD, strict=True)
]


@pytest.fixture
def run(tokenizer, make_config, tmp_path):
    def run(rows, prepare=prepare_pairs, tok=tokenizer, vocab_size=None, scored=None, **changes):
        more = {} if scored is None else {"scored": scored}
        config = make_config(**changes)
        return prepare(rows, tok, config, cache_dir=tmp_path / "cache", vocab_size=vocab_size, **more)

    return run


def listed(examples):
    """(ids, number of tokens before the trained ones) of each row; what is trained must go to the end."""
    result = []
    for a, b in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        flags = examples.trained[a:b].tolist()
        start = flags.index(True) if True in flags else len(flags)
        assert all(flags[start:]) and not any(flags[:start])
        result.append((examples.ids[a:b].tolist(), start))
    return result


def alike(one, other):
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


def text_pair(tokenizer, prompt, chosen, rejected):
    """(ids, prompt tokens) of both, by the definition."""
    asked, eos = tokenizer(prompt)["input_ids"], tokenizer.eos_token_id
    wholes = [tokenizer(prompt + text)["input_ids"] + [eos] for text in (chosen, rejected)]
    start = min(alike(asked, whole) for whole in wholes)
    return [(whole, start) for whole in wholes]


def chat_pair(tokenizer, prompt, chosen, rejected):
    def draw(chat, **more):
        return tokenizer.apply_chat_template(chat, **more)["input_ids"]

    asked = draw(prompt, add_generation_prompt=True)
    wholes = [draw(prompt + reply) for reply in (chosen, rejected)]
    return [(whole, min(alike(asked, whole) for whole in wholes)) for whole in wholes]


@pytest.mark.parametrize(("rows", "oracle"), [(TEXTS, text_pair), (CHATS, chat_pair)])
def test_pairs_are_the_tokens_of_the_whole_and_share_their_prompt(run, tokenizer, rows, oracle):
    examples, report = run(rows)
    expected = [sequence for row in rows for sequence in oracle(tokenizer, **row)]
    assert listed(examples) == expected
    assert examples.paired and examples.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert examples.prompt.tolist() == [start for _, start in expected]
    assert (report.units, report.rows, report.stopped_rows) == (4, 8, 8)
    assert report.trained_tokens == sum(len(ids) - start for ids, start in expected)
    assert examples.margin is None and examples.desirable is None


def test_a_side_that_merges_into_the_prompt_moves_the_start_of_both(run, tokenizer):
    prompt, chosen, rejected = "the c", "at", " x"
    (_, start), _ = text_pair(tokenizer, prompt, chosen, rejected)
    assert start < len(tokenizer(prompt)["input_ids"]), "this tokenizer no longer merges over the boundary"
    assert start < alike(tokenizer(prompt)["input_ids"], tokenizer(prompt + rejected)["input_ids"])
    examples, report = run([dict(prompt=prompt, chosen=chosen, rejected=rejected)])
    assert [at for _, at in listed(examples)] == [start, start] and report.boundary_moved == 1


def test_the_prompt_is_found_where_it_has_no_column(run, tokenizer):
    explicit = listed(run(CHATS)[0])
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]
    assert listed(run(whole)[0]) == explicit
    assert listed(run([{**row, "prompt": a} for row, a in zip(whole, ASKED, strict=True)])[0]) == explicit
    rows = [dict(chosen="What is two? It is four.", rejected="What is two? It is five.")]
    assert listed(run(rows)[0]) == text_pair(tokenizer, "What is two? It is", " four.", " five.")
    rows = [dict(chosen="the cat é", rejected="the cat y")]
    assert len(tokenizer(" é")["input_ids"]) > len(tokenizer("é")["input_ids"]), "the space has lost its own token"
    assert (
        listed(run(rows)[0])
        == text_pair(tokenizer, "the cat", " é", " y")
        != text_pair(tokenizer, "the cat ", "é", "y")
    )
    rows = [dict(chosen="the cat sat", rejected="the cat")]  # one starts with the other
    assert listed(run(rows)[0]) == text_pair(tokenizer, "the ca", "t sat", "t")
    assert run([dict(chosen="the cat", rejected="the cat")])[1].equal_rows == [0]
    rows = [{side: turns("user", side) + turns("assistant", "x") for side in ("chosen", "rejected")}]
    with pytest.raises(UserError, match="no pair can be used .no prompt: row 0"):
        run(rows)


def test_tools_and_template_arguments_and_arrow(run, make_tokenizer):
    tok = make_tokenizer(
        template="{{ (tools or []) | tojson }}{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}, {"name": "g", "parameters": {"y": {"type": "str"}}}]
    row = {**CHATS[0], "tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    want = tok(json.dumps(tools) + "glad" + ASKED[0] + GOOD[0])["input_ids"]
    for rows in ([row], datasets.Dataset.from_list([row]), [{**row, "tools": json.dumps(tools)}]):
        examples, report = run(rows, tok=tok)
        assert listed(examples)[0][0] == want and report.unused_columns == []


@pytest.mark.parametrize("names", [("{}_input_ids", "{}_attention_mask"), ("{}_ids", "{}_mask"),
                                   ("input_ids_{}", "attention_mask_{}")])  # fmt: skip
def test_already_tokenized_pairs(run, names):
    ids, mask = names
    row = {ids.format("prompt"): [5, 6], ids.format("chosen"): [7, 8], ids.format("rejected"): [9, 0]}
    row[mask.format("rejected")] = [1, 0]
    expected = [([5, 6, 7, 8], 2), ([5, 6, 9], 2)]
    assert listed(run([row], vocab_size=10)[0]) == expected
    joined = {ids.format("chosen"): [5, 6, 7, 8], ids.format("rejected"): [5, 6, 9]}
    assert listed(run([joined])[0]) == expected
    assert [ids for ids, _ in listed(run([joined], scored=True)[0])] == [[5, 6, 7, 8], [5, 6, 9]]
    with pytest.raises(UserError, match="row 0: token id 9 is outside the vocabulary of 9"):
        run([row], vocab_size=9)
    rated = {ids.format("prompt"): [5, 6], ids.format("completion"): [7, 8], "label": False}
    assert listed(run([rated], prepare_unpaired)[0]) == [([5, 6, 7, 8], 2)]


def numbered(prompt, chosen, rejected):
    """Tokens that name their places: the prompt counts from 10, the chosen from 30, the rejected from 60."""
    return dict(
        prompt_ids=list(range(10, 10 + prompt)),
        chosen_ids=list(range(30, 30 + chosen)),
        rejected_ids=list(range(60, 60 + rejected)),
    )


@pytest.mark.parametrize(
    ("changes", "chosen", "rejected"),
    [
        (dict(max_length=8), [10, 11, 12, 13, 14, 30, 31, 32], [10, 11, 12, 13, 14, 60, 61]),
        (dict(max_length=4, truncation_mode="keep_end"), [30, 31, 32, 33], [13, 14, 60, 61]),
        (dict(max_length=6, truncation_mode="keep_end"), [13, 14, 30, 31, 32, 33], [11, 12, 13, 14, 60, 61]),
        (dict(max_prompt_length=2), [13, 14, 30, 31, 32, 33], [13, 14, 60, 61]),
        (dict(max_completion_length=1), [10, 11, 12, 13, 14, 30], [10, 11, 12, 13, 14, 60]),
        (dict(max_prompt_length=2, max_completion_length=3, max_length=4), [13, 14, 30, 31], [13, 14, 60, 61]),
        (dict(max_prompt_length=3, max_completion_length=3, max_length=4, truncation_mode="keep_end"),
         [14, 30, 31, 32], [13, 14, 60, 61]),
    ],
)  # fmt: skip
def test_cutting(run, changes, chosen, rejected):
    examples, report = run([numbered(5, 4, 2)], **changes)
    kept = listed(examples)
    assert [ids for ids, _ in kept] == [chosen, rejected]
    assert [ids[start:] for ids, start in kept] == [[i for i in ids if i >= 30] for ids, _ in kept]
    assert report.cut_rows == [0] and report.tokens_lost == 9 + 7 - len(chosen) - len(rejected)
    before, after = 4 + 2, sum(sum(i >= 30 for i in ids[1:]) for ids, _ in kept)
    assert (report.trained_lost, report.trained_tokens) == (before - after, after)


def test_rows_that_cannot_be_used_are_listed(run):
    pair = dict(prompt="a", chosen="b", rejected="c")
    rows = [
        pair,
        {**pair, "chosen": None},
        {"prompt": "a", "rejected": "c"},
        {**pair, "rejected": ""},
        {**pair, "prompt": "a" * 20},
        {**pair, "rejected": "b"},
        {"prompt": "a", "chosen": None, "rejected": None},
        {**pair, "chosen": "b" * 40},
    ]
    examples, report = run(rows, max_length=20)
    assert report.dropped == [
        (1, "no chosen"),
        (2, "no chosen"),
        (3, "empty rejected"),
        (4, "prompt fills max_length 20"),
        (6, "no chosen, no rejected"),
    ]
    assert report.equal_rows == [5] and report.cut_rows == [7]
    assert (report.rows, report.stopped_rows) == (6, 5)  # the cut one doesn't end
    assert examples.rows.tolist() == [0, 0, 5, 5, 7, 7] and report.rows_read == 8
    lines = "\n".join(report.lines())
    assert "dropped 2: no chosen (rows 1, 2)" in lines and "equal in 1 pairs, kept (row 5)" in lines
    assert lines.startswith("8 rows  prompt + chosen + rejected text format   3 pairs\ntokens   prompt: p50 1 ")
    with pytest.raises(UserError, match="no pair can be used .no chosen: rows 1?0, 1; empty rejected: row 2"):
        run(rows[1:4])
    _, report = run([{"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7]}, numbered(2, 1, 1)])
    assert report.dropped == [(0, "empty rejected")]  # nothing comes before its only token
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}, numbered(1, 1, 1)]
    assert run(rows, max_completion_length=1)[1].dropped == [(0, "chosen cut to nothing, rejected cut to nothing")]


def test_chats_without_a_completion(run):
    rows = [CHATS[0], {**CHATS[1], "chosen": []}]
    assert run(rows)[1].dropped == [(1, "empty chosen")]


def test_margins(run):
    rows = [{**row, "margin": i / 2} for i, row in enumerate(TEXTS)]
    rows[1]["chosen"] = None
    examples, report = run(rows)
    assert examples.margin.dtype == np.float32 and examples.margin.tolist() == [0.0, 1.0, 1.5]
    assert report.unused_columns == []
    for bad, message in ((None, "some rows have a margin and some have none"), ("x", "margin must be a number"),
                         (float("nan"), "margin must be a number")):  # fmt: skip
        with pytest.raises(UserError, match=f"row 3.*{message}"):
            run([*rows[:3], {**rows[3], "margin": bad}])


@pytest.mark.parametrize(("rows", "oracle"), [(TEXTS, text_pair), (CHATS, chat_pair)])
def test_scored_pairs_have_no_targets_and_are_never_cut(run, tokenizer, rows, oracle):
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    expected = [ids for row in rows for ids, _ in oracle(tokenizer, **row)]
    for given in (rows, whole):
        examples, _ = run(given, scored=True)
        kept = listed(examples)
        assert [ids for ids, _ in kept] == expected and examples.paired and not examples.trained.any()
    limit = max(map(len, expected)) - 1
    examples, report = run(rows, scored=True, max_length=limit)
    long = [i for i in range(4) if max(len(expected[2 * i]), len(expected[2 * i + 1])) > limit]
    assert report.dropped == [(i, f"longer than max_length {limit}") for i in long] and not report.cut_rows
    assert len(examples) == 2 * (4 - len(long)) > 0
    assert any(line.startswith(f"scored tokens {report.tokens:,}   pairs dropped") for line in report.lines())


@pytest.mark.parametrize(("rows", "oracle"), [(TEXTS, text_pair), (CHATS, chat_pair)])
def test_rated_completions(run, tokenizer, rows, oracle):
    """Each has the prompt that it alone starts with; pairs are taken apart in place."""
    rated = []
    for row in rows:
        for side, label in (("chosen", True), ("rejected", False)):
            rated.append({"prompt": row["prompt"], "completion": row[side], "label": label})
    expected = [oracle(tokenizer, r["prompt"], r["completion"], r["completion"])[0] for r in rated]
    for given in (rated, [{**r, "label": int(r["label"])} for r in rated], rows):
        examples, report = run(given, prepare_unpaired)
        assert listed(examples) == expected and not examples.paired
        assert examples.desirable.tolist() == [True, False] * 4 and report.desirable == 4
        assert examples.question.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert examples.prompt.tolist() == [start for _, start in expected]
        assert "4 of 8 desirable" in report.lines()[0]


def test_rated_rows_that_cannot_be_used(run):
    row = dict(prompt="a", completion="b", label=True)
    rows = [row, {**row, "label": None}, {**row, "completion": ""}, {**row, "prompt": None}, {**row, "prompt": "a" * 9}]
    examples, report = run(rows, prepare_unpaired, max_length=9)
    assert report.dropped == [
        (1, "no label"),
        (2, "empty completion"),
        (3, "no prompt"),
        (4, "prompt fills max_length 9"),
    ]
    assert examples.rows.tolist() == [0]
    pairs = [dict(prompt="a", chosen="b", rejected=None), dict(prompt="a", chosen="", rejected="c")]
    examples, report = run(pairs, prepare_unpaired)
    assert report.dropped == [(0, "no rejected"), (1, "empty chosen")]
    assert examples.rows.tolist() == [0, 1] and examples.desirable.tolist() == [True, False]


@pytest.mark.parametrize(
    ("rows", "prepare", "message"),
    [
        ([], prepare_pairs, "the data set is empty"),
        ([{"text": "a"}], prepare_pairs, r"row 0: unrecognised columns: text. Accepted: prompt \+ chosen"),
        ([{"prompt": "a", "completion": "b", "label": True}], prepare_pairs, "use burnish kto"),
        ([{"prompt": "a", "completion": "b"}], prepare_pairs, "row 0: unrecognised columns"),
        ([{"text": "a"}], prepare_unpaired, r"Accepted: prompt \+ completion \+ label"),
        ([{"prompt": "a", "completion": "b", "label": "yes"}], prepare_unpaired, "row 0: label must be true or false"),
        ([{"prompt": "a", "completion": "b", "label": 2}], prepare_unpaired, "row 0: label must be true or false"),
        ([{"prompt": "a", "completion": "b"}], prepare_unpaired, "no row can be used .no label: row 0"),
        ([{"prompt": "a", "chosen": 3, "rejected": "b"}], prepare_pairs, "row 0: chosen and rejected must be text"),
        ([TEXTS[0], CHATS[0]], prepare_pairs, "row 1: this row is messages, the rows before it are not"),
        ([{**CHATS[0], "prompt": "a"}], prepare_pairs, "row 0: prompt and chosen, rejected must all be text"),
        ([{**TEXTS[0], "rejected": CHATS[0]["rejected"]}], prepare_pairs, "row 0: chosen and rejected must be text"),
        ([{"chosen_ids": "ab", "rejected_ids": [1]}], prepare_pairs, "row 0: chosen_ids and its mask must be lists"),
        (({"prompt": "a"} for _ in range(3)), prepare_pairs, "preference rows that can only be iterated"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(run, rows, prepare, message):
    with pytest.raises(UserError, match=message):
        run(rows, prepare)


def test_the_cache_tells_tasks_and_limits_apart(run):
    rows = [{**row, "margin": 1.5} for row in TEXTS]
    built, first = run(rows)
    mapped, second = run(rows)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.lines() == second.lines() and listed(built) == listed(mapped) and mapped.paired
    assert mapped.margin.tolist() == [1.5] * 4 and mapped.prompt.tolist() == built.prompt.tolist()
    for changes in (dict(scored=True), dict(prepare=prepare_unpaired), dict(max_prompt_length=9),
                    dict(max_completion_length=2), dict(max_length=30)):  # fmt: skip
        examples, report = run(rows, **changes)
        again, cached = run(rows, **changes)
        assert not report.from_cache and cached.from_cache
        for name in (*cache._ARRAYS, *cache._SOME_HAVE):
            one, other = getattr(examples, name), getattr(again, name)
            assert (one is None) == (other is None) and (
                one is None or (one == other).all() and one.dtype == other.dtype
            )


@pytest.mark.parametrize("kind", [DPOConfig, CPOConfig, ORPOConfig, KTOConfig, BCOConfig, RewardConfig])
def test_the_configurations_have_what_is_read_here(kind, tokenizer, tmp_path):
    prepare = prepare_unpaired if kind in (KTOConfig, BCOConfig) else prepare_pairs
    examples, _ = prepare(CHATS, tokenizer, kind(output_dir="x"), cache_dir=tmp_path)
    batches = Batches(examples, kind(output_dir="x"), mismatch=kind is KTOConfig, label_prompts=kind is ORPOConfig)
    assert sum(len(batch.rows) for batch in batches.epoch(0)) == (16 if kind is KTOConfig else 8)


@pytest.mark.parametrize("prepare", [prepare_pairs, prepare_unpaired])
def test_what_a_row_made_is_held_out_together(run, prepare):
    rows = [dict(prompt=f"a{i}", chosen="b" * (i + 1), rejected="c", margin=i) for i in range(10)]
    examples, _ = run(rows, prepare)
    train, held = hold_out(examples, 3, seed=1)
    assert (len(train), len(held)) == (14, 6) and set(train.rows) | set(held.rows) == set(range(10))
    whole = dict(enumerate(listed(examples)))
    for part in (train, held):
        assert part.paired == examples.paired
        assert part.rows[::2].tolist() == part.rows[1::2].tolist()
        assert listed(part) == [whole[2 * row + i % 2] for i, row in enumerate(part.rows.tolist())]
        if part.paired:
            assert part.margin.tolist() == part.rows[::2].tolist()
        else:
            assert part.desirable.tolist() == [True, False] * (len(part) // 2)
            assert part.question.tolist() == part.rows.tolist()
