"""A configuration planned on a machine, and how `burnish plan` shows it.

The model, the card, the batch, every way to save memory that no other beats in all respects, why the rest can't be
used, and the one to use.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from burnish.config.errors import UserError
from burnish.config.load import load as load_config
from burnish.memory.bytes import Setup, state
from burnish.memory.plan import (
    Machine,
    Option,
    as_keys,
    as_yaml,
    choose,
    in_words,
    load_of,
    longest,
    options,
    setup_for,
)
from burnish.memory.probe import here, host_memory
from burnish.memory.shape import shape_of
from burnish.memory.spread import Spread
from burnish.memory.time import CARDS, GIB, Load
from burnish.model.load import load_tokenizer
from burnish.run.rows import read_batches
from burnish.verbs.plan import Request

SMALL = 64 << 20  # bytes of a data file that is tokenized on the spot
COLUMNS = ("GiB", "fullest", "host", "again", "s/step", "tok/s", "MFU", "PCIe", "longest")


def show(request: Request, config_class: type) -> str:
    """The plan, or for a sweep the plans, as text or JSON."""
    machine = machine_for(request)
    if request.sweep is None:
        planned = plan_for(load_config(config_class, request.path, request.words), request, machine)
        return (
            json.dumps(planned.as_dict(), indent=2) if request.as_json else "\n".join(planned.text(request.everything))
        )
    key, values = request.sweep
    found = [
        plan_for(load_config(config_class, request.path, [*request.words, f"{key}={value}"]), request, machine)
        for value in values
    ]
    if request.as_json:
        return json.dumps([{key: v, **each.as_dict()} for v, each in zip(values, found, strict=True)], indent=2)
    return "\n".join([*found[0].head(), "", *_sweep_table(key, values, found)])


def machine_for(request: Request) -> Machine:
    """The card that was named or is at hand, else an H200 in a host of 128 GiB."""
    host = request.host * GIB if request.host else host_memory()
    present = torch.cuda.is_available()
    if request.probe:
        return Machine(here(torch.device("cuda" if present else "cpu")), host)
    if request.card is None and present:
        own = torch.cuda.get_device_name(0)
        name = next((key for key in CARDS if key in own.lower().replace(" ", "")), None)
        if name is None:
            raise UserError(
                f"{own} is not among the cards", where="--card", mend="Add --probe, or name the nearest card"
            )
        return Machine(CARDS[name], host)
    name = request.card or "h200"
    if name not in CARDS:
        raise UserError(f"unknown card {name}", where="--card", mend=f"Use one of {' '.join(CARDS)}, or --probe")
    return Machine(CARDS[name], (request.host or 128) * GIB)


def plan_for(config: Any, request: Request, machine: Machine) -> "Planned":
    """Every setting of this configuration, weighed on the machine."""
    cuda = not request.probe or torch.cuda.is_available()
    half = config.use_peft and config.dtype == "float32" and config.bf16 is not False and cuda  # as run.py loads a base
    shape = shape_of(config, loaded="bfloat16" if half else None)
    load, how = _load(config, request)
    for spread in spreads(config):
        setup = setup_for(config, shape, cuda=cuda, spread=spread)
        shared = replace(machine, cards=spread.on_a_machine)
        weighed = options(setup, replace(load, shared=spread.sequence), shared)
        found = Planned(config, request.verb, setup, shared, weighed[0].load, how, weighed, choose(weighed))
        if found.chosen is not None:
            break
    return found


def spreads(config: Any) -> list[Spread]:
    """The ways to spread a run over its processes, the first that fits to be taken."""
    size, sequence = config.nproc or 1, config.sequence_parallel
    if size % sequence:
        raise UserError(
            f"{size} processes can't be divided into groups of {sequence}",
            where="sequence_parallel",
            mend="Use a divisor of nproc",
        )
    if size == 1:
        return [Spread()]
    return [Spread(size, name, sequence) for name in ([config.parallel] if config.parallel else ["ddp", "fsdp"])]


def _load(config: Any, request: Request) -> tuple[Load, str]:
    """The micro-batch to plan for, and where its lengths are from."""
    if request.lengths:
        return Load(request.lengths), "--lengths"
    name = config.dataset_name
    reason = _unread(config, name)
    if not reason:
        return load_of(read_batches(config).heaviest(0)), f"the heaviest of {name}, tokenized"
    if config.max_tokens_per_batch:
        length = min(config.max_length or config.max_tokens_per_batch, config.max_tokens_per_batch)
        return Load((length,) * max(1, config.max_tokens_per_batch // length)), f"max_tokens_per_batch; {reason}"
    if config.max_length is None:
        raise UserError("how long are the sequences?", where="max_length", mend="Give --lengths, or set max_length")
    each = 1 if request.verb in ("sft", "kto", "bco") else 2
    return Load((config.max_length,) * each * config.per_device_train_batch_size), f"max_length; {reason}"


def _unread(config: Any, name: str | None) -> str:
    """Why the data isn't read for its lengths, or nothing."""
    if not name or not Path(name).is_file():
        return "no data file to read"
    if Path(name).stat().st_size > SMALL:
        return f"{name} is larger than {SMALL >> 20} MiB and was not read"
    try:
        load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except UserError:
        return f"no tokenizer to read {name} with"
    return ""


@dataclass
class Planned:
    """A configuration weighed on a machine. how: where the lengths of `load` are from."""

    config: Any
    verb: str
    setup: Setup
    machine: Machine
    load: Load
    how: str
    options: list[Option]
    chosen: Option | None

    def head(self) -> list[str]:
        """Model, card and rates."""
        shape, machine, rates = self.setup.shape, self.machine, self.machine.card.rates
        name = Path(str(self.config.model_name_or_path)).name
        trained = f"{shape.count(trained=True):,} of {shape.count():,} parameters trained"
        share = f"{machine.usable / GIB:.1f} of {machine.card.memory / GIB:.0f} GiB for tensors"
        return [
            f"{'model':<9}{name}  {shape.family}, {len(shape.layers)} layers of {shape.hidden}, {trained}",
            f"{'card':<9}{machine.card.name}  {share}; host {machine.host / GIB:.0f} GiB, "
            f"{machine.arena / GIB:.0f} for checkpoints",
            f"{'rates':<9}{rates.linear / 1e12:.3g} TFLOP/s in linear layers, "
            f"{rates.attention / 1e12:.3g} in attention, {rates.memory / 1e12:.3g} TB/s, "
            f"{rates.to_host / 1e9:.3g} GB/s to the host",
            f"{'':<9}{rates.source}",
            *self._processes(),
        ]

    def _processes(self) -> list[str]:
        """Over how many GPUs, and how: nothing of it was measured."""
        spread = self.setup.spread
        if spread.size == 1:
            return []
        shared = f", {spread.sequence} share a document" if spread.sequence > 1 else ""
        link = f"{spread.link / 1e9:.0f} GB/s between them"
        return [f"{'GPUs':<9}{spread.size} by {spread.strategy}{shared}; {link}; bytes are one GPU's (simulated)"]

    def text(self, everything: bool) -> list[str]:
        """The whole plan, a fact a line."""
        parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in state(self.setup).items() if size)
        where = ", optimizer_in_bwd" if self.setup.optimizer_in_bwd else ""
        several = f", {self.setup.accumulation} of them a step" if self.setup.accumulation > 1 else ""
        shown = self.options
        if not everything:
            shown = [each for each in shown if each is self.chosen or not _beaten(each, self.options)]
        lines = [
            *self.head(),
            f"{'batch':<9}{_sequences(self.load)} ({self.how}){several}",
            f"{'state':<9}{parts} GiB  ({self.setup.optim}{where})",
        ]
        if self.setup.reference:
            whose = {"copy": "a second model", "policy": "the model without its adapter"}[self.setup.reference]
            lines.append(f"{'beside':<9}the reference's log-probs, by {whose}")
        lines += ["", *_table(self, [each for each in shown if not each.refused])]
        for each in shown:
            if each.refused:
                lines.append(f"{'no':<9}{in_words(each.memory)}: {each.refused}; longest {self.longest(each):,}")
        if len(shown) < len(self.options):
            lines.append(f"{'more':<9}{len(self.options) - len(shown)} settings that others beat: --all")
        return [*lines, self.verdict()]

    def verdict(self) -> str:
        """What to use."""
        if self.chosen is None:
            best = max(self.options, key=self.longest)
            return f"{'fits':<9}nothing; {in_words(best.memory)}: up to {self.longest(best):,} tokens"
        spread = self.setup.spread
        over = f"nproc: {spread.size}  parallel: {spread.strategy}  " if spread.size > 1 else ""
        return f"{'use':<9}{over}{as_yaml(self.chosen.memory)}   (or memory: auto)"

    def longest(self, option: Option) -> int:
        """The longest single document, in tokens, under this option's setting."""
        return longest(self.setup, replace(option.memory, keep_on_device=1), self.machine)

    def as_dict(self) -> dict:
        """The whole plan for programs: bytes and seconds."""
        return {
            "model": str(self.config.model_name_or_path),
            "card": self.machine.card.name,
            "rates": vars(self.machine.card.rates),
            "lengths": list(self.load.lengths),
            "lengths_from": self.how,
            "spread": vars(self.setup.spread),
            "chosen": None if self.chosen is None else as_keys(self.chosen.memory),
            "options": [_option_dict(option, self) for option in self.options],
        }


def _beaten(option: Option, others: list[Option]) -> bool:
    """Whether another is no slower and holds no more anywhere, and is plainer or better somewhere."""
    ahead = True
    for other in others:
        if other is option:
            ahead = False
            continue
        if other.refused and not option.refused:
            continue
        pairs = [
            (other.seconds.total, option.seconds.total),
            (float(other.peak), float(option.peak)),
            (float(other.host), float(option.host)),
        ]
        no_worse = all(theirs <= ours * 1.001 for theirs, ours in pairs)
        if no_worse and (ahead or any(theirs < ours * 0.99 for theirs, ours in pairs)):
            return True
    return False


def _sequences(load: Load) -> str:
    number, tokens = len(load.lengths), sum(load.lengths)
    each = f", {load.tokens:,} of them on a GPU" if load.shared > 1 else ""
    if number == 1:
        return f"{tokens:,} tokens in one sequence{each}"
    return f"{tokens:,} tokens in {number} sequences, the longest {max(load.lengths):,}{each}"


def _table(planned: Planned, fitting: list[Option]) -> list[str]:
    """One line an option that fits, the chosen one marked."""
    if not fitting:
        return []
    rows: list[tuple[str, ...]] = [("", "setting", *COLUMNS)]
    for option in fitting:
        rows.append((">" if option is planned.chosen else "", in_words(option.memory), *_cells(planned, option)))
    return [*_aligned(rows), ""]


def _sweep_table(key: str, values: list[str], found: list[Planned]) -> list[str]:
    """One line a value: the plan for it, or why there is none."""
    rows: list[tuple[str, ...]] = [(key, "setting", *COLUMNS)]
    lines: list[str] = []
    for value, planned in zip(values, found, strict=True):
        if planned.chosen is None:
            least = min(planned.options, key=lambda option: option.peak)
            lines.append(f"{'no':<9}{key}={value}: at the least ({in_words(least.memory)}) it {least.refused}")
        else:
            rows.append((value, in_words(planned.chosen.memory), *_cells(planned, planned.chosen)))
    return [*_aligned(rows), *lines]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = f"{row[0]:<{widths[0]}} {row[1]:<{widths[1]}}"
        numbers = (f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
        lines.append("  ".join([words, *numbers]).rstrip())
    return lines


def _cells(planned: Planned, option: Option) -> tuple[str, ...]:
    spent, offloads = option.seconds, bool(option.host)
    shows = f" +{spent.exposed:.1f} s" if spent.exposed > 0 else ""
    return (
        f"{option.peak / GIB:.1f}",
        option.phase,
        f"{option.host / GIB:.0f}" if offloads else "-",
        f"{option.recomputed:.0%}",
        f"{spent.total:.3g}" if spent.total < 100 else f"{spent.total:,.0f}",
        f"{option.tokens_a_second:,.0f}",
        f"{option.mfu(planned.machine):.0%}" if planned.machine.card.peak else "-",
        f"{spent.copy_share:.0%}{shows}" if offloads else "-",
        f"{planned.longest(option):,}",
    )


def _option_dict(option: Option, planned: Planned) -> dict:
    return {
        **as_keys(option.memory),
        "keep_on_device": option.memory.keep_on_device,
        "refused": option.refused,
        "bytes": {phase: dict(ledger) for phase, ledger in option.phases.items()},
        "peak_bytes": option.peak,
        "host_bytes": option.host,
        "seconds": option.seconds.total,
        "exposed_seconds": option.seconds.exposed,
        "talk_seconds": option.seconds.talk,
        "copied_bytes": option.seconds.copied,
        "tokens_a_second": option.tokens_a_second,
        "recomputed": option.recomputed,
        "longest": planned.longest(option),
    }
