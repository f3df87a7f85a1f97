"""PyTorch's CUDACachingAllocator without CUDA: the same blocks, at the same places, in the same order.

Source: class DeviceCachingAllocator of c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.0; its function names are in the
docstrings here. Left out: private pools (CUDA graphs, MemPool), free-memory callbacks (CUDA IPC), and the deferred
frees of `Tensor.record_stream`. As a block freed here is free at once, *active* and *allocated* are the same; to
replay a program that uses record_stream, free each block where PyTorch completes its free.

Of blocks of equal size, PyTorch from 2.13 takes one of the segment that was made first, and in it the lowest; up to
2.11 it takes the one with the lowest address that the driver gave. Here it is the lowest address, and each segment
lies above those before it, so that both mean the same. To follow a run of 2.11 to the byte, pass the driver's
addresses. 2.12 goes by the age of the block itself, which is not replayed: of blocks of equal size it may take
another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from memscope.allocator.blocks import AddressRange, Block, Pool
from memscope.allocator.report import AllocationFailed, HeldSegments, OutOfMemory, SegmentAction, SegmentEvent
from memscope.allocator.settings import MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE, AllocatorSettings

__all__ = ["CachingAllocator"]

_UNLIMITED = 1 << 47  # bytes: all addresses a process has
_FIRST_ADDRESS = 1 << 60  # above any that a driver gives


class CachingAllocator:
    """The caching allocator of one device. Counts bytes as torch.cuda.memory_stats does.

    Args:
        settings: as PyTorch would read them from PYTORCH_CUDA_ALLOC_CONF; None is PyTorch's default.
        capacity_bytes: what the driver can give to this allocator: the device's memory less the CUDA context and what
            others hold. None: as much as is asked for.
        device_bytes: all memory of the device (cudaDeviceProp.totalGlobalMem), of which `per_process_memory_fraction`
            is a part and from which the length of an expandable segment follows. None: the capacity.
        segment_addresses: by event, where the driver put the segment made in it. One that would lie over another is
            put elsewhere: what is replayed is then no more what the driver saw.

    `allocated` is the bytes in blocks handed out, `requested` what they were asked for, `reserved` what is held from
    the driver, `events` the number of mallocs and frees so far, and `segment_events` all that was taken and given
    back.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | None = None,
        *,
        device_bytes: int | None = None,
        segment_addresses: Mapping[int, int] | None = None,
    ) -> None:
        self.settings = settings = settings or AllocatorSettings()
        self.allocated = 0
        self.requested = 0
        self.reserved = 0
        self.events = 0
        self.segment_events: list[SegmentEvent] = []
        capacity = _UNLIMITED if capacity_bytes is None else capacity_bytes
        self._capacity = capacity
        self._device = capacity if device_bytes is None else device_bytes
        limited = settings.per_process_memory_fraction < 1
        self._allowed = int(settings.per_process_memory_fraction * self._device) if limited else _UNLIMITED
        self._limit = min(capacity, self._allowed)
        self._collects = limited and settings.garbage_collection_threshold is not None
        self._rejects = settings.throw_on_cudamalloc_oom and not limited
        self._max_split = settings.max_split_size_bytes or _UNLIMITED
        self._rounding = settings.max_non_split_rounding_bytes or settings.large_segment_size_bytes
        self._expands = settings.expandable_segments
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._heads: dict[int, Block] = {}
        self._ends: dict[int, int] = {}  # of segments, by address
        # Searches of the large and of the small pool: the clock by which garbage collection tells the age of blocks.
        self._searches = [0, 0]
        self._addresses = segment_addresses or {}
        self._next_address = _FIRST_ADDRESS

    @property
    def active(self) -> int:
        """Bytes that cannot be handed out: `allocated`, as no free is deferred here."""
        return self.allocated

    def malloc(self, size_bytes: int, stream: int = 0) -> Block:
        """A block of at least `size_bytes` for work on `stream`. It is the caller's until `free`.

        Raises:
            AllocationFailed: when the memory is not there, after all that PyTorch tries has been tried.
        """
        if size_bytes <= 0:
            raise ValueError(f"malloc of {size_bytes} bytes: PyTorch allocates nothing for an empty tensor")
        size = self.settings.block_size(size_bytes)
        small = size <= SMALL_SIZE
        pool = self._pools.get((small, stream))
        if pool is None:
            pool = self._pools[small, stream] = Pool(small=small, stream=stream)
        block = self._take_cached(pool, size)
        if block is None:
            block = self._obtain(pool, size, size_bytes)
        if self._should_split(small, size, block.size - size):
            self._cache(block.cut(size))
        block.allocated = True
        block.requested = size_bytes
        self.allocated += block.size
        self.requested += size_bytes
        self.events += 1
        return block

    def free(self, block: Block) -> None:
        """Give a block back to the cache, where it joins its free neighbours."""
        if not block.allocated:
            raise ValueError(f"free of the block at {block.address:#x}, which is not allocated")
        block.allocated = False
        self.allocated -= block.size
        self.requested -= block.requested
        self._cache(self._join(block))
        self.events += 1

    def empty_cache(self) -> None:
        """Give unused segments, and unused pages of expandable ones, back to the driver (release_cached_blocks)."""
        for small in (False, True):
            found = [block for pool in self._pools_in_order(small) for _, _, block in pool.cached]
            for block in found:
                if block.range is None and block.previous is None and block.next is None:
                    self._release(block)
            for block in found:
                if block.range is not None:
                    self._unmap(block, block.range)

    def snapshot(self) -> HeldSegments:
        """Everything it holds now."""
        return HeldSegments.of(head for _, head in sorted(self._heads.items()))

    def largest_free(self) -> int:
        """Bytes of the largest cached block, of any stream and pool."""
        return max((pool.cached[-1][0] for pool in self._pools.values() if pool.cached), default=0)

    def unreleasable(self) -> int:
        """Cached bytes that `empty_cache` would keep, as they share a segment, or a page, with something allocated."""
        return sum(_unreleasable(block) for pool in self._pools.values() for _, _, block in pool.cached)

    # Cached blocks.

    def _cache(self, block: Block) -> None:
        block.gc_base = self._searches[block.pool.small]
        block.pool.add(block)

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """The smallest cached block that is large enough (get_free_block), if it may be used for this size."""
        if self._collects:
            self._searches[pool.small] += 1
        cached = pool.cached
        at = bisect_left(cached, (size,))
        if at == len(cached):
            return None
        if self._expands:
            # A block that can grow counts as what it can become, to be used last.
            while at + 1 < len(cached) and cached[at + 1][2].extent < cached[at][2].extent:
                at += 1
        block = cached[at][2]
        if size < self._max_split <= block.size or (size >= self._max_split and block.size >= size + self._rounding):
            return None
        del cached[at]
        return block

    def _should_split(self, small: bool, size: int, remaining: int) -> bool:
        if small or self._expands:
            return remaining >= MIN_BLOCK
        return remaining > SMALL_SIZE and size < self._max_split

    def _join(self, block: Block) -> Block:
        """Make one block of it and its neighbours in the same state (try_merge_blocks): the lowest, in no pool."""
        below, above = block.previous, block.next
        if above is not None and not above.allocated and above.mapped == block.mapped:
            above.pool.remove(above)
            block.absorb_next()
        if below is not None and not below.allocated and below.mapped == block.mapped:
            below.pool.remove(below)
            below.absorb_next()
            return below
        return block

    def _pools_in_order(self, small: bool) -> list[Pool]:
        return [pool for (is_small, _), pool in sorted(self._pools.items()) if is_small == small]

    # Memory of the driver.

    def _obtain(self, pool: Pool, size: int, size_bytes: int) -> Block:
        """New memory, with room made for it in PyTorch's order: old segments, oversize ones, all that are unused."""
        if self._collects:
            self._collect_garbage()
        segment = self.settings.segment_size(size)
        block = self._allocate(pool, size, segment)
        if block is None and not (self._rejects and self.reserved + segment > self._device):
            if self._release_oversize(pool, size):
                block = self._allocate(pool, size, segment)
            if block is None:
                self.empty_cache()
                block = self._allocate(pool, size, segment)
        if block is None:
            raise AllocationFailed(
                OutOfMemory(
                    event=self.events,
                    requested_bytes=size_bytes,
                    segment_bytes=segment,
                    stream=pool.stream,
                    allocated_bytes=self.allocated,
                    reserved_bytes=self.reserved,
                    largest_free_bytes=self.largest_free(),
                    limit_bytes=self._limit,
                )
            )
        return block

    def _allocate(self, pool: Pool, size: int, segment: int) -> Block | None:
        """A block, in no pool, with memory not held before (alloc_block); None when the driver would refuse."""
        if self.reserved + segment > self._allowed:
            return None
        if self._rejects and self.reserved + segment > self._device:
            return None
        if self._expands:
            return self._expand(pool, size)
        if self.reserved + segment > self._capacity:
            return None
        block = self._new_head(pool, segment, None)
        self._log("segment_alloc", block.address, segment, pool.stream)
        return block

    def _new_head(self, pool: Pool, size: int, page: int | None) -> Block:
        address = self._next_address
        self._next_address += size
        within = None if page is None else AddressRange(address, size, page)
        block = self._heads[address] = Block(address, size, pool, within, mapped=page is None)
        self._ends[address] = address + size
        if page is None:
            self._place(block)
        return block

    def _place(self, head: Block) -> None:
        """Move a segment, in no pool and all one block, to where the driver put the one that was made in this event."""
        address = self._addresses.get(self.events)
        if address is None:
            return
        end = address + head.size
        if not any(start < end and address < stop for start, stop in self._ends.items()):
            self._heads[address] = self._heads.pop(head.address)
            del self._ends[head.address]
            self._ends[address] = end
            head.address = address
            if head.range is not None:
                head.range.base = address

    def _log(self, action: SegmentAction, address: int, size: int, stream: int) -> None:
        event = SegmentEvent(self.events, action, address, size, stream)
        self.reserved += event.change_bytes
        self.segment_events.append(event)

    def _release(self, block: Block) -> None:
        """Give a whole segment back (release_block)."""
        block.pool.remove(block)
        del self._heads[block.address], self._ends[block.address]
        self._log("segment_free", block.address, block.size, block.pool.stream)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back an oversize block large enough, or several, largest first (release_available_cached_blocks)."""
        if self.settings.max_split_size_bytes is None:
            return False
        target = max(size, self._max_split)
        cached = pool.cached
        at = bisect_left(cached, (target,))
        if at < len(cached) and cached[at][2].range is None:
            self._release(cached[at][2])
            return True
        released = 0
        for _, _, block in reversed(cached[:at]):
            if released >= target or block.size < self._max_split:
                break
            if block.range is None:
                released += block.size
                self._release(block)
        return released >= target

    def _collect_garbage(self) -> None:
        """Give back unused large segments that are older than the average (garbage_collect_cached_blocks)."""
        threshold = self.settings.garbage_collection_threshold
        assert threshold is not None
        target = self.reserved - int(threshold * self._allowed)
        if target <= 0:
            return
        now = self._searches[False]
        large = [block for pool in self._pools_in_order(False) for _, _, block in pool.cached]
        unsplit = [block for block in large if block.previous is None and block.next is None]
        total_age, count, reclaimed = sum(now - block.gc_base for block in unsplit), len(unsplit), 0
        candidates = [block for block in unsplit if block.range is None]
        freed = True
        while reclaimed < target and freed and count > 0:
            freed, average, kept = False, total_age / count, []
            for block in candidates:
                age = now - block.gc_base
                if age < average:
                    kept.append(block)
                    continue
                freed = True
                reclaimed += block.size
                total_age -= age
                count -= 1
                self._release(block)
            candidates = kept

    # Expandable segments.

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Map pages until `size` bytes lie together (try_allocate_expandable_block)."""
        block = self._find_room(pool, size)
        if not block.mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            after = block.next
            assert after is not None
            mapped = self._map(after, min(size - block.size, after.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _find_room(self, pool: Pool, size: int) -> Block:
        """The lowest block from which on nothing is allocated for `size` bytes (find_expandable_block)."""
        for _, unmapped in pool.unmapped:
            below = unmapped.previous
            start = unmapped if below is None or below.allocated else below
            if start.room(size):
                return start
        page = SMALL_SEGMENT if pool.small else self.settings.large_segment_size_bytes
        # An eighth more than the device has, for pages that are unmapped and mapped again elsewhere.
        pages = -(-(self._device + self._device // 8) // page)
        block = self._new_head(pool, pages * page, page)
        pool.add(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Put memory behind the first `size` bytes of an unmapped block (map_block): the cached block it is now in."""
        assert block.range is not None
        mapped = -(-size // block.range.page) * block.range.page
        if self.reserved + mapped > self._capacity:
            return None
        block.pool.remove(block)
        if block.size == block.range.size:
            self._place(block)
        if mapped < block.size:
            block.pool.add(block.cut(mapped))
        block.mapped = True
        address = block.address
        block = self._join(block)
        self._cache(block)
        self._log("segment_map", address, mapped, block.pool.stream)
        return block

    def _unmap(self, block: Block, within: AddressRange) -> None:
        """Give back the whole pages inside a cached block (unmap_block), and the addresses of a segment without any."""
        first, last = within.pages_within(block)
        if first == last:
            return
        block.pool.remove(block)
        if first > block.address:
            below, block = block, block.cut(first - block.address)
            self._cache(below)
        if last < block.address + block.size:
            self._cache(block.cut(last - block.address))
        block.mapped = False
        joined = self._join(block)
        self._log("segment_unmap", first, last - first, joined.pool.stream)
        if joined.previous is None and joined.next is None:
            del self._heads[joined.address], self._ends[joined.address]
        else:
            joined.pool.add(joined)


def _unreleasable(block: Block) -> int:
    if block.range is None:
        return 0 if block.previous is None and block.next is None else block.size
    first, last = block.range.pages_within(block)
    return block.size - (last - first)
