"""How long a step takes: floating-point operations, bytes moved, and the rates of a card.

One micro-batch of documents of n_i tokens, T in all. Matrix products count 2 operations a weight and token; causal
attention 2 x (queries' width) x (pairs of tokens that see each other) for each of its two products, its backward 2.5
times its forward (five products for two). What is recomputed is counted as `burnish.memory.tiles` recomputes it. Bytes
are another module's: `burnish.memory.bytes`.
"""

from dataclasses import dataclass, replace

from burnish.memory.settings import Memory
from burnish.memory.shape import Layer, Shape
from burnish.metrics import PEAK_FLOPS

GIB = 2**30
BACKWARD_ATTENTION = 2.5
# Shares of a data sheet's peak that a training step is assumed to reach. On an H200 they give the 600 and 450 TFLOP/s
# that long-context plans are made with; its GEMMs alone were measured at 769 to 798 of 989.
LINEAR_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.607, 0.455, 0.9


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second that a step gets, and where the figures are from."""

    linear: float
    attention: float
    memory: float  # bytes read plus bytes written in the device's memory
    to_host: float
    from_host: float
    source: str


@dataclass(frozen=True)
class Card:
    """A device. memory: bytes that torch can hand out."""

    name: str
    memory: float
    rates: Rates
    peak: float | None = None  # bf16 operations a second by its data sheet, for MFU


def _card(name: str, gib: float, sheet: str, terabytes: float, host: float, note: str = "") -> Card:
    """A card from its data sheet: peak by name, memory bandwidth in TB/s, and GB/s to the host each way."""
    peak = PEAK_FLOPS[sheet]
    source = note or "data sheet x assumed shares"
    memory = terabytes * 1e12 * BANDWIDTH_SHARE
    rates = Rates(peak * LINEAR_SHARE, peak * ATTENTION_SHARE, memory, host * 1e9, host * 1e9, source)
    return Card(name, gib * GIB, rates, peak)


_HOPPER = "memory and copy rate measured (139 GiB, 4.3 TB/s); 600 and 450 TFLOP/s, 50 GB/s to the host assumed"
CARDS = {
    "h200": _card("H200", 139.0, "H200", 4.78, 50, _HOPPER),
    "h100": _card("H100 80 GB", 79.2, "H100", 3.35, 50),
    "b200": _card("B200", 178.0, "B200", 8.0, 50),
    "a100": _card("A100 80 GB", 79.2, "A100", 2.04, 25),
    "a100-40": _card("A100 40 GB", 39.4, "A100", 1.56, 25),
    "l40s": _card("L40S 48 GB", 44.5, "L40S", 0.864, 25),
    "rtx4090": _card("RTX 4090 24 GB", 23.5, "RTX 4090", 1.008, 25),
}


@dataclass(frozen=True)
class Load:
    """One micro-batch: lengths of its documents, and how many of its tokens are trained (None: all but each last).

    shared  so many processes have a run of its tokens each, and all that follows is one process's part
    """

    lengths: tuple[int, ...]
    trained: int | None = None
    shared: int = 1

    @property
    def tokens(self) -> int:
        return -(-sum(self.lengths) // self.shared)

    @property
    def valid(self) -> int:
        trained = sum(self.lengths) - len(self.lengths) if self.trained is None else self.trained
        return -(-trained // self.shared)

    def pairs(self, window: int | None) -> float:
        """Token pairs of causal attention, n^2 / 2 a document (a window w of a longer one: w n - w^2 / 2)."""
        total = 0.0
        for n in self.lengths:
            w = n if window is None else min(window, n)
            total += w * n - w * w / 2
        return total / self.shared


@dataclass(frozen=True)
class Flops:
    """Operations of one micro-batch, forward and backward."""

    forward: float  # matrix products of the layers, adapters with them
    recompute: float
    backward: float
    attention: float
    attention_recompute: float
    attention_backward: float
    head: float

    @property
    def model(self) -> float:
        """What training must do: the convention of `burnish.metrics.step_flops`, for a model trained in full."""
        return self.forward + self.backward + 3 * self.attention + self.head

    @property
    def hardware(self) -> float:
        """What is done: with recomputation, and flash attention's fifth product."""
        again = self.recompute + self.attention_recompute
        return self.forward + again + self.backward + self.attention + self.attention_backward + self.head


def _again(shape: Shape, layer: Layer, load: Load, memory: Memory) -> tuple[float, float]:
    """Shares of a layer's forward that backward runs again: (weights of matrix products, attention).

    A layer's own backward has no use for the product of down_proj, a segment of s layers makes the inputs of all but
    its first again (where an attention's output is kept, without queries, keys and values), and tiles project twice.
    """
    if not memory.checkpointing:
        return 0.0, 0.0
    whole, down = layer.weights() + layer.adapters, layer.linears["down"]
    if not shape.by_hand:  # transformers' checkpoints
        return whole, 1.0
    draws = any(linear.dropout for linear in layer.linears.values())  # then all that draws has to run
    inside = whole - (0 if draws else down.weights + down.rank * down.outputs)
    projected = sum(layer.linears[role].weights + layer.linears[role].adapter for role in ("q", "k", "v"))
    if memory.tile is not None and memory.tile < load.tokens:
        inside += projected
    layers = len(shape.layers)
    share = (layers - -(-layers // memory.segment)) / layers
    if memory.keep_attention:
        return inside + share * (whole - (0 if draws else projected)), 0.0
    return inside + share * whole, 1.0 + share


def layer_flops(shape: Shape, layer: Layer, load: Load, memory: Memory) -> Flops:
    """Operations of one layer on one micro-batch; of those of a segment, the mean."""
    tokens = load.tokens
    weights, attention_again = _again(shape, layer, load, memory)
    trained = sum(linear.weights for linear in layer.linears.values() if linear.trained)
    attention = 4.0 * layer.queries * load.pairs(layer.window)
    return Flops(
        forward=2.0 * (layer.weights() + layer.adapters) * tokens,
        recompute=2.0 * weights * tokens,
        backward=2.0 * (layer.weights() + trained + 2 * layer.adapters) * tokens,
        attention=attention,
        attention_recompute=attention * attention_again,
        attention_backward=attention * BACKWARD_ATTENTION,
        head=0.0,
    )


def flops(shape: Shape, load: Load, memory: Memory) -> Flops:
    """Operations of the whole model; the head's are 4NHV where it is frozen, else 6NHV."""
    parts = [(layer_flops(shape, layer, load, memory), number) for layer, number in shape.kinds]
    names = ("forward", "recompute", "backward", "attention", "attention_recompute", "attention_backward")
    sums = {name: sum(getattr(part, name) * number for part, number in parts) for name in names}
    products = 3 if shape.head_trained else 2
    return Flops(**sums, head=2.0 * products * load.valid * shape.hidden * shape.vocab)


@dataclass(frozen=True)
class Seconds:
    """Time of one update of `micro` micro-batches, and how well the copies to and from the host hide behind it."""

    compute: float
    exposed: float  # copies that compute does not cover
    optimizer: float
    copied: float  # bytes to the host, and as many back
    copy_share: float  # of the compute time that the copies take, in their tighter direction
    talk: float = 0.0  # with other processes, where compute does not cover it

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer + self.talk


def _traffic(layer: Layer, itemsize: int) -> float:
    """Bytes a token that norms, rotations, activations and residuals read and write in a layer's forward."""
    hidden, inner, heads = layer.hidden, layer.inner, layer.queries + layer.keys
    twice_normed = 2 * heads if layer.head_norms else 0
    return itemsize * ((4 * layer.norms + 1) * hidden + 2 * heads + twice_normed + 3 * inner)


def seconds(
    shape: Shape,
    load: Load,
    memory: Memory,
    rates: Rates,
    *,
    itemsize: int = 2,
    micro: int = 1,
    state_bytes: float = 0.0,
    offloaded: tuple[int, int] = (0, 0),
    reference: bool = False,
) -> Seconds:
    """Seconds of one update of `micro` micro-batches like `load`.

    state_bytes  bytes of weights, gradients and optimizer states: an update reads and writes them once
    offloaded    (checkpoints that go to the host in a micro-batch, bytes of one)
    reference    a reference's forward runs beside the policy's
    """
    forward = backward = 0.0
    for layer, number in shape.kinds:
        ops = layer_flops(shape, layer, load, memory)
        moved = _traffic(layer, itemsize) * load.tokens / rates.memory
        again = ops.recompute / ops.forward
        forward += number * (ops.forward / rates.linear + ops.attention / rates.attention + moved)
        backward += number * ((ops.recompute + ops.backward) / rates.linear + (2 + again) * moved)
        backward += number * (ops.attention_recompute + ops.attention_backward) / rates.attention
    head = flops(shape, load, memory).head / rates.linear
    copies, size = offloaded
    segments = max(1, -(-len(shape.layers) // memory.segment))
    out, back = size / rates.to_host, size / rates.from_host
    exposed = copies * (max(0.0, out - forward / segments) + max(0.0, back - backward / segments))
    share = max(out / (forward / segments), back / (backward / segments)) if copies else 0.0
    compute = forward + backward + head
    if reference:
        compute += forward + head / (3 if shape.head_trained else 2)
    return Seconds(compute * micro, exposed * micro, 2 * state_bytes / rates.memory, copies * size * micro, share)


def with_rates(card: Card, measured: Rates) -> Card:
    """The card with rates that were measured on it."""
    return replace(card, rates=measured)
