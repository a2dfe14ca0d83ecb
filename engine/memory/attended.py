"""A layer's attention between forward and backward: what of it is kept, and its backward in groups of heads.

Shapes: q [B, T, Hq, D], k and v [B, T, Hk, D]; attended [B, T, Hq * D].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from burnish.memory.arena import rounded
from burnish.model import blocks
from burnish.model.attention import NAME

Call = dict[str, Any]  # keyword arguments that the model hands a layer beside x


def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """The attention's output [B, T, Hq * D] of a layer that is called like this."""
    left_out = ("position_embeddings", "past_key_values")
    kwargs = {name: value for name, value in call.items() if name not in left_out}
    return blocks.attend(layer.self_attn, q, k, v, **kwargs)  # type: ignore[arg-type]


class _Entry(torch.autograd.Function):
    """q, k and v as the start of a graph that holds none of them: a leaf would keep its tensor alive."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors)


GROUPS = 8  # of KV heads at most: each is a launch of its own


def groups(layer: nn.Module, x: Tensor, call: Call, tile: int | None) -> int:
    """Into how many groups of KV heads a layer's attention is divided where its backward is made: 1 without tiles.

    Heads don't meet in burnish's own attention, so every bit stays; other attentions may see all of them at once.
    """
    attn: Any = layer.self_attn
    whole = tile is None or tile >= x.shape[1] or x.shape[0] > 1 or "cu_seq_lens_q" not in call
    if whole or attn.config._attn_implementation != NAME:
        return 1
    return grouped(attn.k_proj.out_features // attn.head_dim)


def grouped(kv_heads: int) -> int:
    """The most groups of one size that so many heads make."""
    return max(number for number in range(1, GROUPS + 1) if kv_heads % number == 0)


def _heads(tensor: Tensor, number: int, groups: int) -> Tensor:
    """The heads of a group: a view of tensor [B, T, H, D]."""
    size = tensor.shape[2] // groups
    return tensor[:, :, number * size : (number + 1) * size]


@dataclass
class _Place:
    """Where a tensor that a group's attention saved lies: in these columns of the output, or by itself in `kept`."""

    size: torch.Size
    columns: slice | None = None
    number: int = 0


@dataclass
class Attention:
    """An attention's graph between forward and backward, without its q, k and v: only output and log-sum-exp are kept.

    For every attention whose backward reads q, k, v, its output and little else: of what it saves for backward, views
    of q, k and v are noted as such instead of kept. Where it saves more (copies of k and v), nothing is kept,
    `refused` says why, and backward has to run it again.

    groups      of KV heads that are differentiated one after the other: each needs a group's workspace only, and its
                gradients are written where its q, k and v were
    everything  is kept, whatever the backward needs
    """

    groups: int = 1
    everything: bool = False
    kept: list[Tensor] = field(default_factory=list)  # the output, then what else: taken over until backward
    refused: str = ""
    _graphs: list[tuple[list[GradientEdge], GradientEdge]] = field(default_factory=list)
    _sources: list[Tensor] = field(default_factory=list)  # while backward runs: q, k, v, then `kept`

    def size(self, layer: nn.Module, x: Tensor) -> int:
        """Bytes that a layer's output and log-sum-exp take in the arena, for input x."""
        attn = layer.self_attn
        queries = getattr(attn.q_proj, "out_features")  # noqa: B009
        tokens = x.shape[0] * x.shape[1]
        sums = self.groups * rounded(tokens * queries // attn.head_dim // self.groups * 4)  # type: ignore
        return rounded(tokens * queries * x.element_size()) + sums

    def run(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The attention's output [B, T, Hq * D]; what backward must be given again is in `kept`."""
        attended, others = q.new_empty(0), list[Tensor]()
        for number in range(self.groups):
            out, saved = self._record(layer, (q, k, v), number, call)
            columns = slice(number * out.shape[-1], (number + 1) * out.shape[-1])
            if self.groups == 1:
                attended = out
            else:
                if not number:
                    attended = out.new_empty(*out.shape[:-1], out.shape[-1] * self.groups)
                attended[..., columns] = out
            for place, tensor in saved:
                if _memory(tensor) == _memory(out) and tensor.numel() == out.numel() and tensor.is_contiguous():
                    place.columns = columns
                else:
                    place.number = _kept_at(others, tensor)
            del out, saved
        self.kept = [attended, *others]
        promised = attended.numel() * attended.element_size() + 8 * q[..., 0].numel()  # sums in float32 or float64
        if not self.everything and sum(tensor.numel() * tensor.element_size() for tensor in self.kept) > promised:
            self.kept, self._graphs = [], []
            self.refused = "its backward needs more than output and log-sum-exp"
        return attended

    def _record(
        self, layer: nn.Module, whole: tuple[Tensor, ...], number: int, call: Call
    ) -> tuple[Tensor, list[tuple[_Place, Tensor]]]:
        """A group's output [B, T, Hq * D / groups], and what its graph saved beside its parts of q, k and v."""
        originals, saved = list(whole), list[tuple[_Place, Tensor]]()

        def pack(tensor: Tensor) -> Any:
            for which, original in enumerate(originals):
                if _memory(tensor) == _memory(original):
                    offset = tensor.storage_offset() - original.storage_offset()
                    return which, tensor.size(), tensor.stride(), offset
            if not tensor.is_floating_point():
                return tensor  # where sequences begin, a generator's state: small, and the same for every layer
            place = _Place(tensor.size())
            saved.append((place, tensor.detach()))
            return place

        def unpack(place: Any) -> Tensor:
            if isinstance(place, Tensor):
                return place
            if isinstance(place, _Place):
                output, *others = self._sources[3:]
                source = others[place.number] if place.columns is None else output[..., place.columns]
                return source.view(place.size)
            source = self._sources[place[0]]
            return source.as_strided(place[1], place[2], source.storage_offset() + place[3])

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            token = torch.empty(0, device=whole[0].device, requires_grad=True)
            q, k, v = entered = _Entry.apply(token, *(_heads(each, number, self.groups) for each in whole))
            out = attend(layer, q, k, v, call)
        self._graphs.append(([get_gradient_edge(tensor) for tensor in entered], get_gradient_edge(out)))
        found = saved[:]
        originals.clear()  # the graph holds on to the hooks
        saved.clear()
        return out.detach(), found

    def output(self, kept: list[Tensor]) -> Tensor:
        """The attention's output [B, T, Hq * D] from `kept` as it was."""
        return kept[0]

    def backward(self, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], grad: Tensor) -> Sequence[Tensor]:
        """dq, dk and dv from the gradient of the output, q, k and v made again, and `kept` as it was. Works once.

        With several groups they are q, k and v themselves, written over.
        """
        self._sources = [q, k, v, *kept]
        try:
            if self.groups == 1:
                ((entries, exit),) = self._graphs
                return torch.autograd.grad([exit], entries, [grad])  # type: ignore[arg-type]
            width = grad.shape[-1] // self.groups
            for number, (entries, exit) in enumerate(self._graphs):
                part = grad[..., number * width : (number + 1) * width]
                found = torch.autograd.grad([exit], entries, [part])  # type: ignore[arg-type]
                for target, made in zip((q, k, v), found, strict=True):
                    _heads(target, number, self.groups).copy_(made)
                del found
            return q, k, v
        finally:
            self._sources = []


def _kept_at(kept: list[Tensor], tensor: Tensor) -> int:
    """The place of this tensor in `kept`: contiguous views of one storage in full are one."""
    for place, other in enumerate(kept):
        if _memory(other) == _memory(tensor) and other.numel() == tensor.numel() and tensor.is_contiguous():
            return place
    kept.append(tensor.contiguous())
    return len(kept) - 1


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
