"""NEFTune: uniform noise on the input embeddings while training (arXiv 2310.05914).

A token of a document of L tokens gets noise within alpha / sqrt(L * d), d the embedding's width. L is the document's
own length in the packed row, so that packing changes nobody's noise.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.head import backbone

_BLOCK = 1 << 24  # random numbers made at a time: a row of 500,000 tokens would take gigabytes of them


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None, part: int = 0) -> Iterator[None]:
    """Inside, forwards in training mode with gradients on add noise to the input embeddings. alpha None or 0: never.

    part  which of the equal runs of a row this process computes, where it is divided

    The noise is drawn from torch's generator of the device, which checkpoints hold. Evaluation and reference models
    see the embeddings as they are.
    """
    if not alpha:
        yield
        return
    row: dict[str, Tensor | None] = {"edges": None}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        row["edges"] = kwargs.get("cu_seq_lens_q")

    def disturb(module: nn.Module, args: tuple, out: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            add_noise(out, alpha, row["edges"], part)

    handles = [
        backbone(model).register_forward_pre_hook(note, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(disturb),  # type: ignore[operator, union-attr]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def add_noise(embedded: Tensor, alpha: float, edges: Tensor | None, part: int = 0) -> None:
    """Add noise to `embedded` [B, T, d] in place: uniform within alpha / sqrt(L * d), L its document's length.

    edges  [S + 1] int32, where the documents of the whole row begin and end; None: each of B rows is one of T tokens

    In place and unseen by autograd, because the derivative of a sum with a constant is 1.
    """
    tokens, width = embedded.shape[1:]
    lengths = torch.full((tokens,), float(tokens), device=embedded.device)
    if edges is not None:
        places = torch.arange(part * tokens, (part + 1) * tokens, dtype=edges.dtype, device=edges.device)
        lengths = edges.diff()[torch.searchsorted(edges, places, right=True) - 1].float()  # [T]
    bound = alpha / torch.sqrt(lengths * width)  # [T]
    flat = embedded.detach()
    step = max(1, math.floor(_BLOCK / (width * embedded.shape[0])))
    for at in range(0, tokens, step):
        block = flat[:, at : at + step]
        noise = torch.rand(block.shape, dtype=torch.float32, device=block.device).mul_(2).sub_(1)
        block.add_(noise.mul_(bound[at : at + step, None]).to(block.dtype))
