"""AdamW for models whose parameters are bfloat16: `adamw_bf16` and `adamw_bf16_sr`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from burnish.kernels.adamw import Hyper, adamw_step_, noise_key


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (decoupled decay, torch's formula) on bfloat16 parameters, its arithmetic in float32.

    masters  adamw_bf16: {parameter: int16 tensor}, the low bits beside each parameter; the two are a float32 master bit
             for bit, and the parameter is the nearest bfloat16 to it. Parameters that aren't in it get low bits of 0.
             None (adamw_bf16_sr): no master; parameters are rounded stochastically, seeded by (seed, step, index of the
             parameter, offset in it), so that a run can be repeated and resumed exactly.
    moments  their type. bfloat16, but for the tests that hold the arithmetic against torch's

    What that costs, as the mean difference of the loss from float32 masters and moments over 50 steps (SmolLM2-135M on
    GSM8K, loss 2.4 to 1.0): adamw_bf16 0.003, no more than with float32 moments (0.002, from ties alone), adamw_bf16_sr
    0.008; parameters rounded to the nearest bfloat16 (adamw_torch with dtype: bfloat16) 0.24.
    A model is saved as what it computes with, bfloat16; the low bits are in checkpoints, beside the moments.

    State of a parameter: step (int), exp_avg and exp_avg_sq of its shape, low (int16) where there are masters.
    """

    def __init__(
        self, groups, *, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, masters: Mapping | None, seed: int = 0,
        moments: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed
        self._index: dict[Tensor, int] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype == torch.bfloat16 and parameter.is_contiguous()
                self._index[parameter] = len(self._index)
                entry = self.state[parameter]
                entry["step"] = 0
                if masters is not None:
                    low = masters.get(parameter)
                    entry["low"] = torch.zeros_like(parameter, dtype=torch.int16) if low is None else low
                entry["exp_avg"] = torch.zeros_like(parameter, dtype=moments)
                entry["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments)

    @torch.no_grad()
    def step(self, closure=None, *, scale: Tensor | None = None, sums: Mapping[nn.Parameter, Tensor] | None = None):
        """Update every parameter that has a gradient: its `.grad`, or the float32 one in `sums`, times `scale`."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = (sums or {}).get(parameter, parameter.grad)
                if gradient is None:
                    continue
                entry = self.state[parameter]
                entry["step"] += 1
                adamw_step_(
                    parameter,
                    entry.get("low"),
                    gradient.contiguous(),
                    entry["exp_avg"],
                    entry["exp_avg_sq"],
                    Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], entry["step"]),
                    scale=scale,
                    key=noise_key(self._seed, entry["step"], self._index[parameter]),
                )
