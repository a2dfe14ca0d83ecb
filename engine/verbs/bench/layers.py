"""Attention over packed sequences, linear layers with adapters, and their peers."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import kernels
from burnish.kernels.attention import attention_definition
from burnish.verbs.bench.ops import BACKWARD, FORWARD, Op, Shape, Way, randn

# ---- attention


def _attention_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """q [N, Hq, D], k, v [N, Hk, D] and the sequences' offsets, as a tensor and as Python ints."""
    tokens, width = shape["N"], shape["D"]
    q, k, v = (randn((tokens, shape[name], width), device, dtype, generator) for name in ("Hq", "Hk", "Hk"))
    offsets = tuple(range(0, tokens + 1, shape["length"]))
    return q, k, v, torch.tensor(offsets, dtype=torch.int32, device=device), offsets


def _attention_count(shape: Shape, phase: str, size: int) -> tuple[float, float]:
    """Two products forward and five backward over the causal half; q, k, v, the result and their gradients."""
    forward = 4.0 * shape["Hq"] * shape["D"] * shape["N"] * shape["length"] / 2
    moved = shape["N"] * shape["D"] * size * (2 * shape["Hq"] + 2 * shape["Hk"])
    share = {FORWARD: (1.0, 1.0), BACKWARD: (2.0, 2.5)}.get(phase, (3.0, 3.5))
    return moved * share[0], forward * share[1]


def _attention_definition(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
    lengths = [stop - start for start, stop in pairwise(offsets)]
    return attention_definition(q, k, v, lengths, 1 / math.sqrt(q.shape[-1]), None, None)


def _our_attention() -> Callable:
    return lambda q, k, v, cu, offsets: kernels.varlen_attention(q, k, v, cu, _longest(offsets))


def _longest(offsets: tuple) -> int:
    return max(stop - start for start, stop in pairwise(offsets))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
    """transformers' eager attention: all scores of the packed row at once, those across sequences masked."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    place = torch.arange(tokens, device=q.device)
    number = torch.searchsorted(cu, place, right=True)
    seen = (number[:, None] == number) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    chances = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (chances @ v).transpose(0, 1)


def _sdpa() -> Callable:
    """torch's scaled_dot_product_attention, one sequence after the other."""

    def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
        parts = []
        for start, stop in pairwise(offsets):
            mine, keys, values = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(mine, keys, values, is_causal=True, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return attention


def _torch_varlen() -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
        longest = _longest(offsets)
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True)  # type: ignore

    return attention


def _flash() -> Callable:
    from flash_attn import flash_attn_varlen_func

    def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
        longest = _longest(offsets)
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

    return attention


def _flash_four() -> Callable:
    from flash_attn.cute import flash_attn_varlen_func

    def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
        longest = _longest(offsets)
        out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attention


def _flex() -> Callable:
    """FlexAttention with a mask of documents, compiled; the mask is made once, as for the layers of a model."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple, object] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, offsets: tuple) -> Tensor:
        if offsets not in masks:
            number = torch.searchsorted(cu, torch.arange(q.shape[0], device=q.device), right=True)

            def seen(_b, _h, i, j):  # noqa: ANN001
                return (number[i] == number[j]) & (i >= j)

            masks[offsets] = create_block_mask(seen, None, None, q.shape[0], q.shape[0], device=str(q.device))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return run(q, k, v, block_mask=masks[offsets], enable_gqa=True)[0].transpose(0, 1)

    return attention


ATTENTION = Op(
    "varlen_attention", _attention_inputs, (0, 1, 2), _attention_definition, _attention_count,
    {
        "burnish": _our_attention,
        "transformers": lambda: eager_attention,
        "torch SDPA, each sequence": _sdpa,
        "torch varlen_attn": _torch_varlen,
        "torch FlexAttention": _flex,
        "flash-attn 2": _flash,
        "flash-attn 4": _flash_four,
    },
    gate={"N": 256, "Hq": 4, "Hk": 2, "D": 128, "length": 128}, limits=(1e-2, 3e-2),
)  # fmt: skip


# ---- adapters

RANK = 16
SCALE = 2.0


def _lora_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """x [N, K], then three tuples would hide tensors from autograd: W_1, A_1, B_1, W_2, ... in a row."""
    width = shape["K"]
    parts = [randn((shape["N"], width), device, dtype, generator)]
    for out in shape["outs"]:
        parts.append(randn((out, width), device, dtype, generator) / math.sqrt(width))
        parts.append(randn((RANK, width), device, dtype, generator) / math.sqrt(width))
        parts.append(randn((out, RANK), device, dtype, generator) / 10)
    return tuple(parts)


def _lora_count(shape: Shape, phase: str, size: int) -> tuple[float, float]:
    """The frozen bases' products once forward and once backward, the thin ones twice as often backward."""
    tokens, width, outs, total = shape["N"], shape["K"], sum(shape["outs"]), RANK * len(shape["outs"])
    base, thin = 2.0 * tokens * width * outs, 2.0 * tokens * (width * total + RANK * outs)
    moved = (tokens * (width + outs) + width * outs) * size
    work = {FORWARD: (1, base + thin), BACKWARD: (1, base + 2 * thin)}.get(phase, (2, 2 * base + 3 * thin))
    return float(moved * work[0]), work[1]


def eager_lora(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """peft's forward of each layer by itself."""
    weights, downs, ups = (parameters[i::3] for i in range(3))
    return tuple(
        F.linear(x, weight) + F.linear(F.linear(x, down), up) * SCALE
        for weight, down, up in zip(weights, downs, ups, strict=True)
    )


def _our_lora() -> Callable:
    def linears(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, downs, ups = (parameters[i::3] for i in range(3))
        count = len(weights)
        return kernels.lora_linears(x, weights, [None] * count, downs, ups, [SCALE] * count)

    return linears


def lora(name: str, projections: int) -> Op:
    """`projections` adapted layers of the same x, their bases frozen."""
    trained = [1 + 3 * number + part for number in range(projections) for part in (1, 2)]
    ways: dict[str, Way] = {
        "burnish": _our_lora,
        "peft": lambda: eager_lora,
        "torch.compile": lambda: torch.compile(eager_lora, dynamic=False),
    }
    gate = {"N": 256, "K": 256, "outs": (256, 128, 128)[:projections]}
    return Op(
        name, _lora_inputs, (0, *trained), eager_lora, _lora_count, ways, gate, by_token=(0,), limits=(8e-3, 3e-2)
    )


LORA_QKV = lora("lora_linears, q k v", 3)
LORA_GATE_UP = lora("lora_linears, gate up", 2)
