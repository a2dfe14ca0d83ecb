"""Bytes that a trainable parameter costs on its device, by optimizer: what the planner counts and the tests weigh.

    optim                 weights        gradient   states     sum   optimizer_in_bwd
    adamw_torch(_fused)   4              4          8          16    12     computed in float32
      with bf16: true     2 + 4 master   4          8          18    14     a bfloat16 gradient becomes float32 at once
      dtype: bfloat16     2              2          4           8     6     rounded to bfloat16 after every step
    adamw_bf16            2 + 2 rest     2          2 + 2      10     8     the exact float32 master in 4 bytes
    adamw_bf16_sr         2              2          2 + 2       8     6     stochastic rounding
    adamw_8bit            as adamw_torch            2.03                    bitsandbytes; with dtype: bfloat16 sum 6.03
    adamw_torch_8bit      as adamw_torch            2.03                    torchao; the same
    sgd                   as adamw_torch            0
    adafactor             as adamw_torch            0                       a row and a column of each matrix

With optimizer_in_bwd the gradients that live at once are those of the operation whose backward runs: a layer's at most.
Gradients that accumulate over micro-batches are float32 (4 bytes) for adamw_bf16 and adamw_bf16_sr. Not counted: what a
step needs for itself, which is one float32 a parameter for adamw_torch on CUDA, twice the largest matrix for adafactor
and the 8-bit optimizers, and at most `burnish.kernels.adamw.TEMPORARY_BYTES` a thread for the other AdamWs.
"""

from typing import NamedTuple

# optim: (bytes of states a parameter where the optimizer steps float32, the same where it steps bfloat16)
_BLOCK = 256  # elements that share a float32 scale in both 8-bit libraries
_STATES = {
    "adamw_torch_fused": (8.0, 4.0),
    "adamw_torch": (8.0, 4.0),
    "adamw_bf16": (4.0, 4.0),
    "adamw_bf16_sr": (4.0, 4.0),
    "adamw_8bit": (2 + 2 * 4 / _BLOCK,) * 2,
    "adamw_torch_8bit": (2 + 2 * 4 / _BLOCK,) * 2,
    "sgd": (0.0, 0.0),
    "adafactor": (0.0, 0.0),
}
ROUNDED = ("adamw_bf16", "adamw_bf16_sr")  # these hold bfloat16 parameters and no float32 twin


class Footprint(NamedTuple):
    """Bytes a trainable parameter."""

    weights: float  # what the model computes with, and a master or its low bits
    gradient: float  # 0 with optimizer_in_bwd, but for the layer whose backward runs
    states: float

    @property
    def total(self) -> float:
        return self.weights + self.gradient + self.states


def bytes_per_parameter(
    optim: str, *, dtype: str = "float32", bf16: bool = True, accumulates: bool = False, in_backward: bool = False
) -> Footprint:
    """Bytes a trainable parameter under the optimizer `optim`, a name of the key of that name.

    dtype        "float32" or "bfloat16": the type in which the trainable weights are loaded
    bf16         whether the model computes in bfloat16
    accumulates  gradient_accumulation_steps > 1
    in_backward  optimizer_in_bwd
    """
    wide, narrow = _STATES[optim]
    if optim in ROUNDED:
        own = Footprint(4.0 if optim == "adamw_bf16" else 2.0, 4.0 if accumulates else 2.0, narrow)
    elif dtype == "bfloat16":
        own = Footprint(2.0, 2.0, narrow)
    elif bf16:
        own = Footprint(6.0, 4.0, wide)
    else:
        own = Footprint(4.0, 4.0, wide)
    return own._replace(gradient=0.0) if in_backward else own


# {optim: (without, with optimizer_in_bwd)} for a model that computes in bfloat16 and is loaded as float32, the default
BYTES_PER_PARAMETER = {
    optim: (bytes_per_parameter(optim), bytes_per_parameter(optim, in_backward=True)) for optim in _STATES
}
