"""linear_logprob: hidden states to per-token log-probs (and entropy, argmax) without ever holding the logits.

Effective logits of a token, in this order: z = softcap * tanh(logit_scale * (h @ W.T + bias) / softcap) / temperature
(without a softcap z = logit_scale * (h @ W.T + bias) / temperature).

Which gradients are made when (N rows that have a target, H hidden size, V vocabulary):
  weight and bias frozen   the forward makes d logp_i / d h_i, 4NHV operations and N*H numbers kept; the backward
                           scales rows
  otherwise                the forward keeps the exponentials of as many rows as `keep_bytes` holds, from which the
                           backward makes gradients for any upstream: 6NHV. For rows beyond, the backward makes the
                           logits again, 8NHV, and the forward keeps a few numbers a row
  linear_cross_entropy     knows the upstream gradient in advance: 6NHV, nothing kept (see its module)
An entropy that is differentiated takes 8NHV in any case (6NHV with a frozen weight: its own logits and dX).

Pairs and groups need no form of their own. Their loss derivative is known once all their log-probs are, so a group's
exponentials must be kept until then whoever orders the work; keeping those of the batch asks nothing of the loss.

Dtypes: float32 sums and results whatever the inputs are. Under autocast hidden, weight and bias are first cast to
autocast's dtype, as torch's linear layer does. Otherwise bfloat16 with bfloat16 is multiplied as such and added up in
float32, and every other pair is computed in float32 (the weight tile by tile). float64 inputs run the definition.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from burnish.kernels.dispatch import backend_for
from burnish.kernels.head_chunks import HeadSpec, Kept, Stats, Upstream, chunks_to_keep, sweep, work_dtype
from burnish.kernels.head_compile import uncompiled
from burnish.kernels.once import differentiable_once

# ---- definition


def define(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec) -> Stats:
    """The head by the book, all logits [n, V] at once, in float32 or (if an input is) float64, for autograd."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        z = x.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            z = z + bias.to(dtype)
        z = z * spec.logit_scale
        if spec.softcap:
            z = spec.softcap * torch.tanh(z / spec.softcap)
        z = z / spec.temperature
    lse = torch.logsumexp(z, dim=-1)
    logp = torch.log_softmax(z, dim=-1)
    nll = -logp.gather(-1, labels[:, None])[:, 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    loss = nll
    if spec.label_smoothing:
        loss = (1 - spec.label_smoothing) * nll - spec.label_smoothing * logp.mean(-1)
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
    return Stats(loss, nll, lse, entropy, lse, lse, lse, z.argmax(-1) if z.shape[0] else labels)


# ---- which rows count


class Selected(NamedTuple):
    """Rows that have a target. `places` is None if all do, else where they stand among the rows of `shape`."""

    x: Tensor  # [n, H]
    labels: Tensor  # [n] int64
    places: Tensor | None  # [n]
    shape: torch.Size

    def restore(self, values: Tensor, fill: int = 0) -> Tensor:
        """[n] -> the shape of the labels, `fill` where ignored."""
        if self.places is None:
            return values.view(self.shape)
        return values.new_full((self.shape.numel(),), fill).index_copy(0, self.places, values).view(self.shape)


def select(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore: int, all_valid: bool
) -> Selected:
    """Drop ignored rows before any GEMM and see that every label lies in the vocabulary.

    On the CPU a bad label is a ValueError. On a GPU, where asking would stall, it is a device-side assertion.
    """
    if any(hasattr(tensor, "full_tensor") for tensor in (hidden, weight, bias)):
        raise ValueError("a DTensor goes into the head: give its full_tensor(), or call this where it is gathered")
    vocab, size = weight.shape
    if hidden.shape[-1] != size or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} do not fit: "
            "want [..., H], [V, H] and [...]"
        )
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias has shape {list(bias.shape)}, want [{vocab}]")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, want integers")
    x, flat, places = hidden.reshape(-1, size), labels.reshape(-1).long(), None
    if not all_valid:
        places = (flat != ignore).nonzero()[:, 0]
        if places.numel() == flat.numel():
            places = None
        else:
            x, flat = x.index_select(0, places), flat[places]
    bad = (flat < 0) | (flat >= vocab)
    if flat.is_cuda:
        torch._assert_async((~bad).all(), "linear head: a label lies outside the vocabulary and is not ignore_index")
        flat = flat.clamp(0, vocab - 1)
    elif bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        place = first if places is None else int(places[first])
        raise ValueError(
            f"labels[{place}] is {int(flat[first])}, outside the vocabulary of {vocab} and not ignore_index={ignore}"
        )
    return Selected(x, flat.contiguous(), places, labels.shape)


def autocasted(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as a linear layer would see them under the autocast that is on now, if one is."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def head_backend(x: Tensor, weight: Tensor) -> str:
    """As dispatch decides; float64 on the CPU path is the definition."""
    backend = backend_for(x)
    return "reference" if torch.float64 in (x.dtype, weight.dtype) else backend


def wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)


# ---- autograd


class TokenLoss(torch.autograd.Function):
    """Per-token loss and entropy whose upstream gradients are not known yet."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels, spec, backend, needs, keep):
        ctx.set_materialize_grads(False)
        if needs == (True, False, False):  # what the upstream gradients scale is then small enough to keep whole
            ones = Upstream(torch.ones(x.shape[0], device=x.device))
            stats, grads, kept = sweep(x, weight, bias, labels, spec, backend, upstream=ones, needs=needs)
        else:
            stats, grads, kept = sweep(x, weight, bias, labels, spec, backend, keep=keep)
        nll = stats.nll.clone()  # an output of its own: loss and nll may be one tensor
        entropy = stats.entropy.clone()
        # E is saved as inputs are, so that checkpointing drops it and the first backward frees it
        ctx.save_for_backward(x, weight, bias, labels, *stats[:-1], grads.x, *((kept.unit, *kept.exps) if kept else ()))
        ctx.again = replace(spec, argmax=False), backend, needs
        ctx.mark_non_differentiable(*(t for t in (nll, stats.top) if t is not None))
        return stats.loss, entropy, nll, stats.top

    @staticmethod
    @differentiable_once
    def backward(ctx, g_loss, g_entropy, _nll, _top):
        x, weight, bias, labels, *rest = ctx.saved_tensors
        stats, dx, kept = rest[: len(Stats._fields) - 1], rest[len(Stats._fields) - 1], rest[len(Stats._fields) :]
        spec, backend, needs = ctx.again
        if g_loss is None and g_entropy is None:
            return (None,) * 8
        if dx is not None and g_entropy is None:
            return (dx * g_loss[:, None]).to(x.dtype), *(None,) * 7
        g_loss = torch.zeros_like(stats[0]) if g_loss is None else g_loss.contiguous()
        g_entropy = None if g_entropy is None else g_entropy.contiguous()
        _, grads, _ = sweep(
            x, weight, bias, labels, spec if g_entropy is not None else replace(spec, entropy=False), backend,
            upstream=Upstream(g_loss, g_entropy), needs=needs, known=Stats(*stats, None),
            kept=Kept(kept[1:], kept[0]) if kept else None,
        )  # fmt: skip
        g_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        g_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return grads.x, g_weight, g_bias, *(None,) * 5


def token_terms(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, spec: HeadSpec, keep_bytes: int | None = None
) -> Stats:
    """Per-row loss and entropy, differentiable, on the backend in force. Of the rest, nll and top mean something."""
    backend = head_backend(x, weight)
    if backend == "reference":
        return define(x, weight, bias, labels, spec)
    needs = wanted(x, weight, bias)
    if not any(needs):
        return sweep(x, weight, bias, labels, spec, backend)[0]
    vocab, hidden = weight.shape
    keep = chunks_to_keep(x.shape[0], hidden, vocab, x.device, work_dtype(x, weight), keep_bytes)
    loss, entropy, nll, top = TokenLoss.apply(x, weight, bias, labels, spec, backend, needs, 0 if spec.uneven else keep)
    return Stats(loss, nll, nll, entropy, nll, nll, nll, top)


# ---- public


@uncompiled
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_argmax: bool = False,
    all_valid: bool = False,
    keep_bytes: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label under the head's softmax; logits exist only a chunk at a time.

    hidden [..., H] and weight [V, H] in any strides, labels [...] int, bias [V]. `all_valid` promises that no label is
    `ignore_index`, which spares a GPU the wait for their count. `keep_bytes`, where the weight or the bias is trained,
    is how much the forward may hold until the backward (see above): None for CUDA_KEEP_BYTES or CPU_KEEP_BYTES of
    head_chunks, 0 for nothing; otherwise at least one chunk of rows, for which the backward would need room anyway.

    Returns logps [...] float32 in nats, 0 where ignored; with flags a tuple of logps, entropy [...] float32 in nats
    (0 where ignored) and argmax [...] int64 (-1 where ignored), those asked for. logps and entropy are differentiable
    once; float64 inputs give float64.

    Raises ValueError for shapes that do not fit and, on the CPU, for a label outside the vocabulary, by its position;
    on a GPU such a label is a device-side assertion. The log-prob is -log1p(sum_{j != t} exp(z_j - z_t)), to 1e-5 of
    its size also where the model is certain.
    """
    spec = HeadSpec(softcap, logit_scale, temperature, entropy=return_entropy, argmax=return_argmax)
    hidden, weight, bias = autocasted(hidden, weight, bias)
    rows = select(hidden, weight, labels, bias, ignore_index, all_valid)
    stats = token_terms(rows.x, weight, bias, rows.labels, spec, keep_bytes)
    out = [rows.restore(-stats.loss)]
    if return_entropy:
        out.append(rows.restore(stats.entropy))
    if return_argmax:
        out.append(rows.restore(stats.top, fill=-1))
    return out[0] if len(out) == 1 else tuple(out)
