"""Single completions rated desirable or not: KTO (arXiv 2402.01306), its variant by APO (2408.06266), BCO (2404.04656).

U rated sequences with x = log policy - log reference of the completion, and sign +1 where desirable, -1 where not.
KTO's estimate of the policy's divergence (the mean of x over completions put after other prompts) and BCO's reward
shift are those of the whole accumulation window. KTO's mismatched completions run apart from the rated ones, forward
only: they carry no gradient. BCO's shift over several micro-batches costs one more forward pass of each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config.preference import BCOConfig, KTOConfig
from burnish.data.batch import Batch
from burnish.logprobs import token_scores
from burnish.model.head import Head
from burnish.objectives import Metrics, Objective
from burnish.objectives.sequences import completion_sums, num_rated, rated_and_mismatched, token_share
from burnish.parallel.world import total, total_count, world

Reference = Callable[[Batch], Tensor | None]


def _signs(desirable: Tensor, like: Tensor) -> Tensor:
    return torch.full_like(like, -1.0).masked_fill(desirable, 1.0)


def kto_losses(ratio: Tensor, desirable: Tensor, kl: Tensor | float, config: KTOConfig) -> Tensor:
    """weight * s(-sign beta (x - kl)), [U]: 1 less the value of the completion. ratio x [U], desirable [U] bool.

    kl   the divergence, [] and constant; 0 for apo_zero_unpaired
    """
    weights = torch.full_like(ratio, config.undesirable_weight).masked_fill(desirable, config.desirable_weight)
    return weights * (-_signs(desirable, ratio) * config.beta * (ratio - kl)).sigmoid()


def bco_losses(ratio: Tensor, desirable: Tensor, shift: Tensor | float, config: BCOConfig) -> Tensor:
    """-log s(sign (beta x - shift)), [U], with the shift [] constant."""
    return -F.logsigmoid(_signs(desirable, ratio) * (config.beta * ratio - shift))


def divergence(ratios: Tensor) -> Tensor:
    """KTO's estimate from log-ratios of mismatched completions [M], and those of other processes: their mean, at least
    0; 0 for none."""
    return (total(ratios.detach().sum()) / max(total_count(len(ratios)), 1)).clamp(min=0)


def rated_metrics(rewards: Tensor, logps: Tensor, desirable: Tensor) -> Metrics:
    """TRL's metrics of rewards and log-probs [U] of the two kinds of completions; a batch may lack one of them.

    The margin is of their means over all batches since the last log, so it is taken there (metrics.Accumulator).
    """
    rewards, logps = rewards.detach(), logps.detach()
    metrics: Metrics = {}
    for name, of_kind in (("chosen", desirable), ("rejected", ~desirable)):
        number, total = of_kind.sum(), torch.where(of_kind, rewards, 0.0).sum()
        metrics[f"rewards/{name}"] = (total, number)
        metrics[f"logps/{name}"] = (torch.where(of_kind, logps, 0.0).sum(), number)
    return metrics


@dataclass
class _Ratios:
    """Log-ratios [S] of all sequences of a batch, and the policy's sums that they came from."""

    ratio: Tensor
    logps: Tensor


@dataclass
class _Share:
    """What a window knows for the step of one of its batches: the divergence or shift [] (None: the step's own), the
    sequences to train on, and the reference's sums of those."""

    level: Tensor | None
    batch: Batch
    reference: Tensor | None


def objective(
    model: nn.Module, head: Head, config: KTOConfig | BCOConfig, reference: Reference | None = None
) -> Objective:
    """The objective of a KTOConfig or BCOConfig. reference: batch -> [S] sums of log-probs of all sequences.

    BCO's shift is the mean reward of all rows trained on so far, this window's among them; `state["rewards"]` holds
    their sum and number. Evaluation reads it and leaves it as it is.
    """
    bco = isinstance(config, BCOConfig)
    kto = isinstance(config, KTOConfig) and config.loss_type != "apo_zero_unpaired"
    state = {"rewards": torch.zeros(2, dtype=torch.float64)} if bco else {}

    def refer(batch: Batch) -> Tensor | None:
        assert reference is not None, "KTO and BCO need the log-probs of a reference"
        with torch.no_grad():
            return reference(batch)

    def ratios(logps: Tensor, batch: Batch, ref: Tensor | None) -> _Ratios:
        sums = completion_sums(logps, batch)
        return _Ratios(sums if ref is None else sums - ref.to(sums.dtype), sums)

    def forward(batch: Batch, ref: Tensor | None) -> Tensor:
        with torch.no_grad():
            return ratios(token_scores(model, head, batch).logps, batch, ref).ratio

    def window(batches: list[Batch]) -> dict[int, _Share] | None:
        """By the batch's identity."""
        if kto:
            parts = [rated_and_mismatched(batch) for batch in batches]
            found = [forward(other, refer(other)) for _, other in parts]
            level = divergence(torch.cat([x if b.counted else x[:0] for x, b in zip(found, batches, strict=True)]))
            return {id(b): _Share(level, rated, refer(rated)) for b, (rated, _) in zip(batches, parts, strict=True)}
        if not bco or (len(batches) == 1 and world().shares == 1):
            return None
        references = [refer(batch) for batch in batches]
        rewards = [forward(b, ref)[b.rated] for b, ref in zip(batches, references, strict=True)]
        counted = [x if b.counted else x[:0] for x, b in zip(rewards, batches, strict=True)]
        shift = _shift(state, config.beta * torch.cat(counted))
        return {id(b): _Share(shift, b, ref) for b, ref in zip(batches, references, strict=True)}

    def step(batch: Batch, window: dict[int, _Share] | None) -> tuple[Tensor, Metrics]:
        own = _Share(None, batch, refer(batch)) if window is None else window[id(batch)]
        batch, level = own.batch, own.level
        scores = token_scores(model, head, batch)
        found = ratios(scores.logps, batch, own.reference)
        ratio = found.ratio[batch.rated]
        assert batch.desirable is not None
        if isinstance(config, BCOConfig):
            level = _shift(state, config.beta * ratio.detach()) if level is None else level
            losses = bco_losses(ratio, batch.desirable, level, config)
        else:
            losses = kto_losses(ratio, batch.desirable, 0.0 if level is None else level, config)
        metrics = rated_metrics(config.beta * ratio, found.logps[batch.rated], batch.desirable)
        metrics["delta" if bco else "kl"] = (0.0 if level is None else level, 1)
        metrics["entropy"] = token_share(scores.entropy, batch, batch.rated)
        return losses.sum(), metrics

    return Objective(step, num_rated, window, state)


def _shift(state: dict[str, Tensor], rewards: Tensor) -> Tensor:
    """Mean of all rewards so far, [] in their dtype; in training `rewards` [U] of all processes are added first."""
    seen = state["rewards"].to(rewards.device)
    if torch.is_grad_enabled():
        added = rewards.double()
        seen = seen + total(torch.stack([added.sum(), added.new_tensor(float(len(added)))]))
        state["rewards"] = seen
    return (seen[0] / seen[1].clamp(min=1)).to(rewards.dtype)
