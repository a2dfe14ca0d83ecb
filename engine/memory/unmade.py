"""A gated MLP for its backward alone: no gradient needs the down projection's product, so it isn't made.

The forwards here save what the kernels' own save and return a tensor of the right shape that holds nothing; the
backwards are the kernels' own, so gradients are the same bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels import swiglu
from burnish.kernels.dispatch import backend_for
from burnish.kernels.glu import _GatedLinear
from burnish.kernels.lora import CHUNK, _LoRALinear
from burnish.model import blocks
from burnish.model.adapters import is_adapted, plain_lora
from burnish.model.probe import has_hooks


def mlp_ends(layer: nn.Module, normed: Tensor, residual: Tensor) -> list[Tensor]:
    """Tensors that each take the gradient of the layer's output [B, T, H], in place of blocks.mlp(...)."""
    gate_proj, up_proj, down = (getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    backend = backend_for(normed)
    if backend == "reference" or torch.is_autocast_enabled(normed.device.type):
        return [blocks.mlp(layer, normed, residual)]
    if type(down) is nn.Linear and not has_hooks(down) and "forward" not in vars(down):
        gate, up = blocks.linears([gate_proj, up_proj], normed)
        return [_GatedProduct.apply(gate, up, down.weight, down.bias, "silu", backend), residual]
    parts = plain_lora(down) if is_adapted(down) else ""
    if isinstance(parts, str) or parts[0].weight.dtype != normed.dtype:
        return [blocks.mlp(layer, normed, residual)]
    base, a, b, scale = parts
    gate, up = blocks.linears([gate_proj, up_proj], normed)
    return [_AdaptedProduct.apply(swiglu(gate, up), (float(scale),), base.weight, base.bias, a, b), residual]


class _GatedProduct(_GatedLinear):
    """glu_linear without its product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, act: str, backend: str):
        ctx.save_for_backward(gate, up, weight)
        ctx.act, ctx.backend = act, backend
        return gate.new_empty(()).expand(*gate.shape[:-1], weight.shape[0])


class _AdaptedProduct(_LoRALinear):
    """lora_linear without its products, the thin one x A^T apart, which dB needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float], *parameters: Tensor | None) -> Tensor:  # type: ignore[override]
        weight, _, a, b = parameters
        assert weight is not None and a is not None
        wants_weight, _, wants_a, wants_b = ctx.needs_input_grad[2:]
        flat = x.reshape(-1, x.shape[-1])  # [T, K]
        low = None
        if wants_b:
            rows = flat.split(flat.shape[0] if x.dtype == a.dtype else CHUNK)
            low = torch.cat([each.to(a.dtype) @ a.t() for each in rows])  # [T, r]
        ctx.save_for_backward(x if wants_weight or wants_a else None, low, weight, a, b)
        ctx.scales, ctx.shape = scales, x.shape
        return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])
