"""Bytes on the device and on the host, phase by phase: what a run holds at once, before it runs.

A phase is a ledger: component -> bytes. What stays (weights, gradients, optimizer states) is exact; what autograd keeps
is exact (`burnish.memory.saved`); the working sets of a layer and of the head are those of the kernels as they stand,
at the moment when most is alive. What the driver, the libraries and fragmentation take is not among them: that is the
card's reserve.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from burnish.kernels.head_cost import Cost, head_cost
from burnish.memory.arena import ALIGNMENT, STASH
from burnish.memory.saved import Checkpoint, Ledger, Place, checkpoints, groups, layer_ledger, ledger, tables
from burnish.memory.settings import Memory
from burnish.memory.shape import Layer, Shape, Tensors
from burnish.memory.spread import Spread, gathered, scattered
from burnish.memory.time import GIB, Load
from burnish.optim.footprint import bytes_per_parameter

HOST_BASE = 16 * GIB  # Python, loaders, page cache: what a host needs beside the arena


@dataclass(frozen=True)
class Setup:
    """What a run is, whatever it does to save memory.

    dtype        in which trainable weights are loaded: "float32" or "bfloat16"
    bf16         the model computes in bfloat16
    accumulation micro-batches an update
    loss_known   the loss is a plain sum over tokens, so that its gradients are made in the forward (SFT's nll)
    reference    whose log-probs are taken beside the policy's: "" nobody's, "copy" a second model's, "policy" its own,
                 with another adapter or none
    spread       over which processes; all bytes are one's
    """

    shape: Shape
    place: Place
    optim: str = "adamw_torch_fused"
    dtype: str = "float32"
    bf16: bool = True
    accumulation: int = 1
    optimizer_in_bwd: bool = False
    loss_known: bool = True
    reference: str = ""
    spread: Spread = Spread()

    def footprint(self, tensors: Tensors):
        """Bytes an element of these trained parameters."""
        wide = tensors.itemsize == 4
        return bytes_per_parameter(
            self.optim,
            dtype="float32" if wide else "bfloat16",
            # peft's float32 adapters stay so beside bfloat16 weights, and parts are their own masters
            bf16=self.bf16 and self.dtype != "bfloat16" and not self.spread.sharded,
            accumulates=self.accumulation > 1,
            in_backward=self.optimizer_in_bwd,
        )


def state(setup: Setup) -> Ledger:
    """Bytes of weights, gradients and optimizer states, all of them there."""
    held: Ledger = Counter()
    for tensors in setup.shape.tensors:
        count = setup.spread.part(tensors.count)
        if not tensors.trained:
            size = 2 if setup.bf16 and tensors.itemsize == 4 else tensors.itemsize
            held["weights"] += count * size
            continue
        each = setup.footprint(tensors)
        held["weights"] += int(count * each.weights)
        held["gradients"] += int(count * each.gradient)
        held["optimizer"] += int(count * each.states)
    if setup.reference == "copy":
        held["reference"] = setup.spread.part(setup.shape.count() - setup.shape.count("adapter")) * setup.place.itemsize
    return held


def head_work(setup: Setup, load: Load, *, learns: bool = True) -> Cost:
    """What the loss's forward and backward hold beside the rows that it keeps; a reference's forward only."""
    shape, place = setup.shape, setup.place
    return head_cost(
        load.valid,
        shape.hidden,
        shape.vocab,
        device=torch.device("cuda" if place.cuda else "cpu"),
        dtype=torch.bfloat16 if place.itemsize == 2 else torch.float32,
        needs=(learns, learns and shape.head_trained),
        known=setup.loss_known,
    )


def reference_work(setup: Setup, load: Load) -> Ledger:
    """What a reference's forward holds: a layer untiled, without a graph, between two streams; then its head."""
    layer, item = max(setup.shape.layers, key=lambda each: each.parameters), setup.place.itemsize
    stream = load.tokens * setup.shape.hidden * item
    wide, narrow, inner = (load.tokens * size * item for size in (layer.queries, layer.keys, layer.inner))
    work = 2 * wide + 2 * narrow + 2 * stream + 3 * inner  # nothing is let go of before the MLP ends
    head = head_work(setup, load, learns=False).peak_bytes + load.valid * setup.shape.hidden * item
    held: Ledger = Counter({"batch": 32 * load.tokens, "hidden states": 2 * stream})
    held["rotary tables"] = tables(setup.shape, load, setup.place)
    held["reference's forward"] = max(work, head)
    return held


def _part(load: Load, memory: Memory) -> float:
    """A tile's share of the tokens; 1 without tiles."""
    return 1.0 if memory.tile is None else min(1.0, memory.tile / load.tokens)


def forward_work(setup: Setup, layer: Layer, load: Load, memory: Memory) -> int:
    """The most that a layer's forward holds, its input and output not counted, beyond what autograd keeps of it."""
    tokens, item = load.tokens, setup.place.itemsize
    hidden, inner = tokens * layer.hidden * item, tokens * layer.inner * item
    wide, narrow = tokens * layer.queries * item, tokens * layer.keys * item
    if not memory.checkpointing or not setup.shape.by_hand:
        kept = not memory.checkpointing
        product = 2 * hidden if kept and layer.linears["down"].rank else inner
        return product if kept else product + wide + 2 * narrow + wide + 2 * hidden + 2 * inner
    part = _part(load, memory)
    attended = 0 if memory.keep_attention else wide
    projecting = wide + 2 * narrow + part * (hidden + wide + narrow)
    parts = groups(layer, load, memory)
    copied = wide // parts if memory.keep_attention and parts > 1 else 0  # a group's output, on its way into the whole
    attending = wide + 2 * narrow + attended + copied
    mlp = attended + part * (2 * hidden + 3 * inner) + (2 * part * hidden if part < 1 else 0)
    between = hidden if memory.segment > 1 else 0  # inside a segment a layer's input is no checkpoint
    return int(max(projecting, attending, mlp)) + between


def backward_work(setup: Setup, layer: Layer, load: Load, memory: Memory, inputs: int = 0) -> Ledger:
    """The most that a layer's backward holds: what it made again of the forward, and the gradients on their way.

    inputs  of further layers of its segment that were made again

    It can be inside the MLP, where all three wide gradients are there; with tiles at the end of one, where two tiles'
    gradients of the weights are; or in the attention.
    """
    place, tokens = setup.place, load.tokens
    hidden, inner = tokens * layer.hidden * place.itemsize, tokens * layer.inner * place.itemsize
    wide, narrow = tokens * layer.queries * place.itemsize, tokens * layer.keys * place.itemsize
    again, rest, part = _made_again(setup, layer, load, memory)
    if memory.checkpointing:
        again["segment's inputs"] += inputs * hidden
    tiled = part < 1
    product = inner if layer.linears["down"].rank else 0  # is gone before the gradients of its factors are there
    flow = hidden + tiled * (wide + hidden)
    if memory.checkpointing:
        mlp, late = again + Counter({name: int(size * part) for name, size in rest.items()}), Counter(again)
    else:  # all of it is kept: what counts is what is gone by then
        mlp, late = Counter[str](), Counter({name: -size for name, size in rest.items()})
    mlp["gate and up"] -= int(product * part)
    end = mlp + Counter({"gradients on their way": flow})
    end["gate and up"] = 0
    mlp["gradients on their way"] += flow + int(3 * inner * part)
    parts = groups(layer, load, memory)  # whose gradients are written over queries, keys and values, where several
    late["gradients on their way"] += 2 * hidden + wide + (wide + 2 * narrow) // parts
    late["attention backward"] += _attention_workspace(layer, load, place, parts)
    if load.shared > 1:  # queries, keys, values and output as they are exchanged, and their gradients
        late["exchanged heads"] += 2 * (2 * wide + 2 * narrow)
    first, second, third = _parameter_gradients(setup, layer, inputs, tiled=tiled)
    moments = [(mlp, first), (late, third), *([(end, second)] if tiled else [])]
    for moment, size in moments:
        moment["parameter gradients"] += size
    return max((moment for moment, _ in moments), key=total)


def _made_again(setup: Setup, layer: Layer, load: Load, memory: Memory) -> tuple[Ledger, Ledger, float]:
    """What a layer's backward makes again before its attention, behind it, and the share of that a tile holds.

    Without checkpoints nothing is made again; then the second ledger says what autograd keeps of that part.
    """
    made = layer_ledger(layer, load, setup.place, softcap=setup.shape.softcap)
    rest: Ledger = Counter({name: made.pop(name, 0) for name in ("residual", "mlp input", "gate and up")})
    if not memory.checkpointing:
        return Counter(), rest, 1.0
    part = _part(load, memory) if setup.shape.by_hand else 1.0
    if setup.shape.by_hand:
        rest["mlp input"] = load.tokens * layer.hidden * setup.place.itemsize  # kept by name, whoever needs it
        made["attention output"] *= not memory.keep_attention
    if part < 1:
        made.update({name: int(made[name] * (part - 1)) for name in ("attention input", "head norms", "adapters")})
    return made, rest, part


def _attention_workspace(layer: Layer, load: Load, place: Place, parts: int) -> int:
    """What attention's backward takes beside its results, for one of `parts` groups of heads.

    Flash attention 2 (torch's varlen_attn): dq summed in float32, with fewer key heads dk and dv for every query head,
    and of a part the output and its gradient as tensors of their own. The CPU: results of the longest document, before
    they are put into the whole.
    """
    wide = layer.queries * place.itemsize
    if not place.cuda:
        return max(load.lengths) * (wide + 2 * layer.keys * place.itemsize) // parts
    shared = 2 * wide if layer.kv_heads != layer.heads else 0
    return load.tokens * (layer.queries * 4 + shared + 2 * wide * (parts > 1)) // parts


def _parameter_gradients(setup: Setup, layer: Layer, inputs: int, *, tiled: bool) -> tuple[int, int, int]:
    """Gradients of the layer's own parameters inside its MLP, at the end of a tile, and in its attention.

    With tiles a tile's own are there until the next one's are. `inputs` layers of its segment have theirs already.
    """
    linears, item = layer.linears, setup.place.itemsize
    sizes = {role: linears[role].weights * item if linears[role].trained else 0 for role in linears}
    adapters, behind = (
        layer.adapters * setup.place.adapter_itemsize,
        sum(sizes[role] for role in ("o", "gate", "up", "down")),
    )
    earlier = inputs * (sum(sizes.values()) + adapters)
    if not tiled:
        return earlier + sizes["down"], 0, earlier + behind + adapters
    earlier += adapters
    return earlier + behind + sizes["down"], earlier + 2 * behind, earlier + behind


def layers_forward(setup: Setup, load: Load, memory: Memory) -> Ledger:
    """What the layers hold at the fullest moment of their forward: what autograd keeps of all, and the last at work."""
    shape, place = setup.shape, setup.place
    held = _beside(setup, load, memory) + _kept_by_layers(setup, load, memory)
    held["on their way out"] += _leaving(setup, load, memory)
    if _away(setup, load, memory):  # the embeddings stay in the frame of the model's own forward
        held["hidden states"] += load.tokens * shape.hidden * place.itemsize
    held["layer forward"] += forward_work(setup, max(shape.layers, key=lambda each: each.parameters), load, memory)
    return held


def layers_backward(setup: Setup, load: Load, memory: Memory, gradients: int = 0, *, whole: bool = False) -> Ledger:
    """What the layers hold at the fullest moment of their backward.

    gradients  bytes of the whole model's, when all are made; whole: they are there from the beginning

    The last layer's backward or the first's: between those, what is kept falls and the gradients rise alike.
    """
    shape, layers = setup.shape, len(setup.shape.layers)
    made = checkpoints(shape, load, memory, setup.place)
    moments = []
    for done in (0, layers - 1):  # layers whose backward is over
        held, inputs = _beside(setup, load, memory), 0
        held["gradients"] += gradients if whole else gradients * done // layers
        held["gradients to scatter"] += scattered(
            shape, setup.spread, memory, setup.place.itemsize, accumulates=setup.accumulation > 1
        )
        if memory.checkpointing:
            rest = made[: max(1, len(made) - done // memory.segment)]
            held["checkpoints"] += sum(each.tensors[0] for each in rest if not each.away)
            held["kept attention"] += sum(sum(each.tensors[1:]) for each in rest if not each.away)
            inputs = rest[-1].layers - 1
            away = _away(setup, load, memory)
            coming = sum(each.away for each in (made if done else made[-2:]))  # buffers stay once they are there
            held["landing buffers"] += min(2, coming) * max(away, default=0)
        else:
            kept = _kept_by_layers(setup, load, memory)
            kept["hidden states"] -= load.tokens * shape.hidden * setup.place.itemsize  # the last layer's output
            held.update({name: size * (layers - done) // layers for name, size in kept.items()})
        held.update(backward_work(setup, shape.layers[layers - 1 - done], load, memory, inputs))
        moments.append(held)
    return max(moments, key=total)


def _away(setup: Setup, load: Load, memory: Memory) -> list[int]:
    """Bytes of each checkpoint that goes to the host."""
    return [sum(each.tensors) for each in checkpoints(setup.shape, load, memory, setup.place) if each.away]


def _leaving(setup: Setup, load: Load, memory: Memory) -> int:
    """Bytes of checkpoints whose copies out the computation hasn't waited for when the last layer runs."""
    made = checkpoints(setup.shape, load, memory, setup.place)
    return sum(sum(each.tensors) for each in made[-STASH:] if each.away)


def _beside(setup: Setup, load: Load, memory: Memory) -> Ledger:
    """What is there all the time beside state and kept tensors: the batch, rotary tables, sums of tiles."""
    shape = setup.shape
    held: Ledger = Counter({"batch": 32 * load.tokens * load.shared})  # ids, positions, labels, trained positions
    if setup.spread.sharded:
        held["gathered parameters"] = gathered(shape, setup.spread, memory, setup.place.itemsize)
    if memory.checkpointing:
        held["rotary tables"] = tables(shape, load, setup.place)
    if memory.checkpointing and memory.tile is not None and shape.by_hand and memory.tile < load.tokens:
        held["sums of tiles"] = max(_narrow(setup, layer) for layer, _ in shape.kinds)
    return held


def _narrow(setup: Setup, layer: Layer) -> int:
    """Bytes of the float32 sums of a layer's gradients over tiles, where they are narrower themselves."""
    trained = sum(linear.weights for linear in layer.linears.values() if linear.trained)
    adapters = layer.adapters if setup.place.adapter_itemsize < 4 else 0
    return 4 * (adapters + (trained if setup.place.itemsize < 4 else 0))


def _kept_by_layers(setup: Setup, load: Load, memory: Memory) -> Ledger:
    """What autograd keeps, but for the head; token ids are in the batch."""
    kept = ledger(setup.shape, load, memory, setup.place)
    for name in ("head", "head input", "token ids"):
        kept.pop(name, 0)
    return kept


def phases(setup: Setup, load: Load, memory: Memory) -> dict[str, Ledger]:
    """What is on the device at the fullest moment of each phase of an update: forward, loss, backward, update."""
    shape, place = setup.shape, setup.place
    held = state(setup)
    gradients = held.pop("gradients", 0)
    accumulates = setup.accumulation > 1  # then there are those of the micro-batches before
    before = held + Counter({"gradients": gradients if accumulates else 0})
    stream = load.tokens * shape.hidden * place.itemsize
    kept = _beside(setup, load, memory) + ledger(shape, load, memory, place)
    kept["on their way out"] += _leaving(setup, load, memory)
    loss = head_work(setup, load)
    made = loss.kept_bytes if setup.loss_known else load.valid * shape.hidden * place.itemsize
    left = Counter({"head gradients": made})
    head = Counter({"gradients on their way": 2 * stream})
    if shape.head_trained:
        head["parameter gradients"] = shape.vocab * shape.hidden * place.itemsize
    moments = [before + kept + left + head, held + layers_backward(setup, load, memory, gradients, whole=accumulates)]
    first = {"reference": before + reference_work(setup, load)} if setup.reference else {}
    return first | {
        "forward": before + layers_forward(setup, load, memory),
        "loss": before + kept + Counter({"head": loss.peak_bytes}),
        "backward": max(moments, key=total),
        "update": held + Counter({"gradients": gradients}),
    }


def total(ledger: Ledger) -> int:
    return sum(ledger.values())


def host_bytes(setup: Setup, load: Load, memory: Memory) -> int:
    """Bytes of the arena that checkpoints are offloaded to; 0 without offload."""
    made = checkpoints(setup.shape, load, memory, setup.place)
    return sum(_in_arena(each) for each in made if each.away)


def offloaded(setup: Setup, load: Load, memory: Memory) -> tuple[int, int]:
    """(checkpoints that go to the host, bytes of one)."""
    away = [_in_arena(each) for each in checkpoints(setup.shape, load, memory, setup.place) if each.away]
    return len(away), max(away, default=0)


def _in_arena(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors, each from a boundary on."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in checkpoint.tensors)
