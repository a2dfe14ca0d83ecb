"""How a key of a configuration is declared, and how a value given for it is read.

A field is a dataclass field with its one-line description, choices and range in the metadata: the only source of the
command line's help and of the error messages. stdlib and yaml only.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

import yaml


class Declared(dict):
    """What is declared of a key. To whoever lists it, as transformers' HfArgumentParser does for argparse, it is a help
    text; the rest answers to its name."""

    def __init__(self, doc: str, **rest: Any):
        super().__init__(help=doc.replace("%", "%%"))
        self._rest = {"doc": doc, "type": None, **rest, "self": self}

    def __missing__(self, name: str) -> Any:
        return self._rest[name]

    def pinned(self, kind: Any) -> "Declared":
        """The same, with the type that the field is annotated with: HfArgumentParser changes the field's own."""
        rest = {name: value for name, value in self._rest.items() if name not in ("doc", "self")}
        return Declared(self["doc"], **{**rest, "type": kind if self["also"] is None else self["also"] | kind})


def key(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    common: bool = False,
    also: Any = None,
    kw_only: bool = True,
) -> Any:
    """One field: its default, what it does in one line, and which values it takes.

    low and high are inclusive bounds, above an exclusive one. common marks what `--help` shows without `--help-all`,
    also is a type beside the annotation's, of a union that HfArgumentParser couldn't read.
    """
    bounds = {"low": low, "above": above, "high": high}
    metadata = Declared(doc, choices=tuple(choices), **bounds, common=common, also=also)
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, kw_only=kw_only)
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def alternatives(field: dataclasses.Field) -> tuple[Any, ...]:
    """The types a field takes, None included as NoneType: `int | None` gives (int, NoneType)."""
    kind = field.metadata["type"] or field.type
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def type_name(field: dataclasses.Field) -> str:
    """The accepted values in words, for help and errors."""
    if field.metadata["choices"]:
        return " | ".join(field.metadata["choices"])
    words = {bool: "true | false", int: "whole number", float: "number", str: "text", dict: "mapping"}
    words |= {list[str]: "list of texts", list[float]: "list of numbers"}
    names = [words[t] for t in alternatives(field) if t is not type(None)]
    return " | ".join(names) + " | null" * (type(None) in alternatives(field))


def coerce(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type, or ValueError with what is wrong (without the key's name)."""
    if isinstance(value, Enum):
        value = value.value
    elif type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value).removeprefix("torch.")
    choices = field.metadata["choices"]
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if field.metadata["also"] is bool and str(value).lower() in ("true", "false"):
        value = str(value).lower() == "true"
    for kind in alternatives(field):
        fits, result = _as(kind, value)
        if fits:
            break
    else:
        hint = " (quote it to make it text)" if str in alternatives(field) else ""
        raise ValueError(f"must be {type_name(field)}, got {_shown(value)}{hint}")
    if choices and result is not None and result not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, got {_shown(result)}")
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        _check_range(field, result)
    return result


def from_text(field: dataclasses.Field, text: str) -> Any:
    """A command line's `key=text` as a plain value: read as YAML, and as the text itself where the key takes text."""
    try:
        value = yaml.safe_load(text)
        coerce(field, value)
        if value is not None or text.strip():
            return value
    except (ValueError, yaml.YAMLError):
        value = text
    return text if str in alternatives(field) else value


def _as(kind: Any, value: Any) -> tuple[bool, Any]:
    """(whether value can be read as kind, the result). PyYAML reads `1e-4` as text, so numbers may come as text."""
    if kind is type(None) or kind is bool or kind is dict or kind is str:
        return isinstance(value, kind), value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return False, None
        try:
            number = float(value)
        except ValueError:
            return False, None
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            return False, None
        return True, (int(value) if isinstance(value, int) else kind(number))
    if not isinstance(value, (list, tuple)):
        return False, None
    if kind == list[float]:
        numbers = [_as(float, item) for item in value]
        return all(fits for fits, _ in numbers), [number for _, number in numbers]
    return all(isinstance(item, str) for item in value), list(value)


def _check_range(field: dataclasses.Field, number: float) -> None:
    low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
    if low is not None and number < low:
        raise ValueError(f"must be at least {low:g}, got {number:g}")
    if above is not None and number <= above:
        raise ValueError(f"must be above {above:g}, got {number:g}")
    if high is not None and number > high:
        raise ValueError(f"must be at most {high:g}, got {number:g}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
