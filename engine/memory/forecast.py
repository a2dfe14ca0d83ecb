"""The plan of a run that is about to start: its settings, its line, and what its memory is held against.

`forecast` decides what `memory: auto` and the keys that were left open leave to the planner. `Forecast.compare` sets a
measured peak beside the predicted one; `Forecast.out_of_memory` turns torch's error into one that says what would fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.data.batch import Batch, Batches
from burnish.memory.bytes import Setup, total
from burnish.memory.plan import TILE, Machine, Option, as_yaml, choose, load_of, longest, options, settings, setup_for
from burnish.memory.probe import host_memory
from burnish.memory.settings import Memory, from_config
from burnish.memory.shape import describe, shape_of
from burnish.memory.spread import Spread
from burnish.memory.time import CARDS, GIB, Card, Load, Rates
from burnish.parallel.world import least, world

CPU_RATES = Rates(50e9, 20e9, 20e9, 10e9, 10e9, "assumed of a CPU core")


def machine_of(device: torch.device) -> Machine:
    """The device of this process: its rates by its name (an unknown card is taken for an H100), what is free of it."""
    if device.type != "cuda":
        return Machine(Card("this machine", host_memory(), CPU_RATES), host_memory())
    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name.lower().replace(" ", "")), CARDS["h100"])
    free, _ = torch.cuda.mem_get_info(device)
    return Machine(replace(known, name=name, memory=float(free + torch.cuda.memory_reserved(device))), host_memory())


def _of_all(machine: Machine) -> Machine:
    """What every process of the run has: each must make the same plan."""
    free, host = least(machine.card.memory), least(machine.host)
    return replace(machine, card=replace(machine.card, memory=free), host=host)


def asked(config: Any, *, cuda: bool) -> list[Memory]:
    """The settings that a configuration leaves to choose from: one, unless keys are open on a GPU."""
    plain = from_config(config, cuda=cuda)
    if not (cuda and plain.checkpointing):
        return [plain]
    keep = [False, True] if config.keep_attention is None else [plain.keep_attention]
    tile = [None, TILE] if config.tile_tokens is None else [plain.tile]
    return [replace(plain, keep_attention=k, tile=t) for k in keep for t in tile]


def strategy(config: Any, batches: Any, device: torch.device) -> str:
    """How several processes divide a run whose `parallel` was left open: ddp where the whole model's training fits each
    device (or can't be foreseen), else fsdp. Decided before the model is loaded, from its configuration."""
    cuda, own = device.type == "cuda", world()
    if batches is None or not config.model_name_or_path:
        return "ddp"
    half = config.use_peft and config.dtype == "float32" and config.bf16 is not False and cuda  # as a base is loaded
    whole = Spread(own.size, "ddp", own.sequence)
    try:
        setup = setup_for(config, shape_of(config, loaded="bfloat16" if half else None), cuda=cuda, spread=whole)
    except UserError:
        return "ddp"
    machine = replace(_of_all(machine_of(device)), cards=whole.on_a_machine)
    load = replace(heaviest_load(config, batches), shared=whole.sequence)
    return "ddp" if choose(options(setup, load, machine, settings(setup))) else "fsdp"


def forecast(config: Any, model: nn.Module, batches: Any, device: torch.device) -> "Forecast":
    """What this run will hold and take, and the settings that are the planner's to choose.

    Raises UserError for a model that the planner doesn't know.
    """
    cuda = device.type == "cuda"
    own = world()
    spread = Spread(own.size, config.parallel or "ddp", own.sequence) if own.size > 1 else Spread()
    setup = setup_for(config, describe(model), cuda=cuda, spread=spread)
    machine = replace(_of_all(machine_of(device)), cards=spread.on_a_machine)
    candidates = settings(setup) if config.memory == "auto" else asked(config, cuda=cuda)
    load = replace(heaviest_load(config, batches), shared=spread.sequence)
    weighed = options(setup, load, machine, candidates)
    chosen = choose(weighed)
    return Forecast(machine, chosen or min(weighed, key=lambda option: option.peak), chosen is not None)


def memory_for(
    config: Any, model: nn.Module, batches: Any, device: torch.device
) -> "tuple[Memory, Forecast | None, str]":
    """(what to do, the forecast, its line) of a run; without a forecast where there is no data or the model is unknown.

    Raises UserError for `memory: auto` on such a model.
    """
    try:
        if batches is not None:
            found = forecast(config, model, batches, device)
            return found.memory, found, found.line()
        reason = "no training data"
    except UserError as error:
        if config.memory == "auto":
            raise
        reason = error.what
    return from_config(config, cuda=device.type == "cuda"), None, f"not planned: {reason}"


def heaviest_load(config: Any, batches: Any) -> Load:
    """The heaviest micro-batch, or for a stream what its keys allow."""
    if isinstance(batches, Batches):
        return load_of(batches.heaviest(0))
    length = config.max_length or config.max_tokens_per_batch or 1024
    number = max(1, (config.max_tokens_per_batch or length * config.per_device_train_batch_size) // length)
    return Load((length,) * number)


@dataclass
class Forecast:
    """A chosen option on a machine. fits: it is predicted to; measured: bytes at the heaviest micro-batch's peak."""

    machine: Machine
    option: Option
    fits: bool
    measured: int | None = None

    @property
    def memory(self) -> Memory:
        return self.option.memory

    @property
    def setup(self) -> Setup:
        return self.option.setup

    def line(self) -> str:
        """The plan in one line: predicted peak by component, and what is done to keep it there."""
        ledger = self.option.phases[self.option.phase]
        parts = sorted(((size, name) for name, size in ledger.items() if size), reverse=True)
        shown = "  ".join(f"{name} {size / GIB:.1f}" for size, name in parts[:4])
        host = f", host {self.option.host / GIB:.1f}" if self.option.host else ""
        doubt = "" if self.fits else "  predicted not to fit"
        where = f"{self.option.peak / GIB:.1f} GiB of {self.machine.usable / GIB:.1f} in {self.option.phase}{host}"
        return f"planned {where}: {shown}  for {self.option.load.tokens:,} tokens{doubt}"

    def rehearsal(self, batches: Any, wanted: bool | None) -> Batch | None:
        """The micro-batch to run before the first update: the heaviest, unless an epoch starts with one as heavy.

        wanted  None: on a GPU only, where running out of memory is the danger
        """
        cuda = self.setup.place.cuda if wanted is None else wanted
        if not cuda or not isinstance(batches, Batches):
            return None
        heaviest, first = batches.heaviest(0), next(batches.epoch(0))
        return heaviest if wanted or len(heaviest.input_ids) > len(first.input_ids) else None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside, running out of memory is a UserError that says what would fit."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if torch.cuda.is_available():
                self.measured = torch.cuda.max_memory_allocated()
            raise self.out_of_memory(error) from error

    def compare(self, gib: float) -> str:
        """The peak measured over the heaviest micro-batch beside its prediction, which leaves the update out."""
        self.measured = int(gib * GIB)
        predicted = max(total(ledger) for phase, ledger in self.option.phases.items() if phase != "update") / GIB
        if not self.setup.place.cuda:
            return f"heaviest batch: {gib:.2f} GiB resident, all of the process; {predicted:.2f} planned for tensors"
        return f"heaviest batch measured {gib:.1f} GiB, predicted {predicted:.1f} ({gib / predicted - 1:+.1%})"

    def out_of_memory(self, error: BaseException) -> UserError:
        """What was predicted, what was measured, what weighs most, and the largest lengths that fit."""
        name, size = self.option.largest()
        ways = self.lengths_that_fit()
        measured = f", {self.measured / GIB:.1f} measured" if self.measured else ""
        return UserError(
            f"out of memory: {self.option.peak / GIB:.1f} GiB predicted{measured} of {self.machine.usable / GIB:.1f} "
            f"({self.option.phase}; most of it {name}, {size / GIB:.1f}), for {self.option.load.tokens:,} tokens",
            where=str(error).split(". ")[0][:120],
            mend="Fits: " + "; ".join(f"{setting} up to {length:,} tokens" for length, setting in ways)
            if ways
            else "Use a smaller model, or LoRA",
        )

    def lengths_that_fit(self) -> list[tuple[int, str]]:
        """(most tokens in a micro-batch, the keys that it needs): as set, and with the settings that reach farthest."""
        found = [(longest(self.setup, self.memory, self.machine), "as set")]
        reach = [(longest(self.setup, memory, self.machine), memory) for memory in settings(self.setup)]
        best, memory = max(reach, key=lambda pair: pair[0])
        if best > found[0][0]:
            found.append((best, f"with {as_yaml(memory)}"))
        return [pair for pair in found if pair[0]]
