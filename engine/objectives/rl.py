"""PPO's arithmetic: rewards, advantages, clipped losses, KL controllers; pure functions on per-token numbers.

Tables are [B, L]: row b holds the L_b <= L tokens of response b and then padding, which `mask` (1 for tokens that
count, else 0) leaves out. Functions that look at tokens one by one take any shape, so that the losses run on the flat
[N] tokens of a packed mini-batch. The model never sees a padded row.

Sources: PPO arXiv 1707.06347; GAE arXiv 1506.02438; the KL reward and its controller arXiv 1909.08593, section 2.2; the
clipped value loss arXiv 2005.12729. The details (what is whitened, where the score is added) are TRL 0.8's.
"""

import math

import torch
from torch import Tensor

from burnish.model.head import Head, head_logits

_KL_ELEMENTS = 2**24  # logits of a chunk of the full divergence, for each of both models

# ---- averages over what counts


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """sum(values * mask) / sum(mask)."""
    return (values * mask).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Variance of the values that count, over n - 1 of them; 0 where there is only one."""
    count = mask.sum()
    centred = (values - masked_mean(values, mask)) * mask
    return centred.square().sum() / (count - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over what counts, plus the mean again unless `shift_mean`; 0 elsewhere."""
    mean = masked_mean(values, mask)
    white = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask


# ---- rewards


def token_kl(logps: Tensor, reference: Tensor, penalty: str) -> Tensor:
    """What each token is charged for leaving the reference, from log-probs in nats: x = logps - reference.

    kl x; abs |x|; mse x^2 / 2. (`full` is full_kl: it needs both distributions.)
    """
    difference = logps - reference
    if penalty == "abs":
        return difference.abs()
    return 0.5 * difference.square() if penalty == "mse" else difference


@torch.no_grad()
def full_kl(hidden: Tensor, head: Head, reference: Tensor, reference_head: Head) -> Tensor:
    """KL(policy | reference) = sum_v p_v (log p_v - log q_v) of every token, [N] float32, without gradient.

    hidden, reference [N, H]: hidden states of the two models. Logits exist for a chunk of tokens at a time.
    """
    rows = max(1, _KL_ELEMENTS // head.weight.shape[0])
    parts = []
    for ours, theirs in zip(hidden.split(rows), reference.split(rows), strict=True):
        p = head_logits(head, ours).float().log_softmax(-1)  # [rows, V]
        q = head_logits(reference_head, theirs).float().log_softmax(-1)
        parts.append((p.exp() * (p - q).masked_fill(p == -math.inf, 0.0)).sum(-1))
    return torch.cat(parts)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    """(rewards, their part that is no score), both [B, L]: -coefficient * kl, and the score at the last token that
    counts. kl [B, L], scores [B]."""
    penalty = -coefficient * kl * mask
    places = torch.arange(mask.shape[1], device=mask.device) * mask  # [B, L]
    rewards = penalty.clone()
    rewards[torch.arange(len(scores), device=mask.device), places.argmax(1)] += scores
    return rewards, penalty


def advantages(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(generalized advantages, returns), both [B, L]: A_t = sum_k (gamma lam)^k d_{t+k}, R_t = A_t + V_t, with
    d_t = r_t + gamma V_{t+1} - V_t. Values and rewards of tokens that don't count are 0, as is the value after the end.
    """
    values, rewards = values * mask, rewards * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = rewards + gamma * following - values
    running, columns = torch.zeros_like(deltas[:, 0]), []
    for column in reversed(deltas.unbind(1)):
        running = column + gamma * lam * running
        columns.append(running)
    found = torch.stack(columns[::-1], 1)
    return found, found + values


# ---- losses: of each token, so that the caller divides by the count of its whole update


def policy_losses(logps: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(max(-A r, -A clamp(r, 1 - clip, 1 + clip)), whether the second is the larger), r = exp(logps - old)."""
    ratio = torch.exp(logps - old)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(1/2 max((V - R)^2, (V' - R)^2), whether the second is the larger), V' = V within old - clip ... old + clip."""
    clipped = torch.clamp(values, old - clip, old + clip)
    first, second = (values - returns).square(), (clipped - returns).square()
    return 0.5 * torch.maximum(first, second), second > first


# ---- what goes on from step to step


class AdaptiveKL:
    """KL coefficient that moves so that a response's KL comes near `target`, by 20% at most in `horizon` samples."""

    def __init__(self, value: float, target: float, horizon: float):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """value *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * samples / self.horizon


class FixedKL:
    """A KL coefficient that stays."""

    def __init__(self, value: float):
        self.value = value

    def update(self, kl: float, samples: int) -> None:
        """Nothing changes."""


class RunningMoments:
    """Mean and standard deviation (over n - 1) of all numbers seen so far, by Chan's parallel update."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 1.0

    def update(self, numbers: Tensor) -> None:
        """Take in `numbers`, of any shape."""
        new = numbers.detach().double().flatten()
        count, mean = len(new), float(new.mean())
        total, shift = self.count + count, mean - self.mean
        self._squares += float((new - mean).square().sum()) + shift**2 * self.count * count / total
        self.mean, self.count = self.mean + shift * count / total, total
