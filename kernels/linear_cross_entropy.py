"""linear_cross_entropy: the training loss of the head with its gradients made in the forward, logits computed once.

Where the loss is one number, the gradient that reaches each token is known beforehand up to one scalar. The forward
therefore turns each chunk of logits into gradients at once (6NHV operations, 4NHV where the weight is frozen), and the
backward only multiplies by that scalar, on the device. The weight's gradient is added up in float32 over the chunks.
z-loss and label smoothing cost nothing more, except on a GPU smoothing together with a softcap: that makes the logits
twice (8NHV). Reduction "none" has no such scalar and runs as linear_logprob does, whose machinery this is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from burnish.kernels.head_chunks import HeadSpec, Stats, Upstream, sweep
from burnish.kernels.head_compile import uncompiled
from burnish.kernels.linear_logprob import (
    Selected,
    autocasted,
    define,
    head_backend,
    select,
    token_terms,
    wanted,
)
from burnish.kernels.once import differentiable_once

REDUCTIONS = ("mean", "sum", "none")


class Outcome(NamedTuple):
    """loss: scalar, or [n] for reduction "none"; the rest [n], detached."""

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    top: Tensor | None


# ---- definition


def define_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec, scale: Tensor
) -> Outcome:
    """sum_i scale_i * loss_i over materialised logits; autograd differentiates. `scale` [n]: weights / denominator."""
    stats = define(x, weight, bias, labels, spec)
    return _outcome((stats.loss * scale).sum(), stats)


def _outcome(loss: Tensor, stats: Stats) -> Outcome:
    return Outcome(loss, stats.nll.detach(), stats.entropy.detach(), stats.top)


# ---- autograd


class SumLoss(torch.autograd.Function):
    """sum_i scale_i * loss_i with gradients made in the forward.

    The first backward gives them away, so that autograd can take the weight's as its .grad without a copy; one that
    comes after it, with retain_graph, makes them again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, scale, spec, backend, needs):
        ctx.set_materialize_grads(False)
        stats, ctx.grads, _ = sweep(x, weight, bias, labels, spec, backend, upstream=Upstream(scale), needs=needs)
        ctx.save_for_backward(x, weight, bias, labels, scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.again = spec, backend, needs
        entropy = stats.entropy if spec.entropy else None
        ctx.mark_non_differentiable(*(t for t in (stats.nll, entropy, stats.top) if t is not None))
        return (stats.loss * scale).sum(), stats.nll, entropy, stats.top

    @staticmethod
    @differentiable_once
    def backward(ctx, g, _nll, _entropy, _top):
        if g is None:
            return (None,) * 8
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            *inputs, scale = ctx.saved_tensors
            spec, backend, needs = ctx.again
            _, grads, _ = sweep(*inputs, spec, backend, upstream=Upstream(scale), needs=needs)
        return *(_times(made, g, dtype) for made, dtype in zip(grads, ctx.dtypes, strict=True)), *(None,) * 5


def _times(made: Tensor | None, g: Tensor, dtype: torch.dtype) -> Tensor | None:
    """g * made in `dtype`, in place where that is made's own; g stays on the device."""
    if made is None:
        return None
    if made.dtype != dtype:
        return torch.mul(made, g, out=torch.empty_like(made, dtype=dtype))
    return made if g.device.type == "cpu" and g.item() == 1 else made.mul_(g)


def total_loss(rows: Selected, weight: Tensor, bias: Tensor | None, spec: HeadSpec, scale: Tensor) -> Outcome:
    backend = head_backend(rows.x, weight)
    if backend == "reference":
        return define_loss(rows.x, weight, bias, rows.labels, spec, scale)
    needs = wanted(rows.x, weight, bias)
    if not any(needs):
        stats, _, _ = sweep(rows.x, weight, bias, rows.labels, spec, backend)
        return _outcome((stats.loss * scale).sum(), stats)
    return Outcome(*SumLoss.apply(rows.x, weight, bias, rows.labels, scale, spec, backend, needs))


# ---- public


@uncompiled
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_logprob: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    all_valid: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of labels [...] under the head hidden [..., H] @ weight [V, H].T + bias [V], as one loss.

    loss_i = w_i * ((1 - s) nll_i + s * mean_j(-log p_ij) + z_loss * lse_i^2), with w = `token_weights` [...] (constant,
    1 if not given), s = `label_smoothing` and lse_i the log-sum-exp of the row's effective logits (see linear_logprob).
    "mean" divides the sum of loss_i by the number of labels that are not `ignore_index`, or by `num_items` (int or 0-d
    tensor: the count of a whole accumulation step or of all ranks); "sum" does not divide; "none" returns [...], 0
    where ignored. Nothing to average (all ignored): 0, with gradients that are exactly 0.

    Returns the loss, float32; with flags a tuple of loss, logps [...], entropy [...] (float32, detached, 0 where
    ignored) and argmax [...] (int64, -1 where ignored), those asked for. On a GPU, label smoothing and z-loss cost the
    logits a second time (8NHV). Errors, dtypes and `all_valid` as in linear_logprob.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: use one of {', '.join(REDUCTIONS)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides a mean; it means nothing with reduction={reduction!r}")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights {list(token_weights.shape)} must have the shape of labels {list(labels.shape)}"
        )
    spec = HeadSpec(softcap, logit_scale, temperature, label_smoothing, z_loss, return_entropy, return_argmax)
    hidden, weight, bias = autocasted(hidden, weight, bias)
    rows = select(hidden, weight, labels, bias, ignore_index, all_valid)
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    scale = _row_scale(rows, token_weights, reduction, num_items, dtype)
    if reduction == "none":
        stats = token_terms(rows.x, weight, bias, rows.labels, spec)
        result = _outcome(rows.restore(stats.loss * scale), stats)
    else:
        result = total_loss(rows, weight, bias, spec, scale)
    out = [result.loss]
    if return_logprob:
        out.append(rows.restore(-result.nll))
    if return_entropy:
        out.append(rows.restore(result.entropy))
    if return_argmax:
        out.append(rows.restore(result.top, fill=-1))
    return out[0] if len(out) == 1 else tuple(out)


def _row_scale(
    rows: Selected, weights: Tensor | None, reduction: str, num_items: int | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[n]: what each row's loss is multiplied by before the sum."""
    n, device = rows.x.shape[0], rows.x.device
    if weights is None:
        scale = torch.ones(n, dtype=dtype, device=device)
    else:
        scale = weights.detach().reshape(-1).to(device, dtype)
        scale = scale if rows.places is None else scale[rows.places]
    if reduction != "mean":
        return scale.contiguous()
    if isinstance(num_items, Tensor):
        items = num_items.detach().to(device, dtype)
        return scale / torch.where(items == 0, 1.0, items)  # nothing to average: every row is ignored
    return scale / ((n if num_items is None else num_items) or 1)
