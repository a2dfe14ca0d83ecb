"""The ops that only move memory, and their peers: norms, rotation, gated units.

"transformers" is what its modules do, in eager torch. Liger's norms are called with in_place=False, as a residual
stream needs them; ways named "in place" overwrite their inputs and get copies of their own, made anew for every sample.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import kernels
from burnish.kernels.glu import geglu_definition, swiglu_definition
from burnish.kernels.rms_norm import rms_norm_definition
from burnish.kernels.rope import rope_definition
from burnish.verbs.bench.ops import BACKWARD, FORWARD, Op, Shape, Way, randn

EPS = 1e-6
QUACK_NONE = "it has no such op"


def _moves(forward: int, backward: int, size_of: Callable[[Shape], int]) -> Callable[[Shape, str, int], Any]:
    """Passes over tensors of size_of(shape) elements: read and written ones together."""

    def count(shape: Shape, phase: str, size: int) -> tuple[float, float]:
        passes = {FORWARD: forward, BACKWARD: backward}.get(phase, forward + backward)
        return float(passes * size_of(shape) * size), 0.0

    return count


def _compiled(function: Callable) -> Way:
    return lambda: torch.compile(function, dynamic=False)


# ---- norms


def _norm_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """x [N, H] and a weight [H] around 1."""
    x = randn((shape["N"], shape["H"]), device, dtype, generator)
    return x, 1 + randn((shape["H"],), device, dtype, generator) / 10


def _add_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    x, weight = _norm_inputs(shape, device, dtype, generator)
    return x, randn(tuple(x.shape), device, dtype, generator), weight


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_definition(x, weight, EPS)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_definition(total, weight, EPS), total


def _torch_norm() -> Callable:
    return lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS)


def _liger_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False)


def _liger_add_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda x, residual, weight: liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)


def _quack_norm() -> Callable:
    from quack.rmsnorm import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=EPS)


def _quack_add_norm() -> Callable:
    from quack.rmsnorm import rmsnorm

    return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)[:2]


RMS_NORM = Op(
    "rms_norm", _norm_inputs, (0, 1), eager_norm, _moves(2, 3, lambda s: s["N"] * s["H"]),
    {
        "burnish": lambda: lambda x, weight: kernels.rms_norm(x, weight, EPS),
        "transformers": lambda: eager_norm,
        "torch.compile": _compiled(eager_norm),
        "torch rms_norm": _torch_norm,
        "Liger": _liger_norm,
        "quack": _quack_norm,
    },
    gate={"N": 256, "H": 512}, by_token=(0,),
)  # fmt: skip
ADD_RMS_NORM = Op(
    "add_rms_norm", _add_inputs, (0, 1, 2), eager_add_norm, _moves(4, 4, lambda s: s["N"] * s["H"]),
    {
        "burnish": lambda: lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight, EPS),
        "transformers": lambda: eager_add_norm,
        "torch.compile": _compiled(eager_add_norm),
        "Liger": _liger_add_norm,
        "quack": _quack_add_norm,
    },
    gate={"N": 256, "H": 512}, by_token=(0, 1),
)  # fmt: skip


# ---- rotation


def _angles(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [N, D] as transformers' rotary embeddings give them, of positions that restart every 2048 tokens."""
    width = shape["D"]
    rates = 500000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    turns = (torch.arange(shape["N"], device=device) % 2048).float()[:, None] * rates
    turns = torch.cat((turns, turns), dim=-1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def _rope_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """q [N, Hq, D], k [N, Hk, D] as projections leave them, cos and sin [N, D]."""
    heads = [(shape["N"], shape[name], shape["D"]) for name in ("Hq", "Hk")]
    return *(randn(size, device, dtype, generator) for size in heads), *_angles(shape, device, dtype)


def _qk_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """q, k, the norms' weights [D], cos, sin."""
    q, k, cos, sin = _rope_inputs(shape, device, dtype, generator)
    weights = (1 + randn((shape["D"],), device, dtype, generator) / 10 for _ in range(2))
    return q, k, *weights, cos, sin


def _turned(shape: Shape) -> int:
    return shape["N"] * shape["D"] * (shape["Hq"] + shape["Hk"])


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' function on its layout [1, heads, N, D], which here is a view."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    turned = apply_rotary_pos_emb(_by_head(q), _by_head(k), cos[None], sin[None])
    return _by_token(turned[0]), _by_token(turned[1])


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _by_token(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def eager_qk(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return eager_rope(eager_norm(q, qw), eager_norm(k, kw), cos, sin)


def _qk_definition(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope_definition(eager_norm(q, qw), eager_norm(k, kw), cos, sin)


def _liger_rope() -> Callable:
    from liger_kernel.transformers.functional import liger_rope

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = liger_rope(_by_head(q), _by_head(k), cos[None], sin[None])
        return _by_token(turned[0]), _by_token(turned[1])

    return rope


def _liger_qk() -> Callable:
    norm, rope = _liger_norm(), _liger_rope()
    return lambda q, k, qw, kw, cos, sin: rope(norm(q, qw), norm(k, kw), cos, sin)


def _quack_rope() -> Callable:
    from quack.rotary import apply_rotary_emb

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        return tuple(apply_rotary_emb(x[None], cos[:, :half], sin[:, :half])[0] for x in (q, k))

    return rope


ROPE = Op(
    "rope", _rope_inputs, (0, 1), rope_definition, _moves(2, 2, _turned),
    {
        "burnish": lambda: lambda q, k, cos, sin: kernels.rope(q, k, cos, sin),
        "transformers": lambda: eager_rope,
        "torch.compile": _compiled(eager_rope),
        "Liger, in place": _liger_rope,
        "quack": _quack_rope,
    },
    gate={"N": 64, "Hq": 4, "Hk": 2, "D": 128}, by_token=(0, 1, 2, 3),
)  # fmt: skip
QK_NORM_ROPE = Op(
    "qk_norm_rope", _qk_inputs, (0, 1, 2, 3), _qk_definition, _moves(2, 3, _turned),
    {
        "burnish": lambda: lambda q, k, qw, kw, cos, sin: kernels.qk_norm_rope(q, k, qw, kw, cos, sin, EPS),
        "transformers": lambda: eager_qk,
        "torch.compile": _compiled(eager_qk),
        "Liger, norms then rope": _liger_qk,
        "quack": QUACK_NONE,
    },
    gate={"N": 64, "Hq": 4, "Hk": 2, "D": 128}, by_token=(0, 1, 4, 5),
)  # fmt: skip


# ---- gated units


def _glu_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    return tuple(randn((shape["N"], shape["I"]), device, dtype, generator) for _ in range(2))


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _liger_glu(name: str) -> Way:
    def way() -> Callable:
        from liger_kernel.transformers import functional

        return getattr(functional, name)

    return way


def _glu(name: str, eager: Callable, definition: Callable) -> Op:
    ways: dict[str, Way] = {
        "burnish": lambda: getattr(kernels, name),
        "transformers": lambda: eager,
        "torch.compile": _compiled(eager),
        "Liger, in place": _liger_glu(f"liger_{name}"),
        "quack": QUACK_NONE,
    }
    count = _moves(3, 5, lambda s: s["N"] * s["I"])
    return Op(name, _glu_inputs, (0, 1), definition, count, ways, gate={"N": 256, "I": 512}, by_token=(0, 1))


SWIGLU = _glu("swiglu", eager_swiglu, swiglu_definition)
GEGLU = _glu("geglu", eager_geglu, geglu_definition)
