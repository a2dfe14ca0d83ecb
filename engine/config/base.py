"""What every configuration is: strict about its keys, aware of where values came from, readable as training arguments.

`Keys` is the base of `TrainConfig`. Older names of keys are translated (`aliases.py`) wherever a key can be given: to
the constructor, and by assignment afterwards, as scripts do with TRL's configurations.
"""

import dataclasses
import json
import os
from types import MappingProxyType
from typing import Any, ClassVar

from burnish.config.aliases import today
from burnish.config.errors import UserError
from burnish.config.refused import explain
from burnish.config.values import coerce


def translated(given: dict[str, Any], names: list[str], owner: str) -> tuple[dict[str, Any], list[str]]:
    """(`given` by today's names, lines for the log). UserError where a key is given by two of its names."""
    taken: dict[str, Any] = {}
    notes = []
    for name, value in given.items():
        key, note = today(name, value, names)
        if note:
            notes.append(note)
        if key is not None and (key in taken or (key != name and key in given)):
            what = f"{name} is an older name of {key}, which is given as well"
            raise UserError(what, where=f"{owner}({name}=...)", mend="Keep one")
        if key is not None:
            taken[key] = value
    return taken, notes


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class _Today(type):
    """Translates older names before a configuration is made."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        taken, notes = translated(given, names, cls.__name__)
        config = super().__call__(*args, **taken)
        config.notes = [*notes, *config.notes]
        return config


class Keys(metaclass=_Today):
    """The base of configurations. `origins` says where each value came from, `notes` what the log should say of them.

    The properties below the checks are what callbacks written for transformers read from their `args`.
    """

    origins: ClassVar[dict[str, str]] = {}
    notes: ClassVar[list[str]] = []

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for name, kind in cls.__annotations__.items():
            declared = vars(cls).get(name)
            if isinstance(declared, dataclasses.Field):
                declared.metadata = MappingProxyType(declared.metadata["self"].pinned(kind))

    def __new__(cls, *args: Any, **given: Any) -> "Keys":
        """Refuse names that are no key with their reason, before dataclass's bare TypeError would."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in names:
                what, mend = explain(name, names)
                raise UserError(what, where=f"{cls.__name__}({name}=...)", mend=mend)
        config = super().__new__(cls)
        config.notes = []  # type: ignore[misc]
        if len(given) == len(names):  # by a parser of the command line, which gives every default too
            defaults = {field.name: _default(field) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
            given = {name: value for name, value in given.items() if value != defaults[name]}
        config.origins = {  # type: ignore[misc]  # one per configuration; ClassVar keeps it from being a field
            name: f"{cls.__name__}({name}=...)" if name in given else "default" for name in names
        }
        if args:
            config.origins["output_dir"] = f"{cls.__name__}(...)"
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        """A key set afterwards is translated or refused as in the constructor; nothing is set beside the keys."""
        if name in self.origins or name in ("origins", "notes"):
            object.__setattr__(self, name, value)
            return
        key, note = today(name, value, self.origins)
        self.notes.extend([note] if note else [])
        if key is None:
            return
        if key not in self.origins:
            what, mend = explain(key, self.origins)
            raise UserError(what, where=f"{type(self).__name__}.{name}", mend=mend)
        object.__setattr__(self, key, value)

    def __post_init__(self) -> None:
        """Read every value as its field's type, then check the pairs that can't go together. May be called again."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            try:
                setattr(self, field.name, coerce(field, getattr(self, field.name)))
            except ValueError as error:
                self._fail(f"{field.name} {error}", field.name)
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Overridden by each configuration."""

    def _fail(self, what: str, *names: str, mend: str = "") -> None:
        """Raise UserError that points at every place where one of these keys was set."""
        places = dict.fromkeys(self.origins[name] for name in names if self.origins[name] != "default")
        raise UserError(what, where=" and ".join(places) or type(self).__name__, mend=mend, keys=names)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Values that trackers take as they are; everything else as text."""
        return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in self.to_dict().items()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)

    @property
    def process_index(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def local_process_index(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def should_save(self) -> bool:
        return self.process_index == 0

    should_log = should_save

    @property
    def logging_strategy(self) -> str:
        return "steps"
