"""Runs on several processes of this machine, forked with everything imported, joined over gloo."""

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

FORK = multiprocessing.get_context("fork")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _in_rank(rank: int, size: int, port: int, body: Callable[[], None], log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's own stand in their place
    try:
        body()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


class Ranks:
    """`size` processes that run `body`, each as torchrun would start it."""

    def __init__(self, size: int, body: Callable[[], None], folder: Path):
        self.logs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        port = _free_port()
        self.processes = [
            FORK.Process(target=_in_rank, args=(rank, size, port, body, self.logs[rank]), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def join(self, seconds: float = 120) -> list[int | None]:
        """Exit codes; a process that is still there then is killed, and has none."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def finish(self, seconds: float = 120) -> None:
        """All end well."""
        codes = self.join(seconds)
        assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(log.read_text() for log in self.logs)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Callable[..., Ranks]:
    import burnish.run  # noqa: F401  # the children inherit what is imported here

    return lambda size, body: Ranks(size, body, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict]]:
    """The step records of a run's folder."""

    def read(folder: Path) -> list[dict]:
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    return read
