"""The head's ops and their peers: cross-entropy, log-probs (all, forward only, frozen head), and preference pairs.

Every loss is a sum over tokens, which leaves each way its gradients as they come. Random hidden states and weights
give logits of standard deviation 1, as a model has them at the start; labels are random.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import kernels
from burnish.verbs.bench.ops import BOTH, INFERENCE, Op, Shape, Way, randn

IGNORED = -100
BETA = 0.1
TRL_TILE = 32768  # columns of the vocabulary a tile, as TRL's trainers set it


# ---- inputs and counts


def make(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Hidden states [N, H], weight [V, H], labels [N] of which shape["valid"] are not ignored."""
    tokens, hidden, vocab = shape["N"], shape["H"], shape["V"]
    x = randn((tokens, hidden), device, dtype, generator)
    weight = randn((vocab, hidden), device, dtype, generator).mul_(hidden**-0.5)
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    ignored = torch.randperm(tokens, device=device, generator=generator)[valid_tokens(shape) :]
    labels[ignored] = IGNORED
    return x, weight, labels


def valid_tokens(shape: Shape) -> int:
    return round(shape["N"] * shape.get("valid", 1.0))


def _count(products: int) -> Callable[[Shape, str, int], tuple[float, float]]:
    """`products` of valid tokens x H x V each; hidden states and weight read, their gradients written."""

    def count(shape: Shape, phase: str, size: int) -> tuple[float, float]:
        tokens, hidden, vocab = valid_tokens(shape), shape["H"], shape["V"]
        moved = (tokens + vocab) * hidden + (products > 1) * tokens * hidden + (products > 2) * vocab * hidden
        return float(moved * size), 2.0 * products * tokens * hidden * vocab

    return count


# ---- cross-entropy


def eager_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain logits, in float32 (or wider) for the loss, as transformers computes it."""
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def _our_loss() -> Callable:
    return lambda x, weight, labels: kernels.linear_cross_entropy(x, weight, labels, reduction="sum")


def _torch_loss() -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, labels: F.linear_cross_entropy(
        x, weight, labels, reduction="sum", ignore_index=IGNORED, options=options
    )


def _liger_loss(accumulate: torch.dtype | None = None) -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, labels: liger_fused_linear_cross_entropy(
        x, weight, labels, reduction="sum", accum_dtype=accumulate
    )


def _cce(reduction: str) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, labels: linear_cross_entropy(x, weight, labels, reduction=reduction)


def _quack_loss() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, weight, labels: chunked_linear_cross_entropy(x, weight, labels, reduction="sum")


def _trl_logps() -> Callable:
    """TRL's head as its trainers call it: ignored rows dropped first, their log-probs 0."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        valid = labels != IGNORED
        made = ChunkedLogProbFunction.apply(x[valid], weight, None, labels[valid], 1.0, TRL_TILE, None, 1.0, ())[0]
        return made.new_zeros(labels.shape).masked_scatter(valid, made)

    return logps


def _trl_loss() -> Callable:
    logps = _trl_logps()
    return lambda x, weight, labels: -logps(x, weight, labels).sum()


LOSSES: dict[str, Way] = {
    "burnish": _our_loss,
    "eager torch": lambda: eager_loss,
    "torch.compile": lambda: torch.compile(eager_loss, dynamic=False),
    "torch linear_cross_entropy": _torch_loss,
    "Liger": _liger_loss,
    "Liger, float32 dW": lambda: _liger_loss(torch.float32),
    "CCE": lambda: _cce("sum"),
    "quack": _quack_loss,
    "TRL": _trl_loss,
}
CROSS_ENTROPY = Op(
    "linear_cross_entropy", make, (0, 1), eager_loss, _count(3), LOSSES,
    gate={"N": 256, "H": 256, "V": 4096}, by_token=(0, 2),
)  # fmt: skip
MASKED = replace(CROSS_ENTROPY, gate={"N": 256, "H": 256, "V": 4096, "valid": 0.25})


# ---- log-probs


def eager_logps(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def _our_logps() -> Callable:
    return lambda x, weight, labels: kernels.linear_logprob(x, weight, labels)


def _torch_logps() -> Callable:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, labels: (
        -F.linear_cross_entropy(x, weight, labels, reduction="none", ignore_index=IGNORED, options=options)
    )


def _liger_logps() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, labels: -liger_fused_linear_cross_entropy(x, weight, labels, reduction="none")


def _negated(make: Callable[[], Callable]) -> Callable:
    function = make()
    return lambda *inputs: -function(*inputs)


LOGPS: dict[str, Way] = {
    "burnish": _our_logps,
    "eager torch": lambda: eager_logps,
    "torch.compile": lambda: torch.compile(eager_logps, dynamic=False),
    "torch linear_cross_entropy": _torch_logps,
    "Liger": _liger_logps,
    "CCE": lambda: _negated(lambda: _cce("none")),
    "quack": "it gives a loss, no log-prob per token",
    "TRL": _trl_logps,
}
LOGPROB = Op(
    "linear_logprob", make, (0, 1), eager_logps, _count(3), LOGPS,
    gate={"N": 256, "H": 256, "V": 4096}, by_token=(0, 2),
)  # fmt: skip
FORWARD_ONLY = replace(LOGPROB, name="linear_logprob, forward only", wanted=(), count=_count(1))
FROZEN = replace(LOGPROB, name="linear_logprob, frozen head", wanted=(0,), count=_count(2))


# ---- pairs


def _pair_loss(logps: Tensor) -> Tensor:
    """DPO's loss, summed, with reference log-ratios of 0: first all chosen sequences, then all rejected, equally long.

    The number of pairs is fixed, so that the length of a sequence is N / (2 PAIRS).
    """
    sums = logps.view(2 * PAIRS, -1).sum(1)
    return -F.logsigmoid(BETA * (sums[:PAIRS] - sums[PAIRS:])).sum()


PAIRS = 8


def eager_pairs(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _pair_loss(eager_logps(x, weight, labels))


def _paired(make: Callable[[], Callable]) -> Callable:
    logps = make()
    return lambda x, weight, labels: _pair_loss(logps(x, weight, labels))


def _liger_pairs() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def pairs(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = x.view(2 * PAIRS, -1, x.shape[-1])
        return PAIRS * loss(weight, rows, labels.view(2 * PAIRS, -1))[0]  # Liger divides by the number of pairs

    return pairs


DPO = Op(
    "DPO pairs", make, (0, 1), eager_pairs, _count(3),
    {
        "burnish": lambda: _paired(_our_logps),
        "eager torch": lambda: eager_pairs,
        "torch.compile": lambda: torch.compile(eager_pairs, dynamic=False),
        "torch linear_cross_entropy": lambda: _paired(_torch_logps),
        "Liger": _liger_pairs,
        "CCE": lambda: _paired(lambda: _negated(lambda: _cce("none"))),
        "quack": "it gives a loss, no log-prob per token",
        "TRL": lambda: _paired(_trl_logps),
    },
    gate={"N": 256, "H": 256, "V": 4096},
)  # fmt: skip

HEAD_PHASES = {FORWARD_ONLY.name: (INFERENCE,)}


def phases(op: Op) -> tuple[str, ...]:
    return HEAD_PHASES.get(op.name, (BOTH,))
