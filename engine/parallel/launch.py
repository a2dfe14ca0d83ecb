"""Starts a command once for each device of this machine, as `torchrun` does, and says in one line what ended it.

torch's elastic agent does the starting, watching and starting again.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from burnish.interrupt import SIGNALS
from burnish.parallel.world import leave, lost_others, speaks, started

Result = TypeVar("Result")
FINAL = (0, 2, *(128 + number for number in SIGNALS))  # exit codes that starting again wouldn't change
QUIET = 75  # exit code of a process that stopped because another one did, and of one whose error another has shown


def launch(words: list[str], processes: int, restarts: int) -> int:
    """Run `python -m burnish *words` in so many processes; returns the exit code.

    words     the command, as each process runs it
    restarts  how often all start again after one died; a run goes on from its last checkpoint by itself. A mistake of
              the user's, and a run that was told to stop, would only come to the same end

    A signal reaches every process, which stops after its step with everything saved (burnish.interrupt).
    """
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its tables show every error again
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # a step and a checkpoint take their time
    code = _once(words, processes)
    for _ in range(restarts):
        if code in FINAL:
            break
        print("burnish: starting again from the last checkpoint", file=sys.stderr)
        code = _once(words, processes)
    return code


def _once(words: list[str], processes: int) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "burnish", *words)
    except ChildFailedError as error:
        return _explained(error)
    except SignalException as error:  # the processes have been told, and have ended
        return 128 + error.sigval
    return 0


def _explained(error: ChildFailedError) -> int:
    """The exit code of the process that failed first; one line where it couldn't say anything itself."""
    followed = (QUIET, -signal.SIGTERM)  # the agent ends with SIGTERM those that are left
    number, first = min(error.failures.items(), key=lambda item: (item[1].exitcode in followed, item[1].timestamp))
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        print(
            f"burnish: process {number} was ended by {name}, so the others stopped\n"
            "  The same command goes on from the last checkpoint; max_restarts=N does so by itself",
            file=sys.stderr,
        )
        return 128 - first.exitcode
    return first.exitcode


def together(run: Callable[[], Result]) -> Result:
    """run() as one of several processes, or as the only one: an error that all have, or that one has, is shown once.

    A process that has nothing to say ends with QUIET, without waiting for anybody.
    """
    if not started():
        return run()
    try:
        result = run()
    except Exception as error:
        if not lost_others(error) and speaks():
            raise
        sys.stdout.flush()
        time.sleep(1.0)  # the one that has something to say ends first, and so is the one that failed
        os._exit(QUIET)
    leave()
    return result
