"""Blocks of rows to token ids and target flags, in as few calls of the tokenizer as there are kinds of text.

`tokenize_block` returns one `Tokens` a row: all ids of the row, and which of them are targets. Masks come from
positions (where the completion starts, which characters the assistant wrote), never from the identity of a token: a
padding token that equals EOS changes nothing. Cutting to length, dropping and counting happen in `prepare`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.data.chat import ReplyFinder, has_marks, marked_spans, render, require_template, tokens_in_spans
from burnish.data.completion import CompletionMasks, Templates
from burnish.data.formats import Format, conversation, template_arguments
from burnish.data.spelled import UNBREAKABLE, Spelled

_SURROGATE = re.compile(r"\\ud[89a-f]")  # as repr writes one
_WORD_CACHE = 200_000  # words whose pieces the tokenizer remembers; its default of 10,000 overflows within a few rows


@dataclass
class Tokens:
    """ids [n] int32, trained [n] bool (token i is a target), and what is worth reporting about the row."""

    ids: np.ndarray
    trained: np.ndarray
    boundary_moved: bool = False  # the prompt alone does not tokenize to the start of prompt + completion
    doubled_bos: bool = False
    stopped: bool = False  # the last token that is not white space is EOS or another special token, and trained
    missing: str = ""  # why nothing of the row can be trained on
    spelled: bool = False  # a message spells a special token, which stayed text
    spelled_reply: bool = False  # a reply spells one, which is a token
    unanswered: bool = False  # a conversation that doesn't end in a reply, or has two questions or replies in a row


@dataclass
class TokenizeSettings:
    """completion_only None: only the completion is trained on iff the rows have one. templates: what replies follow.

    special, end: whether plain text gets what the tokenizer adds by itself (a BOS), and an EOS; a conversation has what
    its template writes.
    """

    text_field: str = "text"
    completion_only: bool | None = None
    assistant_only: bool = False
    vocab_size: int | None = None
    templates: Templates | None = None
    special: bool = True
    end: bool = True


@dataclass
class _Chat:
    """A conversation, what its template gets beside it, and the text that came out. mark: see `spelled.py`."""

    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    text: str
    where: str
    mark: str
    spelled_reply: bool


class RowTokenizer:
    """A tokenizer made ready for one format of rows: checked for what the format needs, and remembering what has been
    learned about its template."""

    def __init__(self, tokenizer: Any, format: Format, settings: TokenizeSettings, *, name: str, arrow: bool):
        self.tokenizer, self.format, self.settings = tokenizer, format, settings
        self._name, self._arrow = name, arrow
        self._chat = format.endswith("messages")
        self._replies: ReplyFinder | None = None
        if self._chat:
            require_template(tokenizer)
        elif format != "input_ids" and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: a model trained on these rows would never stop",
                            mend="Set eos_token")  # fmt: skip
        if settings.assistant_only and not self._chat and format != "input_ids":
            raise UserError(f"assistant_only_loss needs conversations, these rows are {format}")
        if settings.completion_only and format in ("text", "messages"):
            raise UserError(
                f"completion_only_loss needs prompt and completion, these rows are {format}",
                mend="For conversations use assistant_only_loss" if self._chat else "",
            )
        self.stops = stop_tokens(tokenizer)
        self._replies_after = CompletionMasks(settings.templates, tokenizer) if settings.templates else None
        self._spaces: dict[int, bool] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "encode_batch_fast") else None
        self._spelled = Spelled(tokenizer, self._backend)
        self._adds_bos = tokenizer.bos_token_id in self.encode([""], special=True)[0].tolist()
        if self._backend is not None and hasattr(self._backend.model, "_resize_cache"):
            self._backend.model._resize_cache(_WORD_CACHE)

    def block(self, rows: Sequence[dict[str, Any]], first: int) -> list[Tokens]:
        """Tokens of rows number first, first + 1, ..."""
        return self.tokens(rows, [f"{self._name} row {first + i}" for i in range(len(rows))])

    def tokens(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        """Tokens of rows that errors call by the names in `where`."""
        work = {
            "text": self._text,
            "messages": self._messages,
            "prompt-completion": self._prompt_completion,
            "prompt-completion messages": self._prompt_completion_messages,
            "input_ids": self._tokenized,
        }[self.format]
        try:
            result = work(rows, where)
        except (TypeError, UnicodeError):
            for row, place in zip(rows, where, strict=True):
                if _SURROGATE.search(repr(row)):
                    raise UserError("text with half of a surrogate pair is no Unicode text", where=place) from None
            raise
        limit = self.settings.vocab_size
        for tokens, place in zip(result, where, strict=True):
            if len(tokens.ids) and (tokens.ids.min() < 0 or (limit is not None and tokens.ids.max() >= limit)):
                bad = tokens.ids.max() if tokens.ids.min() >= 0 else tokens.ids.min()
                size = "" if limit is None else f" of {limit}"
                raise UserError(f"token id {int(bad)} is outside the vocabulary{size}", where=place)
            if self._replies_after is not None:
                flags, missing = self._replies_after.flags(tokens.ids, place)
                tokens.missing = tokens.missing or missing
                tokens.trained &= flags
        return result

    def stops_well(self, tokens: Tokens) -> bool:
        """Whether the row's last token, white space aside, is a trained stop token."""
        last = len(tokens.ids) - 1
        while last > 0 and self._is_space(int(tokens.ids[last])):
            last -= 1
        return last > 0 and bool(tokens.trained[last]) and int(tokens.ids[last]) in self.stops

    def _is_space(self, token: int) -> bool:
        if token not in self._spaces:
            self._spaces[token] = token not in self.stops and self.tokenizer.decode([token]).isspace()
        return self._spaces[token]

    def encode(self, texts: list[str], *, special: bool) -> list[np.ndarray]:
        """Token ids of each text; `special` adds what the tokenizer adds by itself (a BOS, for instance)."""
        if self._backend is None:
            encoded = self.tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
            return [np.array(ids, dtype=np.int32) for ids in encoded]
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=special)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _plain(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Ids of plain text, and whether a BOS in the text was doubled by the tokenizer's own (then one is removed)."""
        bos = self.tokenizer.bos_token_id
        result, doubled = [], []
        for ids in self.encode(texts, special=self.settings.special):
            twice = self._adds_bos and self.settings.special and len(ids) > 1 and ids[0] == bos and ids[1] == bos
            result.append(ids[1:] if twice else ids)
            doubled.append(bool(twice))
        return result, doubled

    def _end(self, ids: np.ndarray) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        return ids if not self.settings.end or (len(ids) and ids[-1] == eos) else np.append(ids, np.int32(eos))

    def _text(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        texts = [row[self.settings.text_field] for row in rows]
        encoded, doubled = self._plain(texts)
        ended = [self._end(ids) if text else ids for text, ids in zip(texts, encoded, strict=True)]
        return [
            Tokens(ids, np.ones(len(ids), dtype=bool), doubled_bos=twice)
            for ids, twice in zip(ended, doubled, strict=True)
        ]

    def _prompt_completion(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        prompts, _ = self._plain([row["prompt"] for row in rows])
        wholes, doubled = self._plain([row["prompt"] + row["completion"] for row in rows])
        result = []
        for row, prompt, whole, twice in zip(rows, prompts, wholes, doubled, strict=True):
            tokens = self._completion(prompt, self._end(whole) if row["completion"] else whole)
            tokens.doubled_bos = twice
            result.append(tokens)
        return result

    def _prompt_completion_messages(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        chats, prompts = [], []
        for row, place in zip(rows, where, strict=True):
            prompt = conversation(row["prompt"], place, arrow=self._arrow)
            chat = self._chat_of(row, prompt + conversation(row["completion"], place, arrow=self._arrow), place)
            asked = chat.messages[: len(prompt)]
            prompts.append(render(self.tokenizer, asked, chat.arguments, place, generation_prompt=True))
            chats.append(chat)
        result = self._chat_tokens(chats)
        asked_ids = self.encode(prompts, special=False)
        for i, (tokens, chat) in enumerate(zip(result, chats, strict=True)):
            if tokens.missing:
                continue
            prompt_ids = asked_ids[i]
            if chat.mark:
                encoding = self._spelled.encode(prompts[i], chat.mark, prompt_ids.tolist())
                prompt_ids = np.array(encoding.ids if encoding is not None else [], dtype=np.int32)
            found = self._completion(prompt_ids, tokens.ids)
            tokens.trained &= found.trained
            tokens.boundary_moved = found.boundary_moved
        return result

    def _completion(self, prompt: np.ndarray, whole: np.ndarray) -> Tokens:
        """The completion is what follows the longest common start of both (tokens may merge across the boundary)."""
        common = min(len(prompt), len(whole))
        different = np.flatnonzero(prompt[:common] != whole[:common])
        start = int(different[0]) if len(different) else common
        trained = np.ones(len(whole), dtype=bool)
        if self.settings.completion_only is not False:
            trained[:start] = False
        return Tokens(whole, trained, boundary_moved=start < len(prompt))

    def _messages(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        chats = []
        for row, place in zip(rows, where, strict=True):
            messages = row["messages"] if row.get("messages") is not None else row["conversations"]
            chats.append(self._chat_of(row, conversation(messages, place, arrow=self._arrow), place))
        return self._chat_tokens(chats)

    def _chat_of(self, row: dict[str, Any], messages: list[dict[str, Any]], where: str) -> _Chat:
        """A conversation as the template gets and renders it; special tokens are broken where its texts spell any."""
        arguments = template_arguments(row, where, arrow=self._arrow)
        written = self._spelled.in_replies(messages)
        messages, arguments, mark = self._spelled.broken(messages, arguments)
        return _Chat(messages, arguments, render(self.tokenizer, messages, arguments, where), where, mark, written)

    def _chat_tokens(self, chats: list[_Chat]) -> list[Tokens]:
        """Tokens of rendered conversations, trained where the assistant wrote them (all of them without
        assistant_only). The template writes its own BOS, so the tokenizer adds none."""
        assistant, texts = self.settings.assistant_only, [chat.text for chat in chats]
        encodings: list[Any] = [None] * len(chats)
        if not assistant:
            ids_of = self.encode(texts, special=False)
        elif self._backend is None:
            raise UserError("assistant_only_loss needs a fast tokenizer (one with a tokenizer.json)")
        else:
            self._backend.no_truncation()
            self._backend.no_padding()
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            ids_of = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        result = []
        for chat, ids, encoding in zip(chats, ids_of, encodings, strict=True):
            if chat.mark:
                encoding = self._spelled.encode(chat.text, chat.mark, ids.tolist())
                if encoding is None:
                    result.append(Tokens(ids, np.zeros(len(ids), dtype=bool), missing=UNBREAKABLE, spelled=True))
                    continue
                ids = np.array(encoding.ids, dtype=np.int32)
            flags = self._written(chat, ids, encoding.offsets) if assistant else np.ones(len(ids), dtype=bool)
            roles = [message["role"] for message in chat.messages]
            twice = any(a == b and a in ("user", "assistant") for a, b in pairwise(roles))
            tokens = Tokens(ids, flags, spelled=bool(chat.mark), spelled_reply=chat.spelled_reply)
            tokens.unanswered = twice or roles[-1] != "assistant"
            result.append(tokens)
        return result

    def _written(self, chat: _Chat, ids: np.ndarray, offsets: list[tuple[int, int]]) -> np.ndarray:
        """Which tokens the assistant wrote.  [n] bool"""
        if has_marks(self.tokenizer, chat.arguments):
            spans = marked_spans(self.tokenizer, chat.messages, chat.arguments, chat.text)
        else:
            self._replies = self._replies or ReplyFinder(self.tokenizer)
            spans = self._replies.spans(chat.messages, chat.arguments, chat.text, chat.where)
        return self._with_stops(ids, tokens_in_spans(offsets, spans))

    def _with_stops(self, ids: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """Also train the EOS right after a reply where the template's marks leave it out: untrained, it is never
        learned."""
        eos = self.tokenizer.eos_token_id
        after = np.flatnonzero(flags[:-1] & ~flags[1:]) + 1
        flags[after[ids[after] == eos]] = True
        return flags

    def _tokenized(self, rows: Sequence[dict[str, Any]], where: list[str]) -> list[Tokens]:
        return [self._one_tokenized(row, place) for row, place in zip(rows, where, strict=True)]

    def _one_tokenized(self, row: dict[str, Any], where: str) -> Tokens:
        if row.get("seq_lengths") is not None:
            raise UserError(
                "this row is packed already (seq_lengths): its documents would attend to each other",
                where=where,
                mend="Give the rows as they were before packing; packing=true packs them",
            )
        try:
            wide = np.array(row["input_ids"], dtype=np.int64).reshape(-1)
            columns = {key: np.array(row[key], dtype=np.int64).reshape(-1) for key in self._masks(row)}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"input_ids and its masks must be lists of integers ({error})", where=where) from None
        for key, values in columns.items():
            if len(values) != len(wide):
                raise UserError(f"{key} has {len(values)} entries, input_ids {len(wide)}", where=where)
        if len(wide) and not 0 <= wide.min() <= wide.max() < 2**31:
            raise UserError("input_ids holds a number that is no token id", where=where)
        trained = np.ones(len(wide), dtype=bool)
        for key in ("completion_mask", "assistant_masks"):
            if key in columns:
                trained &= columns[key] != 0
        if "labels" in columns:  # they decide alone, as in TRL
            trained = columns["labels"] != -100
            if (columns["labels"][trained] != wide[trained]).any():
                raise UserError("labels must repeat input_ids, or be -100 where nothing is trained", where=where)
        kept = columns.get("attention_mask", np.ones_like(wide)) != 0
        return Tokens(wide[kept].astype(np.int32), trained[kept])

    def _masks(self, row: dict[str, Any]) -> list[str]:
        names = ["labels", "assistant_masks", "attention_mask"]
        if self.settings.completion_only is not False:
            names.append("completion_mask")
        return [name for name in names if row.get(name) is not None]


def stop_tokens(tokenizer: Any) -> set[int]:
    """Ids that can end a reply: EOS, and the special tokens that were added to the vocabulary (an end of turn)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
