"""Stopping without losing anything: signals and files become a question that the loop asks between two steps.

SIGINT, SIGTERM and SIGUSR1, or a file STOP in the run's folder: the step is finished, all is saved, the run ends.
A file SAVE: a checkpoint is written and training goes on. A second SIGINT stops at once.
"""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """Listens while it is entered (as often as one likes); `stopping` says whether to stop, `saving` whether to save.

    `number` is the signal that came, 0 where a STOP file did it, None while nothing has.
    """

    def __init__(self, folder: Path, say: Callable[[str, str], None]):
        self.folder = folder
        self.number: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "Interrupt":
        self._depth += 1
        if self._depth == 1:
            self.number = None
        if self._depth == 1 and threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number
            again = " (Ctrl-C again to stop now and lose it)" if number == signal.SIGINT else ""
            self._say("stop", f"{signal.Signals(number).name}: stopping after this step{again}")

    def stopping(self) -> bool:
        """Whether somebody has asked the run to stop. A STOP file is taken away when it is seen.

        False outside: what is evaluated after a run that was stopped is not the run.
        """
        if not self._depth:
            return False
        if self.number is None and self._taken("STOP"):
            self.number = 0
            self._say("stop", "STOP: stopping after this step")
        return self.number is not None

    def saving(self) -> bool:
        """Whether somebody has asked for a checkpoint. The SAVE file is taken away when it is seen."""
        return self._taken("SAVE")

    def _taken(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True
