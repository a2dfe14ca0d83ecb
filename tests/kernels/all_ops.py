"""Every differentiable op as a function of tensors, with inputs of any size: for tests of what all of them must do.

The truth is the op's own definition (use("reference")) on float64 inputs, differentiated by autograd; the tests of each
op hold the definitions against transformers, peft and brute force.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from burnish import kernels
from burnish.kernels import use

EPS = 1e-5
VOCAB = 11


class Op(NamedTuple):
    """run: tensors -> tensor or tuple. draw: (tokens, width) -> its float32 tensors.

    rows, trained: which tensors have one row a token, and which get gradients. interpreted: has Triton kernels.
    """

    run: Callable
    draw: Callable[[int, int], list[Tensor]]
    rows: tuple[int, ...]
    trained: tuple[int, ...]
    interpreted: bool = True


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(tokens, device=device) * 7 % VOCAB


def _norm(tokens, width):
    return [randn(tokens, width, seed=0), 1 + 0.3 * randn(width, seed=1)]


def _add_norm(tokens, width):
    return [randn(tokens, width, seed=0), randn(tokens, width, seed=2), 1 + 0.3 * randn(width, seed=1)]


def _heads(tokens, width):
    """Queries of 3 heads and keys of 1; the halves of cos and sin differ, so that only the true transpose passes."""
    width += width % 2
    return [randn(tokens, *shape, seed=i) for i, shape in enumerate([(3, width), (1, width), (width,), (width,)])]


def _normed_heads(tokens, width):
    q, k, cos, sin = _heads(tokens, width)
    return [q, k, 1 + 0.3 * randn(q.shape[-1], seed=5), 1 + 0.3 * randn(q.shape[-1], seed=6), cos, sin]


def _gates(tokens, width):
    return [2 * randn(tokens, width, seed=0), randn(tokens, width, seed=1)]


def _gates_and_down(tokens, width):
    return [*_gates(tokens, width), randn(5, width, seed=2), randn(5, seed=3)]


def _lora(tokens, width):
    return [
        randn(tokens, width, seed=0),
        randn(5, width, seed=1),
        randn(5, seed=2),
        randn(2, width, seed=3),
        randn(5, 2, seed=4),
    ]


def _attention(tokens, width):
    return [randn(tokens, heads, width, seed=heads) for heads in (4, 2)] + [randn(tokens, 2, width, seed=7)]


def _attend(q, k, v):
    half = q.shape[0] // 2
    cu = torch.tensor([0, half, q.shape[0]], dtype=torch.int32)
    return kernels.varlen_attention(q, k, v, cu, q.shape[0] - half)


def _head(tokens, width):
    return [
        randn(tokens, width, seed=0) / max(1, width / 8) ** 0.5,
        0.5 * randn(VOCAB, width, seed=1),
        randn(VOCAB, seed=2),
    ]


def _logprob(x, w, b):
    return kernels.linear_logprob(x, w, labels(len(x), x.device), bias=b, all_valid=True)


def _cross_entropy(reduction):
    return lambda x, w, b: kernels.linear_cross_entropy(
        x, w, labels(len(x), x.device), bias=b, reduction=reduction, all_valid=True
    )


OPS = {
    "rms_norm": Op(lambda x, w: kernels.rms_norm(x, w, EPS), _norm, (0,), (0, 1)),
    "rms_norm gemma": Op(lambda x, w: kernels.rms_norm(x, w, EPS, offset=1.0, cast="gemma"), _norm, (0,), (0, 1)),
    "add_rms_norm": Op(lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), _add_norm, (0, 1), (0, 1, 2)),
    "rope": Op(lambda *t: kernels.rope(*t), _heads, (0, 1, 2, 3), (0, 1)),
    "rope interleaved": Op(lambda *t: kernels.rope(*t, interleaved=True), _heads, (0, 1, 2, 3), (0, 1)),
    "qk_norm_rope": Op(lambda *t: kernels.qk_norm_rope(*t, EPS), _normed_heads, (0, 1, 4, 5), (0, 1, 2, 3)),
    "swiglu": Op(lambda g, u: kernels.swiglu(g, u), _gates, (0, 1), (0, 1)),
    "geglu": Op(lambda g, u: kernels.geglu(g, u), _gates, (0, 1), (0, 1)),
    "geglu erf": Op(lambda g, u: kernels.geglu(g, u, approximate="none"), _gates, (0, 1), (0, 1)),
    "glu_linear": Op(lambda *t: kernels.glu_linear(*t, activation="silu"), _gates_and_down, (0, 1), (0, 1, 2, 3)),
    "lora_linear": Op(lambda *t: kernels.lora_linear(*t, 0.7), _lora, (0,), (0, 1, 2, 3, 4), interpreted=False),
    "varlen_attention": Op(_attend, _attention, (0, 1, 2), (0, 1, 2), interpreted=False),
    "linear_logprob": Op(_logprob, _head, (0,), (0, 1, 2)),
    "linear_cross_entropy": Op(_cross_entropy("mean"), _head, (0,), (0, 1, 2)),
    "linear_cross_entropy none": Op(_cross_entropy("none"), _head, (0,), (0, 1, 2)),
}
PATHS = [(name, "auto") for name in OPS] + [(name, "triton") for name, op in OPS.items() if op.interpreted]
IDS = [f"{name.replace(' ', '_')}-{backend}" for name, backend in PATHS]


def outputs(op: Op, tensors, backend: str = "auto") -> list[Tensor]:
    with use(backend):
        out = op.run(*tensors)
    return list(out) if isinstance(out, tuple) else [out]


def leaves(op: Op, tensors, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies of the tensors; those that are trained require gradients."""
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_(i in op.trained) for i, t in enumerate(tensors)]


def upstream(outs) -> list[Tensor]:
    return [randn(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outs)]


def gradients(op: Op, tensors, outs, ups, **options) -> list[Tensor]:
    given = [t for i, t in enumerate(tensors) if i in op.trained]
    return list(torch.autograd.grad(outs, given, ups, **options))


def truth(op: Op, tensors, ups=None) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the trained tensors) by the definition in float64."""
    wide = leaves(op, tensors, torch.float64)
    outs = outputs(op, wide, "reference")
    ups = upstream(outs) if ups is None else ups
    return [out.detach() for out in outs], gradients(op, wide, outs, [up.double() for up in ups])


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; exact agreement demanded where the truth is 0."""
    assert got.shape == want.shape
    return ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(op: Op, tensors, backend: str, limit: float = 3e-6) -> None:
    """Outputs and every gradient of random upstreams against the truth."""
    tensors = [t.detach().requires_grad_(i in op.trained) for i, t in enumerate(tensors)]
    outs = outputs(op, tensors, backend)
    ups = upstream(outs)
    want_outs, want_grads = truth(op, tensors, ups)
    grads = gradients(op, tensors, outs, ups)
    for got, want in zip([*outs, *grads], [*want_outs, *want_grads], strict=True):
        assert error(got, want) < limit
