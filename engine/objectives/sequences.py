"""From the log-probs of a packed stream to numbers per sequence and pair, and the pieces that objectives share.

T tokens, N of them with a label, S sequences, P pairs, U rated sequences. Counting asks nothing of the device.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.data.batch import IGNORE, Batch
from burnish.logprobs import Scores, sequence_sums
from burnish.objectives import Metrics
from burnish.parallel.world import total, total_count


def completion(batch: Batch) -> Tensor:
    """Which positions predict a token of a completion, [T] bool: all that have a label, or fewer where the batch says
    so (for ORPO, whose likelihood runs over the chosen prompts too)."""
    labelled = batch.labels != IGNORE
    return labelled if batch.completion is None else labelled & batch.completion


def num_pairs(batch: Batch) -> int:
    assert batch.chosen is not None, "a batch of pairs"
    return len(batch.chosen)


def num_rated(batch: Batch) -> int:
    assert batch.rated is not None, "a batch of rated completions"
    return len(batch.rated)


def rated_and_mismatched(batch: Batch) -> tuple[Batch, Batch]:
    """The rated sequences of a batch, which come first, and its mismatched ones, as batches of their own."""
    assert batch.mismatched is not None and batch.edge is not None, "KTO needs mismatched completions"
    number, (tokens, valid) = num_rated(batch), batch.edge
    assert number + len(batch.mismatched) == len(batch.rows), "rated sequences, then mismatched ones"
    rated = _part(batch, slice(0, number), slice(0, tokens), slice(0, valid))
    others = _part(batch, slice(number, None), slice(tokens, None), slice(valid, None))
    rated.mismatched = others.rated = others.desirable = None
    rated.edge = others.edge = None
    others.mismatched = torch.arange(len(others.cu_seqlens) - 1, device=batch.valid.device)
    return rated, others


def _part(batch: Batch, sequences: slice, tokens: slice, valid: slice) -> Batch:
    """A run of a batch's sequences, whose tokens and labelled positions stand at `tokens` and `valid`."""
    edges = slice(sequences.start, None if sequences.stop is None else sequences.stop + 1)
    places = batch.valid[valid] - tokens.start
    return replace(
        batch,
        input_ids=batch.input_ids[tokens],
        position_ids=batch.position_ids[tokens],
        cu_seqlens=batch.cu_seqlens[edges] - tokens.start,
        labels=batch.labels[tokens],
        num_valid=len(places),
        valid=places,
        rows=batch.rows[sequences],
        examples=batch.examples[sequences],
        completion=None if batch.completion is None else batch.completion[tokens],
        reference=None if batch.reference is None else batch.reference[sequences],
    )


def counts(wanted: Tensor, batch: Batch) -> Tensor:
    """Number of `wanted` [T] positions in each sequence, [S] int64."""
    running = F.pad(wanted.cumsum(0), (1, 0))  # [T + 1]
    edges = batch.cu_seqlens.long()
    return running[edges[1:]] - running[edges[:-1]]


def owners(batch: Batch) -> Tensor:
    """The sequence of each token, [T] int64."""
    lengths = batch.cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=len(batch.labels))


def completion_sums(logps: Tensor, batch: Batch, ld_alpha: float | None = None) -> Tensor:
    """Log-prob of each sequence's completion, [S], from token log-probs [T].

    ld_alpha   weight of the tokens of a pair's longer completion beyond the length of its shorter one (LD-DPO, arXiv
               2409.06411); None or 1: all count alike. A reference must be summed with the same ld_alpha.
    """
    mask = completion(batch)
    kept = torch.where(mask, logps, 0.0)
    if ld_alpha is not None:
        lengths, owner = counts(mask, batch), owners(batch)
        shorter = torch.minimum(lengths[batch.chosen], lengths[batch.rejected])
        shared = lengths.index_copy(0, batch.chosen, shorter).index_copy(0, batch.rejected, shorter)  # [S]
        running = mask.cumsum(0)  # [T]
        before = F.pad(running, (1, 0))[batch.cu_seqlens[:-1].long()]  # [S]
        place = running - before[owner]  # 1 at a completion's first token
        kept = torch.where(place <= shared[owner], kept, ld_alpha * kept)
    return sequence_sums(kept, batch.cu_seqlens)


def averages(sums: Tensor, tokens: Tensor) -> Tensor:
    """Sums per token; 0 for an empty completion."""
    return sums / tokens.clamp(min=1)


def smoothed_logistic(z: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z): a pair that is the wrong way round with probability e (cDPO)."""
    loss = -F.logsigmoid(z)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * F.logsigmoid(-z)


def power_limit(dtype: torch.dtype) -> float:
    """Largest exponent whose exp can still be multiplied by a few, and squared, in dtype: 40 in float32."""
    return math.log(torch.finfo(dtype).max) / 2 - 4


def bounded_exp(x: Tensor) -> Tensor:
    """exp, held (without gradient) where its square would leave the dtype's range."""
    return x.clamp(max=power_limit(x.dtype)).exp()


def power_reward(x: Tensor, alpha: float) -> Tensor:
    """(e^(alpha x) - 1) / alpha, and its limit x for alpha 0; the exponent is held as in bounded_exp."""
    if alpha == 0:
        return x
    return torch.expm1((alpha * x).clamp(max=power_limit(x.dtype))) / alpha


def pairs_per_token(batches: list[Batch], wanted=completion) -> Tensor:
    """Pairs of a whole window, of all processes, over the `wanted` tokens of its chosen sequences, [] float64.

    Times sums over such tokens [P] it gives what, divided by the pairs, is the token mean over the window.
    """
    tokens = [counts(wanted(batch), batch)[batch.chosen].sum() * batch.counted for batch in batches]
    pairs = total_count(sum(num_pairs(batch) for batch in batches if batch.counted))
    return pairs / total(torch.stack(tokens).sum()).clamp(min=1).double()


def token_share(values: Tensor, batch: Batch, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, number) of `values` [N], one for each labelled token, over the completion tokens of some sequences."""
    picked = torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.bool, device=values.device)
    picked = picked.index_fill(0, sequences, True)
    kept = (completion(batch) & picked[owners(batch)])[batch.valid]
    return torch.where(kept, values.float(), 0.0).sum(), kept.sum()


def pair_metrics(chosen: Tensor, rejected: Tensor, logps: tuple[Tensor, Tensor]) -> Metrics:
    """TRL's metrics of rewards [P] and of the log-probs (chosen, rejected) [P] that they were made of."""
    chosen, rejected, pairs = chosen.detach(), rejected.detach(), len(chosen)
    return {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), pairs),
        "rewards/margins": ((chosen - rejected).sum(), pairs),
        "logps/chosen": (logps[0].detach().sum(), pairs),
        "logps/rejected": (logps[1].detach().sum(), pairs),
    }


def score_metrics(scores: Scores, batch: Batch) -> Metrics:
    """TRL's metrics of tokens: entropy over both completions, accuracy over the chosen ones."""
    return {
        "entropy": token_share(scores.entropy, batch, torch.cat([batch.chosen, batch.rejected])),
        "mean_token_accuracy": token_share(scores.correct, batch, batch.chosen),
    }
