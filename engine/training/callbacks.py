"""Callbacks: transformers' TrainerCallbacks, or any object with methods of their names.

A callback reads `args` (the configuration), `state` and the objects that come as keywords, and answers through
`control` as with transformers: flags that it sets are honoured, and so are flags that it takes back in time.
"""

from collections.abc import Iterable
from typing import Any

from burnish.config.errors import UserError
from burnish.loop.state import Control
from burnish.metrics import Log
from burnish.parallel.world import any_of_each

_NEVER = {
    "on_substep_end": "gradients of a window are one sum",
    "on_pre_optimizer_step": "gradients may live in the optimizer's own twins",
    "on_optimizer_step": "gradients are gone as soon as they are used",
    "on_predict": "there is no predict",
    "on_push_begin": "uploads run no callbacks",
}
# the events after which the loop reads the flags; every process comes to them
ANSWERED = ("on_train_begin", "on_step_end", "on_epoch_end", "on_log", "on_evaluate", "on_save")
_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def heard(callbacks: Iterable[Any], log: Log) -> list:
    """The callbacks as objects (a class is made into one); what will never be called is reported."""
    made = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    for callback in made:
        for event, why in _NEVER.items():
            if _overrides(callback, event):
                log.warn(f"{type(callback).__name__}.{event} is never called: {why}")
    return made


def _overrides(callback: Any, event: str) -> bool:
    """Whether a class other than transformers' own base has this method."""
    for cls in type(callback).__mro__:
        if event in vars(cls):
            return not (cls.__name__ == "TrainerCallback" and cls.__module__.startswith("transformers."))
    return False


def tell(callbacks: list, event: str, config: Any, state: Any, control: Control, **given: Any) -> None:
    """Call each callback's method for `event`; a control object that one returns takes effect.

    An assertion at the start of training (EarlyStoppingCallback's about its metric) is the user's to mend: UserError.
    """
    for callback in callbacks:
        call = getattr(callback, event, None)
        if call is None:
            continue
        try:
            answer = call(config, state, control, **given)
        except AssertionError as error:
            if event not in ("on_init_end", "on_train_begin"):
                raise
            raise UserError(str(error), where=type(callback).__name__) from error
        if answer is not None and answer is not control:
            for flag in _FLAGS:
                setattr(control, flag, bool(getattr(answer, flag)))


def agree(control: Control) -> None:
    """What a callback of one process asks for (one that looks at the clock, say), all do; all processes must agree."""
    flags = any_of_each([getattr(control, flag) for flag in _FLAGS])
    for flag, asked in zip(_FLAGS, flags, strict=True):
        setattr(control, flag, asked)


def states(callbacks: list) -> dict[str, list[dict]]:
    """What callbacks want kept in a checkpoint (transformers' ExportableState), by class."""
    kept: dict[str, list[dict]] = {}
    for callback in callbacks:
        if callable(getattr(callback, "state", None)):
            kept.setdefault(type(callback).__name__, []).append(callback.state().get("attributes", {}))
    return kept


def restore(callbacks: list, kept: dict[str, list[dict]]) -> None:
    """Put back what `states` gave, to the callbacks of the same classes in the same order."""
    waiting = {name: list(entries) for name, entries in kept.items()}
    for callback in callbacks:
        if waiting.get(type(callback).__name__):
            for name, value in waiting[type(callback).__name__].pop(0).items():
                setattr(callback, name, value)
