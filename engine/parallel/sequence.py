"""Slices of a document, one a process (sequence parallel, as in DeepSpeed-Ulysses, arXiv 2309.14509).

Each process of a group runs every layer on its own run of a packed row's tokens. Only attention looks across: there
tokens are exchanged for heads, so that each process has the whole row of some heads, for which any varlen kernel is
right as it is. The row is cut anywhere, documents or not: positions, labels and sequence ends were fixed before.

Shapes: T tokens of the row, n = ceil(T / P) of them on each of P processes (the row's end is filled up with a document
of its own that trains on nothing).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.data.batch import Batch
from burnish.model.attention import attention
from burnish.parallel.world import world

NAME = "burnish_slices"


@dataclass
class Slice:
    """This process's run of a row of `tokens`: positions start to stop of them.

    input_ids, position_ids  [n], filled up at the row's end
    cu_seqlens, max_seqlen   of the whole row, with the filling as a document
    valid                    [N'] int64, the trained positions of this run, from its start
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    valid: Tensor
    start: int
    tokens: int


def register() -> str:
    """Register the exchanging attention with transformers; returns the name to give a model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def cut(batch: Batch) -> Slice:
    """This process's slice of a batch, on the batch's device."""
    own = world()
    tokens = len(batch.input_ids)
    size = -(-tokens // own.sequence)
    filling = size * own.sequence - tokens
    start, stop = own.slice * size, (own.slice + 1) * size
    ids, positions = F.pad(batch.input_ids, (0, filling)), batch.position_ids
    if filling:
        positions = torch.cat([positions, torch.arange(filling, device=positions.device)])
    edges = F.pad(batch.cu_seqlens, (0, 1), value=size * own.sequence) if filling else batch.cu_seqlens
    valid = batch.valid[(batch.valid >= start) & (batch.valid < stop)] - start
    return Slice(
        ids[start:stop],
        positions[start:stop],
        edges,
        max(batch.max_seqlen, filling),
        F.pad(batch.labels, (0, filling), value=-100)[start:stop],
        valid,
        start,
        tokens,
    )


def joined(values: Tensor, piece: Slice) -> Tensor:
    """Values [n, ...] of every slice as one row [T, ...], on each process of the group.

    Each computes the same loss from it, so the gradient of its own slice is the row's gradient there.
    """
    return _Joined.apply(values)[: piece.tokens]


def summed(value: Tensor) -> Tensor:
    """The sum of a loss over the slices, on each process of the group; its gradient reaches each slice as it is."""
    return _Summed.apply(value)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        own = world()
        ctx.size, ctx.number = len(values), own.slice
        parts = [torch.empty_like(values) for _ in range(own.sequence)]
        dist.all_gather(parts, values.contiguous(), group=own.slices)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[ctx.number * ctx.size : (ctx.number + 1) * ctx.size]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        whole = value.clone()
        dist.all_reduce(whole, group=world().slices)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Exchange(torch.autograd.Function):
    """Tokens for heads [n, H, D] -> [n * P, H / P, D], or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: bool) -> Tensor:
        ctx.back = back
        return _exchange(x, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, not ctx.back), None


def _exchange(x: Tensor, back: bool) -> Tensor:
    own = world()
    p = own.sequence
    if back:  # [n * P, h, D]: each run of n tokens goes to the process whose it is
        sent = x.contiguous()
    else:  # [n, H, D]: each run of H / P heads goes to its process
        sent = x.unflatten(1, (p, -1)).transpose(0, 1).contiguous()  # [P, n, h, D]
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=own.slices)
    if back:
        return got.unflatten(0, (p, -1)).transpose(0, 1).flatten(1, 2)  # [P, n, h, D] -> [n, P * h, D]
    return got.flatten(0, 1)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, n, D]
    key: Tensor,  # [1, Hk, n, D]
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns ([1, n, Hq, D], None)."""
    if kwargs.get("cu_seq_lens_q") is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [n, H, D]
    heads = q.shape[1]
    q, k, v = _divisible(q, k, v, world().sequence)
    q, k, v = (_Exchange.apply(x, False).transpose(0, 1)[None] for x in (q, k, v))  # [1, h, n * P, D]
    out, _ = attention(module, q, k, v, attention_mask, **kwargs)
    return _Exchange.apply(out[0], True)[None, :, :heads], None


def _divisible(q: Tensor, k: Tensor, v: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention with numbers of heads that P processes can share: keys and values are repeated for the heads
    that read them, and where queries can't be divided either, heads of zeros are put behind."""
    queries, keys = q.shape[1], k.shape[1]
    if queries % p == 0 and keys % p == 0:
        return q, k, v
    times = next((r for r in range(1, queries // keys + 1) if (queries // keys) % r == 0 and (keys * r) % p == 0), 0)
    if queries % p == 0 and times:
        return q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    k, v = k.repeat_interleave(queries // keys, 1), v.repeat_interleave(queries // keys, 1)
    missing = -queries % p
    return tuple(F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))  # type: ignore[return-value]
