"""Conversations to text, and which characters of that text the assistant wrote.

Text always comes out of `tokenizer.apply_chat_template`. With `{% generation %}` marks the template says itself what
the assistant writes. Without them the spans are derived from what the template does: the text that changes with a
reply's content is the reply; it begins where the template's own generation prompt ends and goes through the token that
stops it. Every derived span is checked against the text of the whole conversation; what can't be is refused.
"""

from __future__ import annotations

import os.path
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np

from burnish.config.errors import UserError

Span = tuple[int, int]
Message = dict[str, Any]
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REFUSAL = "Mark the assistant's part of the chat template with {% generation %} ... {% endgeneration %}"


def has_marks(tokenizer: Any, arguments: dict[str, Any] | None = None) -> bool:
    return bool(_MARK.search(tokenizer.get_chat_template(None, (arguments or {}).get("tools"))))


def require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the rows are conversations and the tokenizer has no chat template",
            mend="Set chat_template_path to a .jinja file or to a model whose template to use",
        )


def render(
    tokenizer: Any, messages: list[Message], arguments: dict[str, Any], where: str, *, generation_prompt: bool = False
) -> str:
    """The conversation as text. Raises UserError with the row where the template rejects it."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **arguments
        )
    except Exception as error:  # a template may raise anything: its own raise_exception, a missing key, a bad filter
        raise UserError(f"the chat template rejects this conversation ({error})", where=where) from error


def marked_spans(tokenizer: Any, messages: list[Message], arguments: dict[str, Any], text: str) -> list[Span]:
    """Character spans inside the template's generation marks. `text` is the rendered conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = dict(arguments)
    tools = arguments.pop("tools", None)
    drawn: Any = render_jinja_template(
        conversations=[[{key: value for key, value in m.items() if value is not None} for m in messages]],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **arguments},
    )
    rendered, spans = drawn
    assert rendered[0] == text, "the template renders differently when its generation marks are followed"
    return [(start, stop) for start, stop in spans[0] if stop > start]


class ReplyFinder:
    """Character spans of the assistant's replies under a template without generation marks.

    A reply's span covers its content (or tool calls) and the stop token that the template puts after it. It starts
    where the generation prompt ends, because that is where the model starts to write at inference.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._openings: dict[str, str] = {}
        self._special = sorted(
            {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
            | {token for token in tokenizer.all_special_tokens if token},
            key=len,
            reverse=True,
        )

    def spans(self, messages: list[Message], arguments: dict[str, Any], text: str, where: str) -> list[Span]:
        """One span for each assistant message, in order. Raises UserError where one can't be proved."""

        def draw(chat: list[Message], prompt: bool = False) -> str:
            return render(self._tokenizer, chat, arguments, where, generation_prompt=prompt)

        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return []
        asker = messages[turns[0] - 1]["role"] if turns[0] else ""
        known = f"{asker} {arguments}"
        if known not in self._openings:
            self._openings[known] = self._opening(messages[: turns[0]], draw)
        opening = self._openings[known]
        found = self._by_content(messages, turns, text, opening, draw)
        if found is None:
            found = self._by_prefix(messages, turns, text, draw)
        if found is None:
            raise UserError(
                "assistant_only_loss: the chat template has no {% generation %} marks and its assistant parts "
                "could not be told from the text it renders",
                where=where,
                mend=_REFUSAL,
            )
        return found

    def _opening(self, before: list[Message], draw: Callable[..., str]) -> str:
        """What the template writes to ask for a reply; empty where it has no such thing."""
        try:
            before = before or [{"role": "user", "content": "x"}]
            plain, asking = draw(before), draw(before, True)
        except UserError:
            return ""
        return asking[len(plain) :] if asking.startswith(plain) else ""

    def _by_content(
        self, messages: list[Message], turns: list[int], text: str, opening: str, draw: Callable[..., str]
    ) -> list[Span] | None:
        """Put a marker in place of every reply's content: what lies between markers is the template's own. The spans
        stand if template text and contents, put together again, are the whole text."""
        markers = {i: f"\ue000{i}\ue001" for i in turns}
        if any(not isinstance(messages[i].get("content"), str) or messages[i].get("tool_calls") for i in turns):
            return None
        if any(marker in text for marker in markers.values()):
            return None
        marked = [{**m, "content": markers[i]} if i in markers else m for i, m in enumerate(messages)]
        try:
            fixed = re.split("|".join(map(re.escape, markers.values())), draw(marked))
        except UserError:
            return None
        if len(fixed) != len(turns) + 1 or not text.startswith(fixed[0]):
            return None
        spans, at = [], len(fixed[0])
        closing = self._stop(fixed[-1])
        for turn, before, after in zip(turns, fixed, fixed[1:], strict=False):
            length = self._content_length(text, at, messages[turn]["content"], after, last=turn == turns[-1])
            if length is None:
                return None
            header = before.rfind(opening) if opening else -1
            start = at if header < 0 else at - (len(before) - header - len(opening))
            stop = closing if closing and after.startswith(closing) else self._first_special(after)
            spans.append((start, at + length + len(stop)))
            at += length + len(after)
        return spans if at == len(text) else None

    @staticmethod
    def _content_length(text: str, at: int, content: str, after: str, *, last: bool) -> int | None:
        """Characters that a reply's content takes at text[at:], given the template's text after it. A template may
        strip the content or take reasoning out of it: then the text after it must occur once only."""
        for form in (content, content.strip()):
            if text.startswith(form + after, at):
                return len(form)
        if last:
            return len(text) - len(after) - at if text.endswith(after) and len(text) - len(after) >= at else None
        return text.find(after, at) - at if after and text.count(after, at) == 1 else None

    def _by_prefix(
        self, messages: list[Message], turns: list[int], text: str, draw: Callable[..., str]
    ) -> list[Span] | None:
        """Render the conversation up to each reply: where that (with the generation prompt) is a prefix of the whole
        text, the reply starts at its end. It stops where the conversation up to and with the reply stops, or, where
        the template writes a last turn in another way, at the first stop token."""
        spans: list[Span] = []
        for turn in turns:
            try:
                plain, prompt, upto = draw(messages[:turn]), draw(messages[:turn], True), draw(messages[: turn + 1])
            except UserError:
                return None
            start = len(prompt) if text.startswith(prompt) else len(os.path.commonprefix([prompt, text]))
            if start < len(plain) or (spans and start < spans[-1][1]):
                return None
            if text.startswith(upto) and len(upto) > start:
                stop = len(upto.rstrip()) if self._ends_special(upto.rstrip()) else len(upto)
            else:
                stops = [(text.find(token, start), token) for token in self._stops(messages, turns, draw)]
                stops = [(at, token) for at, token in stops if at >= 0]
                if not stops:
                    return None
                at, token = min(stops)
                stop = at + len(token)
            spans.append((start, stop))
        return spans

    def _stops(self, messages: list[Message], turns: list[int], draw: Callable[..., str]) -> list[str]:
        """What the template writes to end a plain reply, if it is a special token."""
        chat = [*messages[: turns[0]], {"role": "assistant", "content": "\ue000"}]
        try:
            after = draw(chat).partition("\ue000")[2]
        except UserError:
            return []
        return [stop] if (stop := self._stop(after).lstrip()) else []

    def _stop(self, after: str) -> str:
        """The start of the template's text after a reply that still belongs to it: special tokens without a gap (white
        space may precede them), else nothing."""
        start = at = len(after) - len(after.lstrip())
        while token := self._special_at(after, at):
            at += len(token)
        return after[:at] if at > start else ""

    def _first_special(self, after: str) -> str:
        """White space and the special token that follow it; empty where something else comes first."""
        gap = len(after) - len(after.lstrip())
        token = self._special_at(after, gap)
        return after[:gap] + token if token else ""

    def _special_at(self, text: str, at: int) -> str:
        return next((token for token in self._special if text.startswith(token, at)), "")

    def _ends_special(self, text: str) -> bool:
        return text.endswith(tuple(self._special))


def tokens_in_spans(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Which tokens have a character inside a span, from each token's (start, stop).  [n] bool

    Offsets ascend. A token of zero width (some tokenizers trim white space off) counts where it stands.
    """
    inside = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        first = bisect_right(offsets, start, key=lambda token: max(token[1], token[0] + 1))
        last = bisect_left(offsets, stop, key=lambda token: token[0])
        inside[first:last] = True
    return inside
