"""Model + batch -> per-token log-probs: the one way from tokens to numbers, for every objective, metric and reference.

The backbone gives hidden states, the head gives log-probs of the trained positions only; logits never exist. Objectives
get `Scores`; SFT's plain loss may ask for `nll` instead, the same head with its upstream gradient known in advance.

Shapes: T tokens of the packed row, N of them trained (batch.num_valid), H hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.data.batch import Batch
from burnish.kernels import linear_cross_entropy, linear_logprob
from burnish.model.attention import packed_arguments
from burnish.model.head import Head, backbone


@dataclass
class Scores:
    """What the head says of a batch. `entropy` and `correct` are for metrics and carry no gradient."""

    logps: Tensor  # [T] float32; log p(labels[t]), 0 where nothing is trained
    entropy: Tensor  # [N] float32
    correct: Tensor  # [N] bool: the label is the most likely token
    sharp: Tensor | None = None  # [T] float32; log p(labels[t]) at temperature 1/2, no gradient, where asked for


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states of the packed row, [T, H] in the model's dtype."""
    packed = packed_arguments(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    return backbone(model)(**packed).last_hidden_state[0]


def _trained(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of the trained positions: [N, H], [N]."""
    if batch.num_valid == hidden.shape[0]:
        return hidden, batch.labels
    return hidden.index_select(0, batch.valid), batch.labels[batch.valid]


def token_scores(model: nn.Module, head: Head, batch: Batch, *, sharp: bool = False) -> Scores:
    """Log-probs of every trained token of `batch` under `model`, differentiable in any way.

    Where the head is trained its exponentials stay until the backward, up to the limit that linear_logprob documents:
    three matrix products a token, four beyond.

    sharp   also the log-probs at temperature 1/2, for one more pass over the head without gradients: with them
            log sum_v p_v^2 = 2 log p - log p_sharp, for every token's label
    """
    hidden, labels = _trained(hidden_states(model, batch), batch)
    logps, entropy, best = linear_logprob(
        hidden, head.weight, labels, all_valid=True, return_entropy=True, return_argmax=True, **head.options()
    )
    full = torch.zeros(batch.labels.shape[0], dtype=torch.float32, device=hidden.device)  # [T]
    scores = Scores(full.index_copy(0, batch.valid, logps), entropy.detach(), best == labels)
    if sharp:
        with torch.no_grad():
            values = linear_logprob(hidden, head.weight, labels, all_valid=True, temperature=0.5, **head.options())
        scores.sharp = full.index_copy(0, batch.valid, values)
    return scores


def token_nll(model: nn.Module, head: Head, batch: Batch) -> tuple[Tensor, Scores]:
    """Sum of -log p over the trained tokens, with gradients made in the forward pass; and the scores, all detached."""
    hidden, labels = _trained(hidden_states(model, batch), batch)
    loss, logps, entropy, best = linear_cross_entropy(
        hidden,
        head.weight,
        labels,
        reduction="sum",
        all_valid=True,
        return_logprob=True,
        return_entropy=True,
        return_argmax=True,
        **head.options(),
    )
    full = torch.zeros(batch.labels.shape[0], dtype=torch.float32, device=hidden.device)  # [T]
    return loss, Scores(full.index_copy(0, batch.valid, logps), entropy, best == labels)


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of per-token values [T] over each packed sequence, [S]; differentiable, in a fixed order (no atomics).

    Added up in float64: objectives look at differences of these sums, and one float32 after the other would lose 9e-4
    of a sum over 400 tokens.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0.0).to(values.dtype)
