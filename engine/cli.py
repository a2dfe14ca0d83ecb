"""The command line: `burnish VERB ...`. Verbs, help and exit codes; torch is imported only by a verb that needs it.

Exit codes: 0 done, 1 a fault in burnish or a library (with its traceback), 2 a mistake in the command, configuration
or data (one line), 130 interrupted. `check` answers 0, 1 (warnings only) or 2 (errors).
"""

import errno
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from burnish.config.errors import UserError

# What the machine refused, wherever it was met: no fault of burnish's, so no traceback.
OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}


def entry() -> None:
    """Entry point of the `burnish` command and of `python -m burnish`."""
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run one command line and return its exit code. A UserError becomes one line, unless BURNISH_DEBUG=1."""
    debug = os.environ.get("BURNISH_DEBUG", "0") not in ("", "0")
    if not debug:
        _quiet_libraries()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # a reader that has gone shows here, not at the interpreter's end
        return code
    except UserError as error:
        if debug:
            raise
        print("burnish: " + " ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("burnish: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `burnish sft --help-all | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in OUTSIDE:
            raise
        print(f"burnish: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        from burnish import __version__

        print(f"burnish {__version__}")
        return 0
    verb, *words = argv
    if verb not in VERBS:
        raise _unknown_verb(verb)
    return VERBS[verb][1](words)


def _train(verb: str, words: list[str]) -> int:
    """Train: one YAML file, `key=value` words, or both."""
    import burnish
    from burnish.data.peek import peek

    if not words or {"-h", "--help", "--help-all"} & {*words}:
        print(_keys_help(verb, getattr(burnish, CONFIGS[verb]), everything="--help-all" in words))
        return 0
    command = shlex.join(["burnish", verb, *words])
    began = time.perf_counter()
    try:
        config = _configuration(verb, words)
        peek(config, TASKS.get(verb, "pairs"))
    except UserError:
        if os.environ.get("RANK", "0") != "0":  # every process of a torchrun makes it, the first one shows it
            return 2
        raise
    spent = {"config": time.perf_counter() - began}
    from burnish.parallel import launch

    if (config.nproc or 1) > 1 and "WORLD_SIZE" not in os.environ:
        return launch.launch([verb, *words], config.nproc, config.max_restarts)
    from burnish.run import train

    spent["imports"] = time.perf_counter() - began - spent["config"]
    result = launch.together(lambda: train(config, spent))
    if result.interrupted is None:
        return 0
    if os.environ.get("RANK", "0") == "0":
        print(f"resume   {command}")
    return 128 + result.interrupted if result.interrupted else 0


def _demo(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("burnish demo [FOLDER]\n\nTrains SmolLM2-135M-Instruct on a small chat corpus, into FOLDER (out/demo).")
        return 0
    from burnish.verbs.demo import demo

    keyed = [word for word in words if "=" in word and word.split("=")[0].isidentifier()]
    if len(words) > 1 or keyed or words[:1] and words[0].startswith("-"):
        raise UserError(
            f"demo takes one folder, got {' '.join(words)}", where="command line", mend="burnish demo out/demo"
        )
    demo(words[0] if words else "out/demo")
    return 0


def _env(words: list[str]) -> int:
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"env takes no arguments, got {words[0]}", where="command line", mend="Run: burnish env")
    from burnish.verbs.env import env

    print("burnish env\n\nPrints versions, device and kernel backends." if words else env())
    return 0


def _report(words: list[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        return _usage(
            words, "report RUN", "Writes report.html and report.md into a run's folder, from the files there."
        )
    from burnish.verbs.report import report

    for path in report(words[0]):
        print(path)
    return 0


def _compare(words: list[str]) -> int:
    if len(words) != 2 or words[0].startswith("-"):
        return _usage(words, "compare RUN RUN", "Shows what two runs were given differently and what came of it.")
    from burnish.verbs.compare import compare

    print(compare(*words))
    return 0


def _preview(words: list[str]) -> int:
    usage = "preview [VERB] run.yaml [rows=5] [--html | html=FILE] [key=value ...]"
    words = ["html=preview.html" if word == "--html" else word for word in words]
    if not words or words[0].startswith("-"):
        return _usage(
            words, usage, "Shows rows as the model will see them: trained, context and special tokens, packs."
        )
    verb = words.pop(0) if words[0] in CONFIGS else "sft"
    own = {name: word.partition("=")[2] for word in words if (name := word.partition("=")[0]) in ("rows", "html")}
    if not own.get("rows", "5").isdigit() or own.get("rows") == "0":
        raise UserError(f"rows={own['rows']} is no number of rows", where="command line", mend=f"Run: burnish {usage}")
    config = _configuration(verb, [word for word in words if word.partition("=")[0] not in ("rows", "html")])
    from burnish.verbs import preview

    shown, lengths = preview.preview(config, int(own.get("rows", "5")))
    if "html" in own:
        print(preview.write_page(preview.as_html(shown, lengths, config.dataset_name), Path(own["html"])))
    else:
        print(preview.as_text(shown, lengths, preview.wants_colour()))
    return 0


def _check(words: list[str]) -> int:
    usage = "check [VERB] run.yaml [key=value ...]   or   burnish check --replay FILE"
    if not words or words[0] in ("-h", "--help"):
        what = """Checks a run before it runs, without weights: configuration, rows, lengths, memory, kernels, time.
Exit code 0: nothing to mend; 1: warnings only; 2: errors.
--replay runs the rows again that a step without a number left behind, and says where it begins."""
        return _usage(words, usage, what)
    if words[0].partition("=")[0] == "--replay":
        _, _, file = words.pop(0).partition("=")
        if len(words) != (not file):
            raise UserError("--replay takes one file", where="command line", mend="Run: burnish check --replay FILE")
        from burnish.verbs.replay import replay

        return replay(file or words[0])
    import burnish

    verb = words.pop(0) if words[0] in CONFIGS else "sft"
    cls = getattr(burnish, CONFIGS[verb])
    path, words = split_path(cls, words)
    from burnish.verbs.check import check

    return check(cls, path, words)


def _configuration(verb: str, words: list[str]) -> Any:
    """The configuration of a training verb: one YAML file, `key=value` words, or both."""
    import burnish
    from burnish.config.load import load

    cls = getattr(burnish, CONFIGS[verb])
    return load(cls, *split_path(cls, words))


def split_path(cls: type, words: list[str]) -> tuple[str | None, list[str]]:
    """(the file among the words, wherever it stands, and the others). A file's path may hold a `=`."""
    found = [word for word in takewhile(lambda word: not word.startswith("-"), words) if is_path(cls, word)]
    if len(found) > 1:
        raise UserError(f"two files, {found[0]} and {found[1]}", where="command line", mend="Name one")
    return found[0] if found else None, [word for word in words if word not in found]


def is_path(cls: type, word: str) -> bool:
    """Whether a word names a file, and is no `key=value` of this configuration."""
    name, equals, _ = word.partition("=")
    return not equals or (name not in cls.__dataclass_fields__ and Path(word).is_file())  # type: ignore[attr-defined]


def _merge(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        return _usage(words, "merge RUN [dataset_name=FILE]", "Merges a run's adapter into its base, into RUN/merged.")
    from burnish.verbs.merge import merge

    target, found = merge(words[0], words[1:])
    print(f"merged   {target}\ncheck    {found}  ok")
    return 0


def _chat(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        usage = "chat RUN [base=true] [max_new_tokens=512] [temperature=0]"
        return _usage(words, usage, "Talks to a run's model; with base=true its base answers beside it.")
    from burnish.verbs.chat import chat

    chat(words[0], words[1:])
    return 0


def _plan(words: list[str]) -> int:
    from burnish.verbs.plan import HELP, parse, plan

    if not words or {"-h", "--help"} & {*words}:
        print(HELP)
        return 0
    import burnish

    request = parse(words, CONFIGS)
    print(plan(request, getattr(burnish, CONFIGS[request.verb])))
    return 0


def _bench(words: list[str]) -> int:
    if {"-h", "--help"} & {*words}:
        usage = "bench [small=true] [only=OP] [minutes=NUMBER] [out=FOLDER]"
        what = """Times every op beside the peers that are installed; only what gives right results is timed.
Ends within 9 minutes on a GPU; on a CPU, or with small=true, small shapes in 1.5 minutes.
Writes the device's JSON, table and plot into benchmarks/results of a clone, else into out/bench."""
        return _usage(["--help"], usage, what)
    from burnish.verbs.bench import bench

    return bench(words)


def _usage(words: list[str], usage: str, what: str) -> int:
    """Help for a verb that takes only names; a UserError where other words were given."""
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"got {' '.join(words)}", where="command line", mend=f"Run: burnish {usage}")
    print(f"burnish {usage}\n\n{what}")
    return 0


CONFIGS = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "cpo": "CPOConfig",
    "orpo": "ORPOConfig",
    "kto": "KTOConfig",
    "bco": "BCOConfig",
    "reward": "RewardConfig",
}
TASKS: dict[str, Any] = {"sft": None, "kto": "unpaired", "bco": "unpaired", "reward": "scored"}  # of rows; else pairs
VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "sft": ("supervised fine-tuning: burnish sft run.yaml key=value ...", partial(_train, "sft")),
    "dpo": ("direct preference optimization and its family, on pairs of completions", partial(_train, "dpo")),
    "cpo": ("contrastive preference optimization, SimPO, AlphaPO: pairs, no reference", partial(_train, "cpo")),
    "orpo": ("odds-ratio preference optimization: pairs, no reference", partial(_train, "orpo")),
    "kto": ("Kahneman-Tversky optimization, on completions rated good or bad", partial(_train, "kto")),
    "bco": ("binary classifier optimization, on completions rated good or bad", partial(_train, "bco")),
    "reward": ("reward modelling, on pairs of completions", partial(_train, "reward")),
    "check": ("all that can be wrong with a run, before it runs: burnish check [VERB] run.yaml", _check),
    "preview": ("rows as the model will see them: burnish preview [VERB] run.yaml", _preview),
    "merge": ("an adapter into its base model, proved on training rows: burnish merge RUN", _merge),
    "chat": ("talk to what a run left: burnish chat RUN [base=true]", _chat),
    "plan": ("memory and speed of a run before it runs, no GPU, no weights: burnish plan run.yaml", _plan),
    "report": ("one page of a finished or running run, as HTML and Markdown: burnish report RUN", _report),
    "compare": ("two runs beside each other: burnish compare RUN RUN", _compare),
    "bench": ("every op beside its peers on this machine, results checked first: burnish bench", _bench),
    "demo": ("train a small real chat model on a small real corpus, on any machine, no model hub", _demo),
    "env": ("versions, device, kernel backends", _env),
}


def _help() -> str:
    verbs = "\n".join(f"  {name:<8}{what}" for name, (what, _) in VERBS.items())
    return (
        "burnish fine-tunes Hugging Face causal language models on its own kernels.\n\n"
        f"usage: burnish VERB [run.yaml] [key=value ...]\n\n{verbs}\n\n"
        "burnish VERB --help says more. BURNISH_DEBUG=1 shows tracebacks and the libraries' own output."
    )


def _keys_help(verb: str, cls: type, *, everything: bool) -> str:
    """The keys of a training verb, each with its values, default and one line: straight from the fields."""
    import dataclasses
    import textwrap

    from burnish.config.values import type_name

    fields = [field for field in dataclasses.fields(cls) if everything or field.metadata["common"]]
    lines = [f"usage: burnish {verb} [run.yaml] [key=value ...]", ""]
    for field in fields:
        default = "" if field.default is None else f" [{_plain(field.default)}]"
        lines.append(f"  {field.name}: {type_name(field)}{default}")
        lines += textwrap.wrap(field.metadata["doc"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    hidden = len(dataclasses.fields(cls)) - len(fields)
    if hidden:
        lines += ["", f"{hidden} more keys: burnish {verb} --help-all"]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """A default as it would be written in the YAML file."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"


def _unknown_verb(verb: str) -> UserError:
    import difflib

    close = difflib.get_close_matches(verb, VERBS, n=1)
    mend = f"Did you mean {close[0]}?" if close else f"Verbs: {' '.join(VERBS)}"
    return UserError(f"unknown verb {verb}", where="command line", mend=mend)


def _quiet_libraries() -> None:
    """Before they are imported: no progress bars, no advice, errors only."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("DATASETS_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
