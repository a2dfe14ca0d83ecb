"""burnish's attention under transformers' own hook, for every model that uses AttentionInterface.

A packed call hands cu_seq_lens_q and max_length_q down to each layer and a one-element 4-D attention mask, which
transformers passes through untouched: no mask is built, and nothing asks the device where the sequences begin (its own
detection of packed rows synchronises once a forward). Calls without cu_seq_lens (generate, an evaluation harness) get
transformers' scaled-dot-product attention and its masks.
"""

import torch
from torch import Tensor, nn

from burnish.kernels import varlen_attention

NAME = "burnish"


def register() -> str:
    """Register the attention function and its mask function with transformers; returns the name to load models with."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def packed_arguments(input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> dict:
    """Keyword arguments of a backbone's forward for one packed row of [T] tokens."""
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "attention_mask": torch.empty(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hk, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns ([1, T, Hq, D], None). Raises ValueError for what it can't honour."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None:
            from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

            kwargs.pop("is_causal", None)
            mask = _additive(attention_mask, query, key)
            return eager_attention_forward(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout and module.training:
        raise ValueError(f"attention dropout {dropout}: packed attention has none; set attention_dropout to 0")
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("packed attention takes neither attention sinks nor a position bias")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    assert max_length_q is not None
    out = varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """sdpa's mask (boolean, or None for plain causal attention) as eager attention adds it to the scores."""
    if mask is None:
        new, seen = query.shape[-2], key.shape[-2]
        mask = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
