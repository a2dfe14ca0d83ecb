"""Direct preference optimisation: every loss of TRL's DPO, on sums of log-probs per pair.

Losses read `Pairs`, P pairs in any float dtype. With l = log policy - log reference of a completion, c chosen and
r rejected, s a score of l (s = l, or what an f-divergence makes of it) and z = beta (s_c - s_r). Papers by their arXiv
numbers at each loss. What a loss needs of other pairs (ranks, means, token counts) comes as `Shared`, made from all
pairs of the accumulation window, so that how they are split into micro-batches changes nothing.

`logits/chosen` and `logits/rejected`, TRL's means of logits over the vocabulary, do not exist here: logits never do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config.preference import DPOConfig
from burnish.data.batch import Batch
from burnish.logprobs import Scores, sequence_sums, token_scores
from burnish.model.head import Head
from burnish.objectives import Metrics, Objective
from burnish.objectives.sequences import (
    averages,
    bounded_exp,
    completion,
    completion_sums,
    counts,
    num_pairs,
    pair_metrics,
    pairs_per_token,
    power_reward,
    score_metrics,
    smoothed_logistic,
)
from burnish.parallel.world import gather, world

Reference = Callable[[Batch], Tensor | None]


class Pairs(NamedTuple):
    """Log-prob sums over completions, and their token counts. Every field [P]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor  # int64
    rejected_tokens: Tensor  # int64
    chosen_nll: Tensor  # -sum over the chosen completion, ld_alpha or not

    def none(self) -> "Pairs":
        """As of a batch without pairs."""
        return Pairs(*(field[:0] for field in self))

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


class Shared(NamedTuple):
    """What some pairs must know of all pairs of their window; constants to autograd. None: not needed."""

    pairs_per_token: Tensor | None = None  # [] pairs over tokens of chosen completions
    reference: Tensor | None = None  # [P] reference difference of the rank that the pair's policy difference has
    chosen: Tensor | None = None  # [P] chosen log-ratio of the rank that the pair's rejected one has
    rejected: Tensor | None = None  # [P] the other way round
    chosen_kl: Tensor | None = None  # [] mean log-ratio of the chosen, at least 0
    rejected_kl: Tensor | None = None  # []


def of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """others' element of the rank that each of `values` has among its own. Both [P]; ties in order of place."""
    order = values.argsort(stable=True)
    return torch.empty_like(others).scatter_(0, order, others.sort().values)


def share(pairs: Pairs, config: DPOConfig) -> Shared:
    """`Shared` of all pairs of a window."""
    pairs = Pairs(*(field.detach() for field in pairs))
    tokens = pairs.chosen_tokens.sum().clamp(min=1)
    known = Shared(pairs_per_token=len(pairs.chosen) / tokens.double())
    c, r = pairs.chosen_ratio, pairs.rejected_ratio
    if "aot" in config.loss_type:
        known = known._replace(
            reference=of_same_rank(pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected)
        )
    if "aot_unpaired" in config.loss_type:
        known = known._replace(chosen=of_same_rank(r, c), rejected=of_same_rank(c, r))
    if "kto_pair" in config.loss_type:
        known = known._replace(chosen_kl=c.mean().clamp(min=0), rejected_kl=r.mean().clamp(min=0))
    return known


def share_out(parts: list[Pairs], config: DPOConfig) -> list[Shared]:
    """`Shared` for each part (micro-batch) of a window: made from all, other processes' too, cut to its own pairs."""
    gathered = [gather(torch.cat(fields)) for fields in zip(*parts, strict=True)]
    known, first = share(Pairs(*(field for field, _ in gathered)), config), gathered[0][1]
    sizes = [len(part.chosen) for part in parts]
    own = [field if field is None or field.ndim == 0 else field[first : first + sum(sizes)] for field in known]
    cut = [[field] * len(parts) if field is None or field.ndim == 0 else field.split(sizes) for field in own]
    return [Shared(*fields) for fields in zip(*cut, strict=True)]


def _score(ratio: Tensor, config: DPOConfig) -> Tensor:
    """f'(policy / reference) with f'(1) = 0, from the log-ratio (f-DPO, 2309.16240)."""
    kind = config.f_divergence_type
    if kind == "forward_kl":
        return power_reward(ratio, -1.0)  # 1 - e^-l
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if kind == "alpha_divergence":
        return power_reward(ratio, config.f_alpha_divergence_coef - 1)
    return ratio


def _difference(p: Pairs, config: DPOConfig) -> Tensor:
    return _score(p.chosen_ratio, config) - _score(p.rejected_ratio, config)


def _difference_per_token(p: Pairs, config: DPOConfig) -> Tensor:
    chosen = averages(_score(p.chosen_ratio, config), p.chosen_tokens)
    return chosen - averages(_score(p.rejected_ratio, config), p.rejected_tokens)


def _sigmoid(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """-log s(z) (2305.18290), with label smoothing as in conservative DPO."""
    return smoothed_logistic(config.beta * _difference(p, config), config.label_smoothing)


def _sigmoid_norm(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """The same of scores per token."""
    return smoothed_logistic(config.beta * _difference_per_token(p, config), config.label_smoothing)


def _hinge(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """max(0, 1 - z) (SLiC, 2305.10425)."""
    return torch.relu(1 - config.beta * _difference(p, config))


def _ipo(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """(D - 1 / (2 beta))^2 of the difference D of scores per token, as its authors measured (2310.12036)."""
    return (_difference_per_token(p, config) - 1 / (2 * config.beta)).square()


def _exo_pair(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """KL((s(z), s(-z)) || (1 - e, e)) (2402.00856)."""
    z, e = config.beta * _difference(p, config), config.label_smoothing
    chosen = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-e))
    return chosen + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(e))


def _nca_pair(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """-log s(beta l_c) - (log s(-beta l_c) + log s(-beta l_r)) / 2 (2402.05369)."""
    c, r = config.beta * p.chosen_ratio, config.beta * p.rejected_ratio
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def _robust(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """(-(1 - e) log s(z) + e log s(-z)) / (1 - 2e): unbiased where a share e of pairs is swapped (2403.00409)."""
    z, e = config.beta * _difference(p, config), config.label_smoothing
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


def _bco_pair(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """-log s(beta l_c) - log s(-beta l_r), without a reward shift (2404.04656)."""
    return -F.logsigmoid(config.beta * p.chosen_ratio) - F.logsigmoid(-config.beta * p.rejected_ratio)


def _sppo_hard(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """(l_c - 1 / (2 beta))^2 + (l_r + 1 / (2 beta))^2 (2405.00675)."""
    half = 0.5 / config.beta
    return (p.chosen_ratio - half).square() + (p.rejected_ratio + half).square()


def _aot(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """Logistic loss of sorted policy differences less sorted reference differences (2406.05882)."""
    z = config.beta * (p.chosen - p.rejected - shared.reference)
    return smoothed_logistic(z, config.label_smoothing)


def _aot_unpaired(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """Logistic loss of sorted chosen less sorted rejected log-ratios (2406.05882).

    A match spans two pairs, perhaps of two micro-batches: each side counts half its value and all of its own gradient.
    """
    mine = smoothed_logistic(config.beta * (p.chosen_ratio - shared.rejected), config.label_smoothing)
    mine = mine + smoothed_logistic(config.beta * (shared.chosen - p.rejected_ratio), config.label_smoothing)
    return mine - mine.detach() / 2


def _apo_zero(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """s(-beta l_c) + s(beta l_r) (2408.06266)."""
    return (-config.beta * p.chosen_ratio).sigmoid() + (config.beta * p.rejected_ratio).sigmoid()


def _apo_down(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """s(beta l_c) + s(-beta (l_c - l_r)) (2408.06266)."""
    c, r = config.beta * p.chosen_ratio, config.beta * p.rejected_ratio
    return c.sigmoid() + (r - c).sigmoid()


def _discopop(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """-log s(z) (1 - m) + e^-z m with m = s(z / tau) (2406.08414); e^-z m in one exponential, which can't overflow."""
    z = config.beta * _difference(p, config)
    gate = z / config.discopop_tau
    return -F.logsigmoid(z) * (-gate).sigmoid() + bounded_exp(F.logsigmoid(gate) - z)


def _sft(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """Each pair's share in the mean of -log p over all tokens of the window's chosen completions."""
    return p.chosen_nll * shared.pairs_per_token


def _kto_pair(p: Pairs, config: DPOConfig, shared: Shared) -> Tensor:
    """(s(beta (KL_r - l_c)) + s(beta (l_r - KL_c))) / 2, KL the mean log-ratio of the other side (2402.01306).

    As TRL 0.8 had it, whose mean ran over both completions; KL carries no gradient, as in the paper.
    """
    chosen = (config.beta * (shared.rejected_kl - p.chosen_ratio)).sigmoid()
    return (chosen + (config.beta * (p.rejected_ratio - shared.chosen_kl)).sigmoid()) / 2


LOSSES: dict[str, Callable[[Pairs, DPOConfig, Shared], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "kto_pair": _kto_pair,
}


def dpo_losses(pairs: Pairs, config: DPOConfig, shared: Shared | None = None, weights: Tensor | None = None) -> Tensor:
    """The loss of each pair, [P]: sum_i loss_weights_i loss_i + rpo_alpha nll, times the pair's WPO weight.

    nll is, as in TRL, the mean over all tokens of the window's chosen completions, of which a pair has its share. For
    aot_unpaired, and so for their mixtures, only the sum over the window has a meaning.
    shared    of the whole window; None: these pairs are the window
    weights   [P], constants (WPO, 2406.11827), from `wpo_weights`
    """
    shared = shared or share(pairs, config)
    losses = torch.zeros_like(pairs.chosen)
    for name, weight in zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True):
        losses = losses + weight * LOSSES[name](pairs, config, shared)
    if config.rpo_alpha:
        losses = losses + config.rpo_alpha * _sft(pairs, config, shared)
    return losses if weights is None else losses * weights


def wpo_weights(scores: Scores, batch: Batch) -> Tensor:
    """w_c w_r of each pair, [P], with w = exp(mean_t(log p_t - log sum_v p_v^2)) (WPO's alignment by all outputs).

    log sum_v p_v^2 = 2 log p_t - log q_t with q the softmax at temperature 1/2, so the mean is of log q_t - log p_t.
    """
    assert scores.sharp is not None
    mask = completion(batch)
    aligned = torch.where(mask, scores.sharp - scores.logps.detach(), 0.0)
    weights = averages(sequence_sums(aligned, batch.cu_seqlens), counts(mask, batch)).exp()
    return weights[batch.chosen] * weights[batch.rejected]


def pairs_of(logps: Tensor, batch: Batch, config: DPOConfig, reference: Tensor | None) -> Pairs:
    """`Pairs` from token log-probs [T] and the reference's sums [S], or None for one that finds all equally likely.

    With ld_alpha the reference's sums must be weighted by `completion_sums` with the same ld_alpha.
    """
    sums = completion_sums(logps, batch, config.ld_alpha)
    plain = sums if config.ld_alpha is None else completion_sums(logps, batch)
    reference = torch.zeros_like(sums) if reference is None else reference.to(sums.dtype)
    tokens, c, r = counts(completion(batch), batch), batch.chosen, batch.rejected
    return Pairs(sums[c], sums[r], reference[c], reference[r], tokens[c], tokens[r], -plain[c])


def dpo(
    logps: Tensor,
    batch: Batch,
    config: DPOConfig,
    reference: Tensor | None,
    shared: Shared | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, int, Metrics]:
    """Loss sum over the batch's pairs. logps [T] and reference [S] as for `pairs_of`, the rest as for `dpo_losses`."""
    pairs = pairs_of(logps, batch, config, reference)
    losses = dpo_losses(pairs, config, shared, weights)
    rewards = config.beta * pairs.chosen_ratio, config.beta * pairs.rejected_ratio
    metrics = pair_metrics(*rewards, (pairs.chosen, pairs.rejected))
    if "sft" in config.loss_type or config.rpo_alpha:
        metrics["nll_loss"] = (pairs.chosen_nll.detach().sum(), pairs.chosen_tokens.sum())
    return losses.sum(), num_pairs(batch), metrics


@dataclass
class _Window:
    """What the steps of a window of several micro-batches share, by the identity of their batch."""

    shared: dict[int, Shared]
    references: dict[int, Tensor | None]


def objective(model: nn.Module, head: Head, config: DPOConfig, reference: Reference | None = None) -> Objective:
    """The DPO objective. reference: batch -> [S] sums of log-probs, weighted as `completion_sums` does with ld_alpha;
    not called with reference_free.

    aot, aot_unpaired and kto_pair look at all pairs of a window at once: accumulating over several micro-batches costs
    them one more forward pass of each.
    """
    coupled = {"aot", "aot_unpaired", "kto_pair"} & {*config.loss_type}
    likelihood = "sft" in config.loss_type or config.rpo_alpha

    def refer(batch: Batch) -> Tensor | None:
        if config.reference_free:
            return None
        assert reference is not None, "DPO with a reference needs its log-probs"
        with torch.no_grad():
            return reference(batch)

    def window(batches: list[Batch]) -> _Window | None:
        if (len(batches) == 1 and world().shares == 1) or not (coupled or likelihood):
            return None
        if not coupled:
            shared = Shared(pairs_per_token(batches))
            return _Window({id(batch): shared for batch in batches}, {})
        references = {id(batch): refer(batch) for batch in batches}
        with torch.no_grad():
            parts = [
                pairs_of(token_scores(model, head, batch).logps, batch, config, references[id(batch)])
                for batch in batches
            ]
        counted = [part if batch.counted else part.none() for batch, part in zip(batches, parts, strict=True)]
        shares = share_out(counted, config)
        return _Window({id(batch): known for batch, known in zip(batches, shares, strict=True)}, references)

    def step(batch: Batch, window: _Window | None) -> tuple[Tensor, Metrics]:
        references = {} if window is None else window.references
        ref = references[id(batch)] if id(batch) in references else refer(batch)
        scores = token_scores(model, head, batch, sharp=config.use_weighting)
        weights = wpo_weights(scores, batch) if config.use_weighting else None
        shared = None if window is None else window.shared[id(batch)]
        loss, _, metrics = dpo(scores.logps, batch, config, ref, shared, weights)
        return loss, {**metrics, **score_metrics(scores, batch)}

    return Objective(step, num_pairs, window)
