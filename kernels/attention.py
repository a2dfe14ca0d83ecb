"""Causal attention over packed sequences: no padding, and no T x T mask on any path.

The definition, a portable path that goes sequence by sequence (in blocks of queries where a window or a softcap rules
scaled_dot_product_attention out), and the installed flash kernels. `attention_backend` says which runs and why.

Shapes: T tokens of all sequences, S sequences, L tokens of one, Hq query heads, Hk key/value heads (Hq % Hk == 0), D.
"""

import inspect
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from burnish.kernels.dispatch import backend_for
from burnish.kernels.once import differentiable_once

BACKENDS = ("auto", "flash-attn-4", "flash-attn-2", "torch-varlen", "sdpa", "reference")
QUERY_BLOCK = 1024  # queries scored at once on the blocked path: scores are [Hq, 1024, keys], never [Hq, L, L]


def attention_definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window, softcap) -> Tensor:
    """softmax(softcap(q k^T * scale) + causal and window mask) v, one sequence at a time, in q's dtype."""
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outs = [_scores_times_values(qs, ks, vs, 0, scale, window, softcap) for qs, ks, vs in parts]
    return torch.cat(outs) if outs else _scores_times_values(q, k, v, 0, scale, window, softcap)


def _scores_times_values(q: Tensor, k: Tensor, v: Tensor, ahead: int, scale: float, window, softcap) -> Tensor:
    """Queries [Lq, Hq, D] at key positions ahead..ahead+Lq-1 against keys [Lk, Hk, D] -> [Lq, Hq, D]."""
    groups = q.shape[1] // k.shape[1]
    kh = k.transpose(0, 1).repeat_interleave(groups, 0)  # [Hq, Lk, D]
    vh = v.transpose(0, 1).repeat_interleave(groups, 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.transpose(0, 1) @ kh.transpose(1, 2)).to(wide) * scale  # [Hq, Lq, Lk]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(ahead, ahead + q.shape[0], device=q.device)[:, None]
    key = torch.arange(k.shape[0], device=q.device)[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return (weights @ vh).transpose(0, 1)  # [Lq, Hq, D]


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float, window, softcap) -> Tensor:
    """One sequence [L, H, D] in blocks of queries; each block's scores are recomputed in backward."""
    outs = []
    for start in range(0, q.shape[0], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[0])
        first = 0 if window is None else max(0, start - window + 1)
        args = (q[start:stop], k[first:stop], v[first:stop], start - first, scale, window, softcap)
        outs.append(checkpoint(_scores_times_values, *args, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs)


class _Documents(torch.autograd.Function):
    """The CPU's flash kernel sequence by sequence, as scaled_dot_product_attention runs it, bit for bit.

    Kept for backward: one output and one log-sum-exp [T, Hq] for all sequences, where autograd would keep each
    sequence's output beside the whole.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        out, lse = torch.empty(q.shape, dtype=q.dtype), None
        for rows in _rows(lengths):
            part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_heads_first(x[rows]) for x in (q, k, v)), 0.0, True, scale=scale
            )
            lse = sums.new_empty(q.shape[:2]) if lse is None else lse
            out[rows], lse[rows] = part[0].transpose(0, 1), sums[0].transpose(0, 1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        for rows in _rows(ctx.lengths):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads_first(x[rows]) for x in (grad, q, k, v, out)),
                lse[rows].transpose(0, 1).unsqueeze(0),
                0.0,
                True,
                scale=ctx.scale,
            )
            for whole, part in zip(grads, parts, strict=True):
                whole[rows] = part[0].transpose(0, 1)
        return *grads, None, None


def _rows(lengths: list[int]) -> list[slice]:
    """The tokens of each sequence that has any."""
    stops = list(accumulate(lengths))
    return [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True) if length]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # [1, H, L, D]


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether scaled_dot_product_attention would take the CPU's flash kernel (number 1) for sequences like these."""
    if q.is_cuda or not q.shape[0]:
        return False
    heads = (_heads_first(x) for x in (q, k, v))
    return torch._fused_sdp_choice(*heads, None, 0.0, True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]) == 1


def _sequence_by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale, window, softcap) -> Tensor:
    whole = softcap is None and (window is None or window >= max(lengths, default=0))
    if whole and _fused_on_cpu(q, k, v, scale):
        return _Documents.apply(q, k, v, lengths, scale)
    outs = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if not qs.shape[0]:
            continue
        if softcap is not None or (window is not None and window < qs.shape[0]):
            outs.append(_blocked(qs, ks, vs, scale, window, softcap))
            continue
        grouped = qs.shape[1] != ks.shape[1]
        if grouped and qs.is_cuda:  # the memory-efficient kernel takes equal head counts; the fallback scores L x L
            ks, vs = (x.repeat_interleave(qs.shape[1] // x.shape[1], 1) for x in (ks, vs))
            grouped = False
        qh, kh, vh = (x.transpose(0, 1).unsqueeze(0) for x in (qs, ks, vs))  # [1, H, L, D]
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs) if outs else _scores_times_values(q, k, v, 0, scale, window, softcap)


@lru_cache
def _importable(module: str) -> bool:
    """Whether a module is there and can be imported; one that breaks (built for another torch) counts as absent."""
    try:
        if find_spec(module) is None:
            return False
        import_module(module)
    except (ImportError, OSError):
        return False
    return True


@lru_cache
def _torch_varlen_parameters() -> frozenset[str]:
    """Keyword names that this torch's varlen_attn takes; empty where torch has none."""
    if not _importable("torch.nn.attention.varlen"):
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def attention_backend(q: Tensor, *, window: int | None = None, softcap: float | None = None) -> tuple[str, str]:
    """(backend, reason) that `varlen_attention` takes for queries like `q` [T, Hq, D] when asked for "auto"."""
    if backend_for(q) == "reference":
        return "reference", "kernels.use('reference')"
    if not q.is_cuda:
        return "sdpa", "no flash kernel runs on the CPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash kernels take float16 and bfloat16, not {q.dtype}"
    head_dim = q.shape[-1]
    major = torch.cuda.get_device_capability(q.device)[0]
    if major < 8:
        return "sdpa", f"flash kernels need compute capability 8.0, this GPU has {major}.x"
    # flash-attn 4 has no backward for packed sequences on Hopper, for other head sizes, or with a softcap.
    if major in (10, 11) and head_dim in (64, 96, 128) and softcap is None and _importable("flash_attn.cute"):
        return "flash-attn-4", "importable"
    if head_dim % 8 == 0 and _importable("flash_attn.flash_attn_interface") and head_dim <= 256:
        return "flash-attn-2", "importable"
    takes = _torch_varlen_parameters()
    if not takes:
        return "sdpa", "no flash-attn installed and this torch has no varlen_attn"
    if softcap is not None:
        return "sdpa", "torch's varlen_attn has no softcap; install flash-attn for speed"
    if window is not None and "window_size" not in takes:
        return "sdpa", "this torch's varlen_attn has no window; install flash-attn for speed"
    if head_dim > 256 or head_dim % 8:
        return "sdpa", f"head_dim {head_dim}: flash kernels take multiples of 8 up to 256"
    return "torch-varlen", "flash-attn is not installed"


def _flash(name: str, q, k, v, cu, longest: int, scale: float, window, softcap) -> Tensor:
    if name == "flash-attn-4":
        from flash_attn.cute import flash_attn_varlen_func

        reach = {"window_size": (window - 1, 0)} if window is not None else {}
        out = flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, softcap=softcap or 0.0, **reach
        )
        return out[0] if isinstance(out, tuple) else out
    if name == "flash-attn-2":
        from flash_attn import flash_attn_varlen_func

        reach = {"window_size": (window - 1, 0)} if window is not None else {}
        return flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, softcap=softcap or 0.0, **reach
        )
    from torch.nn.attention.varlen import varlen_attn

    takes = _torch_varlen_parameters()
    if q.shape[1] != k.shape[1] and "enable_gqa" not in takes:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    options: dict = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in takes else {}
    if "window_size" in takes:
        options["window_size"] = (window - 1 if window is not None else -1, 0)
    else:
        options["is_causal"] = True
    if "scale" in takes:
        options["scale"] = scale
    elif scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)
    return varlen_attn(q, k, v, cu, cu, longest, longest, **options)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal self-attention inside each packed sequence.

    q [T, Hq, D]; k, v [T, Hk, D], Hq a multiple of Hk; any strides. cu_seqlens [S+1] int32 on q's device: sequence i
    is tokens cu_seqlens[i] to cu_seqlens[i+1]-1; empty sequences are allowed. max_seqlen: the longest, a Python int.
    scale: of the scores, D**-0.5 when None. window: each token sees itself and the window-1 tokens before it.
    softcap: scores become softcap*tanh(scores/softcap) (Gemma 2, arXiv 2408.00118).
    backend: "auto" or one of flash-attn-4, flash-attn-2, torch-varlen, sdpa, reference; see `attention_backend`.
    Returns [T, Hq, D] in q's dtype; under autocast q, k and v are first cast to autocast's.
    Raises ValueError for a backend of another name or shapes that don't fit.
    On CUDA the "sdpa" path reads cu_seqlens on the host (one synchronisation a call).
    """
    if backend not in BACKENDS:
        raise ValueError(f"varlen_attention(backend={backend!r}): use one of {', '.join(BACKENDS)}")
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
        raise ValueError(f"varlen_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # as scaled_dot_product_attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    name = attention_backend(q, window=window, softcap=softcap)[0] if backend == "auto" else backend
    if name in ("sdpa", "reference"):
        offsets = cu_seqlens.tolist()
        if offsets[-1] != q.shape[0]:
            raise ValueError(f"varlen_attention: cu_seqlens ends at {offsets[-1]}, q has {q.shape[0]} tokens")
        lengths = [stop - start for start, stop in zip(offsets, offsets[1:], strict=False)]
        run = attention_definition if name == "reference" else _sequence_by_sequence
        return run(q, k, v, lengths, scale, window, softcap)
    return _flash(name, q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)
