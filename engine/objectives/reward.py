"""Reward modelling: one score a sequence, and chosen above rejected (Bradley-Terry)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.config.preference import RewardConfig
from burnish.data.batch import Batch
from burnish.logprobs import hidden_states
from burnish.model.head import causal_lm
from burnish.objectives import Metrics, Objective
from burnish.objectives.sequences import num_pairs
from burnish.parallel.sequence import cut, summed
from burnish.parallel.shards import inside
from burnish.parallel.world import world


def reward_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None, config: RewardConfig) -> Tensor:
    """-log s(r_c - r_r - margin) + center_rewards_coefficient (r_c + r_r)^2 (arXiv 2312.09244), [P], from scores."""
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if margin is None else difference - margin.to(difference.dtype))
    if config.center_rewards_coefficient:
        losses = losses + config.center_rewards_coefficient * (chosen + rejected).square()
    return losses


def reward(scores: Tensor, batch: Batch, config: RewardConfig) -> tuple[Tensor, int, Metrics]:
    """Loss sum over the batch's pairs from the scores [S] of its sequences."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    losses = reward_losses(chosen, rejected, batch.margin, config)
    pairs, both = len(chosen), torch.cat([chosen, rejected]).detach()
    metrics: Metrics = {
        "min_reward": (both.min(), 1),
        "mean_reward": (both.sum(), len(both)),
        "max_reward": (both.max(), 1),
        "accuracy": ((chosen > rejected).sum(), pairs),
        "margin": ((chosen - rejected).detach().sum(), pairs),
    }
    return losses.sum(), pairs, metrics


def score_layer(model: nn.Module) -> nn.Module:
    """The layer from hidden states to one score. Raises UserError for a model that is no sequence classifier of one."""
    layer = getattr(causal_lm(model), "score", None)
    labels = getattr(getattr(model, "config", None), "num_labels", 1)
    if layer is None or labels != 1:
        raise UserError(
            f"{type(causal_lm(model)).__name__} does not give one score a sequence",
            where="model",
            mend="Load it with AutoModelForSequenceClassification and num_labels=1",
        )
    return layer


def sequence_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The score at each sequence's last token, [S] float32."""
    return inside(model, partial(_sequence_scores, model, batch))


def _sequence_scores(model: nn.Module, batch: Batch) -> Tensor:
    last = batch.cu_seqlens[1:].long() - 1  # [S]
    if world().sequence == 1:
        return score_layer(model)(hidden_states(model, batch)[last])[:, 0].float()
    part = cut(batch)
    hidden = hidden_states(model, part)  # [n, H], of this process's slice
    here = (last >= part.start) & (last < part.start + len(hidden))
    scores = score_layer(model)(hidden[(last - part.start).clamp(0, len(hidden) - 1)])[:, 0].float()
    return summed(torch.where(here, scores, 0.0))


def objective(model: nn.Module, head: None, config: RewardConfig, reference: None = None) -> Objective:
    """The reward objective; `head` and `reference` are there for the sake of one signature."""
    score_layer(model)  # a wrong model is an error before training

    def step(batch: Batch, window: None) -> tuple[Tensor, Metrics]:
        loss, _, metrics = reward(sequence_scores(model, batch), batch, config)
        return loss, metrics

    return Objective(step, num_pairs)
