"""`burnish plan run.yaml`: what a run will hold and take, before it runs. No GPU, no weights: config.json and lengths.

Reads the command line, without torch; `burnish.verbs.planned` plans and prints.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.config.errors import UserError

USAGE = "burnish plan [VERB] run.yaml [key=value ...] [--card NAME] [--host GIB] [--lengths N,N,...] [--all] [--json]"
HELP = f"""usage: {USAGE}
                    [--sweep KEY=V,V,...] [--probe]

What a training run will hold and take, planned without a GPU and without weights.

  VERB           whose configuration it is: sft (default), dpo, cpo, orpo, kto, bco, reward
  --card NAME    h200 h100 b200 a100 a100-40 l40s rtx4090; default: the GPU at hand, else h200
  --host GIB     memory of the host; default: this machine's with its own GPU, else 128
  --lengths N,.. tokens of each sequence of a micro-batch, instead of the data's
  --sweep K=V,.. the plan for each of these values of a key, such as max_length=32768,131072
  --probe        measure this device's rates first (20 seconds) and plan with those
  --all          every setting, not only those that nothing beats
  --json         the same as JSON"""


@dataclass
class Request:
    """What the command line asks for."""

    verb: str = "sft"
    path: str | None = None
    words: list[str] = field(default_factory=list)
    card: str | None = None
    host: float | None = None
    lengths: tuple[int, ...] | None = None
    sweep: tuple[str, list[str]] | None = None
    probe: bool = False
    everything: bool = False
    as_json: bool = False


def parse(words: list[str], verbs: Any) -> Request:
    """The words behind `burnish plan`. Raises UserError for what it doesn't take."""
    request, rest = Request(), list(words)
    if rest and rest[0] in verbs:
        request.verb = rest.pop(0)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name in ("--card", "--host", "--lengths", "--sweep"):
            if not value and not rest:
                raise UserError(f"{name} needs a value", where="command line", mend=f"Run: {USAGE}")
            _set(request, name, value or rest.pop(0))
        elif word in ("--probe", "--all", "--json"):
            setattr(request, {"--probe": "probe", "--all": "everything", "--json": "as_json"}[word], True)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}", where="command line", mend=f"Run: {USAGE}")
        elif "=" in word and not Path(word).is_file():
            request.words.append(word)
        elif request.path is None:
            request.path = word
        else:
            raise UserError(f"two files, {request.path} and {word}", where="command line", mend=f"Run: {USAGE}")
    return request


def _set(request: Request, name: str, value: str) -> None:
    try:
        if name == "--card":
            request.card = value
        elif name == "--host":
            request.host = float(value)
        elif name == "--lengths":
            request.lengths = tuple(int(part.replace("_", "")) for part in value.split(","))
            if min(request.lengths) < 1:
                raise ValueError
        else:
            key, _, values = value.partition("=")
            request.sweep = (key, values.split(","))
            if not key or not all(request.sweep[1]):
                raise ValueError
    except ValueError:
        raise UserError(f"{name} {value} can't be read", where="command line", mend=f"Run: {USAGE}") from None


def plan(request: Request, config_class: type) -> str:
    """The plan as text or JSON. Raises UserError for what the user can mend."""
    from burnish.verbs.planned import show

    return show(request, config_class)
