"""What a row is, told from its columns, brought to one shape per format, or refused with the formats we accept."""

from __future__ import annotations

import json
from typing import Any, Literal

from burnish.config.errors import UserError

Format = Literal["text", "messages", "prompt-completion", "prompt-completion messages", "input_ids"]
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_SHAREGPT_ROLES |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
IMAGES = ("images", "image")
_TEMPLATE_COLUMNS = {"tools", "chat_template_kwargs"}
USED_COLUMNS = {
    "messages": {"messages", "conversations"} | _TEMPLATE_COLUMNS,
    "prompt-completion": {"prompt", "completion"},
    "prompt-completion messages": {"prompt", "completion"} | _TEMPLATE_COLUMNS,
    "input_ids": {"input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask"},
}


def accepted(text_field: str) -> str:
    """The formats that supervised fine-tuning takes, in one line."""
    return (
        f"Accepted: messages (also as conversations; optionally tools) | prompt + completion, both text or both "
        f"messages | {text_field} | input_ids (optionally labels, completion_mask, assistant_masks, attention_mask)"
    )


def detect(row: dict[str, Any], text_field: str, where: str) -> Format:
    """The format of one row. Raises UserError, listing the formats and the columns seen, where there is none."""
    present = {key for key, value in row.items() if value is not None}
    if "input_ids" in present:
        return "input_ids"
    if {"prompt", "completion"} <= present:
        kinds = {kind_of(row["prompt"]), kind_of(row["completion"])}
        if kinds == {"text"}:
            return "prompt-completion"
        if kinds == {"messages"}:
            _refuse_images(present, where)
            return "prompt-completion messages"
        raise UserError("prompt and completion must both be text or both be lists of messages", where=where)
    for column in ("messages", "conversations"):
        if column in present:
            if kind_of(row[column]) != "messages":
                raise UserError(f"{column} must be a list of objects with role and content", where=where)
            _refuse_images(present, where)
            return "messages"
    if text_field in present:
        if not isinstance(row[text_field], str):
            raise UserError(f"{text_field} must be text, it is a {type(row[text_field]).__name__}", where=where)
        return "text"
    mend = accepted(text_field)
    if {"chosen", "rejected"} <= present:
        mend = f"These are preference rows: use burnish dpo, cpo, orpo or reward. {mend}"
    columns = ", ".join(sorted(present)) or "no columns with a value"
    raise UserError(f"unrecognised columns: {columns}", where=where, mend=mend)


def _refuse_images(present: set[str], where: str) -> None:
    """Conversations with images that came by a way on which nobody looks at them: text alone would be trained."""
    if present & set(IMAGES):
        raise UserError(
            f"a conversation with {' and '.join(sorted(present & set(IMAGES)))} can't be packed as text",
            where=where,
            mend="Give rows of messages and images as SFTTrainer's train_dataset (a list or a datasets.Dataset), or "
            "delete the column",
        )


def check_same(row: dict[str, Any], expected: Format, text_field: str, where: str) -> None:
    """Raise UserError where a row is not of the format that the first row has."""
    found = detect(row, text_field, where)
    if found != expected:
        columns = ", ".join(sorted(row))
        raise UserError(
            f"this row is {found} (columns {columns}), the rows before it are {expected}",
            where=where,
            mend="Give every row the same columns",
        )


def kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple) and value and all(isinstance(message, dict) for message in value):
        return "messages"
    return "neither"


def unused_columns(row: dict[str, Any], format: Format, text_field: str) -> list[str]:
    used = USED_COLUMNS.get(format, {text_field})
    return sorted(key for key, value in row.items() if value is not None and key not in used)


def conversation(messages: list[dict[str, Any]], where: str, *, arrow: bool) -> list[dict[str, Any]]:
    """Messages with role and content: ShareGPT's from/value renamed, keys that Arrow filled with None taken out."""
    result = []
    for number, message in enumerate(messages):
        if arrow:
            message = without_none(message)
        if "role" not in message and "from" in message:
            role = message["from"]
            message = {k: v for k, v in message.items() if k not in ("from", "value")}
            message = {
                "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None,
                "content": messages[number].get("value"),
                **message,
            }
        if not isinstance(message.get("role"), str):
            raise UserError(f"message {number} has no role (keys: {', '.join(message)})", where=where)
        if message.get("content") is None and not any(value for key, value in message.items() if key != "role"):
            raise UserError(f"message {number} ({message['role']}) has no content", where=where)
        result.append(message)
    return result


def template_arguments(row: dict[str, Any], where: str, *, arrow: bool) -> dict[str, Any]:
    """What a row asks of its template beside its messages: `tools` (a list, or its JSON) and `chat_template_kwargs`."""
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise UserError(f"chat_template_kwargs must be an object, it is a {type(given).__name__}", where=where)
    arguments = dict(given)
    if arrow:
        arguments = without_none(arguments)
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"tools is not JSON: {error.msg}", where=where) from None
    if tools:
        if not isinstance(tools, list):
            raise UserError(f"tools must be a list of schemas, it is a {type(tools).__name__}", where=where)
        arguments["tools"] = without_none(tools) if arrow else tools
    return arguments


def without_none(value: Any) -> Any:
    """The value without the dictionary entries that are None, at any depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
