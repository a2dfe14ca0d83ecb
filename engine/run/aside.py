"""What the libraries say during a run of the command line goes to log.txt, not to the screen.

Their warnings, and the records of their loggers from WARNING on. The screen is for the run's own lines; BURNISH_DEBUG=1
leaves everything where the libraries put it.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from burnish.metrics import Log

# With handlers of their own, which they may add when they are imported; everybody else's records come to the root.
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "torch")
LEVELS = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")  # read when they are imported


class Aside(logging.Handler):
    """Keeps lines until it is given a log, then writes them there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._held: list[str] = []
        self._log: Log | None = None

    def to(self, log: Log) -> None:
        self._log = log
        held, self._held = self._held, []
        for line in held:
            log.keep(line)

    def emit(self, record: logging.LogRecord) -> None:
        self.keep(f"{record.name}: {record.getMessage()}")

    def keep(self, text: str) -> None:
        line = f"{'library':<8} {' '.join(text.split())}"
        if self._log is None:
            self._held.append(line)
        else:
            self._log.keep(line)


def _refuse(hdlr: logging.Handler) -> None:
    """A library that is imported from now on adds its own handler, which writes to the screen."""


@contextmanager
def aside() -> Iterator[Aside]:
    """Inside, what libraries say is kept by the handler that this gives."""
    kept = Aside()
    if os.environ.get("BURNISH_DEBUG", "0") not in ("", "0"):
        yield kept
        return
    root = logging.getLogger()
    known = [name for name in root.manager.loggerDict if name.split(".")[0] in LIBRARIES]  # torch's have handlers too
    loggers = [logging.getLogger(name) for name in dict.fromkeys([*LIBRARIES, *known])]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    levels = {name: os.environ.get(name) for name in LEVELS}
    os.environ.update(dict.fromkeys(LEVELS, "warning"))
    for logger in loggers:
        top = logger.name in LIBRARIES
        logger.handlers, logger.propagate = [kept] * top, not top
        logger.setLevel(logging.WARNING if top else logger.level)
        logger.addHandler = _refuse  # type: ignore[method-assign]
    root.addHandler(kept)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, category, *place: kept.keep(f"{category.__name__}: {message}")
            yield kept
    finally:
        root.removeHandler(kept)
        for logger, handlers, level, propagate in before:
            del logger.addHandler
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        for name, value in levels.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
