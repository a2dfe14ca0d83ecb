"""Special tokens that the text of a message spells: there they stay text.

Whoever writes `<|im_end|>` into a question would end the turn and could go on as the assistant. So such a text is
broken by characters that it doesn't have, which keep the tokenizer from seeing the token, and a copy of the tokenizer
takes these out again before it cuts words: the text comes out as if the tokenizer had no such token. What the
template writes is untouched, and a conversation that spells nothing never comes near the copy. Replies are left as
they stand, because tool calls and the marks of reasoning are special tokens that the assistant does write.
"""

from __future__ import annotations

import json
import re
from typing import Any

BREAK = "\ufdd0\ufdd1"  # noncharacters, which Unicode keeps out of texts; longer where a text has them all the same
UNBREAKABLE = "spells a special token, which this tokenizer can't write as text"


class Spelled:
    """The special tokens of a tokenizer. backend: its fast tokenizer, None where it has none."""

    def __init__(self, tokenizer: Any, backend: Any):
        words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        words |= set(tokenizer.all_special_tokens)
        either = "|".join(re.escape(word) for word in sorted(words) if len(word) > 1)
        self._starts = sorted({word[:2] for word in words if len(word) > 1})  # looked for first: far faster
        self._found = re.compile(either or "(?!)")
        self._first = re.compile(f"(?=(?:{either}))(.)" if either else "(?!)", re.DOTALL)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        self._special -= {tokenizer.unk_token_id}  # what breaks a token may be unknown
        self._backend = backend
        self._copies: dict[str, Any] = {}

    def in_replies(self, messages: list[dict[str, Any]]) -> bool:
        """Whether a message of the assistant spells a special token."""
        return any(m["role"] == "assistant" and self._spells(m.get("content")) for m in messages)

    def broken(
        self, messages: list[dict[str, Any]], arguments: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        """Messages and template arguments with every special token broken that the tools or a message spell, unless
        the assistant wrote it, and what they are broken by: nothing where none is spelled."""
        asked = [
            m["role"] != "assistant" and any([self._spells(v) for k, v in m.items() if k != "role"]) for m in messages
        ]
        tools = "tools" in arguments and self._spells(arguments["tools"])
        if not any(asked) and not tools:
            return messages, arguments, ""
        mark, content = BREAK, repr((messages, arguments))
        while repr(mark)[1:-1] in content:
            mark = BREAK[0] + mark
        messages = [
            {k: v if k == "role" else self._break(v, mark) for k, v in m.items()} if spells else m
            for m, spells in zip(messages, asked, strict=True)
        ]
        if tools:
            arguments = {**arguments, "tools": self._break(arguments["tools"], mark)}
        return messages, arguments, mark

    def _spells(self, value: Any) -> bool:
        if isinstance(value, str):
            return any(start in value for start in self._starts) and self._found.search(value) is not None
        if isinstance(value, dict):
            return any(self._spells(item) for item in value.values())
        if isinstance(value, list):
            return any(self._spells(item) for item in value) or self._found.search(_joined(value)) is not None
        return False

    def _break(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._first.sub(r"\1" + mark, value)
        if isinstance(value, dict):
            return {key: self._break(item, mark) for key, item in value.items()}
        if isinstance(value, list):
            if self._found.search(_joined(value)):  # a token may begin in one part and end in the next
                value = [{**v, "text": v["text"] + mark} if _is_text(v) else v for v in value]
            return [self._break(item, mark) for item in value]
        return value

    def encode(self, text: str, mark: str, seen: list[int]) -> Any:
        """The encoding of a rendered text with tokens broken by `mark`, offsets in it. None where one would become a
        token still, as with a tokenizer whose pieces are whole special tokens. seen: the ids under the tokenizer
        itself, to which only the template's tokens look special."""
        if self._backend is None:
            return None
        if mark not in self._copies:
            self._copies = {mark: _copy(self._backend, mark)}  # another mark is needed once in a lifetime
        encoding = self._copies[mark].encode(text, add_special_tokens=False)
        if sum(i in self._special for i in encoding.ids) != sum(i in self._special for i in seen):
            return None
        return encoding


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part["text"] != ""


def _joined(parts: list[Any]) -> str:
    return "".join(part["text"] for part in parts if _is_text(part))


def _copy(backend: Any, mark: str) -> Any:
    """The tokenizer, with special tokens looked for before its normalizer takes `mark` out of the text."""
    from tokenizers import Tokenizer, normalizers

    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False
    copy = Tokenizer.from_str(json.dumps(content))
    gone = normalizers.Replace(mark, "")
    copy.normalizer = gone if copy.normalizer is None else normalizers.Sequence([gone, copy.normalizer])
    copy.no_truncation()
    copy.no_padding()
    return copy
