"""Who this process is among the others, and the few collectives that the rest of burnish needs.

The group is torch.distributed's own, one a process; a process that joined none is a world of one, where every function
here returns what it was given. Numbers that decide what the host does next travel over gloo, between the CPUs: no
device waits for them.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.config.errors import UserError

STRATEGIES = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among `size`.

    rank, local_rank  its number, and its number on its machine
    sequence          so many neighbours hold slices of the same documents (sequence parallel)
    documents         group of the ranks that hold the same slice number, of other documents; None: all
    slices            group of the ranks that hold slices of the same documents; None: this rank alone
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sequence: int = 1
    documents: Any = None
    slices: Any = None
    store: Any = None

    @property
    def shares(self) -> int:
        """Into how many parts a window's documents are shared out."""
        return self.size // self.sequence

    @property
    def share(self) -> int:
        """Which of these parts this process works on."""
        return self.rank // self.sequence

    @property
    def slice(self) -> int:
        """Which slice of its documents this process holds."""
        return self.rank % self.sequence

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


_world = World()


def world() -> World:
    return _world


def started() -> bool:
    """Whether torchrun, or burnish as torchrun, started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device, *, sequence: int = 1, timeout: float = 1800.0) -> World:
    """Join the processes that torchrun started; a world of one where it started none.

    sequence  neighbours that share documents; must divide the number of processes
    timeout   seconds that a collective may wait for the others

    Raises UserError for a sequence_parallel that the processes can't be divided by.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if (_world.size, _world.sequence) == (size, sequence):  # a second run of the same process
        return _world
    if size % sequence:
        raise UserError(
            f"{size} processes can't be divided into groups of {sequence}",
            where="sequence_parallel",
            mend="Use a divisor of the number of processes",
        )
    if size == 1:
        _world = World()
        return _world
    wait = timedelta(seconds=timeout)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        found, rank, size = next(dist.rendezvous("env://", timeout=wait))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what an earlier attempt left there is no use
        store = dist.PrefixStore(f"burnish-{attempt}", found)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait
        )
    else:
        store = _world.store
    rank = dist.get_rank()
    documents = slices = None
    if sequence > 1:
        groups = [list(range(first, first + sequence)) for first in range(0, size, sequence)]
        slices, _ = dist.new_subgroups_by_enumeration(groups, timeout=wait)
        across = [list(range(number, size, sequence)) for number in range(sequence)]
        documents, _ = dist.new_subgroups_by_enumeration(across, timeout=wait)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    _world = World(rank, size, local, sequence, documents, slices, store)
    return _world


def leave() -> None:
    """Back to a world of one. The others need not be there any more."""
    global _world
    if dist.is_initialized():
        dist.destroy_process_group()
    _world = World()


def speaks() -> bool:
    """Whether this process is the one to show an error: the first of the processes that asks."""
    if not started():
        return True
    if _world.store is None:  # nobody has joined yet, and all have made the same mistake
        return os.environ.get("RANK") == "0"
    try:
        return _world.store.add("spoken", 1) == 1
    except RuntimeError:
        return True  # the store went with the process that kept it


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Socket")
    return started() and isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def total(value: Tensor) -> Tensor:
    """The sum of `value` over the shares of a window's documents, in its dtype and on its device; a new tensor.

    Slices of one document know the same number, which counts once.
    """
    if _world.shares == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed, group=_world.documents)
    return summed


def total_count(number: int) -> int:
    """The sum of a number that every share knows of its own documents."""
    if _world.shares == 1:
        return number
    return int(total(torch.tensor(number, dtype=torch.int64)))


def any_of(flag: bool) -> bool:
    """Whether any process says so; all of them get the same answer, so they must all ask."""
    return any_of_each([flag])[0]


def any_of_each(flags: list[bool]) -> list[bool]:
    """any_of for several questions at once."""
    if _world.size == 1:
        return flags
    answers = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    return [bool(answer) for answer in answers.tolist()]


def least(number: float) -> float:
    """The smallest of the numbers that all processes give; all must ask."""
    if _world.size == 1:
        return number
    smallest = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return float(smallest)


def gather(values: Tensor) -> tuple[Tensor, int]:
    """`values` [n, ...] of all shares one after the other, and where this share's begin. n may differ, 0 included."""
    if _world.shares == 1:
        return values, 0
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_world.shares)]
    dist.all_gather(sizes, torch.tensor([len(values)]), group=_world.documents)
    counts = [int(size) for size in sizes]
    padded = values.detach().new_zeros(max(max(counts), 1), *values.shape[1:])
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=_world.documents)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole, sum(counts[: _world.share])


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others: what it leaves in a cache, they read."""
    if _world.size > 1 and _world.local_rank:
        barrier()
    yield
    if _world.size > 1 and not _world.local_rank:
        barrier()
