"""TRL's earlier ways to prepare text: training on what follows a template's tokens, and blocks of constant length.

Masks are made for each row before it is cut or packed, so they hold in packs too. Where a row lacks the template, the
report says how the template's text is tokenized inside that row, which is what has to be given instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from burnish.config.errors import UserError

IGNORE = -100
_WHERE, _BLOCKS = "DataCollatorForCompletionOnlyLM", "ConstantLengthDataset"


@dataclass(frozen=True)
class Templates:
    """Token ids that come before a reply, and those that come before the next instruction (None: rows of one reply)."""

    response: tuple[int, ...]
    instruction: tuple[int, ...] | None = None

    def trained(self, ids: np.ndarray) -> np.ndarray | None:
        """Which tokens of a row are part of a reply, [n] bool; None where a template is not in it.

        Without an instruction template: everything after the last response template. With it: what follows each
        response template, up to the next instruction template.
        """
        replies = _starts(ids, self.response)
        if not len(replies):
            return None
        flags = np.zeros(len(ids), dtype=bool)
        if self.instruction is None:
            flags[replies[-1] + len(self.response) :] = True
            return flags
        asked = _starts(ids, self.instruction)
        if not len(asked):
            return None
        begins = replies + len(self.response)
        ends = np.append(asked, len(ids))[np.searchsorted(asked, begins)]  # the first instruction at or after it
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            flags[begin:end] = True
        for reply in replies.tolist():  # a second template before the next instruction is no reply itself
            flags[reply : reply + len(self.response)] = False
        return flags

    def missing(self, ids: np.ndarray) -> tuple[int, ...]:
        """The template that a row lacks."""
        if self.instruction is not None and len(_starts(ids, self.response)):
            return self.instruction
        return self.response


def _starts(ids: np.ndarray, pattern: tuple[int, ...]) -> np.ndarray:
    """Where `pattern` begins in `ids`, ascending."""
    if len(ids) < len(pattern):
        return np.zeros(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    return np.flatnonzero((windows == np.array(pattern)).all(axis=1))


@dataclass
class CompletionMasks:
    """Templates at work on a data set: masks its rows, and explains the ones that lack a template."""

    templates: Templates
    tokenizer: Any
    _reasons: dict[tuple, str] = field(default_factory=dict)

    def flags(self, ids: np.ndarray, where: str) -> tuple[np.ndarray, str]:
        """(trained [n] bool, why nothing is, or "") for the row that reports call `where`."""
        flags = self.templates.trained(ids)
        if flags is not None:
            return flags, ""
        template = self.templates.missing(ids)
        inside = in_context(ids, template, self.tokenizer)
        known = (template, inside is None)
        if known not in self._reasons:
            self._reasons[known] = self._explain(template, inside, where)
        return np.zeros(len(ids), dtype=bool), self._reasons[known]

    def _explain(self, template: tuple[int, ...], inside: list[int] | None, where: str) -> str:
        name = "response_template" if template == self.templates.response else "instruction_template"
        what = f"{name} {self.tokenizer.decode(list(template))!r}, tokens {list(template)}, not found"
        if inside is None:
            return f"{what}: nor is its text, look at how {where} is written"
        return f"{what}: in {where} its text is tokens {inside}, so give {name}={inside}"


def in_context(ids: np.ndarray, template: tuple[int, ...], tokenizer: Any) -> list[int] | None:
    """The tokens of a row that lie within the template's text there; None where that text isn't in the row.

    White space is left out of the comparison: decoded alone, a token of many tokenizers loses its own.
    """
    wanted, pieces = _bare(tokenizer, template), [_bare(tokenizer, [token]) for token in ids]
    at = "".join(pieces).find(wanted) if wanted else -1
    if at < 0:
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    inner = np.flatnonzero((starts >= at) & (ends <= at + len(wanted)) & (starts < ends))
    return [int(token) for token in ids[inner[0] : inner[-1] + 1]] if len(inner) else None


def _bare(tokenizer: Any, ids: Iterable[int]) -> str:
    return "".join(tokenizer.decode([int(token) for token in ids]).split())


class DataCollatorForCompletionOnlyLM:
    """TRL's collator that trains on replies only. As SFTTrainer's data_collator it masks every row, packed or not.

    response_template     what comes before a reply: text, or its token ids where context changes how it is tokenized
    instruction_template  what comes before an instruction; with it every reply of a conversation is trained on,
                          without it what follows the last response template of the row

    Called on rows {"input_ids": [...]} it returns what a training step of transformers takes: input_ids, attention_mask
    and labels, padded, [B, L] int64. Padding is told by its place, so an EOS stays a target where it also pads. A row
    without the template trains on nothing, and a line on the screen says why. Raises UserError for an empty template.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        *,
        tokenizer: Any = None,
        mlm: bool = False,
        ignore_index: int = IGNORE,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ):
        if mlm:
            raise UserError("mlm masks words for encoders", where=_WHERE, mend="Leave mlm out: it is False")
        if tokenizer is None:
            raise UserError("no tokenizer", where=_WHERE, mend="Give tokenizer=...")
        if return_tensors != "pt":
            raise UserError(
                f"return_tensors {return_tensors!r}", where=_WHERE, mend="Leave it out: tensors are torch's"
            )
        self.response_template, self.instruction_template = response_template, instruction_template
        self.tokenizer, self.mlm, self.ignore_index = tokenizer, mlm, ignore_index
        self.padding_free, self.pad_to_multiple_of = padding_free, pad_to_multiple_of
        self.response_token_ids = list(_ids(response_template, tokenizer, "response_template"))
        asked = instruction_template
        self.instruction_token_ids = None if asked is None else list(_ids(asked, tokenizer, "instruction_template"))
        self.templates = Templates(
            tuple(self.response_token_ids), None if asked is None else tuple(self.instruction_token_ids or ())
        )

    def __call__(self, examples: Iterable[Any]) -> dict[str, Tensor]:
        masks = CompletionMasks(self.templates, self.tokenizer)
        rows, labels, said = [], [], set()
        for number, example in enumerate(examples):
            ids = np.asarray(example["input_ids"] if hasattr(example, "keys") else example, dtype=np.int64)
            flags, why = masks.flags(ids, f"row {number}")
            if why and why not in said:
                print(f"burnish  {_WHERE}: {why}")
                said.add(why)
            rows.append(ids)
            labels.append(np.where(flags, ids, self.ignore_index))
        if self.padding_free:
            return self._flat(rows, labels)
        if self.tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token", where=_WHERE, mend="Set tokenizer.pad_token")
        batch = self.tokenizer.pad(
            {"input_ids": [row.tolist() for row in rows]},
            return_tensors="pt",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        batch["labels"] = torch.full_like(batch["input_ids"], self.ignore_index)
        batch["labels"][batch["attention_mask"].bool()] = torch.from_numpy(np.concatenate(labels))
        return batch

    def _flat(self, rows: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Tensor]:
        """One row of all tokens, [1, T]: positions restart, and no row's first token is a target."""
        for row_labels in labels:
            row_labels[:1] = self.ignore_index
        positions = [np.arange(len(row)) for row in rows]
        parts = {"input_ids": rows, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(np.concatenate(values))[None] for name, values in parts.items()}


def _ids(template: str | list[int], tokenizer: Any, name: str) -> tuple[int, ...]:
    ids = tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)
    if not ids:
        raise UserError(f"{name} has no tokens", where=_WHERE, mend="Give the text that comes before a reply")
    return tuple(int(token) for token in ids)


class ConstantLengthDataset(IterableDataset):
    """Blocks of exactly seq_length tokens, cut from texts laid end to end: {"input_ids", "labels"}, [seq_length] int64.

    Texts are read until they have seq_length * chars_per_token * num_of_sequences characters; their tokens, with an EOS
    after each text, are cut into blocks, and what is left of the read is dropped. Documents of a block see each other;
    burnish's own `packing` keeps them apart and drops nothing.

    infinite  start anew at the end of `dataset`, without end
    shuffle   the blocks of one read, with Python's `random`

    As a train_dataset it is read once before training; an infinite one is read on the way and needs max_steps.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ):
        if formatting_func is None and not dataset_text_field:
            raise UserError("no text to cut", where=_BLOCKS, mend="Give dataset_text_field or formatting_func")
        self.tokenizer, self.dataset, self.infinite = tokenizer, dataset, infinite
        self.seq_length, self.shuffle = seq_length, shuffle
        self.formatting_func = formatting_func or (lambda row: row[dataset_text_field])
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.append_concat_token, self.add_special_tokens = append_concat_token, add_special_tokens

    def __len__(self) -> int:
        """Texts, not blocks, as in TRL."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        texts = self._texts()
        for first in texts:
            held, size = [first], len(first)
            while size < self.max_buffer_size and (text := next(texts, None)) is not None:
                held.append(text)
                size += len(text)
            encoded = self.tokenizer(held, add_special_tokens=self.add_special_tokens, truncation=False)["input_ids"]
            end = [self.concat_token_id] if self.append_concat_token else []
            ids = list(chain.from_iterable([*row, *end] for row in encoded))
            whole = len(ids) // self.seq_length
            blocks = [ids[i * self.seq_length : (i + 1) * self.seq_length] for i in range(whole)]
            if self.shuffle:
                random.shuffle(blocks)
            for block in blocks:
                yield {"input_ids": torch.tensor(block), "labels": torch.tensor(block)}

    def _texts(self) -> Iterator[str]:
        while True:
            found = False
            for row in self.dataset:
                found = True
                yield self.formatting_func(row)
            if not found:
                raise UserError("the data set is empty", where=_BLOCKS)
            if not self.infinite:
                return
