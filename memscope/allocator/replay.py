"""Replay a run's allocations through PyTorch's CUDA caching allocator, to find reserved memory and running out of it.

The allocations and their order come from a trace; the replay gives them the blocks, segments and addresses they would
get on a device of a given capacity. Needs neither CUDA nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

import numpy as np

from memscope.allocator.blocks import Block
from memscope.allocator.caching import CachingAllocator
from memscope.allocator.report import AllocationFailed, HeldSegments, OutOfMemory, SegmentEvent
from memscope.allocator.settings import AllocatorSettings
from memscope.trace import Ints

__all__ = ["Replay", "follow", "replay"]


@dataclass(frozen=True, eq=False)
class Replay:
    """The result of a replay. Columns have one value per allocation, or one after each event that took place."""

    block_sizes: Ints
    """Bytes of each allocation's block `[allocations]`; 0 for an empty tensor and after running out of memory."""
    addresses: Ints
    """Start address of each block `[allocations]`; -1 for an allocation without a block."""
    allocated: Ints
    """Bytes in allocated blocks `[events]`: torch.cuda.memory_allocated()."""
    requested: Ints
    """Bytes requested for these blocks `[events]`: `requested_bytes` of torch.cuda.memory_stats()."""
    reserved: Ints
    """Bytes reserved from the driver `[events]`: torch.cuda.memory_reserved()."""
    segment_events: tuple[SegmentEvent, ...]
    """Driver memory reserved and released, in order."""
    oom: OutOfMemory | None
    """The request that ran out of memory and ended the replay; None if all requests succeeded."""
    _run: _Run = field(repr=False)

    @property
    def active(self) -> Ints:
        """Bytes in use `[events]`: equal to `allocated`, because a replay defers no free."""
        return self.allocated

    @property
    def peak_allocated(self) -> int:
        """Peak allocated bytes: torch.cuda.max_memory_allocated()."""
        return int(self.allocated.max(initial=0))

    @property
    def peak_reserved(self) -> int:
        """Peak reserved bytes, including within an event: torch.cuda.max_memory_reserved()."""
        return _peak_reserved(self.segment_events)

    @property
    def failed_allocation(self) -> int | None:
        """Index of the allocation that ran out of memory; None if none did."""
        return None if self.oom is None else self._run.order[self.oom.event]

    def peak_reserved_within(self, capacity_bytes: int) -> int | None:
        """Peak reserved bytes with another capacity; None if memory runs out. Repeats the replay."""
        allocator = self._run.allocator(capacity_bytes=capacity_bytes, device_bytes=None)
        try:
            for _ in self._run.steps(allocator):
                pass
        except AllocationFailed:
            return None
        return _peak_reserved(allocator.segment_events)

    @cached_property
    def largest_free(self) -> Ints:
        """Bytes of the largest cached block `[events]`. The first access repeats the replay."""
        allocator = self._run.allocator()
        steps = zip(range(len(self.allocated)), self._run.steps(allocator), strict=False)
        return np.fromiter((allocator.largest_free() for _ in steps), dtype=np.int64, count=len(self.allocated))

    def snapshots(self, events: Iterable[int]) -> dict[int, HeldSegments]:
        """All segments and blocks after each of these events, by event. Repeats the replay."""
        wanted = set(events)
        absent = [event for event in sorted(wanted) if not 0 <= event < len(self.allocated)]
        if absent:
            raise ValueError(f"no event {absent[0]} in a replay of events 0 to {len(self.allocated) - 1}")
        allocator = self._run.allocator()
        steps = zip(range(max(wanted, default=-1) + 1), self._run.steps(allocator), strict=False)
        return {event: allocator.snapshot() for event, _ in steps if event in wanted}


@dataclass(frozen=True, eq=False)
class _Run:
    """The inputs of a replay, kept to repeat it."""

    order: list[int]
    """By event: `i` for the birth of allocation `i`, `~i` for its free."""
    sizes: list[int]
    streams: list[int]
    cache_emptied: frozenset[int]
    allocator: Callable[..., CachingAllocator]

    def steps(self, allocator: CachingAllocator) -> Iterator[tuple[int, Block | None]]:
        """Run one event after the other; each yields its entry of `order` and its block (None for an empty tensor).

        Raises:
            AllocationFailed: the device is out of memory.
        """
        held: dict[int, Block] = {}
        for event, entry in enumerate(self.order):
            if event in self.cache_emptied:
                allocator.empty_cache()
            index = entry if entry >= 0 else ~entry
            if not self.sizes[index]:
                allocator.events += 1
                yield entry, None
            elif entry >= 0:
                block = held[index] = allocator.malloc(self.sizes[index], self.streams[index])
                yield entry, block
            else:
                block = held.pop(index)
                allocator.free(block)
                yield entry, block
        if len(self.order) in self.cache_emptied:
            allocator.empty_cache()


def replay(
    sizes: Ints,
    born: Ints,
    freed: Ints,
    *,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
    device_bytes: int | None = None,
    streams: Ints | None = None,
    cache_emptied: Sequence[int] = (),
    segment_addresses: Mapping[int, int] | None = None,
) -> Replay:
    """Make and free allocations in order, until the last event or until memory runs out.

    Args:
        sizes: bytes requested `[allocations]`.
        born: event of each allocation `[allocations]`. Each allocation and each free is one event, numbered from 0
            without gaps.
        freed: event of its free `[allocations]`; -1 if it is never freed.
        settings: the allocator's settings; None: PyTorch's defaults.
        capacity_bytes: bytes that the driver can give; None: no limit. See `CachingAllocator`, also for `device_bytes`.
        device_bytes: total memory of the device; None: the capacity.
        streams: CUDA stream of each allocation `[allocations]`; None: all on the default stream, 0.
        cache_emptied: events before which torch.cuda.empty_cache() is called; the number of events stands for the end.
        segment_addresses: the driver's address of the segment created in each event; to follow PyTorch 2.11 and older.

    Raises:
        ValueError: the columns do not describe a sequence of events.
    """
    run = _Run(
        order=_order(sizes, born, freed),
        sizes=sizes.tolist(),
        streams=[0] * len(sizes) if streams is None else streams.tolist(),
        cache_emptied=frozenset(cache_emptied),
        allocator=partial(
            CachingAllocator,
            settings,
            capacity_bytes=capacity_bytes,
            device_bytes=device_bytes,
            segment_addresses=segment_addresses,
        ),
    )
    allocator, oom = run.allocator(), None
    block_sizes, addresses = [0] * len(sizes), [-1] * len(sizes)
    try:
        for entry, block in run.steps(allocator):
            if entry >= 0 and block is not None:
                block_sizes[entry] = block.size
                addresses[entry] = block.address
    except AllocationFailed as failure:
        oom = failure.record
    events = allocator.events
    blocks = np.array(block_sizes, dtype=np.int64)
    reserved = np.zeros(events, dtype=np.int64)
    for change in allocator.segment_events:
        if change.event < events:
            reserved[change.event] += change.change_bytes
    return Replay(
        block_sizes=blocks,
        addresses=np.array(addresses, dtype=np.int64),
        allocated=_running_total(blocks, born, freed, events),
        requested=_running_total(sizes, born, freed, events),
        reserved=reserved.cumsum(),
        segment_events=tuple(allocator.segment_events),
        oom=oom,
        _run=run,
    )


def _peak_reserved(segment_events: Iterable[SegmentEvent]) -> int:
    return max(accumulate((event.change_bytes for event in segment_events), initial=0))


def follow(
    allocator: CachingAllocator, sizes: Ints, born: Ints, freed: Ints, cache_emptied: Sequence[int] = ()
) -> Iterator[tuple[int, Block | None]]:
    """Replay allocations on a given allocator, one event per iteration, so that the caller can inspect it in between.

    Each iteration yields `i` for the birth of allocation `i` or `~i` for its free, and its block (None for an empty
    tensor). The other arguments are as in `replay`.

    Raises:
        ValueError: the columns do not describe a sequence of events.
        AllocationFailed: the device is out of memory.
    """
    order, streams = _order(sizes, born, freed), [0] * len(sizes)
    return _Run(order, sizes.tolist(), streams, frozenset(cache_emptied), lambda: allocator).steps(allocator)


def _order(sizes: Ints, born: Ints, freed: Ints) -> list[int]:
    """By event: `i` for the birth of allocation `i`, `~i` for its free."""
    count = len(sizes)
    is_freed = freed >= 0
    events = count + int(is_freed.sum())
    if len(born) != count or len(freed) != count:
        raise ValueError(f"{count} sizes, {len(born)} births, {len(freed)} frees: expected the same number of each")
    if (sizes < 0).any():
        raise ValueError(f"allocation {int((sizes < 0).argmax())} has {int(sizes.min())} bytes")
    if (is_freed & (freed <= born)).any():
        raise ValueError(f"allocation {int((is_freed & (freed <= born)).argmax())} is freed before it is made")
    clock = np.concatenate([born, freed[is_freed]])
    if not np.array_equal(np.sort(clock), np.arange(events)):
        raise ValueError(f"the {events} births and frees are not numbered 0 to {events - 1}, each once")
    order = np.empty(events, dtype=np.int64)
    order[born] = np.arange(count)
    order[freed[is_freed]] = ~np.flatnonzero(is_freed)
    found: list[int] = order.tolist()
    return found


def _running_total(sizes: Ints, born: Ints, freed: Ints, events: int) -> Ints:
    """Bytes alive after each of the first `events` events."""
    change = np.zeros(events, dtype=np.int64)
    made, gone = born < events, (freed >= 0) & (freed < events)
    change[born[made]] = sizes[made]
    change[freed[gone]] = -sizes[gone]
    return change.cumsum()
