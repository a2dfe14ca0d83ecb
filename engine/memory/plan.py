"""The planner: every way to save memory, what it would hold and take, which one to use, and how long sequences may get.

An option is a Memory setting under a setup (optimizer, precision) on a card; `options` weighs them all, `choose` takes
the fastest that fits, `longest` says how far each goes. Nothing here touches a device: `burnish plan` runs anywhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from burnish.data.batch import Batch
from burnish.memory.bytes import HOST_BASE, Setup, host_bytes, offloaded, phases, state, total
from burnish.memory.saved import Ledger, Place
from burnish.memory.settings import Memory
from burnish.memory.shape import Shape
from burnish.memory.spread import Spread, communication
from burnish.memory.time import GIB, Card, Load, Seconds, flops, seconds
from burnish.optim.footprint import ROUNDED

TILE = 16384  # tokens: shorter ones slow the products down (3 times at 4,096, measured by others), longer save nothing
SEGMENTS = (1, 2, 3, 4)
ALIKE = 0.01  # plans whose times differ by less than this share are equally fast: then the plainer one is better


@dataclass(frozen=True)
class Machine:
    """A card, and the bytes of memory of the host that it is in, which `cards` of them share."""

    card: Card
    host: float
    cards: int = 1

    @property
    def usable(self) -> float:
        """What plans may fill: the rest is for driver, libraries and fragmentation (5.9 GiB of an H200's 139, which is
        what published runs there needed; see `anchors`)."""
        return self.card.memory - (GIB + 0.0355 * self.card.memory)

    @property
    def arena(self) -> float:
        """Host bytes that checkpoints may take."""
        return max(0.0, self.host - HOST_BASE) / self.cards


@dataclass(frozen=True)
class Option:
    """One way to run, weighed. phases: ledgers by name; refused: why it can't be used, or nothing."""

    memory: Memory
    setup: Setup
    load: Load
    phases: dict[str, Ledger]
    host: int
    seconds: Seconds
    refused: str

    @property
    def phase(self) -> str:
        """The fullest."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device at the fullest moment."""
        return total(self.phases[self.phase])

    @property
    def tokens_a_second(self) -> float:
        """Of all processes together."""
        return self.load.tokens * self.setup.accumulation * self.setup.spread.size / self.seconds.total

    @property
    def recomputed(self) -> float:
        """Share of the operations that are done a second time."""
        work = flops(self.setup.shape, self.load, self.memory)
        return (work.recompute + work.attention_recompute) / work.hardware

    def mfu(self, machine: Machine) -> float:
        """Share of the card's data-sheet peak that goes into what training must do."""
        work = flops(self.setup.shape, self.load, self.memory).model * self.setup.accumulation
        return work / self.seconds.total / machine.card.peak if machine.card.peak else 0.0

    def largest(self) -> tuple[str, int]:
        """(component, bytes) that weighs most in the fullest phase."""
        return max(self.phases[self.phase].items(), key=lambda item: item[1])


def setup_for(config: Any, shape: Shape, *, cuda: bool = True, spread: Spread | None = None) -> Setup:
    """The setup of a training configuration for a model of this shape, on a GPU or the CPU, in one process or many."""
    bf16 = config.bf16 if config.bf16 is not None else cuda
    computes = bf16 or config.dtype == "bfloat16"
    casts = computes and (config.dtype != "bfloat16" or config.optim in ROUNDED)  # else peft's adapters stay float32
    return Setup(
        shape,
        Place(2 if computes else 4, 2 if casts else 4, cuda),
        optim=config.optim,
        dtype=config.dtype,
        bf16=bool(computes),
        accumulation=config.gradient_accumulation_steps,
        optimizer_in_bwd=config.optimizer_in_bwd,
        loss_known=getattr(config, "loss_type", "") == "nll",
        reference=reference_of(config),
        spread=spread or Spread(),
    )


def reference_of(config: Any) -> str:
    """Whose log-probs are taken beside the policy's, as `Setup.reference` says it; a model given in a script aside."""
    if getattr(config, "reference_free", False) or getattr(config, "precompute_ref_log_probs", True):
        return ""  # none, or taken before training
    return "policy" if config.use_peft and not getattr(config, "force_use_ref_model", False) else "copy"


def load_of(batch: Batch, shared: int = 1) -> Load:
    """What a micro-batch asks for."""
    return Load(tuple(batch.cu_seqlens.diff().tolist()), batch.num_valid, shared)


def settings(setup: Setup) -> list[Memory]:
    """Every setting worth weighing, plainest first; a model that has no hand-written layer has fewer."""
    found = [Memory(False), Memory(True)]
    if not all(layer.block for layer in setup.shape.layers):
        return [*found, Memory(True, offload=True)]
    for offload in (False, True):
        for segment in SEGMENTS:
            for keep in (False, True)[: 1 + (setup.spread.sequence == 1)]:  # exchanged heads are nobody's to keep
                for tile in (None, TILE):
                    found.append(Memory(True, segment, keep, tile, offload))
    return list(dict.fromkeys(found))


def weigh(setup: Setup, load: Load, memory: Memory, machine: Machine) -> Option:
    """One option. With offload, keep_on_device grows until the rest fits on the host."""
    if memory.offload:
        memory = _spread(setup, load, memory, machine)
    moments = phases(setup, load, memory)
    host = host_bytes(setup, load, memory)
    spent = seconds(
        setup.shape,
        load,
        memory,
        machine.card.rates,
        itemsize=setup.place.itemsize,
        micro=setup.accumulation,
        state_bytes=total(_updated(setup)),
        offloaded=offloaded(setup, load, memory),
        reference=bool(setup.reference),
    )
    talk = communication(
        setup.shape,
        setup.spread,
        load,
        memory,
        itemsize=setup.place.itemsize,
        micro=setup.accumulation,
        compute=spent.compute,
    )
    spent = replace(spent, talk=talk)
    option = Option(memory, setup, load, moments, host, spent, "")
    return replace(option, refused=_refusal(option, machine))


def _updated(setup: Setup) -> Ledger:
    """State that an update touches: a frozen base's weights it does not."""
    held = state(setup)
    held["weights"] -= sum(setup.spread.part(t.count) * t.itemsize for t in setup.shape.tensors if not t.trained)
    del held["reference"]
    return held


def _spread(setup: Setup, load: Load, memory: Memory, machine: Machine) -> Memory:
    count, size = offloaded(setup, load, memory)
    most = int(machine.arena // size) if size else count
    return replace(memory, keep_on_device=memory.keep_on_device + max(0, count - most))


def _refusal(option: Option, machine: Machine) -> str:
    if option.peak > machine.usable:
        name, size = option.largest()
        return (
            f"needs {option.peak / GIB:.1f} of {machine.usable / GIB:.1f} GiB ({option.phase}: {name} {size / GIB:.1f})"
        )
    if option.host > machine.arena:
        return f"needs {option.host / GIB:.0f} of {machine.arena / GIB:.0f} GiB on the host"
    return ""


def options(setup: Setup, load: Load, machine: Machine, memories: Iterable[Memory] | None = None) -> list[Option]:
    """Every setting (or those given), weighed for this batch."""
    return [weigh(setup, load, memory, machine) for memory in memories or settings(setup)]


def choose(weighed: Iterable[Option]) -> Option | None:
    """The fastest that fits, and of those as fast within a hundredth the plainest, which comes first; else None."""
    fitting = [option for option in weighed if not option.refused]
    if not fitting:
        return None
    best = min(option.seconds.total / option.load.tokens for option in fitting)
    return next(option for option in fitting if option.seconds.total / option.load.tokens <= best * (1 + ALIKE))


def fits(setup: Setup, load: Load, memory: Memory, machine: Machine) -> bool:
    """Whether nothing refuses this option."""
    if memory.offload:
        memory = _spread(setup, load, memory, machine)
    if host_bytes(setup, load, memory) > machine.arena:
        return False
    return max(map(total, phases(setup, load, memory).values())) <= machine.usable


def longest(
    setup: Setup,
    memory: Memory,
    machine: Machine,
    load: Callable[[int], Load] | None = None,
    limit: int = 1 << 26,
) -> int:
    """The most tokens n for which the micro-batch load(n), one document unless given, fits; 0 where not even 2 do."""
    load = load or (lambda n: Load((n,), shared=setup.spread.sequence))
    low, high = 1, 2
    while high < limit and fits(setup, load(high), memory, machine):
        low, high = high, 2 * high
    while high - low > max(1, low >> 10):
        middle = (low + high) // 2
        if fits(setup, load(middle), memory, machine):
            low = middle
        else:
            high = middle
    return 0 if low < 2 else low


def in_words(memory: Memory) -> str:
    """A setting as a table shows it."""
    if not memory.checkpointing:
        return "no checkpoints"
    words = ["a checkpoint a layer" if memory.segment == 1 else f"a checkpoint every {memory.segment} layers"]
    words += ["on the host"] * memory.offload + ["attention kept"] * memory.keep_attention
    return ", ".join([*words, *([f"tiles of {memory.tile:,}"] if memory.tile else [])])


def as_keys(memory: Memory) -> dict[str, bool | int]:
    """A setting as the keys of a configuration."""
    if not memory.checkpointing:
        return {"gradient_checkpointing": False}
    return {
        "gradient_checkpointing": True,
        "activation_offloading": memory.offload,
        "checkpoint_segment": memory.segment,
        "keep_attention": memory.keep_attention,
        "tile_tokens": memory.tile or 0,
    }


def as_yaml(memory: Memory) -> str:
    """The keys in one line, as a YAML file or a command line would have them."""
    return "  ".join(f"{key}: {str(value).lower()}" for key, value in as_keys(memory).items())
