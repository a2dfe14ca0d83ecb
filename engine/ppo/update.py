"""One PPO update: rows are packed, read once without gradients, and gone through for some epochs.

Per-token numbers that the backbone gives are flat [N]; tables [B, L] of them exist only where a token must know the
next one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from burnish.config.ppo import PPOConfig
from burnish.data.batch import IGNORE, Batch
from burnish.kernels import linear_logprob
from burnish.logprobs import hidden_states
from burnish.model.head import Head, evaluating, read_head
from burnish.objectives import rl

Rows = list[tuple[Tensor, Tensor]]  # (query [Q], response [R]) of each row


class Reading(NamedTuple):
    """What a model says of the N response tokens of a packed batch."""

    hidden: Tensor  # [N, H], at the position before each token
    head: Head
    logps: Tensor  # [N] float32
    entropy: Tensor  # [N] float32


@dataclass
class Rollout:
    """What is known of B rows before the first update: tables [B, L], 0 behind each response's end."""

    mask: Tensor
    logps: Tensor
    reference: Tensor
    values: Tensor
    kl: Tensor


@dataclass
class Targets:
    """What the losses of each token are made of, all [N]."""

    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def pack_rows(rows: Rows, device: torch.device) -> Batch:
    """The rows as one packed batch, with labels on the responses' tokens and nowhere else."""
    whole = [torch.cat([query.to(device), response.to(device)]).long() for query, response in rows]
    lengths = np.array([len(ids) for ids in whole])
    ends = np.cumsum(lengths)
    valid = np.concatenate(
        [np.arange(end - len(response) - 1, end - 1) for end, (_, response) in zip(ends, rows, strict=True)]
    )
    ids, places = torch.cat(whole), torch.from_numpy(valid).to(device)
    labels = torch.full_like(ids, IGNORE).index_copy(0, places, ids[places + 1])
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    edges = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
    return Batch(ids, positions, edges, int(lengths.max()), labels, len(valid), places, list(range(len(rows))))


def read(model: nn.Module, batch: Batch) -> Reading:
    """Log-probs and entropies of the responses' tokens, through the fused head."""
    hidden, head = hidden_states(model, batch).index_select(0, batch.valid), read_head(model)
    logps, entropy = linear_logprob(
        hidden, head.weight, batch.labels[batch.valid], all_valid=True, return_entropy=True, **head.options()
    )
    return Reading(hidden, head, logps, entropy.detach())


def places(lengths: list[int], chosen: list[int], width: int, device: torch.device) -> Tensor:
    """Where the tokens of the chosen rows, one after the other, stand in a flattened table [B, width]: [N] int64."""
    parts = [np.arange(lengths[row]) + row * width for row in chosen]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def roll_out(
    policy: Any,
    reference: nn.Module,
    standing_in: Callable[[], AbstractContextManager],
    rows: Rows,
    masks: list[Tensor],
    config: PPOConfig,
) -> Rollout:
    """Read the policy and the reference on all rows, mini_batch_size at a time, in eval mode and without gradients.

    policy       a model with a value head
    reference    a transformers model; `standing_in` is a context in which it is the reference
    """
    device, lengths = policy.v_head.summary.weight.device, [len(response) for _, response in rows]
    flat: list[Rollout] = []
    with torch.no_grad():
        for start in range(0, len(rows), config.mini_batch_size):
            part = slice(start, start + config.mini_batch_size)
            batch = pack_rows(rows[part], device)
            with evaluating(policy):
                ours = read(policy.pretrained_model, batch)
                values = policy.v_head(ours.hidden)
                with standing_in():
                    theirs = read(reference, batch)
                    if config.kl_penalty == "full":
                        kl = rl.full_kl(ours.hidden, ours.head, theirs.hidden, theirs.head)
                    else:
                        kl = rl.token_kl(ours.logps, theirs.logps, config.kl_penalty)
            flat.append(Rollout(torch.cat(masks[part]).to(device), ours.logps, theirs.logps, values, kl))
    where = places(lengths, list(range(len(rows))), max(lengths), device)

    def table(name: str) -> Tensor:
        numbers = torch.cat([getattr(part, name) for part in flat])
        return numbers.new_zeros(len(rows) * max(lengths)).index_copy(0, where, numbers).view(len(rows), -1)

    return Rollout(**{each.name: table(each.name) for each in fields(Rollout)})


def losses(policy: Any, batch: Batch, targets: Targets, config: PPOConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the loss over the tokens that count, their mean ratio, statistics under TRL's names) of a mini-batch."""
    now, mask = read(policy.pretrained_model, batch), targets.mask
    values = policy.v_head(now.hidden)
    policy_loss, policy_clipped = rl.policy_losses(now.logps, targets.logps, targets.advantages, config.cliprange)
    value_loss, value_clipped = rl.value_losses(values, targets.values, targets.returns, config.cliprange_value)
    total = ((policy_loss + config.vf_coef * value_loss) * mask).sum()
    with torch.no_grad():
        moved = now.logps - targets.logps
        ratio = moved.exp()
        means = {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "loss/total": policy_loss + config.vf_coef * value_loss,
            "policy/entropy": now.entropy,
            "policy/approxkl": 0.5 * moved.square(),
            "policy/policykl": -moved,
            "policy/clipfrac": policy_clipped,
            "policy/advantages_mean": targets.advantages,
            "returns/mean": targets.returns,
            "val/vpred": values,
            "val/error": (values - targets.returns).square(),
            "val/clipfrac": value_clipped,
            "val/mean": targets.values,
        }
        stats = {name: rl.masked_mean(numbers, mask) for name, numbers in means.items()}
        stats["returns/var"] = rl.masked_var(targets.returns, mask)
        stats["val/var"] = rl.masked_var(targets.values, mask)
        counted = mask.bool()
        stats["policy/ratio"], stats["policy/advantages"] = ratio[counted], targets.advantages[counted]
    return total, rl.masked_mean(ratio, mask), stats


def optimize(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    known: Rollout,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
    order: np.random.Generator,
    warn: Callable[[str], None],
) -> list[dict[str, Tensor]]:
    """config.ppo_epochs passes over the rows in random order; the statistics of every mini-batch.

    Losses are divided by the tokens of the whole update. A mini-batch whose mean ratio is above ratio_threshold gives
    no gradient, and an update of such mini-batches only is left out; `warn` is told.
    """
    device, width = known.mask.device, known.mask.shape[1]
    lengths = [len(response) for _, response in rows]
    tables = Targets(known.mask, known.logps, known.values, advantages, returns)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: list[dict[str, Tensor]] = []
    policy.train()
    for _ in range(config.ppo_epochs):
        shuffled = order.permutation(len(rows)).tolist()
        for start in range(0, len(rows), config.backward_batch_size):
            window = shuffled[start : start + config.backward_batch_size]
            count = known.mask[window].sum()
            optimizer.zero_grad(set_to_none=True)
            for first in range(0, len(window), config.mini_batch_size):
                chosen = window[first : first + config.mini_batch_size]
                where = places(lengths, chosen, width, device)
                targets = Targets(**{each.name: getattr(tables, each.name).view(-1)[where] for each in fields(Targets)})
                batch = pack_rows([rows[row] for row in chosen], device)
                total, ratio, stats = losses(policy, batch, targets, config)
                found.append(stats)
                if not ratio <= config.ratio_threshold:  # a NaN must not pass
                    warn(f"mean ratio {float(ratio):.4g} is above {config.ratio_threshold:g}: mini-batch skipped")
                    continue
                (total / count).backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()  # leaves parameters without a gradient as they are
        if config.early_stopping and float(found[-1]["policy/policykl"]) > 1.5 * config.target_kl:
            break
    optimizer.zero_grad(set_to_none=True)
    return found


def statistics(
    known: Rollout, scores: Tensor, penalty: Tensor, found: list[dict[str, Tensor]], rows: Rows, coefficient: float
) -> dict[str, Any]:
    """A step's numbers under TRL's names: floats, and numpy arrays where a name stands for many.

    scores [B] as given, penalty [B, L] the rewards that are no scores, found: from `optimize`.
    """
    kl = (known.kl * known.mask).sum(1)  # [B]
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    means = {
        "objective/kl": kl.mean(),
        "objective/entropy": -(known.logps * known.mask).sum(1).mean(),
        "ppo/mean_non_score_reward": rl.masked_mean(penalty, known.mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": spread,
    }
    many = {"policy/ratio", "policy/advantages"}
    for name in found[0]:
        if name not in many:
            means[f"ppo/{name}"] = torch.stack([each[name] for each in found]).mean()
    stats: dict[str, Any] = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    stats["objective/kl_coef"] = coefficient
    variance = stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / variance if variance else 0.0
    for name in many:
        stats[f"ppo/{name}"] = torch.cat([each[name] for each in found]).cpu().numpy()
    arrays = {"kl_dist": kl, "logprobs": known.logps, "ref_logprobs": known.reference}
    stats |= {f"objective/{name}": numbers.cpu().numpy() for name, numbers in arrays.items()}
    for side, name in enumerate(("queries", "responses")):
        lengths = np.array([len(row[side]) for row in rows], dtype=np.float64)
        stats[f"tokens/{name}_len_mean"], stats[f"tokens/{name}_len_std"] = lengths.mean().item(), lengths.std().item()
        stats[f"tokens/{name}_dist"] = lengths
    return stats
