"""The allocator's blocks, read from its own history: how large each was, when it was there, what was reserved.

A history tells where a block begins and how much was asked for, not how large the block is: that follows from what lay
free behind it and from PyTorch's rule for splitting. Needs neither CUDA nor torch.

Sources: `alloc_found_block`, `should_split`, `free` and `free_block` in c10/cuda/CUDACachingAllocator.cpp and
`TraceEntry` in c10/core/CachingDeviceAllocator.h, PyTorch 2.11 and 2.13. `alloc`, `free_requested` and `free_completed`
carry the bytes asked for; `oom` carries the bytes that were not to be had, and `device_free` in place of an address.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memscope.allocator.settings import MIN_BLOCK, SMALL_SIZE, AllocatorSettings
from memscope.errors import MemscopeError
from memscope.trace import Ints, columns_of

__all__ = ["BLOCK_COLUMNS", "Memory", "RecordedBlocks", "Refusal", "read_blocks"]

Entry = Mapping[str, Any]
"""An entry of `device_traces`, or a segment of `segments`, of `torch.cuda.memory._snapshot()`."""
_ALLOCATED = "active_allocated"
BLOCK_COLUMNS = ("address", "size", "requested", "born", "entry")
"""Of `RecordedBlocks`, what is known of a block when it is born."""


@dataclass(frozen=True)
class Refusal:
    """A request that ran out of memory, and what there was. Bytes."""

    entry: int
    """Its place in the history."""
    event: int
    """Events before it."""
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    """Largest free piece of what the allocator holds."""
    device_free_bytes: int
    """What the driver had left."""

    def sizes(self, limit_bytes: int | None = None) -> dict[str, int]:
        """As `meta["out_of_memory"]` of a trace has them; `limit_bytes`: what the process may take, if less."""
        offered = self.reserved_bytes + self.device_free_bytes
        return {
            "requested": self.requested_bytes,
            "allocated": self.allocated_bytes,
            "reserved": self.reserved_bytes,
            "largest_free": self.largest_free_bytes,
            "limit": offered if limit_bytes is None else min(offered, limit_bytes),
        }


@dataclass(frozen=True, eq=False)
class RecordedBlocks:
    """Every block of a history, in order of birth; those there before it come first. Columns are int64 `[blocks]`."""

    address: Ints
    size: Ints
    """Bytes of the block: what `torch.cuda.memory_allocated` counts."""
    requested: Ints
    born: Ints
    """Event: births, and frees as they are asked for, are counted from 0."""
    freed: Ints
    """Event; -1 when it is alive at the end."""
    entry: Ints
    """Place in the history of its birth; -1 when it was there before."""
    event_entry: Ints
    """Place in the history of each event `[events]`; -1 for the births of what was there before."""
    reserved: Ints
    """Bytes held from the driver after each event `[events]`."""
    peak_reserved: int
    """Most bytes held from the driver, be it within an event."""
    peak_active: int
    """Most bytes in blocks that are handed out or wait for a stream to be done with them."""
    refusals: tuple[Refusal, ...]

    def size_differences(self, segments: Sequence[Entry]) -> int:
        """Bytes by which the blocks alive at the end differ from those in a snapshot of then: 0 when all agree."""
        alive = self.freed < 0
        ours = dict(zip(self.address[alive].tolist(), self.size[alive].tolist(), strict=True))
        theirs = {address: block["size"] for address, block in _blocks_of(segments) if block["state"] == _ALLOCATED}
        return sum(abs(ours.get(address, 0) - theirs.get(address, 0)) for address in ours.keys() | theirs.keys())


def read_blocks(
    before: Sequence[Entry], entries: Sequence[Entry], settings: AllocatorSettings, first: Sequence[int] = ()
) -> RecordedBlocks:
    """Follow a history from a snapshot's segments on.

    Args:
        before: `segments` of one device when the history began.
        entries: the device's `device_traces` since then, none of them dropped.
        settings: what the allocator was told; they decide how blocks are rounded and split.
        first: addresses, in the order in which the blocks there before are taken in; the others follow by address.

    Raises:
        MemscopeError: when the history contradicts itself or the snapshot.
    """
    reader = _Reader(settings)
    reader.take_in(before, {address: place for place, address in reversed([*enumerate(first)])})
    for place, entry in enumerate(entries):
        reader.read(place, entry)
    return reader.blocks()


class Memory:
    """What is held from the driver, as ranges of addresses, and which parts of it are taken."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self._grows: dict[int, bool] = {}
        self._taken: list[int] = []
        self.sizes: dict[int, int] = {}

    def ranges(self) -> list[tuple[int, int, bool]]:
        """Start, end and whether it can grow, of each range, by address."""
        return [(start, self._ends[start], self._grows[start]) for start in self._starts]

    def hold(self, start: int, size: int, *, grows: bool) -> None:
        """Memory from the driver; pages of a growing segment join those beside them."""
        end, at = start + size, bisect_left(self._starts, start)
        if grows:
            after = self._starts[at] if at < len(self._starts) else -1
            if after == end and self._grows[after]:
                end = self._drop(after)
            before = self._starts[at - 1] if at else -1
            if before >= 0 and self._ends[before] == start and self._grows[before]:
                self._drop(before)
                start = before
        self._add(start, end, grows)

    def give_back(self, start: int, size: int) -> None:
        """Memory for the driver: a segment, or pages out of one."""
        first = self._range_of(start)
        grows, end = self._grows[first], self._drop(first)
        if start + size > end:
            raise _contradiction(f"{size} bytes at {start:#x} are given back, which reach beyond their segment")
        if first < start:
            self._add(first, start, grows)
        if start + size < end:
            self._add(start + size, end, grows)

    def room(self, address: int) -> int:
        """Free bytes from an address on."""
        end = self._ends[self._range_of(address)]
        at = bisect_left(self._taken, address)
        return (min(end, self._taken[at]) if at < len(self._taken) else end) - address

    def take(self, address: int, size: int) -> None:
        """A block of `size` bytes begins at an address."""
        insort(self._taken, address)
        self.sizes[address] = size

    def free(self, address: int) -> int:
        """Bytes that are free again."""
        if address not in self.sizes:
            raise _contradiction(f"the block at {address:#x} is freed, which was not there")
        del self._taken[bisect_left(self._taken, address)]
        return self.sizes.pop(address)

    def largest_free(self) -> int:
        """Bytes of the largest range in a segment that no block takes."""
        largest = 0
        for start in self._starts:
            end, at = self._ends[start], bisect_left(self._taken, start)
            while at < len(self._taken) and self._taken[at] < end:
                largest = max(largest, self._taken[at] - start)
                start = self._taken[at] + self.sizes[self._taken[at]]
                at += 1
            largest = max(largest, end - start)
        return largest

    def _range_of(self, address: int) -> int:
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._ends[self._starts[at]]:
            raise _contradiction(f"the block at {address:#x} lies in no segment")
        return self._starts[at]

    def _add(self, start: int, end: int, grows: bool) -> None:
        insort(self._starts, start)
        self._ends[start], self._grows[start] = end, grows

    def _drop(self, start: int) -> int:
        del self._starts[bisect_left(self._starts, start)]
        del self._grows[start]
        return self._ends.pop(start)


class _Reader:
    """The state of the allocator at one point of its history, and what came before."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self._settings = settings
        self._memory = Memory()
        self._rows: list[tuple[int, int, int, int, int]] = []  # address, size, requested, born, entry
        self._freed: list[int] = []
        self._alive: dict[int, int] = {}
        self._event_entry: list[int] = []
        self._reserved_after: list[int] = []
        self._reserved = self._peak_reserved = self._allocated = self._active = self._peak_active = 0
        self._refusals: list[Refusal] = []

    def take_in(self, segments: Sequence[Entry], places: Mapping[int, int]) -> None:
        for segment in segments:
            self._memory.hold(segment["address"], segment["total_size"], grows=bool(segment.get("is_expandable")))
            self._hold(segment["total_size"])
        last = len(places)
        for address, block in sorted(_blocks_of(segments), key=lambda item: (places.get(item[0], last), item[0])):
            if block["state"] == _ALLOCATED:
                self._bear(-1, address, block["size"], block["requested_size"])
            elif block["state"].startswith("active"):
                self._take(address, block["size"])

    def read(self, place: int, entry: Entry) -> None:
        action, size = entry["action"], entry["size"]
        if action == "oom":
            self._refuse(place, size, entry["device_free"])
            return
        address = entry["addr"]
        if action == "alloc":
            self._bear(place, address, self._block_size(address, size), size)
        elif action == "free_requested":
            self._end(place, address)
        elif action == "free_completed":
            self._active -= self._memory.free(address)
        elif action in ("segment_alloc", "segment_map"):
            self._memory.hold(address, size, grows=action == "segment_map")
            self._hold(size)
        elif action in ("segment_free", "segment_unmap"):
            self._memory.give_back(address, size)
            self._hold(-size)

    def _block_size(self, address: int, requested: int) -> int:
        """The request rounded up, and with it what is left of a free block that is too little to be split off."""
        room, size = self._memory.room(address), self._settings.block_size(requested)
        if room < size:
            raise _contradiction(f"the block at {address:#x} for {requested} bytes has room for {room}")
        if size <= SMALL_SIZE or self._settings.expandable_segments:
            splits = room - size >= MIN_BLOCK
        else:
            limit = self._settings.max_split_size_bytes
            splits = room - size > SMALL_SIZE and (limit is None or size < limit)
        return size if splits else room

    def _bear(self, place: int, address: int, size: int, requested: int) -> None:
        self._take(address, size)
        self._allocated += size
        self._alive[address] = len(self._rows)
        self._rows.append((address, size, requested, len(self._event_entry), place))
        self._freed.append(-1)
        self._count(place)

    def _end(self, place: int, address: int) -> None:
        if address not in self._alive:
            raise _contradiction(f"the block at {address:#x} is freed, which was not there")
        row = self._alive.pop(address)
        self._allocated -= self._rows[row][1]
        self._freed[row] = len(self._event_entry)
        self._count(place)

    def _refuse(self, place: int, size: int, device_free: int) -> None:
        self._refusals.append(
            Refusal(
                entry=place,
                event=len(self._event_entry),
                requested_bytes=size,
                allocated_bytes=self._allocated,
                reserved_bytes=self._reserved,
                largest_free_bytes=self._memory.largest_free(),
                device_free_bytes=device_free,
            )
        )

    def _take(self, address: int, size: int) -> None:
        self._memory.take(address, size)
        self._active += size
        self._peak_active = max(self._peak_active, self._active)

    def _hold(self, change: int) -> None:
        self._reserved += change
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    def _count(self, place: int) -> None:
        self._event_entry.append(place)
        self._reserved_after.append(self._reserved)

    def blocks(self) -> RecordedBlocks:
        return RecordedBlocks(
            **columns_of(BLOCK_COLUMNS, self._rows),
            freed=np.array(self._freed, dtype=np.int64),
            event_entry=np.array(self._event_entry, dtype=np.int64),
            reserved=np.array(self._reserved_after, dtype=np.int64),
            peak_reserved=self._peak_reserved,
            peak_active=self._peak_active,
            refusals=tuple(self._refusals),
        )


def _blocks_of(segments: Sequence[Entry]) -> list[tuple[int, Entry]]:
    """`(address, block)` of every block of a snapshot."""
    found = []
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            found.append((address, block))
            address += block["size"]
    return found


def _contradiction(what: str) -> MemscopeError:
    return MemscopeError(
        f"the history of PyTorch's allocator contradicts itself: {what}. Was it stopped, cleared or started anew "
        "(torch.cuda.memory._record_memory_history), or the allocator set up differently, while memscope recorded?"
    )
