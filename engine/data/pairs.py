"""Preference rows, taken apart: every completion becomes a row of prompt and completion as fine-tuning has them.

A row holds a chosen and a rejected completion, or one completion with a label. The prompt stands in a column of its own
or is what chosen and rejected have in common at their start: whole turns of conversations, characters of plain text,
tokens of tokenized rows. A side that can't be used is named with the reason; a row that isn't a preference row is an
error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from burnish.config.errors import UserError
from burnish.data.formats import Format, kind_of

if TYPE_CHECKING:
    from burnish.data.read import Row  # which takes seconds to import

Task = Literal["pairs", "scored", "unpaired"]
Kind = Literal["text", "messages", "input_ids"]
ACCEPTED = (
    "Accepted: prompt + chosen + rejected | chosen + rejected that start alike (both: text or messages; optionally "
    "tools, margin) | prompt_input_ids + chosen_input_ids + rejected_input_ids"
)
ACCEPTED_RATED = "Accepted: prompt + completion + label (text or messages; optionally tools), or pairs. Pairs: "
# Names of a side's token ids and of their mask, by today's and by older names.
_TOKENIZED = (("{}_input_ids", "{}_attention_mask"), ("{}_ids", "{}_mask"), ("input_ids_{}", "attention_mask_{}"))
_PAIR = ("chosen", "rejected")
_BESIDE = ("tools", "chat_template_kwargs")


@dataclass
class Parts:
    """A preference row taken apart.

    sides     chosen and rejected, or completion -> a row for `RowTokenizer`, or the reason why there is none
    kind      what the sides are; None where none can be used
    question  the prompt, to be compared with those of other rows
    """

    sides: dict[str, Row | str]
    kind: Kind | None = None
    question: Any = None
    margin: float | None = None
    label: bool | None = None
    used: set[str] = field(default_factory=set)


def row_format(kind: Kind, task: Task) -> Format:
    """The format of the rows that sides of this kind are made into."""
    if kind == "input_ids":
        return "input_ids"
    if task == "scored":
        return kind
    return "prompt-completion" if kind == "text" else "prompt-completion messages"


def take_apart(row: Row, task: Task, where: str) -> Parts:
    """A row of the task's kind, in its sides. Raises UserError for a row that holds something else."""
    names = _sides(row, task, where)
    style = _tokenized_style(row, names)
    if style is not None:
        parts = _tokenized(row, names, style, task, where)
        parts.used = {name.format(side) for name in style for side in ("prompt", *names)}
    else:
        parts = _written(row, names, task, where)
        parts.used = {"prompt", *names, *(_BESIDE if parts.kind == "messages" else ())}
    if names == _PAIR:
        parts.margin = _margin(row, where)
        parts.used.add("margin")
    else:
        parts.label = _label(row, where)
        parts.used.add("label")
        if parts.label is None:
            parts.sides["completion"] = "no label"
    return parts


def _sides(row: Row, task: Task, where: str) -> tuple[str, ...]:
    def has(side: str) -> bool:
        return any(name in row for name in (side, *(style[0].format(side) for style in _TOKENIZED)))

    if task == "unpaired" and has("completion"):
        return ("completion",)
    if has("chosen") or has("rejected"):
        return _PAIR
    mend = ACCEPTED_RATED + ACCEPTED.removeprefix("Accepted: ") if task == "unpaired" else ACCEPTED
    if task != "unpaired" and {"completion", "label"} <= row.keys():
        mend = f"These are rated completions: use burnish kto. {mend}"
    columns = ", ".join(sorted(row)) or "no columns"
    raise UserError(f"unrecognised columns: {columns}", where=where, mend=mend)


def _margin(row: Row, where: str) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"margin must be a number, it is {value!r}", where=where)
    return number


def _label(row: Row, where: str) -> bool | None:
    value = row.get("label")
    if value is None:
        return None
    if not isinstance(value, bool | int | np.bool_ | np.integer) or value not in (0, 1):
        raise UserError(f"label must be true or false, it is {value!r}", where=where)
    return bool(value)


def _written(row: Row, names: tuple[str, ...], task: Task, where: str) -> Parts:
    """Sides of text or of messages."""
    sides: dict[str, Row | str] = {}
    found: dict[str, Any] = {}
    for name in names:
        value = row.get(name)
        if value is None or (isinstance(value, str | list | tuple) and not value):
            sides[name] = f"no {name}" if value is None else f"empty {name}"
        else:
            found[name] = value
    kinds = {kind_of(value) for value in found.values()}
    if "neither" in kinds or len(kinds) > 1:
        raise UserError(f"{' and '.join(names)} must be text or lists of messages", where=where)
    if not found:
        return Parts(sides)
    kind: Kind = kinds.pop()  # type: ignore[assignment]
    prompt, found = _prompt(row, found, names, kind, task, where)
    for name, value in found.items():
        if prompt is None:
            sides[name] = "no prompt"
            continue
        made = {"prompt": prompt, "completion": value}
        if task == "scored":
            made = {"text" if kind == "text" else "messages": prompt + value}
        sides[name] = made | {column: row.get(column) for column in _BESIDE if row.get(column) is not None}
    return Parts({name: sides[name] for name in names}, kind, prompt)


def _prompt(
    row: Row, found: dict[str, Any], names: tuple[str, ...], kind: Kind, task: Task, where: str
) -> tuple[Any, dict[str, Any]]:
    """The prompt (None: there is none) and what follows it on each side that was found."""
    prompt = row.get("prompt")
    given = kind_of(prompt) if prompt or isinstance(prompt, str) else "none"
    whole = len(found) == 2 and kind == "messages" and found["chosen"][0] == found["rejected"][0]
    if given == kind:
        assert prompt is not None
        return (list(prompt) if kind == "messages" else prompt), {
            name: list(value) if kind == "messages" else value for name, value in found.items()
        }
    if given != "none" and not (given == "text" and whole):  # some data sets repeat the prompt's text beside them
        raise UserError(f"prompt and {', '.join(names)} must all be text or all be lists of messages", where=where)
    if task == "scored":
        return ("" if kind == "text" else []), found
    if len(found) < 2:
        return None, found
    shared = _common(found["chosen"], found["rejected"])
    if kind == "messages" and shared == 0:
        return None, found
    if kind == "text" and shared and found["chosen"][shared - 1] == " ":
        shared -= 1  # most tokenizers join a space to the word after it
    return found["chosen"][:shared], {name: value[shared:] for name, value in found.items()}


def _common(one: Any, other: Any) -> int:
    """Turns, characters or tokens that both start with, of which each side keeps at least one to follow them."""
    most = max(min(len(one), len(other)) - 1, 0)
    return next((i for i in range(most) if one[i] != other[i]), most)


def _tokenized_style(row: Row, names: tuple[str, ...]) -> tuple[str, str] | None:
    """How the columns of token ids are called; None where there is text or messages, or nothing."""
    if any(row.get(name) is not None for name in names):
        return None
    return next((s for s in _TOKENIZED if any(row.get(s[0].format(name)) is not None for name in names)), None)


def _tokenized(row: Row, names: tuple[str, ...], style: tuple[str, str], task: Task, where: str) -> Parts:
    sides: dict[str, Row | str] = {}
    found: dict[str, list[int]] = {}
    for name in names:
        ids = _ids(row, name, style, where)
        if ids:
            found[name] = ids
        else:
            sides[name] = f"no {name}" if ids is None else f"empty {name}"
    prompt = _ids(row, "prompt", style, where)
    if prompt is None and task == "scored":
        prompt = []
    elif prompt is None and len(found) == 2:
        shared = _common(found["chosen"], found["rejected"])
        prompt = found["chosen"][:shared]
        found = {name: ids[shared:] for name, ids in found.items()}
    for name, ids in found.items():
        if prompt is None:
            sides[name] = "no prompt"
        else:
            mask = [0] * len(prompt) + [1] * len(ids)
            sides[name] = {"input_ids": prompt + ids, "completion_mask": mask}
    return Parts({name: sides[name] for name in names}, "input_ids" if found else None, prompt)


def _ids(row: Row, side: str, style: tuple[str, str], where: str) -> list[int] | None:
    """Token ids of a side without those that its attention mask leaves out, or None."""
    ids, mask = (row.get(name.format(side)) for name in style)
    if ids is None:
        return None
    given = [values for values in (ids, mask) if values is not None]
    lists = all(hasattr(values, "__len__") and not isinstance(values, (str, bytes, dict)) for values in given)
    if not lists or (mask is not None and len(mask) != len(ids)):
        raise UserError(f"{style[0].format(side)} and its mask must be lists of integers of one length", where=where)
    return list(ids) if mask is None else [token for token, kept in zip(ids, mask, strict=True) if kept]
