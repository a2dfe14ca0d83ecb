"""Responses to queries of differing lengths, through transformers' generate: the one place where rows are padded."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.model.head import evaluating


class LengthSampler:
    """A callable that draws a whole number from min_value to max_value - 1, each as likely."""

    def __init__(self, min_value: int, max_value: int):
        if not 0 < min_value < max_value:
            raise UserError(f"no length from {min_value} to below {max_value}", where="LengthSampler")
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return random.choice(self.values)


@torch.no_grad()
def respond(
    model: nn.Module, queries: list[Tensor], pad: int, eos: set[int], *, batch_size: int, **options: Any
) -> list[Tensor]:
    """The response to each query [Q_i] as a tensor [R_i] without its query, through the first of `eos` if one came.

    pad      fills rows on the left, masked out, and those that ended
    options  of transformers' generate. A top_k of 0.0 and a negative min_length, which scripts hand over to switch both
             off, mean what they meant
    """
    if options.get("min_length", 0) is not None and options.get("min_length", 0) < 0:
        del options["min_length"]
    if "top_k" in options:
        options["top_k"] = int(options["top_k"])
    responses: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        part = queries[start : start + batch_size]
        width = max(len(query) for query in part)
        ids = torch.stack([nn.functional.pad(query, (width - len(query), 0), value=pad) for query in part])
        mask = torch.stack([nn.functional.pad(torch.ones_like(q), (width - len(q), 0)) for q in part])
        with evaluating(model):
            whole = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **options)  # type: ignore[operator]
        for row in whole[:, width:]:
            ends = [place for place, token in enumerate(row.tolist()) if token in eos]
            responses.append(row[: ends[0] + 1] if ends else row)
    return responses
