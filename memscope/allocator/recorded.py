"""Reconstruct the allocator's blocks from its own history: their sizes and lifetimes, and the reserved memory.

A history has the address of each block and the bytes requested, but not the block's size. The size follows from the
free memory behind the address and from PyTorch's rule for splitting. Needs neither CUDA nor torch.

Sources: `alloc_found_block`, `should_split`, `free` and `free_block` in c10/cuda/CUDACachingAllocator.cpp and
`TraceEntry` in c10/core/CachingDeviceAllocator.h, PyTorch 2.11 and 2.13. The size in `alloc`, `free_requested` and
`free_completed` entries is the bytes requested. In an `oom` entry it is the bytes that could not be allocated;
`device_free` takes the place of the address.
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
"""Columns of `RecordedBlocks` that are known at a block's birth."""


@dataclass(frozen=True)
class Refusal:
    """A request that ran out of memory, and the memory in use at that moment."""

    entry: int
    """Index of the request in the history."""
    event: int
    """Number of events before it."""
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    """Largest free range in the allocator's segments."""
    device_free_bytes: int
    """Bytes that the driver had left."""

    def sizes(self, limit_bytes: int | None = None) -> dict[str, int]:
        """The sizes for `meta["out_of_memory"]` of a trace; `limit_bytes`: the process's own memory limit, if any."""
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
    """Every block of a history, in order of birth, earlier blocks first. Columns are int64 `[blocks]`."""

    address: Ints
    size: Ints
    """Bytes of the block, as counted by `torch.cuda.memory_allocated`."""
    requested: Ints
    born: Ints
    """Event of its birth. Events are births and requested frees, counted from 0."""
    freed: Ints
    """Event of its requested free; -1 if it is alive at the end."""
    entry: Ints
    """Index of its birth in the history; -1 if it was born before the history began."""
    event_entry: Ints
    """Index of each event in the history `[events]`; -1 for births before the history began."""
    reserved: Ints
    """Reserved bytes after each event `[events]`."""
    peak_reserved: int
    """Peak reserved bytes, including within an event."""
    peak_active: int
    """Peak bytes in blocks that are allocated or still in use by a stream."""
    refusals: tuple[Refusal, ...]

    def size_differences(self, segments: Sequence[Entry]) -> int:
        """Bytes by which the blocks alive at the end differ from a snapshot taken then; 0 if all agree."""
        alive = self.freed < 0
        ours = dict(zip(self.address[alive].tolist(), self.size[alive].tolist(), strict=True))
        theirs = {address: block["size"] for address, block in _blocks_of(segments) if block["state"] == _ALLOCATED}
        return sum(abs(ours.get(address, 0) - theirs.get(address, 0)) for address in ours.keys() | theirs.keys())


def read_blocks(
    before: Sequence[Entry], entries: Sequence[Entry], settings: AllocatorSettings, first: Sequence[int] = ()
) -> RecordedBlocks:
    """Reconstruct the blocks of a history that begins with a snapshot's segments.

    Args:
        before: `segments` of one device when the history began.
        entries: the device's `device_traces` since then, none of them dropped.
        settings: the allocator's settings, which decide how blocks are rounded and split.
        first: addresses of earlier blocks, in the order in which to list them; other earlier blocks follow by address.

    Raises:
        MemscopeError: the history contradicts itself or the snapshot.
    """
    reader = _HistoryReader(settings)
    reader.take_in(before, {address: place for place, address in reversed([*enumerate(first)])})
    for place, entry in enumerate(entries):
        reader.read(place, entry)
    return reader.blocks()


class Memory:
    """Reserved memory as ranges of addresses, and the blocks in it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self._grows: dict[int, bool] = {}
        self._taken: list[int] = []
        self.sizes: dict[int, int] = {}

    def ranges(self) -> list[tuple[int, int, bool]]:
        """`(start, end, whether it can grow)` of each range, in order of address."""
        return [(start, self._ends[start], self._grows[start]) for start in self._starts]

    def hold(self, start: int, size: int, *, grows: bool) -> None:
        """Add reserved memory; pages of a growing segment are merged with their neighbours."""
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
        """Remove released memory: a segment, or pages of one."""
        first = self._range_of(start)
        grows, end = self._grows[first], self._drop(first)
        if start + size > end:
            raise _contradiction(f"it releases {size} bytes at {start:#x}, which reach beyond their segment")
        if first < start:
            self._add(first, start, grows)
        if start + size < end:
            self._add(start + size, end, grows)

    def room(self, address: int) -> int:
        """Contiguous free bytes from an address on."""
        end = self._ends[self._range_of(address)]
        at = bisect_left(self._taken, address)
        return (min(end, self._taken[at]) if at < len(self._taken) else end) - address

    def take(self, address: int, size: int) -> None:
        """Add a block of `size` bytes at an address."""
        insort(self._taken, address)
        self.sizes[address] = size

    def free(self, address: int) -> int:
        """Remove a block and return its size in bytes."""
        if address not in self.sizes:
            raise _contradiction(f"it frees a block at {address:#x}, where there is none")
        del self._taken[bisect_left(self._taken, address)]
        return self.sizes.pop(address)

    def largest_free(self) -> int:
        """Bytes of the largest free range in a segment."""
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
            raise _contradiction(f"the address {address:#x} is in no segment")
        return self._starts[at]

    def _add(self, start: int, end: int, grows: bool) -> None:
        if start in self._ends:
            raise _contradiction(f"it reserves the memory at {start:#x} twice")
        insort(self._starts, start)
        self._ends[start], self._grows[start] = end, grows

    def _drop(self, start: int) -> int:
        del self._starts[bisect_left(self._starts, start)]
        del self._grows[start]
        return self._ends.pop(start)


class _HistoryReader:
    """The allocator's state at one point of its history, and the blocks so far."""

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
        """The rounded request, plus the rest of the free block if it is too small to be split off."""
        room, size = self._memory.room(address), self._settings.block_size(requested)
        if room < size:
            raise _contradiction(f"it puts {requested} bytes at {address:#x}, where only {room} are free")
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
            raise _contradiction(f"it frees a block at {address:#x}, where there is none")
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
        f"the history of PyTorch's allocator contradicts itself: {what}. Check that nothing stopped, cleared or "
        "restarted it (torch.cuda.memory._record_memory_history), or changed the allocator's settings, during recording"
    )
