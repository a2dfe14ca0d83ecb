"""Backward functions that answer a request for second derivatives with an error."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an autograd.Function's backward: under create_graph=True it raises RuntimeError.

    torch's once_differentiable alone raises only where the incoming gradient itself needs a gradient, and otherwise
    (a plain loss with a gradient penalty) returns a constant, which silently drops the penalty's gradient.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def refuse_second_order(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # so in backward only where a graph of the gradient was asked for
            raise RuntimeError(
                "burnish.kernels: the gradient of this op can't be differentiated again (create_graph=True); "
                "run it under kernels.use('reference')"
            )
        return once(ctx, *grads)

    return refuse_second_order
