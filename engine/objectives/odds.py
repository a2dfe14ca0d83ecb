"""Preferences without a reference: CPO, SimPO and AlphaPO, and ORPO.

Both add the likelihood of the chosen to a loss of pairs. It is TRL's mean over all tokens of a batch's chosen
sequences, here of the whole accumulation window: over completion tokens for CPO (arXiv 2401.08417), and for ORPO
(2403.07691) over every labelled token of the chosen, which with labels on the prompts, as TRL has it, includes those.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config.preference import CPOConfig, ORPOConfig
from burnish.data.batch import IGNORE, Batch
from burnish.logprobs import sequence_sums, token_scores
from burnish.model.head import Head
from burnish.objectives import Metrics, Objective
from burnish.objectives.sequences import (
    averages,
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
from burnish.parallel.world import world


def cpo_losses(chosen: Tensor, rejected: Tensor, config: CPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen rewards, rejected rewards), each [P], without the likelihood term.

    chosen, rejected [P]: log-probs of completions, summed for sigmoid and hinge, per token for ipo, simpo and alphapo.
    Rewards r are beta log p, or with alpha beta (1 - p^-alpha) / alpha (AlphaPO, 2501.03884). Losses: logistic of
    r_c - r_r, for simpo less simpo_gamma (2405.14734), smoothed; hinge; ipo's (D - 1 / (2 beta))^2, D without beta.
    """
    r_chosen, r_rejected = power_reward(chosen, -config.alpha), power_reward(rejected, -config.alpha)
    difference = r_chosen - r_rejected
    if config.loss_type == "hinge":
        losses = torch.relu(1 - config.beta * difference)
    elif config.loss_type == "ipo":
        losses = (difference - 1 / (2 * config.beta)).square()
    else:
        margin = 0.0 if config.loss_type == "sigmoid" else config.simpo_gamma
        losses = smoothed_logistic(config.beta * difference - margin, config.label_smoothing)
    return losses, config.beta * r_chosen, config.beta * r_rejected


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, accurate on both ends. Held (without gradient) where e^x and 1 are one number: both
    branches are then finite everywhere, and so is the gradient of the one not taken."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def orpo_losses(chosen: Tensor, rejected: Tensor, config: ORPOConfig) -> tuple[Tensor, Tensor]:
    """(-beta log s(log odds ratio), log odds ratio), each [P], from log-probs per token [P]; odds p / (1 - p)."""
    ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -config.beta * F.logsigmoid(ratio), ratio


def _likelihood(logps: Tensor, batch: Batch, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """-log p summed over the `wanted` [T] tokens of each chosen sequence, and how many there are: [P], [P]."""
    nll = -sequence_sums(torch.where(wanted, logps, 0.0), batch.cu_seqlens)
    return nll[batch.chosen], counts(wanted, batch)[batch.chosen]


def _labelled(batch: Batch) -> Tensor:
    return batch.labels != IGNORE


def cpo(logps: Tensor, batch: Batch, config: CPOConfig, per_token: Tensor | None = None) -> tuple[Tensor, int, Metrics]:
    """Loss sum over the pairs: `cpo_losses` and cpo_alpha times the chosen completions' mean -log p. logps [T].

    per_token   `pairs_per_token` of the window; None: this batch is the window
    """
    sums, tokens = completion_sums(logps, batch), counts(completion(batch), batch)
    inputs = sums if config.loss_type in ("sigmoid", "hinge") else averages(sums, tokens)
    chosen, rejected = inputs[batch.chosen], inputs[batch.rejected]
    losses, chosen_rewards, rejected_rewards = cpo_losses(chosen, rejected, config)
    nll, number = _likelihood(logps, batch, completion(batch))
    if config.cpo_alpha:
        per_token = pairs_per_token([batch]) if per_token is None else per_token
        losses = losses + config.cpo_alpha * nll * per_token
    metrics = pair_metrics(chosen_rewards, rejected_rewards, (chosen, rejected))
    metrics["nll_loss"] = (nll.detach().sum(), number.sum())
    return losses.sum(), len(chosen), metrics


def orpo(
    logps: Tensor, batch: Batch, config: ORPOConfig, per_token: Tensor | None = None
) -> tuple[Tensor, int, Metrics]:
    """Loss sum over the pairs: `orpo_losses` and the mean -log p of the chosen's labelled tokens. As `cpo`."""
    values = averages(completion_sums(logps, batch), counts(completion(batch), batch))
    chosen, rejected = values[batch.chosen], values[batch.rejected]
    losses, ratio = orpo_losses(chosen, rejected, config)
    nll, number = _likelihood(logps, batch, _labelled(batch))
    per_token = pairs_per_token([batch], _labelled) if per_token is None else per_token
    metrics = pair_metrics(config.beta * chosen, config.beta * rejected, (chosen, rejected))
    metrics["nll_loss"] = (nll.detach().sum(), number.sum())
    metrics["log_odds_ratio"] = (F.logsigmoid(ratio.detach()).sum(), len(ratio))
    metrics["log_odds_chosen"] = (ratio.detach().sum(), len(ratio))
    return (losses + nll * per_token).sum(), len(chosen), metrics


def objective(model: nn.Module, head: Head, config: CPOConfig | ORPOConfig, reference: None = None) -> Objective:
    """The objective of a CPOConfig or ORPOConfig; `reference` is there for the sake of one signature."""
    loss, wanted = (orpo, _labelled) if isinstance(config, ORPOConfig) else (cpo, completion)

    def window(batches: list[Batch]) -> Tensor | None:
        return pairs_per_token(batches, wanted) if len(batches) > 1 or world().shares > 1 else None

    def step(batch: Batch, per_token: Tensor | None) -> tuple[Tensor, Metrics]:
        scores = token_scores(model, head, batch)
        loss_sum, _, metrics = loss(scores.logps, batch, config, per_token)  # type: ignore[arg-type]
        return loss_sum, {**metrics, **score_metrics(scores, batch)}

    return Objective(step, num_pairs, window)
