"""A model of one table of logits per previous token, and packed batches of pairs or rated rows to run it on."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from burnish.logprobs import Scores

VOCAB = 11


@dataclass(eq=False)
class ToyBatch:
    """The fields of a batch that objectives read."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    valid: Tensor
    num_valid: int
    rows: list[int]
    examples: list[int]
    chosen: Tensor | None = None
    rejected: Tensor | None = None
    margin: Tensor | None = None
    rated: Tensor | None = None
    desirable: Tensor | None = None
    mismatched: Tensor | None = None
    edge: tuple[int, int] | None = None
    completion: Tensor | None = None
    reference: Tensor | None = None
    counted: bool = True


def pack(sequences: list[tuple[list[int], int, int]], **fields) -> ToyBatch:
    """From (ids, first labelled token, first completion token) of each sequence."""
    ids, positions, labels, marked, edges = [], [], [], [], [0]
    for tokens, labelled, start in sequences:
        ids += tokens
        positions += range(len(tokens))
        labels += [tokens[i + 1] if i + 1 >= labelled else -100 for i in range(len(tokens) - 1)] + [-100]
        marked += [i + 1 >= start for i in range(len(tokens))]
        edges.append(len(ids))
    labels_ = torch.tensor(labels)
    valid = (labels_ != -100).nonzero()[:, 0]
    return ToyBatch(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(edges, dtype=torch.int32), labels_, valid, len(valid),
        list(range(len(sequences))), list(range(len(sequences))), completion=torch.tensor(marked), **fields,
    )  # fmt: skip


class Table(torch.nn.Module):
    """Logits of the next token are a row of a table, chosen by the token before: float64."""

    def __init__(self, seed: int):
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=noise, dtype=torch.float64))
        self.forwards = 0

    def token_scores(self, model, head, batch, *, sharp=False) -> Scores:
        """In the place of burnish.logprobs.token_scores."""
        self.forwards += 1
        logits, labels = self.table[batch.input_ids[batch.valid]], batch.labels[batch.valid, None]
        logps = logits.log_softmax(-1)
        empty = self.table.new_zeros(len(batch.labels))
        sharpened = (2 * logits).log_softmax(-1).gather(1, labels)[:, 0].detach()
        return Scores(
            empty.index_copy(0, batch.valid, logps.gather(1, labels)[:, 0]),
            -(logps.exp() * logps).sum(-1).detach(),
            logps.argmax(-1) == labels[:, 0],
            empty.index_copy(0, batch.valid, sharpened) if sharp else None,
        )

    def logps(self, tokens: list[int], start: int) -> Tensor:
        """Log-probs of tokens[start:], one by one, by the definition."""
        rows = [self.table[a].log_softmax(-1)[b] for a, b in zip(tokens, tokens[1:], strict=False)]
        return torch.stack(rows)[max(start, 1) - 1 :] if len(tokens) > max(start, 1) else self.table.new_zeros(0)

    def square_sums(self, tokens: list[int], start: int) -> Tensor:
        """log sum_v p_v^2 at the same positions."""
        rows = [self.table[a].softmax(-1).square().sum().log() for a in tokens[:-1]]
        return torch.stack(rows)[max(start, 1) - 1 :]


def run(objective, batches: list) -> tuple[Tensor, dict]:
    """Loss of one window as the loop takes it, with gradients; and the metrics of its micro-batches."""
    from burnish.metrics import Accumulator

    count = sum(objective.count(batch) for batch in batches)
    shared, total, metrics = objective.window(batches), 0.0, Accumulator()
    for batch in batches:
        loss, found = objective.step(batch, shared)
        (loss / count).backward()
        total = total + loss.detach() / count
        metrics.add(found)
    return total, metrics.take()


@pytest.fixture
def toy():
    """The helpers of this file."""
    return SimpleNamespace(pack=pack, Table=Table, run=run, VOCAB=VOCAB)
