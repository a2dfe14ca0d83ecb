"""Which characters the assistant wrote, for templates of many habits, held against what each template should train."""

import random

import pytest
from tokenizers import AddedToken

from burnish.config.errors import UserError
from burnish.data.chat import (
    ReplyFinder,
    has_marks,
    marked_spans,
    render,
    require_template,
    tokens_in_spans,
)

CHAT = [
    {"role": "user", "content": "Hi <there>"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
]
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": (HEAD + "{{ m['content'] }}" + TAIL, [" Hello. <|im_end|>", "Hello.<|im_end|>"]),
    "strips": (HEAD + "{{ m['content'] | trim }}" + TAIL, ["Hello.<|im_end|>", "Hello.<|im_end|>"]),
    "system first": (
        "{{ 'Hello.<|im_end|>\n' }}" + HEAD + "{{ m['content'] }}" + TAIL,
        [" Hello. <|im_end|>", "Hello.<|im_end|>"],
    ),
    "thinks in the last turn": (
        HEAD
        + "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m['content'] }}"
        + TAIL,
        [" Hello. <|im_end|>", "<think>\n\n</think>\nHello.<|im_end|>"],
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' <eos>' }}{% endif %}{% endfor %}",
        [" Hello.  <eos>", "Hello. <eos>"],
    ),
    "other end in the last turn": (
        HEAD + "{{ m['content'] }}{{ '<eos>' if loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        [" Hello. <|im_end|>", "Hello.<eos>"],
    ),
    "two end tokens": (
        HEAD + "{{ m['content'] + '<eos>' }}" + TAIL.replace("\n' }}{% endfor", "' }}{% endfor"),
        [" Hello. <eos><|im_end|>", "Hello.<eos><|im_end|>"],
    ),
    "no end token": (HEAD + "{{ m['content'] + '\n' }}{% endfor %}", [" Hello. ", "Hello."]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_replies_found_without_marks(name, make_tokenizer):
    template, expected = TEMPLATES[name]
    tokenizer = make_tokenizer(template=template)
    assert not has_marks(tokenizer)
    text = render(tokenizer, CHAT, {}, "row 0")
    spans = ReplyFinder(tokenizer).spans(CHAT, {}, text, "row 0")
    found = [text[start:stop] for start, stop in spans]
    if name == "no end token":  # where no special token ends a turn, the next header's begins the next one
        found = [reply.partition("<|im_start|>")[0].rstrip("\n") for reply in found]
    assert found == expected


CALLS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {"city": "Paris"}}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
CALLING = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    + HEAD
    + "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ '<call>' + (c['function'] | tojson) }}{% endfor %}"
    + TAIL
)


def test_tool_calls_are_replies(make_tokenizer):
    tokenizer = make_tokenizer(template=CALLING)
    arguments = {"tools": [{"type": "function", "function": {"name": "w", "parameters": {}}}]}
    text = render(tokenizer, CALLS, arguments, "row 0")
    found = [text[a:b] for a, b in ReplyFinder(tokenizer).spans(CALLS, arguments, text, "row 0")]
    assert found == ['<call>{"name": "w", "arguments": {"city": "Paris"}}<|im_end|>', "It rains.<|im_end|>"]


def test_reasoning_that_the_template_takes_out_of_earlier_turns(make_tokenizer):
    content = "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    tokenizer = make_tokenizer(template=HEAD + content + TAIL)
    chat = [{**m, "content": f"<think>{i}</think>{m['content']}"} for i, m in enumerate(CHAT)]
    text = render(tokenizer, chat, {}, "row 0")
    found = [text[a:b] for a, b in ReplyFinder(tokenizer).spans(chat, {}, text, "row 0")]
    assert found == [" Hello. <|im_end|>", "<think>3</think>Hello.<|im_end|>"]


def test_a_generation_prompt_that_opens_the_reasoning(make_tokenizer):
    """The model continues after "<think>\\n"; earlier turns lost theirs, so they start where the two texts part."""
    thinking = (
        "{% set c = m['content'] %}{% if m['role'] == 'user' %}{{ c }}"
        "{% elif not loop.last %}{{ c.split('</think>')[-1] }}"
        "{% else %}{{ '<think>\n' }}{% if '</think>' in c %}{{ c.split('<think>')[-1] }}"
        "{% else %}{{ '</think>' + c }}{% endif %}{% endif %}"
    )
    tokenizer = make_tokenizer(template=HEAD + thinking + TAIL.replace("assistant\n", "assistant\n<think>\n"))
    chat = [{**m, "content": f"<think>{i}</think>{m['content']}"} for i, m in enumerate(CHAT)]
    text = render(tokenizer, chat, {}, "row 0")
    found = [text[a:b] for a, b in ReplyFinder(tokenizer).spans(chat, {}, text, "row 0")]
    assert found == [" Hello. <|im_end|>", "3</think>Hello.<|im_end|>"]


def test_a_template_that_can_not_be_followed_is_refused(make_tokenizer):
    shuffled = "{% for m in messages | sort(attribute='content') %}{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(template=shuffled)
    text = render(tokenizer, CHAT, {}, "row 4")
    with pytest.raises(UserError, match=r"row 4: assistant_only_loss.*generation"):
        ReplyFinder(tokenizer).spans(CHAT, {}, text, "row 4")


def test_marks_say_it_themselves(make_tokenizer):
    body = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ '<|im_end|>' }}{% endgeneration %}"
    tokenizer = make_tokenizer(template=HEAD + body + "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}")
    assert has_marks(tokenizer)
    text = render(tokenizer, CHAT, {}, "row 0")
    assert [text[a:b] for a, b in marked_spans(tokenizer, CHAT, {}, text)] == [" Hello. <|im_end|>", "Hello.<|im_end|>"]


def test_a_template_s_own_complaint_names_the_row(make_tokenizer):
    tokenizer = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="row 3: .*roles must alternate"):
        render(tokenizer, CHAT, {}, "row 3")


@pytest.mark.parametrize("seed", range(20))
def test_tokens_in_spans_equals_character_by_character(seed):
    draw = random.Random(seed)
    cuts = sorted(draw.choices(range(30), k=12))
    offsets = list(zip(cuts, cuts[1:], strict=False))  # some of zero width
    edges = sorted(draw.sample(range(31), 4))
    spans = [(edges[0], edges[1]), (edges[2], edges[3])]
    inside = {c for a, b in spans for c in range(a, b)}
    expected = [any(c in inside for c in range(a, max(b, a + 1))) for a, b in offsets]
    assert tokens_in_spans(offsets, spans).tolist() == expected


def test_a_template_is_asked_for(make_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        require_template(make_tokenizer(template=None))


def test_a_special_token_longer_than_another_is_taken_whole(make_tokenizer):
    tokenizer = make_tokenizer(template=HEAD + "{{ m['content'] + '<|im_end|>!' }}{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>!", special=True)]})
    text = render(tokenizer, CHAT[:2], {}, "row 0")
    assert [text[a:b] for a, b in ReplyFinder(tokenizer).spans(CHAT[:2], {}, text, "row 0")] == [
        "\n Hello. <|im_end|>!".lstrip("\n")
    ]
