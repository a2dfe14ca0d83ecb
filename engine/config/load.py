"""One way from a YAML file and `key=value` words to a configuration, and back.

Strict: an unknown key, a repeated key or a value of the wrong type is an error that names the file and line. Every
value remembers where it came from. stdlib and yaml only.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from burnish.config.aliases import today
from burnish.config.errors import UserError
from burnish.config.fields import TrainConfig
from burnish.config.refused import explain
from burnish.config.values import from_text

Config = TypeVar("Config", bound=TrainConfig)
COMMAND_LINE = "command line"


def load(cls: type[Config], path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """A configuration from a YAML file (or none) and `key=value` words, which win over the file.

    Raises UserError with file and line for a file that can't be read, unknown, repeated or refused keys, values of the
    wrong type or out of range, and keys that can't go together.
    """
    given, unknown, notes = _gathered(cls, path, overrides)
    if unknown:
        raise _unknown_keys(unknown, [field.name for field in dataclasses.fields(cls)])
    return _made(cls, given, notes)


def examine(
    cls: type[Config], path: str | Path | None = None, overrides: Iterable[str] = ()
) -> tuple[Config | None, list[UserError]]:
    """(the configuration without the keys that are wrong, every mistake in it) of what `load` stops at the first of.

    None where there is no reading it at all. A key of two wrong pairs shows with one of them at a time.
    """
    try:
        given, unknown, notes = _gathered(cls, path, overrides)
    except UserError as error:
        return None, [error]
    names = [field.name for field in dataclasses.fields(cls)]
    found = [_unknown_keys([one], names) for one in unknown]
    while True:
        try:
            return _made(cls, given, notes), found
        except UserError as error:
            if error.what not in [other.what for other in found]:
                found.append(error)
            wrong = next((name for name in error.keys if name in given), None)
            if wrong is None:
                return None, found
            del given[wrong]  # at its default it may be right


def _gathered(cls: type, path: str | Path | None, overrides: Iterable[str]) -> tuple[dict, list[tuple[str, str]], list]:
    """({key: (value, place)}, names that are no key with their places, notes) of a file and of words, which win."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = _read(Path(path)) if path is not None else {}
    words = _split(overrides)
    given, notes = _todays(given, fields, lambda entry: entry[0], lambda name: given[name][1])
    words, more = _todays(words, fields, _yaml_or_text, lambda name: COMMAND_LINE)
    unknown = [(name, given.pop(name)[1]) for name in [*given] if name not in fields]
    unknown += [(name, COMMAND_LINE) for name in words if name not in fields]
    given |= {n: (from_text(fields[n], text), COMMAND_LINE) for n, text in words.items() if n in fields}
    return given, unknown, [*notes, *more]


def _made(cls: type[Config], given: dict[str, tuple[Any, str]], notes: list[str]) -> Config:
    """The configuration of these values. Raises UserError for the first that is wrong."""
    values = {name: value for name, (value, _) in given.items()}
    config: Any = TrainConfig.__new__(cls, **values)
    config.origins.update({name: origin for name, (_, origin) in given.items()})
    config.__init__(**values)  # after the origins, so that its checks can name file and line
    config.notes += notes
    return config


def _yaml_or_text(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _todays(given: dict[str, Any], fields: dict, value_of: Callable, place_of: Callable) -> tuple[dict, list[str]]:
    """`given` by today's names (`aliases.py`), and lines for the log."""
    taken, notes = {}, []
    for name, entry in given.items():
        key, note = today(name, value_of(entry), fields)
        if key is not None and key != name and key in given:
            raise UserError(
                f"{name} is an older name of {key}, which is set as well", where=place_of(name), mend="Keep one"
            )
        notes += [note] if note else []
        if key is not None:
            taken[key] = entry
    return taken, notes


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML, one key a line with the value's origin as a comment; `load` reads it back."""
    lines = []
    for field in dataclasses.fields(config):
        value = None if field.name == "hub_token" else getattr(config, field.name)  # a secret stays out of files
        text = f"{field.name}: {_flow(value)}"
        lines.append(f"{text:<48} # {config.origins[field.name]}\n")
    return "".join(lines)


def _read(path: Path) -> dict[str, tuple[Any, str]]:
    """The file's keys with their values and places, in the file's order."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), mend="Name a YAML file, or give key=value words") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read as text: {error}", where=str(path)) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeats(root, path)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"not valid YAML: {error.problem or error.context}", where=where) from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=str(path)) from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError("must hold `key: value` lines", where=f"{path}:1")
    lines = {node.value: f"{path}:{node.start_mark.line + 1}" for node, _ in root.value}
    return {str(name): (value, lines.get(str(name), str(path))) for name, value in values.items()}


def _refuse_repeats(node: yaml.Node | None, path: Path) -> None:
    """YAML lets a later key silently replace an earlier one; here it is an error, at any depth."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if isinstance(name, yaml.ScalarNode) and seen.setdefault(name.value, line) != line:
            first = f"{path}:{seen[name.value]}"
            raise UserError(f"{name.value} is set twice, first at {first}", where=f"{path}:{line}", mend="Keep one")
        _refuse_repeats(value, path)


def _split(words: Iterable[str]) -> dict[str, str]:
    """`key=value` words as a dict; a leading `--`, the habit of other tools, is explained."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name.startswith("-") or not equals or not name.isidentifier():
            bare = name.lstrip("-") or "key"
            raise UserError(f"{word!r} is not key=value", where=COMMAND_LINE, mend=f"Write {bare}={text or 'VALUE'}")
        if name in found:
            raise UserError(f"{name} is given twice", where=COMMAND_LINE, mend="Keep one")
        found[name] = text
    return found


def _unknown_keys(unknown: list[tuple[str, str]], fields: Iterable[str]) -> UserError:
    """One error for the first name that is no key, which also lists the others: a copied file often has several."""
    (name, origin), *others = unknown
    what, mend = explain(name, fields)
    if others:
        rest = ", ".join(f"{other} ({place})" for other, place in others)
        mend += ("" if mend.endswith("?") else ".") + f" Also not taken: {rest}"
    return UserError(what, where=origin, mend=mend)


class _Dumper(yaml.SafeDumper):
    """Writes what YAML has no notation for (a torch.dtype in model_init_kwargs) as its text."""


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value).removeprefix("torch.")))


def _flow(value: Any) -> str:
    """`value` as YAML on one line."""
    if isinstance(value, str) and ("\n" in value or "#" in value):
        return json.dumps(value)
    return (
        yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1 << 30)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
