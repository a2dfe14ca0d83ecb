"""One decoder layer forward and backward by hand, out of burnish.model.blocks, in tiles of tokens where asked.

Forward makes no graph. Backward makes the layer's parts again, differentiates each by itself and lets go of it:
projections and attention, then norm and MLP (tile by tile, without the product of the down projection, which no
gradient needs), then attention, then the projections. Untiled it runs the very operations that autograd would run over
the whole layer, in the same order, so every bit is the same.

Shapes: x [B, T, H] the layer's input; q [B, T, Hq, D], k and v [B, T, Hk, D]; attended [B, T, Hq * D].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from burnish.memory.attended import Attention, Call, attend, groups
from burnish.memory.unmade import mlp_ends
from burnish.model import blocks


def in_tiles(function: Callable, tile: int | None, *rows: Tensor) -> list[Tensor]:
    """function(*tiles) over tiles of `tile` tokens at most of rows [B, T, ...], its results put together on T."""
    tokens = rows[0].shape[1]
    if tile is None or tile >= tokens:
        return function(*rows)
    whole: list[Tensor] = []
    for start, stop in spans(tokens, tile):
        made = function(*(row[:, start:stop] for row in rows))
        if not whole:
            whole = [part.new_empty(part.shape[0], tokens, *part.shape[2:]) for part in made]
        for target, part in zip(whole, made, strict=True):
            target[:, start:stop] = part
    return whole


def spans(tokens: int, tile: int | None) -> list[tuple[int, int]]:
    """Tiles of about one size, none longer than `tile`."""
    number = 1 if tile is None else max(1, -(-tokens // tile))
    size = -(-tokens // number)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def forward(layer: nn.Module, x: Tensor, call: Call, tile: int | None, attention: "Attention | None") -> Tensor:
    """The layer's output [B, T, H], without a graph. `attention` remembers what its backward needs, if given."""
    q, k, v = _projections(layer, x, call, tile)
    if attention is None:
        attended = attend(layer, q, k, v, call)
    else:
        attended = attention.run(layer, q, k, v, call)
    del q, k, v
    return _rest(layer, attended, x, tile)


def again(layer: nn.Module, x: Tensor, call: Call, tile: int | None, attended: Tensor | None, draws: bool) -> Tensor:
    """The layer's output a second time, from its kept attention output if there is one.

    draws  random numbers are drawn: then the projections run in any case, for what comes after them to be the same
    """
    if attended is None:
        return forward(layer, x, call, tile, None)
    if draws:
        _projections(layer, x, call, tile)
    return _rest(layer, attended, x, tile)


def _projections(layer: nn.Module, x: Tensor, call: Call, tile: int | None) -> list[Tensor]:
    def run(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return blocks.project(layer.self_attn, blocks.input_norm(layer, x), cos, sin)  # type: ignore[arg-type]

    return in_tiles(run, tile, x, *call["position_embeddings"])


def _rest(layer: nn.Module, attended: Tensor, x: Tensor, tile: int | None) -> Tensor:
    def run(attended: Tensor, x: Tensor) -> list[Tensor]:
        return [blocks.mlp(layer, *blocks.after_attention(layer, attended, x))]

    return in_tiles(run, tile, attended, x)[0]


# ---- backward


class Sums:
    """Gradients of a layer's parameters, summed over tiles in float32 (or wider) and rounded to their type once.

    scratch  holds the float32 buffer in which tiles of narrower gradients are summed, one for all layers; grown here
    """

    def __init__(self, layer: nn.Module, tiled: bool, scratch: list[Tensor]):
        late = {id(p) for name in ("post_attention_layernorm", "mlp") for p in getattr(layer, name).parameters()}
        late |= {id(p) for p in layer.self_attn.o_proj.parameters()}  # type: ignore[union-attr, operator]
        self.parameters = trained(layer)
        self.before = [number for number, p in enumerate(self.parameters) if id(p) not in late]
        self.after = [number for number, p in enumerate(self.parameters) if id(p) in late]
        self._totals: list[Tensor | None] = [None] * len(self.parameters)
        self._places: dict[int, Tensor] = {}
        narrow = [p for p in self.parameters if tiled and p.dtype.itemsize < 4]
        size = sum(p.numel() for p in narrow)
        if narrow and (not scratch or scratch[0].numel() < size):
            scratch[:] = [torch.empty(size, dtype=torch.float32, device=narrow[0].device)]
        start = 0
        for parameter in narrow:
            self._places[id(parameter)] = scratch[0][start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    def add(self, numbers: Sequence[int], grads: Sequence[Tensor | None]) -> None:
        """Add gradients of the parameters of these numbers; None adds nothing."""
        for number, grad in zip(numbers, grads, strict=True):
            total, place = self._totals[number], self._places.get(id(self.parameters[number]))
            if grad is None:
                continue
            if total is not None:
                total.add_(grad)
            else:
                self._totals[number] = grad if place is None else place.copy_(grad)

    def results(self) -> list[Tensor | None]:
        """One gradient a parameter, in its type; None where there was none."""
        pairs = zip(self._totals, self.parameters, strict=True)
        return [None if total is None else total.to(parameter.dtype) for total, parameter in pairs]


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def backward(
    layer: nn.Module,
    x: Tensor,
    call: Call,
    grad: Tensor,
    attention: Attention | None,
    kept: list[Tensor],
    tile: int | None,
    wants_x: bool,
    sums: Sums,
    rewind: Callable[[], None],
) -> Tensor | None:
    """The gradient of x [B, T, H] from that of the layer's output; those of the parameters go into `sums`.

    attention  as `forward` left it, with `kept` its tensors; or None, and the attention runs again
    rewind     puts random generators back to where this layer's forward began
    """
    wants_attended = wants_x or bool(sums.before)
    number = groups(layer, x, call, tile) if attention is None and wants_attended else 1
    plainly = attention is None and number == 1  # the attention runs as it is, with its graph
    rewind()
    if tile is None or tile >= x.shape[1]:
        with torch.enable_grad():
            source = x.detach().requires_grad_(wants_x)
            made = _projections(layer, source, call, None)
        q, k, v = (each.detach().requires_grad_(wants_attended and plainly) for each in made)
    else:
        made = []
        q, k, v = (each.requires_grad_(wants_attended and plainly) for each in _projections(layer, x, call, tile))
    if plainly:
        with torch.enable_grad():
            graph = attend(layer, q, k, v, call)
        attended = graph.detach()
    else:
        if attention is None:
            attention = Attention(number, everything=True)
            attention.run(layer, q, k, v, call)
            kept, attention.kept = attention.kept, []
        attended = attention.output(kept)
    d_attended, dx = _rest_backward(layer, attended, x, grad, tile, wants_attended, wants_x, sums)
    if d_attended is None:
        return None
    if plainly:
        grads = torch.autograd.grad(graph, (q, k, v), d_attended)
        del graph
    else:
        assert attention is not None
        grads = attention.backward(q, k, v, kept, d_attended)
    del attended, d_attended, kept, q, k, v
    if made:
        found = _differentiate(made, grads, [source, *(sums.parameters[number] for number in sums.before)])
        sums.add(sums.before, found[1:])
        return None if dx is None else dx.add_(found[0])
    rewind()
    _projections_backward(layer, x, call, grads, tile, dx, sums)
    return dx


def _rest_backward(
    layer: nn.Module,
    attended: Tensor,
    x: Tensor,
    grad: Tensor,
    tile: int | None,
    wants_attended: bool,
    wants_x: bool,
    sums: Sums,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of attended and of x (as the residual) through output projection, norm and MLP, tile by tile."""
    parameters = [sums.parameters[number] for number in sums.after]
    parts = spans(x.shape[1], tile)
    d_attended = torch.empty_like(attended) if wants_attended and len(parts) > 1 else None
    dx = torch.empty_like(x) if wants_x and len(parts) > 1 else None
    for start, stop in parts:
        with torch.enable_grad():
            a = attended[:, start:stop].detach().requires_grad_(wants_attended)
            residual_in = x[:, start:stop].detach().requires_grad_(wants_x)
            normed, residual = blocks.after_attention(layer, a, residual_in)
            outs = mlp_ends(layer, normed, residual)
        part = grad[:, start:stop]
        da, d_residual, *found = _differentiate(outs, [part] * len(outs), [a, residual_in, *parameters])
        del outs, normed, residual
        sums.add(sums.after, found)
        if len(parts) == 1:
            return da, d_residual
        for whole, made in ((d_attended, da), (dx, d_residual)):
            if whole is not None:
                whole[:, start:stop] = made
    return d_attended, dx


def _projections_backward(
    layer: nn.Module, x: Tensor, call: Call, grads: Sequence[Tensor], tile: int | None, dx: Tensor | None, sums: Sums
) -> None:
    """Through projections and the first norm, tile by tile; dx [B, T, H] grows by what comes to x this way."""
    parameters = [sums.parameters[number] for number in sums.before]
    for start, stop in spans(x.shape[1], tile):
        cos, sin = (table[:, start:stop] for table in call["position_embeddings"])
        with torch.enable_grad():
            source = x[:, start:stop].detach().requires_grad_(dx is not None)
            made = _projections(layer, source, {"position_embeddings": (cos, sin)}, None)
        found = _differentiate(made, [each[:, start:stop] for each in grads], [source, *parameters])
        sums.add(sums.before, found[1:])
        if dx is not None:
            dx[:, start:stop] += found[0]


def _differentiate(
    outs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """torch.autograd.grad for those that need or give gradients; None for the others. The graph is gone afterwards."""
    ends = [(out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad]
    wanted = [each for each in inputs if each.requires_grad]
    found: Sequence[Tensor | None] = []
    if ends and wanted:
        found = torch.autograd.grad([out for out, _ in ends], wanted, [grad for _, grad in ends], allow_unused=True)
    by_input = dict(zip(map(id, wanted), found, strict=True))
    return [by_input.get(id(each)) for each in inputs]
