"""AdamW on bfloat16 parameters, in place: the arithmetic is float32, and what is stored between steps is half as wide.

(Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, with torch's order of operations.) A parameter is
either the upper half of a float32 master whose lower half lies beside it, or it is rounded at random so that it is
right on average. The noise is a function of (key, offset in the tensor) alone: it needs no generator, and every path
and device draws the same.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw

from burnish.kernels.dispatch import backend_for

BLOCK = 2048
WARPS = 4
CPU_BLOCK = 131072  # elements a thread handles at a time on the CPU, a power of two: temporaries stay in its cache
TEMPORARY_BYTES = 36 * CPU_BLOCK  # a thread, on the CPU; on a GPU a step needs nothing
_MIX_1, _MIX_2 = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32  # as int32; the 32-bit finalizer of MurmurHash3 (A. Appleby)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


class Hyper(NamedTuple):
    """One AdamW step's numbers. `step` counts from 1 and stands for the bias corrections."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw_definition(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor, Tensor]:
    """(master, exp_avg, exp_avg_sq) after a step, as new tensors; all of one shape and floating type."""
    lr, beta1, beta2, eps, weight_decay, step = hyper
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    root = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    return master * (1 - lr * weight_decay) - lr / (1 - beta1**step) * exp_avg / root, exp_avg, exp_avg_sq


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as (nearest bfloat16, what is missing): `join_master` gives it back bit for bit.

    Returns (bfloat16, int16) of master's shape. The bits of a float32 read as an integer m; the bfloat16's are
    p = floor((m + 2^15) / 2^16), the rest m - 2^16 p lies in [-2^15, 2^15). So m -> (p, rest) has an inverse for every
    m, subnormal and infinite ones too; NaN stays NaN (its rest is 0). A value exactly between two bfloat16 goes to the
    larger magnitude, where torch takes the even one: to the even ones 2^16 + 1 values would round, one more than 16
    bits can tell apart.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    broken = master.isnan()
    if broken.any():  # the largest NaN would carry over into the sign, and become a zero
        upper, rest = upper.masked_fill(broken, 0x7FC0), rest.masked_fill(broken, 0)
    return upper.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def join_master(parameter: Tensor, low: Tensor) -> Tensor:
    """The float32 master whose parts `split_master` gave; a new tensor."""
    return (parameter.view(torch.int16).to(torch.int32) << 16).add_(low).view(torch.float32)


def noise_key(seed: int, step: int, index: int) -> tuple[int, int]:
    """(offset, odd factor), both int32, for the noise of parameter number `index` at `step`."""
    state = 0
    for word in (seed, step, index):  # the finalizer of SplitMix64 (Steele, Lea and Flood, 2014) after each word
        state = ((state ^ word) + _GOLDEN) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return _signed(state), _signed(state >> 32 | 1)


def _signed(word: int) -> int:
    """The lowest 32 bits as an int32 has them."""
    return (word + 2**31) % 2**32 - 2**31


def noise(start: int, count: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """int32 [count] of uniform bits for the elements from `start` on; `start` is a multiple of the blocks' size."""
    first = _signed(start + (start >> 32) * _GOLDEN + key[0])
    x = torch.arange(count, dtype=torch.int32, device=device).add_(first).mul_(key[1])
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # a shift of an int32 repeats its sign
    x *= _MIX_1
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _round_by(value: Tensor, uniform: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability that makes it right on average. uniform: int32 in [0, 2^16)."""
    bits = uniform.add_(value.view(torch.int32)).bitwise_right_shift_(16)
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isnan(), value.to(torch.bfloat16), rounded)


def _store(tensors: tuple[Tensor, Tensor | None, Tensor, Tensor], new: tuple[Tensor, ...], start: int, key) -> None:
    """Write a step's float32 results into what keeps them; the tensors begin at offset `start` of the parameter."""
    parameter, low, exp_avg, exp_avg_sq = tensors
    master, mean, square = new
    bits = noise(start, master.numel(), key, master.device)
    if low is not None:
        upper, rest = split_master(master)
        parameter.copy_(upper)
        low.copy_(rest)
    else:
        parameter.copy_(_round_by(master, bits & 0xFFFF))
    if exp_avg.dtype == torch.bfloat16:
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(_round_by(square, (bits >> 16).bitwise_and_(0xFFFF)))
    elif mean is not exp_avg:
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(square)


def _wide(parameter: Tensor, low: Tensor | None, grad: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float32 master and gradient, both new tensors."""
    gradient = grad.to(torch.float32, copy=True)
    return parameter.float() if low is None else join_master(parameter, low), (
        gradient if scale is None else gradient.mul_(scale)
    )


def _step_reference(parameter, low, grad, exp_avg, exp_avg_sq, hyper: Hyper, scale, key) -> None:
    master, gradient = _wide(parameter, low, grad, scale)
    new = adamw_definition(master, gradient, exp_avg.float(), exp_avg_sq.float(), hyper)
    _store((parameter, low, exp_avg, exp_avg_sq), new, 0, key)


def _step_torch(parameter, low, grad, exp_avg, exp_avg_sq, hyper: Hyper, scale, key) -> None:
    """Piece by piece through torch's own fused AdamW, so that the float32 arithmetic is its, bit for bit."""
    size = CPU_BLOCK * torch.get_num_threads()
    for start in range(0, parameter.numel(), size):
        piece = slice(start, start + size)
        own = (parameter[piece], None if low is None else low[piece], exp_avg[piece], exp_avg_sq[piece])
        master, gradient = _wide(own[0], own[1], grad[piece], scale)
        mean, square = own[2].float(), own[3].float()  # themselves where they are float32
        before = torch.tensor(float(hyper.step - 1))
        adamw(
            [master], [gradient], [mean], [square], [], [before], fused=True, amsgrad=False, maximize=False,
            beta1=hyper.beta1, beta2=hyper.beta2, lr=hyper.lr, weight_decay=hyper.weight_decay, eps=hyper.eps,
        )  # fmt: skip
        _store(own, (master, own[2] if mean is own[2] else mean, square), start, key)


@triton.jit
def _to_half(value, uniform):
    """The upper 16 of value's bits after `uniform` has been added to them; NaN stays NaN. Returns int32."""
    upper = (value.to(tl.int32, bitcast=True) + uniform) >> 16
    return tl.where(value != value, 0x7FC0, upper)


@triton.jit
def _to_float(half):
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(start, cols, key, factor):
    """`noise` for the elements start + cols."""
    first = (start + (start >> 32) * 0x7F4A7C15 + key).to(tl.int32)
    x = (first + cols) * factor
    x ^= (x >> 16) & 0xFFFF
    x *= -0x7A143595  # _MIX_1, _MIX_2
    x ^= (x >> 13) & 0x7FFFF
    x *= -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit(do_not_specialize=["key", "factor"])
def _step_kernel(
    P, LOW, G, M, V, SCALE, n, keep, rate, mean_share, beta2, square_share, eps, correction, key, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """P, LOW and, where they are bfloat16, M and V are their bits as int16. LOW or SCALE may be None.

    The shares are 1 - beta1 and 1 - beta2: made here, of a float32 beta2, the latter would be off by 5e-5 of itself.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    mask = start + cols < n
    if SCALE is not None:
        scale = tl.load(SCALE)
        mask = mask & (tl.full([BLOCK], 0.0, tl.float32) + scale == scale)
    P += start
    G += start
    M += start
    V += start
    p = tl.load(P + cols, mask=mask, other=0).to(tl.int32) << 16
    if LOW is not None:
        LOW += start
        p += tl.load(LOW + cols, mask=mask, other=0).to(tl.int32)
    master = p.to(tl.float32, bitcast=True)
    g = tl.load(G + cols, mask=mask, other=0.0).to(tl.float32)
    if SCALE is not None:
        g *= scale
    m = tl.load(M + cols, mask=mask, other=0)
    v = tl.load(V + cols, mask=mask, other=0)
    NARROW: tl.constexpr = M.dtype.element_ty == tl.int16
    if NARROW:
        m = _to_float(m)
        v = _to_float(v)
    m += tl.cast(mean_share, tl.float32) * (g - m)
    v = tl.cast(beta2, tl.float32) * v + tl.cast(square_share, tl.float32) * g * g
    root = tl.div_rn(tl.sqrt_rn(v), tl.cast(correction, tl.float32)) + tl.cast(eps, tl.float32)
    master = master * tl.cast(keep, tl.float32) - tl.div_rn(tl.cast(rate, tl.float32) * m, root)
    bits = _uniform(start, cols, key, factor)
    if LOW is not None:
        upper = _to_half(master, 0x8000)
        rest = tl.where(master != master, 0, master.to(tl.int32, bitcast=True) - (upper << 16))
        tl.store(LOW + cols, rest.to(tl.int16), mask=mask)
    else:
        upper = _to_half(master, bits & 0xFFFF)
    tl.store(P + cols, upper.to(tl.int16), mask=mask)
    if NARROW:
        odd = (m.to(tl.int32, bitcast=True) >> 16) & 1
        tl.store(M + cols, _to_half(m, 0x7FFF + odd).to(tl.int16), mask=mask)  # to the nearest, ties to even
        tl.store(V + cols, _to_half(v, (bits >> 16) & 0xFFFF).to(tl.int16), mask=mask)
    else:
        tl.store(M + cols, m, mask=mask)
        tl.store(V + cols, v, mask=mask)


def _step_triton(parameter, low, grad, exp_avg, exp_avg_sq, hyper: Hyper, scale, key) -> None:
    lr, beta1, beta2, eps, weight_decay, step = hyper
    moments = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in (exp_avg, exp_avg_sq))
    n = parameter.numel()
    with torch.cuda.device_of(parameter):
        _step_kernel[(triton.cdiv(n, BLOCK),)](
            parameter.view(torch.int16), low, grad, *moments, scale, n, 1 - lr * weight_decay, lr / (1 - beta1**step),
            1 - beta1, beta2, 1 - beta2, eps, math.sqrt(1 - beta2**step), *key, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def adamw_step_(
    parameter: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    *,
    scale: Tensor | None = None,
    key: tuple[int, int] = (0, 1),
) -> None:
    """One AdamW step on a bfloat16 parameter; writes into all but grad, and allocates nothing of their size.

    parameter   [...] bfloat16, contiguous, as are all others
    low         int16, the rest of `split_master`: (parameter, low) is the float32 master. None: parameter is rounded
                stochastically, up with the probability (value - lower neighbour) / (upper - lower neighbour)
    grad        bfloat16 or float32
    exp_avg, exp_avg_sq  both bfloat16 or both float32. In bfloat16 the mean is rounded to the nearest; the square is
                rounded stochastically, because with beta2 = 0.999 a step changes it by less than half of a bfloat16's
                last place, and rounded to the nearest it would never fall
    scale       float32 scalar on the device, multiplied into the gradient: clipping, without a pass of its own. NaN:
                nothing is written, so that a step can be called off without asking the device
    key         `noise_key`'s; another one for each step and parameter

    The same bits give the same results again. Raises ValueError for other types and for tensors that aren't contiguous.
    """
    kept = (torch.bfloat16, torch.float32)
    if parameter.dtype != torch.bfloat16 or exp_avg.dtype not in kept or exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"adamw_step_: a bfloat16 parameter, got {parameter.dtype} with moments of {exp_avg.dtype}")
    if low is not None and low.dtype != torch.int16:
        raise ValueError(f"adamw_step_: low must be int16, got {low.dtype}")
    own = [parameter, grad, exp_avg, exp_avg_sq, *([] if low is None else [low])]
    if not all(x.is_contiguous() and x.numel() == parameter.numel() for x in own):
        raise ValueError("adamw_step_: tensors must be contiguous and of one shape")
    if not parameter.numel() or (scale is not None and not scale.is_cuda and scale.isnan()):
        return
    run = {"triton": _step_triton, "torch": _step_torch, "reference": _step_reference}[backend_for(parameter)]
    flat = None if low is None else low.view(-1)
    run(parameter.view(-1), flat, grad.view(-1), exp_avg.view(-1), exp_avg_sq.view(-1), hyper, scale, key)
