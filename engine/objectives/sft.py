"""Supervised fine-tuning: negative log-likelihood, and its dynamic variant (dft)."""

import torch
from torch import Tensor, nn

from burnish.data.batch import Batch
from burnish.logprobs import Scores, token_nll, token_scores
from burnish.model.head import Head
from burnish.objectives import Metrics, Objective


def nll(logps: Tensor, batch: Batch, config=None) -> tuple[Tensor, int, Metrics]:
    """Sum over trained tokens of -log p_t. logps [T] float32, 0 where nothing is trained."""
    return -logps.sum(), batch.num_valid, {}


def dft(logps: Tensor, batch: Batch, config=None) -> tuple[Tensor, int, Metrics]:
    """Sum over trained tokens of -p_t log p_t with p_t held constant (dynamic fine-tuning, arXiv 2508.05629)."""
    return -(logps.detach().exp() * logps).sum(), batch.num_valid, {}


def token_metrics(scores: Scores, batch: Batch) -> Metrics:
    """TRL's token metrics: mean entropy and share of trained tokens whose label is the most likely one."""
    return {
        "entropy": (scores.entropy.sum(), batch.num_valid),
        "mean_token_accuracy": (scores.correct.sum(), batch.num_valid),
    }


def objective(model: nn.Module, head: Head, config, reference: None = None) -> Objective:
    """The SFT objective named by config.loss_type, as the loop takes it."""

    def step(batch: Batch, window: None) -> tuple[Tensor, Metrics]:
        if config.loss_type == "nll" and torch.is_grad_enabled():
            loss, scores = token_nll(model, head, batch)
        else:
            scores = token_scores(model, head, batch)
            loss = {"nll": nll, "dft": dft}[config.loss_type](scores.logps, batch, config)[0]
        return loss, token_metrics(scores, batch)

    return Objective(step, lambda batch: batch.num_valid)
