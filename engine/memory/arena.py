"""Checkpoints on the host: one arena of exact size, filled and read beside the computation.

A pass is the forward of one micro-batch; its checkpoints are numbered in the order in which they are made, and backward
reads them from the last to the first. Each copy out starts behind the computation that made the tensor, each copy in
one checkpoint before it is needed, into one of two landing buffers. Nothing here waits on the host, except to give the
arena back; what must not overtake what is said by events alone, so no tensor is handed to the allocator too early and
record_stream is not needed.

Why no read comes too early and nothing is written over too soon:
    copy out    starts behind an event of the computation, and so behind every copy in that the computation waited for
    its source  is held until the computation waits for the copy, at the latest two checkpoints later
    copy in     starts behind its own copy out, and behind the computation that last read the landing buffer
    the reader  waits for the copy in
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from burnish.config.errors import UserError

ALIGNMENT = 16  # bytes: what vector loads ask of a tensor's start
STASH = 2  # checkpoints whose copy out may still be under way before the computation waits for it


class Copies(Protocol):
    """Asynchronous copies between host and device, and events that order them with the computation."""

    def event(self) -> Any:
        """Done when everything that the computation was told to do up to here is done."""

    def copy_out(self, source: Tensor, target: Tensor, after: list) -> Any:
        """Device to host behind the events `after`; returns the event of its end."""

    def copy_in(self, source: Tensor, target: Tensor, after: list) -> Any:
        """Host to device behind the events `after`; returns the event of its end."""

    def wait(self, event: Any) -> None:
        """What the computation is told from here on comes behind the event."""

    def host(self, size: int) -> tuple[Tensor, str]:
        """A host buffer of exactly `size` bytes, and how it was had."""

    def free(self, buffer: Tensor) -> None:
        """Give a host buffer back, once no copy uses it."""


class PlainCopies:
    """On the CPU the host is the device: copies are done when they return."""

    def event(self) -> None:
        return None

    def copy_out(self, source: Tensor, target: Tensor, after: list) -> None:
        target.copy_(source)

    def copy_in(self, source: Tensor, target: Tensor, after: list) -> None:
        target.copy_(source)

    def wait(self, event: None) -> None:
        return None

    def host(self, size: int) -> tuple[Tensor, str]:
        return torch.empty(size, dtype=torch.uint8), "plain copies"

    def free(self, buffer: Tensor) -> None:
        return None


class StreamCopies:
    """CUDA: a stream for each direction, so that a copy out and a copy in may overlap, and a page-locked host buffer.

    The buffer is torch.empty and cudaHostRegister: torch's own pinned allocator rounds up to a power of two.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy_out(self, source: Tensor, target: Tensor, after: list) -> torch.cuda.Event:
        return self._copy(self._out, source, target, after)

    def copy_in(self, source: Tensor, target: Tensor, after: list) -> torch.cuda.Event:
        return self._copy(self._in, source, target, after)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def host(self, size: int) -> tuple[Tensor, str]:
        buffer = torch.empty(size, dtype=torch.uint8)
        failed = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(failed):
            return buffer, f"pageable, slow: page-locking {size / 2**30:.1f} GiB failed with CUDA error {int(failed)}"
        return buffer, "page-locked"

    def free(self, buffer: Tensor) -> None:
        for stream in (self._out, self._in):
            stream.synchronize()
        if buffer.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor, after: list) -> torch.cuda.Event:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()


def copies_for(device: torch.device) -> Copies:
    return StreamCopies(device) if device.type == "cuda" else PlainCopies()


def rounded(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in the arena."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Slot:
    """One checkpoint of one pass on the host: whose it is, where its tensors lie, and how far its copies are."""

    def __init__(self, owner: tuple[int, int], start: int):
        self.owner = owner  # (checkpoint, pass)
        self.start = self.end = start
        self.parts: list[tuple[int, torch.Size, torch.dtype]] = []  # offset in the slot, shape, dtype
        self.sources: list[Tensor] = []  # held until the computation has waited for `left`
        self.left: list[Any] = []
        self.arrived: list[Any] = []
        self.landing: Landing | None = None

    def views(self, buffer: Tensor, start: int) -> list[Tensor]:
        """The checkpoint's tensors in a byte buffer that holds the slot from `start` on."""
        found = []
        for offset, shape, dtype in self.parts:
            size = shape.numel() * dtype.itemsize
            found.append(buffer[start + offset : start + offset + size].view(dtype).view(shape))
        return found


class Landing:
    """One of the two device buffers that checkpoints come back into."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.slot: Slot | None = None
        self.read: Any = None  # event: the computation is done with what was here


class Arena:
    """The host buffer, its slots and the landing buffers. Grows between passes only, when no slot is live."""

    def __init__(self, device: torch.device, copies: Copies | None = None):
        self._buffer: Tensor | None = None
        self.device = device
        self.copies = copies or copies_for(device)
        self.capacity = 0
        self.wanted = 0
        self.note = ""
        self.stayed = 0  # tensors that stayed on the device because the arena was full
        self.live: list[Slot] = []  # in the order of their places
        self._landings = (Landing(), Landing())
        self._passes = 0

    def begin(self, kept: int, size: int) -> "Pass":
        """A new pass: its checkpoints before number `kept` go to the host and will take `size` bytes there."""
        top = self.live[-1].end if self.live else 0
        self.wanted = max(self.wanted, top + size)
        if not self.live and self.wanted > self.capacity:
            self._allocate(self.wanted)
        self._passes += 1
        return Pass(self, self._passes, kept)

    def _allocate(self, size: int) -> None:
        self.close()
        try:
            self._buffer, self.note = self.copies.host(size)
        except RuntimeError as error:
            raise UserError(
                f"the host has no {size / 2**30:.1f} GiB for checkpoints",
                where="activation_offloading",
                mend="Set checkpoint_segment: 2, or train on shorter batches",
            ) from error
        self.capacity = size

    def put(self, slot: Slot | None, owner: tuple[int, int], tensor: Tensor) -> Slot | None:
        """Start copying a tensor [any] out into the owner's slot (a new one without); None where there is no room."""
        if slot is None:
            slot = Slot(owner, self.live[-1].end if self.live else 0)
        end = slot.end + rounded(_bytes(tensor))
        if self._buffer is None or end > self.capacity or (slot.parts and self.live[-1] is not slot):
            self.wanted = max(self.wanted, end)
            self.stayed += 1
            return None
        if not slot.parts:
            self.live.append(slot)
        source = tensor.detach().contiguous()
        slot.parts.append((slot.end - slot.start, source.shape, source.dtype))
        slot.end = end
        slot.sources.append(source)
        target = slot.views(self._buffer, slot.start)[-1]
        slot.left.append(self.copies.copy_out(source, target, [self.copies.event()]))
        return slot

    def settle(self, slot: Slot) -> None:
        """Let go of a slot's sources: what the computation does from here on comes behind their copies."""
        for event in slot.left if slot.sources else ():
            self.copies.wait(event)
        slot.sources.clear()

    def fetch(self, slot: Slot, *, ahead: bool) -> None:
        """Start copying a slot in, unless it is under way; `ahead` of need only if a landing buffer is free."""
        if slot.landing is not None:
            return
        landing = next((each for each in self._landings if each.slot is None), None)
        if landing is None:  # never when it is needed: only one is ever filled ahead of need
            assert ahead, "both landing buffers are taken"
            return
        size = slot.end - slot.start
        if landing.buffer is None or landing.buffer.numel() < size:
            landing.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            landing.read = self.copies.event()  # what had this memory before is the computation's to finish
        landing.slot, slot.landing = slot, landing
        assert self._buffer is not None
        after = [*slot.left, landing.read]
        sources, targets = slot.views(self._buffer, slot.start), slot.views(landing.buffer, 0)
        slot.arrived = [
            self.copies.copy_in(source, target, after) for source, target in zip(sources, targets, strict=True)
        ]

    @contextmanager
    def reading(self, slot: Slot) -> Iterator[list[Tensor]]:
        """The slot's tensors on the device. They are gone behind the block, and the slot is free."""
        if slot not in self.live:
            raise RuntimeError(
                "this checkpoint has been read already: with activation_offloading a graph can be gone through once "
                "(no retain_graph)"
            )
        self.fetch(slot, ahead=False)
        landing = slot.landing
        assert landing is not None and landing.buffer is not None
        for event in slot.arrived:
            self.copies.wait(event)
        slot.sources.clear()  # a copy in comes behind its copy out
        self.live.remove(slot)
        try:
            yield slot.views(landing.buffer, 0)
        finally:
            landing.slot, landing.read = None, self.copies.event()
            self._let_go_of_landings()

    def abandon(self, number: int | None = None) -> None:
        """Free every live slot, or those of this pass: their backward will not come."""
        for slot in [slot for slot in self.live if number in (None, slot.owner[1])]:
            self.settle(slot)
            for event in slot.arrived:
                self.copies.wait(event)
            if slot.landing is not None:
                slot.landing.slot, slot.landing.read = None, self.copies.event()
            self.live.remove(slot)
        self._let_go_of_landings()

    def _let_go_of_landings(self) -> None:
        """Between passes their memory is the forward's. The computation has waited for all that was copied there."""
        if not self.live and all(landing.slot is None for landing in self._landings):
            self._landings = (Landing(), Landing())

    def __deepcopy__(self, memo: dict) -> "Arena":
        return Arena(self.device)  # a copied model's checkpoints go elsewhere

    def __del__(self) -> None:
        if self._buffer is not None and not sys.is_finalizing():
            self.copies.free(self._buffer)

    def close(self) -> None:
        """Give the host buffer and the landing buffers back. No slot may be live."""
        assert not self.live, "slots are live"
        if self._buffer is not None:
            self.copies.free(self._buffer)
        self._buffer, self.capacity = None, 0
        self._landings = (Landing(), Landing())


class Pass:
    """The checkpoints of one micro-batch, numbered from 0; those from `kept` on stay on the device.

    Slots live as long as somebody may read them: a pass that is forgotten before its backward frees its own.
    """

    def __init__(self, arena: Arena, number: int, kept: int):
        self.arena, self.number, self.kept = arena, number, kept
        self._slots: dict[int, Slot] = {}

    def __del__(self) -> None:
        self.arena.abandon(self.number)

    def put(self, index: int, tensor: Tensor) -> bool:
        """Copy a tensor of checkpoint `index` out; False if it has to stay on the device (or lies on another one)."""
        if index - STASH in self._slots:
            self.arena.settle(self._slots[index - STASH])
        if index >= self.kept or tensor.device != self.arena.device:
            return False
        slot = self.arena.put(self._slots.get(index), (index, self.number), tensor)
        if slot is None:
            return False
        self._slots[index] = slot
        return True

    @contextmanager
    def reading(self, index: int) -> Iterator[list[Tensor]]:
        """The tensors of checkpoint `index` that went to the host, on the device; the one before it starts to come.

        Backward has begun: no source is held any more. The last copies out had the head and the loss to end in.
        """
        for each in self._slots.values():
            self.arena.settle(each)
        slot = self._slots.get(index)
        nothing: AbstractContextManager[list[Tensor]] = nullcontext([])
        with nothing if slot is None else self.arena.reading(slot) as tensors:
            if index - 1 in self._slots:
                self.arena.fetch(self._slots[index - 1], ahead=True)
            yield tensors
