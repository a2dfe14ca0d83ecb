"""Several processes that share a run, one a GPU: what each holds, and how long they talk to each other.

Counted as `burnish.parallel` does it. ddp: everything on each, gradients summed once an update, after all backwards.
fsdp: parameters, gradients and optimizer states in parts; a unit (the layers of one checkpoint) is gathered when it
runs, the next one while it does; embeddings and head are whole for a forward and its backward; gradients are scattered
in float32. Sequence parallel: each process has a run of a document's tokens, and of its attention some heads.

No figure of this module was measured: links have the bandwidth of their data sheets.
"""

from dataclasses import dataclass

from burnish.memory.settings import Memory
from burnish.memory.shape import Shape, Tensors
from burnish.memory.time import Load

NVLINK = 450e9  # bytes a second each way, H100 and H200
BETWEEN = 50e9  # bytes a second a GPU, from one machine to another (400 Gbit/s)
NODE = 8  # GPUs of a machine
_FLOAT32 = 4


@dataclass(frozen=True)
class Spread:
    """`size` processes; strategy: none, ddp or fsdp; sequence: so many of them share a document."""

    size: int = 1
    strategy: str = "none"
    sequence: int = 1

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.size > 1

    @property
    def link(self) -> float:
        """Bytes a second each way of the slowest link that a collective of all uses."""
        return NVLINK if self.size <= NODE else BETWEEN

    @property
    def on_a_machine(self) -> int:
        return min(self.size, NODE)

    def part(self, count: int) -> int:
        """Elements of `count` that one process holds."""
        return -(-count // self.size) if self.sharded else count


def gathered(shape: Shape, spread: Spread, memory: Memory, itemsize: int) -> int:
    """Bytes of parameters that are whole beside a process's own parts: the root's, and two units of layers."""
    if not spread.sharded:
        return 0
    root = shape.count("embedding") + shape.count("head")
    return itemsize * (root + 2 * _unit(memory) * max(layer.parameters for layer in shape.layers))


def scattered(shape: Shape, spread: Spread, memory: Memory, itemsize: int, *, accumulates: bool) -> int:
    """Bytes of gradients that are whole: a unit's and their float32 copy, or those of micro-batches that aren't the
    last of an update, which are not scattered."""
    if not spread.sharded:
        return 0
    trained = shape.count(trained=True)
    layers = sum(t.count for t in shape.tensors if t.trained and t.kind not in ("embedding", "head"))
    unit = _unit(memory) * layers // len(shape.layers)
    return (itemsize + _FLOAT32) * unit + accumulates * _FLOAT32 * trained


def _unit(memory: Memory) -> int:
    return memory.segment if memory.checkpointing else 1


def communication(
    shape: Shape, spread: Spread, load: Load, memory: Memory, *, itemsize: int, micro: int, compute: float
) -> float:
    """Seconds of an update that collectives take and computation (`compute` seconds in all) does not cover.

    Of fsdp's gathers and scatters, those of a unit run behind the unit before it; the first of each pass is waited for.
    All else is waited for: ddp's sum of gradients and the exchanges around attention.
    """
    if spread.size == 1:
        return 0.0
    others = (spread.size - 1) / spread.size
    trained = shape.count(trained=True)
    seconds = micro * _exchanges(shape, spread, load, memory, itemsize)
    if not spread.sharded:
        return seconds + 2 * others * _sent(shape.tensors) / spread.link
    gather = others * shape.count() * itemsize / spread.link
    scatter = others * trained * _FLOAT32 / spread.link
    units = max(1, len(shape.layers) // _unit(memory))
    forward, backward = compute / micro / 3, 2 * compute / micro / 3
    shown = micro * (max(0.0, gather - forward) + max(0.0, gather - backward) + 2 * gather / units)
    return seconds + shown + scatter / units + max(0.0, scatter - max(0.0, backward - gather))


def _sent(tensors: tuple[Tensors, ...]) -> int:
    """Bytes of the gradients that ddp sums: float32 twins where weights have them, else the parameters' own type."""
    return sum(t.count * t.itemsize for t in tensors if t.trained)


def _exchanges(shape: Shape, spread: Spread, load: Load, memory: Memory, itemsize: int) -> float:
    """Seconds of the exchanges of tokens for heads in a micro-batch: forward, again where recomputed, and backward."""
    if spread.sequence == 1:
        return 0.0
    passes = 2 + memory.checkpointing
    share = (spread.sequence - 1) / spread.sequence
    link = NVLINK if spread.sequence <= NODE else BETWEEN
    elements = sum(number * (2 * layer.queries + 2 * layer.keys) for layer, number in shape.kinds)
    return passes * share * load.tokens * elements * itemsize / link
