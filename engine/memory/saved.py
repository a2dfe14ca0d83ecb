"""What autograd keeps between forward and backward, to the byte: every tensor that some backward will read.

A ledger maps a name to bytes, each storage once; parameters and buffers are not in it. It follows the code: `blocks`
and the kernels' save_for_backward for a layer, `layers` for checkpoints, the head's loss for the rest. The tests hold
it against torch.autograd.graph.saved_tensors_hooks, integer by integer.

Shapes: T tokens, N of them trained, H hidden, I inner, Hq query heads of D, R rotated dimensions.
"""

from collections import Counter
from dataclasses import dataclass

from burnish.memory.attended import grouped
from burnish.memory.settings import Memory
from burnish.memory.shape import Layer, Shape
from burnish.memory.time import Load

Ledger = Counter[str]  # name -> bytes
_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Place:
    """Where and in what a model computes: bytes of an activation, of an adapter's products, and the kind of device."""

    itemsize: int = 2
    adapter_itemsize: int = 2
    cuda: bool = True


def _group(layer: Layer, roles: tuple[str, ...], tokens: int, place: Place, flows: bool = True) -> tuple[bool, int]:
    """For projections of one input: (that input is kept, bytes that adapters keep of their own).

    flows  the input has a gradient
    """
    kept, own = False, 0
    for linear in (layer.linears[role] for role in roles):
        kept = kept or linear.trained
        if not linear.rank:
            continue
        own += tokens * linear.rank * place.adapter_itemsize
        copy = tokens * linear.inputs * place.adapter_itemsize
        if linear.dropout:  # what is left of the input and, for its gradient, a factor of each element (CUDA: a byte)
            own += copy + flows * (tokens * linear.inputs if place.cuda else copy)
        elif layer.block or place.adapter_itemsize == place.itemsize:
            kept = True
        else:
            own += copy  # peft casts the input for every adapter
    return kept, own


def attention_ledger(layer: Layer, load: Load, place: Place, *, softcap: bool, projected: bool) -> int:
    """Bytes of the attention's output and log-sum-exp.

    projected  the output projection keeps its input: the same storage, but where the CPU has no fused kernel for all
               documents. Those that a window or a softcap cuts are computed again, of the others each is kept twice.
    """
    output, sums = layer.queries * place.itemsize, layer.heads * _FLOAT32
    cut = (
        0 if place.cuda else sum(n for n in load.lengths if softcap or (layer.window is not None and layer.window < n))
    )
    if not cut:
        return load.tokens * (output + sums)
    return (load.tokens - cut) * (output + sums) + projected * load.tokens * output


def layer_ledger(layer: Layer, load: Load, place: Place, *, softcap: bool = False, first: bool = False) -> Ledger:
    """What one layer keeps of a forward that backward follows, but for its input x [T, H].

    first  nothing below the layer is trained: its input needs no gradient
    """
    tokens, item = load.tokens, place.itemsize
    hidden = tokens * layer.hidden * item
    kept: Ledger = Counter()
    if layer.norms_trained or not first:
        kept["norms"] += tokens * _FLOAT32
    into_qkv, kept["adapters"] = _group(layer, ("q", "k", "v"), tokens, place, not first or layer.norms_trained)
    if into_qkv:
        kept["attention input"] += hidden
    wide, narrow = tokens * layer.queries * item, tokens * layer.keys * item
    q, k = layer.linears["q"], layer.linears["k"]
    kept["queries, keys, values"] += wide + 2 * narrow
    if layer.head_norms:
        flow = [not first or layer.norms_trained or linear.trained or linear.rank > 0 for linear in (q, k)]
        if layer.block and layer.rotates:  # one op norms and rotates both
            flow = [any(flow)] * 2
        fused = place.cuda and layer.block and layer.rotates  # whose Triton kernels make the rows' factors again
        kept["head norms"] += flow[0] * (wide + (not fused) * tokens * layer.heads * _FLOAT32)
        kept["head norms"] += flow[1] * (narrow + (not fused) * tokens * layer.kv_heads * _FLOAT32)
    into_o, thin = _group(layer, ("o",), tokens, place)
    kept["adapters"] += thin
    kept["attention output"] += attention_ledger(layer, load, place, softcap=softcap, projected=into_o)
    kept["residual"] += (layer.norms - 1) * hidden  # and the inputs of Gemma's further norms
    kept["norms"] += (layer.norms - 1) * tokens * _FLOAT32
    into_mlp, thin = _group(layer, ("gate", "up"), tokens, place)
    kept["adapters"] += thin
    if into_mlp:
        kept["mlp input"] += hidden
    inner = tokens * layer.inner * item
    kept["gate and up"] += 2 * inner
    down = layer.linears["down"]
    into_down, thin = _group(layer, ("down",), tokens, place)
    kept["adapters"] += thin
    if into_down and down.rank:
        kept["gate and up"] += inner  # the gated product: an adapter's input
    return kept


def tables(shape: Shape, load: Load, place: Place) -> int:
    """cos and sin [T, D]: one pair for all layers, or for each kind of layer where kinds differ (Gemma 3)."""
    rotating = [layer for layer in shape.layers if layer.rotates]
    kinds = {layer.window is None for layer in rotating} if shape.family.startswith("gemma3") else {True}
    return 2 * len(kinds) * load.tokens * rotating[0].head_dim * place.itemsize if rotating else 0


def ends(shape: Shape, load: Load, place: Place) -> Ledger:
    """What embedding, final norm and the loss of `linear_cross_entropy` keep, the final norm's input not counted."""
    kept: Ledger = Counter()
    if shape.embedding_trained:
        kept["token ids"] += load.tokens * _INT64
    kept["norms"] += load.tokens * _FLOAT32
    kept["token ids"] += 2 * load.valid * _INT64  # positions that are trained, and their labels
    kept["head input"] += load.valid * shape.hidden * place.itemsize
    kept["head"] += load.valid * _FLOAT32  # the rows' scales
    return kept


def groups(layer: Layer, load: Load, memory: Memory) -> int:
    """Groups of KV heads that a checkpointed layer's attention is divided into, as `burnish.memory.attended` does."""
    tiled = memory.checkpointing and layer.block and memory.tile is not None and memory.tile < load.tokens
    tiled = tiled and load.shared == 1  # processes that share a document exchange heads by themselves
    return grouped(layer.kv_heads) if tiled else 1


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: bytes of its input and of kept attentions, whether they go to the host, how many layers."""

    tensors: tuple[int, ...]
    away: bool
    layers: int


def checkpoints(shape: Shape, load: Load, memory: Memory, place: Place) -> list[Checkpoint]:
    """The checkpoints of one micro-batch, first to last: `segment` layers each where burnish runs them by hand."""
    if not memory.checkpointing:
        return []
    step = memory.segment if shape.by_hand else 1
    starts = range(0, len(shape.layers), step)
    made = []
    for number, start in enumerate(starts):
        tensors, layers = [load.tokens * shape.hidden * place.itemsize], shape.layers[start : start + step]
        if memory.keep_attention and shape.by_hand:
            for layer in layers:
                parts = groups(layer, load, memory)
                sums = load.tokens * layer.heads * _FLOAT32
                tensors += [load.tokens * layer.queries * place.itemsize, *[sums // parts] * parts]
        away = memory.offload and number < len(starts) - memory.keep_on_device
        made.append(Checkpoint(tuple(tensors), away, len(layers)))
    return made


def ledger(shape: Shape, load: Load, memory: Memory, place: Place) -> Ledger:
    """Everything that autograd keeps on the device between the forward and the backward of one micro-batch."""
    state = load.tokens * shape.hidden * place.itemsize
    kept = ends(shape, load, place)
    if memory.checkpointing:
        kept["hidden states"] += state  # the last layer's output
        for each in checkpoints(shape, load, memory, place):
            if not each.away:
                kept["checkpoints"] += each.tensors[0]
                kept["kept attention"] += sum(each.tensors[1:])
        return kept
    for layer, number in shape.kinds:
        made = layer_ledger(layer, load, place, softcap=shape.softcap)
        kept.update({name: size * number for name, size in made.items()})
    first = shape.layers[0]
    inputs = len(shape.layers) + 1
    if not shape.embedding_trained:
        kept.subtract(layer_ledger(first, load, place, softcap=shape.softcap))
        kept.update(layer_ledger(first, load, place, softcap=shape.softcap, first=True))
        inputs -= not first.norms_trained
    kept["hidden states"] += inputs * state
    kept["rotary tables"] += tables(shape, load, place)
    return kept
