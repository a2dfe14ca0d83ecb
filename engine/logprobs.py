"""Model + batch -> per-token log-probs: the one way from tokens to numbers, for every objective, metric and reference.

The backbone gives hidden states, the head gives log-probs of the trained positions only; logits never exist. Objectives
get `Scores`; SFT's plain loss may ask for `nll` instead, the same head with its upstream gradient known in advance.

Where the parameters are divided among processes all of it runs inside the model's root, where they are whole; where a
row is, each process runs its slice and gets everyone's numbers (burnish.parallel).

Shapes: T tokens of the packed row, N of them trained (batch.num_valid), H hidden.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from burnish.data.batch import Batch
from burnish.kernels import linear_cross_entropy, linear_logprob
from burnish.model.attention import packed_arguments
from burnish.model.head import Head, backbone, read_head
from burnish.parallel.sequence import Slice, cut, joined, summed
from burnish.parallel.shards import inside, sharded
from burnish.parallel.world import world


@dataclass
class Scores:
    """What the head says of a batch. `entropy` and `correct` are for metrics and carry no gradient."""

    logps: Tensor  # [T] float32; log p(labels[t]), 0 where nothing is trained
    entropy: Tensor  # [N] float32
    correct: Tensor  # [N] bool: the label is the most likely token
    sharp: Tensor | None = None  # [T] float32; log p(labels[t]) at temperature 1/2, no gradient, where asked for


def hidden_states(model: nn.Module, batch: Batch | Slice) -> Tensor:
    """Last hidden states of the packed row (or of this process's slice of it), [T, H] in the model's dtype."""
    if isinstance(batch, Batch) and batch.inputs is not None:  # padded rows, of which the real tokens count
        assert batch.place is not None
        padded = backbone(model)(**batch.inputs, use_cache=False).last_hidden_state  # [B, L, H]
        return padded.flatten(0, 1).index_select(0, batch.place)
    packed = packed_arguments(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    return backbone(model)(**packed).last_hidden_state[0]


def _trained(hidden: Tensor, batch: Batch | Slice) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of the trained positions: [N, H], [N]."""
    if len(batch.valid) == hidden.shape[0]:
        return hidden, batch.labels
    return hidden.index_select(0, batch.valid), batch.labels[batch.valid]


def _spread(values: Tensor, batch: Batch, part: Batch | Slice) -> Tensor:
    """Values [N] of the trained positions of `part` (the batch, or a slice of it) as float32 over the row, [T]."""
    full = torch.zeros(part.labels.shape[0], dtype=torch.float32, device=values.device)
    full = full.index_copy(0, part.valid, values.float())
    return joined(full, part) if isinstance(part, Slice) else full


def _picked(values: Tensor, batch: Batch, part: Batch | Slice) -> Tensor:
    """Values [N] of the trained positions of the whole batch, from those of `part`; no gradient."""
    return _spread(values, batch, part)[batch.valid].to(values.dtype) if isinstance(part, Slice) else values


def token_scores(model: nn.Module, head: Head, batch: Batch, *, sharp: bool = False) -> Scores:
    """Log-probs of every trained token of `batch` under `model`, differentiable in any way.

    Where the head is trained its exponentials stay until the backward, up to the limit that linear_logprob documents:
    three matrix products a token, four beyond.

    sharp   also the log-probs at temperature 1/2, for one more pass over the head without gradients: with them
            log sum_v p_v^2 = 2 log p - log p_sharp, for every token's label
    """
    return inside(model, partial(_token_scores, model, head, batch, sharp))


def _token_scores(model: nn.Module, head: Head, batch: Batch, sharp: bool) -> Scores:
    head = read_head(model) if sharded(model) else head
    part = cut(batch) if world().sequence > 1 else batch
    hidden, labels = _trained(hidden_states(model, part), part)
    logps, entropy, best = linear_logprob(
        hidden, head.weight, labels, all_valid=True, return_entropy=True, return_argmax=True, **head.options()
    )
    scores = Scores(
        _spread(logps, batch, part), _picked(entropy.detach(), batch, part), _picked(best == labels, batch, part)
    )
    if sharp:
        with torch.no_grad():
            values = linear_logprob(hidden, head.weight, labels, all_valid=True, temperature=0.5, **head.options())
        scores.sharp = _spread(values, batch, part)
    return scores


def token_nll(model: nn.Module, head: Head, batch: Batch) -> tuple[Tensor, Scores]:
    """Sum of -log p over the trained tokens, with gradients made in the forward pass; and the scores, all detached."""
    return inside(model, partial(_token_nll, model, head, batch))


def _token_nll(model: nn.Module, head: Head, batch: Batch) -> tuple[Tensor, Scores]:
    head = read_head(model) if sharded(model) else head
    part = cut(batch) if world().sequence > 1 else batch
    hidden, labels = _trained(hidden_states(model, part), part)
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
    scores = Scores(_spread(logps, batch, part), _picked(entropy, batch, part), _picked(best == labels, batch, part))
    return summed(loss) if isinstance(part, Slice) else loss, scores


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of per-token values [T] over each packed sequence, [S]; differentiable, in a fixed order (no atomics).

    Added up in float64: objectives look at differences of these sums, and one float32 after the other would lose 9e-4
    of a sum over 400 tokens.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0.0).to(values.dtype)
