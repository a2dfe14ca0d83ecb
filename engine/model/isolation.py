"""Do sequences packed into one row stay strangers? Asked of the model itself, before any training.

burnish trains on packed rows only. A model whose code ignores cu_seqlens (its own attention, a state that runs on
through the row, absolute positions) would train across documents without any sign of it, so it is refused.
"""

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.model.attention import packed_arguments
from burnish.model.head import backbone, causal_lm, evaluating

# Relative to the largest hidden state. Equal shapes give equal bits in most models; mixtures of experts regroup rows.
_LEAK = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ALONE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Two short sequences in one packed row against the second one alone; raises UserError where they differ.

    The model must have been loaded with burnish's attention. Costs four forwards of a dozen tokens.
    """
    inner = causal_lm(model)
    embeddings = inner.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    first, other, second = (
        (torch.arange(start, start + length, device=embeddings.device) % embeddings.shape[0])
        for start, length in ((5, 5), (31, 5), (17, 7))
    )
    with evaluating(inner):
        try:
            packed, changed = (_packed(model, [before, second])[5:] for before in (first, other))
            alone = backbone(model)(
                input_ids=second[None], attention_mask=torch.ones_like(second[None]), use_cache=False
            ).last_hidden_state[0]
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(
                f"{type(inner).__name__} can't run a packed row ({type(error).__name__}: {str(error)[:200]})"
            ) from error
    dtype, size = packed.dtype, alone.abs().max()
    leak, off = ((x.float() - packed.float()).abs().max() / size.float() for x in (changed, alone))
    if not (leak <= _LEAK.get(dtype, 1e-5) and off <= _ALONE.get(dtype, 1e-3)):  # a NaN must fail
        raise UserError(
            f"{type(inner).__name__} mixes the sequences of a packed row: hidden states differ by {leak:.1e} when the "
            f"neighbour changes and by {off:.1e} from the sequence alone",
            mend="burnish trains architectures whose attention goes through transformers' AttentionInterface",
        )


def _packed(model: nn.Module, sequences: list[Tensor]) -> Tensor:
    """Hidden states [T, H] of the sequences in one row."""
    lengths = [len(ids) for ids in sequences]
    device = sequences[0].device
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    arguments = packed_arguments(torch.cat(sequences), positions, cu_seqlens, max(lengths))
    return backbone(model)(**arguments).last_hidden_state[0]
