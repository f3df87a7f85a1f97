"""PyTorch's CUDACachingAllocator without CUDA: the same blocks, at the same places, in the same order.

Source: class DeviceCachingAllocator of c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.0; docstrings here name its
functions. `releases.py` has what other releases do differently. Not implemented: private pools (CUDA graphs, MemPool),
free-memory callbacks (CUDA IPC), and the deferred frees of `Tensor.record_stream`. A block freed here is free at once,
so *active* and *allocated* are equal; to replay a program that uses record_stream, free each block where PyTorch
completes its free.

Among cached blocks of equal size, PyTorch 2.13 and later takes the lowest one in the oldest segment; PyTorch 2.11 and
older takes the one with the lowest driver address. This allocator takes the lowest address and places each new segment
above the earlier ones, so both rules agree. To follow a run of 2.11 to the byte, pass the driver's addresses. PyTorch
2.12 takes the oldest block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from memscope.allocator.address_space import AddressSpace
from memscope.allocator.blocks import AddressRange, Block, Pool
from memscope.allocator.releases import AGE_OF_BLOCK
from memscope.allocator.report import AllocationFailed, HeldSegments, OutOfMemory, SegmentAction, SegmentEvent
from memscope.allocator.settings import MIN_BLOCK, SMALL_SEGMENT, SMALL_SIZE, AllocatorSettings

__all__ = ["CachingAllocator"]

_UNLIMITED = 1 << 47  # bytes: the whole address space of a process


class CachingAllocator:
    """The caching allocator of one device. Counts bytes as torch.cuda.memory_stats does.

    Args:
        settings: the allocator's settings (PYTORCH_CUDA_ALLOC_CONF); None: PyTorch's defaults.
        capacity_bytes: bytes that the driver can give to this allocator: the device's memory minus the CUDA context and
            the memory of other processes. None: no limit.
        device_bytes: total memory of the device (cudaDeviceProp.totalGlobalMem). `per_process_memory_fraction` is a
            fraction of it, and it determines the length of an expandable segment. None: the capacity.
        segment_addresses: the driver's address of the segment created in each event, by event. A segment that would
            overlap another is placed elsewhere; from then on the replay differs from the real run.

    Attributes:
        allocated: bytes in allocated blocks.
        requested: bytes requested for these blocks.
        reserved: bytes reserved from the driver.
        events: number of mallocs and frees so far.
        segment_events: every reservation and release of driver memory, in order.
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
        self._sizes: dict[int, int] = {}  # size of the block for each size requested
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._space = AddressSpace(segment_addresses or {})
        # Number of searches in the large and the small pool: the clock by which garbage collection measures age.
        self._searches = [0, 0]
        self._by_age = settings.release == AGE_OF_BLOCK
        self._made = 0  # number of blocks created so far

    @property
    def active(self) -> int:
        """Bytes in use: equal to `allocated`, because no free is deferred here."""
        return self.allocated

    def malloc(self, size_bytes: int, stream: int = 0) -> Block:
        """Allocate a block of at least `size_bytes` for work on `stream`. The caller owns the block until `free`.

        Raises:
            AllocationFailed: the device is out of memory, even after releasing cached memory as PyTorch does.
        """
        if size_bytes <= 0:
            raise ValueError(f"malloc of {size_bytes} bytes: PyTorch allocates nothing for an empty tensor")
        size = self._sizes.get(size_bytes)
        if size is None:
            size = self._sizes[size_bytes] = self.settings.block_size(size_bytes)
        small = size <= SMALL_SIZE
        pool = self._pools.get((small, stream))
        if pool is None:
            pool = self._pools[small, stream] = Pool(small=small, stream=stream, by_age=self._by_age)
        block = self._take_cached(pool, size)
        if block is None:
            block = self._obtain(pool, size, size_bytes)
        if self._should_split(small, size, block.size - size):
            rest = block.cut(size)
            rest.age, block.age = block.age, self._next_age()
            self._cache(rest)
        block.allocated = True
        block.requested = size_bytes
        self.allocated += block.size
        self.requested += size_bytes
        self.events += 1
        return block

    def free(self, block: Block) -> None:
        """Return a block to the cache and merge it with its free neighbours."""
        if not block.allocated:
            raise ValueError(f"free of the block at {block.address:#x}, which is not allocated")
        block.allocated = False
        self.allocated -= block.size
        self.requested -= block.requested
        self._cache(self._join(block))
        self.events += 1

    def empty_cache(self) -> None:
        """Release unused segments and unused pages of expandable segments to the driver (release_cached_blocks)."""
        for small in (False, True):
            found = [block for pool in self._pools_in_order(small) for _, _, block in pool.cached]
            for block in found:
                if block.range is None and block.previous is None and block.next is None:
                    self._release(block)
            for block in found:
                if block.range is not None:
                    self._unmap(block, block.range)

    def snapshot(self) -> HeldSegments:
        """The segments held now."""
        return HeldSegments.of(self._space.heads())

    def largest_free(self) -> int:
        """Bytes of the largest cached block, of any stream and pool."""
        return max((pool.cached[-1][0] for pool in self._pools.values() if pool.cached), default=0)

    def unreleasable(self) -> int:
        """Cached bytes that `empty_cache` cannot release: they share a segment or a page with an allocated block."""
        return sum(block.unreleasable for pool in self._pools.values() for _, _, block in pool.cached)

    # Cached blocks.

    def _next_age(self) -> int:
        """The number of a new block: Block::registration_counter of PyTorch 2.12."""
        self._made += 1
        return self._made

    def _cache(self, block: Block) -> None:
        block.gc_base = self._searches[block.pool.small]
        block.pool.add(block)

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """The smallest cached block that is large enough (get_free_block); None if it may not be used for this size."""
        if self._collects:
            self._searches[pool.small] += 1
        cached = pool.cached
        at = bisect_left(cached, (size,))
        if at == len(cached):
            return None
        if self._expands:
            # A block that can grow is ranked by the size it can grow to, so that it is used last.
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
        """Merge a block with its neighbours in the same state (try_merge_blocks); the merged block is in no pool."""
        below, above = block.previous, block.next
        if above is not None and not above.allocated and above.mapped == block.mapped:
            above.pool.remove(above)
            block.absorb_next()
        if below is not None and not below.allocated and below.mapped == block.mapped:
            below.pool.remove(below)
            below.absorb_next()
            below.age = block.age
            return below
        return block

    def _pools_in_order(self, small: bool) -> list[Pool]:
        return [pool for (is_small, _), pool in sorted(self._pools.items()) if is_small == small]

    # Memory of the driver.

    def _obtain(self, pool: Pool, size: int, size_bytes: int) -> Block:
        """A block in new memory. Makes room in PyTorch's order: old segments, oversize segments, all unused ones."""
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
        """A block, in no pool, with new memory of the driver (alloc_block); None if the driver would refuse."""
        if self.reserved + segment > self._allowed:
            return None
        if self._rejects and self.reserved + segment > self._device:
            return None
        if self._expands:
            return self._expand(pool, size)
        if self.reserved + segment > self._capacity:
            return None
        block = self._space.add(pool, segment, None)
        block.age = self._next_age()
        self._space.place(block, self.events)
        self._log("segment_alloc", block.address, segment, pool.stream)
        return block

    def _log(self, action: SegmentAction, address: int, size: int, stream: int) -> None:
        event = SegmentEvent(self.events, action, address, size, stream)
        self.reserved += event.change_bytes
        self.segment_events.append(event)

    def _release(self, block: Block) -> None:
        """Release a whole segment (release_block)."""
        block.pool.remove(block)
        self._space.remove(block)
        self._log("segment_free", block.address, block.size, block.pool.stream)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Release one oversize block that is large enough, or several (release_available_cached_blocks)."""
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
        """Release unused large segments of at least average age (garbage_collect_cached_blocks)."""
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
        """Map pages until `size` contiguous bytes are mapped (try_allocate_expandable_block)."""
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
        """The lowest block at which `size` contiguous bytes are free (find_expandable_block)."""
        for _, unmapped in pool.unmapped:
            below = unmapped.previous
            start = unmapped if below is None or below.allocated else below
            if start.room(size):
                return start
        page = SMALL_SEGMENT if pool.small else self.settings.large_segment_size_bytes
        # An eighth more than the device's memory, for pages that are unmapped and mapped again elsewhere.
        pages = -(-(self._device + self._device // 8) // page)
        block = self._space.add(pool, pages * page, page)
        block.age = self._next_age()
        pool.add(block)
        return block

    def _map(self, block: Block, size: int) -> Block | None:
        """Map the first `size` bytes of an unmapped block (map_block) and return the cached block they are now in."""
        assert block.range is not None
        mapped = -(-size // block.range.page) * block.range.page
        if self.reserved + mapped > self._capacity:
            return None
        block.pool.remove(block)
        if block.size == block.range.size:
            self._space.place(block, self.events)
        if mapped < block.size:
            rest = block.cut(mapped)
            rest.age = self._next_age()
            block.pool.add(rest)
        block.mapped = True
        address = block.address
        block = self._join(block)
        self._cache(block)
        self._log("segment_map", address, mapped, block.pool.stream)
        return block

    def _unmap(self, block: Block, within: AddressRange) -> None:
        """Release the whole pages inside a cached block (unmap_block), and the address range of an empty segment."""
        first, last = within.pages_within(block)
        if first == last:
            return
        block.pool.remove(block)
        if first > block.address:
            below, block = block, block.cut(first - block.address)
            below.age, block.age = self._next_age(), below.age
            self._cache(below)
        if last < block.address + block.size:
            above = block.cut(last - block.address)
            above.age = self._next_age()
            self._cache(above)
        block.mapped = False
        joined = self._join(block)
        self._log("segment_unmap", first, last - first, joined.pool.stream)
        if joined.previous is None and joined.next is None:
            self._space.remove(joined)
        else:
            joined.pool.add(joined)
