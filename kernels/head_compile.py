"""The head inside functions that torch.compile compiles: it runs as it is, between two graphs."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(op: Callable[P, R]) -> Callable[P, R]:
    """Decorates an op whose work torch.compile can't improve and would cut into dozens of graphs: it gets one break.

    torch.compiler.disable does that, but costs an import of seconds; it is asked for only where a compiler is at work.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            if not disabled:
                disabled.append(torch.compiler.disable(op))
            return disabled[0](*args, **kwargs)
        return op(*args, **kwargs)

    return call
