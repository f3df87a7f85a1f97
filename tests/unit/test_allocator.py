"""The rules of the caching allocator, one by one, with numbers derived by hand."""

from __future__ import annotations

import pytest

from memscope.allocator.caching import CachingAllocator
from memscope.allocator.report import AllocationFailed, OutOfMemory
from memscope.allocator.settings import AllocatorSettings

MIB = 2**20
Change = tuple[str, int]


def allocator(settings: str = "", capacity_mib: int | None = None) -> CachingAllocator:
    return CachingAllocator(AllocatorSettings.parse(settings), None if capacity_mib is None else capacity_mib * MIB)


def changes(made: CachingAllocator) -> list[Change]:
    """Segments taken and given back, as (action, MiB)."""
    return [(event.action.removeprefix("segment_"), event.size_bytes // MIB) for event in made.segment_events]


def cached(made: CachingAllocator) -> list[int]:
    """Bytes of the cached blocks, in order of address."""
    return [b.size_bytes for segment in made.snapshot().segments for b in segment.blocks if not b.allocated]


# Pools and segments.


def test_up_to_1_mib_shares_a_2_mib_segment() -> None:
    made = allocator()
    first, second = made.malloc(MIB), made.malloc(MIB)
    assert made.reserved == 2 * MIB
    assert second.address == first.address + MIB
    made.malloc(1)
    assert made.reserved == 4 * MIB
    assert made.allocated == 2 * MIB + 512
    assert made.requested == 2 * MIB + 1


def test_just_over_1_mib_gets_a_20_mib_segment_and_the_rest_of_it_is_cached() -> None:
    made = allocator()
    block = made.malloc(MIB + 1)
    assert block.size == MIB + 512
    assert made.reserved == 20 * MIB
    assert cached(made) == [20 * MIB - (MIB + 512)]
    made.malloc(9 * MIB)
    made.malloc(9 * MIB)  # 20 − 1 − 9 MiB − 512 B are left: enough
    assert made.reserved == 20 * MIB


def test_from_10_mib_a_block_gets_a_segment_of_its_own_size() -> None:
    made = allocator()
    made.malloc(10 * MIB)
    made.malloc(11 * MIB)
    assert changes(made) == [("alloc", 10), ("alloc", 12)]


def test_small_and_large_pool_do_not_share() -> None:
    made = allocator()
    made.malloc(2 * MIB)
    made.malloc(512)
    assert changes(made) == [("alloc", 20), ("alloc", 2)]


def test_a_stream_does_not_reuse_a_block_that_another_stream_freed() -> None:
    made = allocator()
    made.free(made.malloc(30 * MIB, stream=1))
    made.malloc(30 * MIB, stream=2)
    assert made.reserved == 60 * MIB
    made.malloc(30 * MIB, stream=1)
    assert made.reserved == 60 * MIB


# Splitting, best fit, joining.


def test_a_large_block_keeps_up_to_1_mib_of_slack_that_counts_as_allocated() -> None:
    # 19 MiB get a segment of 20 MiB. 1 MiB is left over: not more than 1 MiB, so the block keeps it.
    made = allocator()
    block = made.malloc(19 * MIB)
    assert block.size == made.allocated == 20 * MIB
    assert made.requested == 19 * MIB
    assert cached(made) == []


def test_a_large_block_with_more_than_1_mib_left_over_is_split() -> None:
    made = allocator()
    assert made.malloc(19 * MIB - 512).size == 19 * MIB - 512
    assert cached(made) == [MIB + 512]


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    made = allocator()
    made.malloc(MIB)
    made.malloc(MIB - 512)
    assert cached(made) == [512]


def test_the_smallest_fitting_block_is_taken_and_the_lowest_of_equal_ones() -> None:
    made = allocator()
    blocks = [made.malloc(size * MIB) for size in (30, 24, 26, 24)]
    for block in blocks:
        made.free(block)
    assert made.malloc(23 * MIB).address == blocks[1].address
    assert made.malloc(23 * MIB).address == blocks[3].address
    assert made.malloc(23 * MIB).address == blocks[2].address


def test_freed_neighbors_become_one_block() -> None:
    made = allocator()
    low, middle, high = (made.malloc(6 * MIB) for _ in range(3))
    made.free(low)
    assert cached(made) == [6 * MIB, 2 * MIB]
    made.free(high)
    assert cached(made) == [6 * MIB, 8 * MIB]
    made.free(middle)
    assert cached(made) == [20 * MIB]
    assert (made.allocated, made.requested, made.active, made.reserved) == (0, 0, 0, 20 * MIB)


def test_empty_cache_gives_back_only_segments_without_anything_in_use() -> None:
    made = allocator()
    kept = made.malloc(6 * MIB)
    made.free(made.malloc(6 * MIB))
    made.free(made.malloc(40 * MIB))
    made.free(made.malloc(512))
    before = made.snapshot()
    assert before.free_bytes == (14 + 40 + 2) * MIB
    assert before.unreleasable_bytes == 14 * MIB
    assert before.largest_free_bytes == made.largest_free() == 40 * MIB
    made.empty_cache()
    assert changes(made)[3:] == [("free", 40), ("free", 2)]
    assert made.reserved == 20 * MIB
    made.free(kept)
    made.empty_cache()
    assert made.reserved == 0
    assert made.snapshot().segments == ()


def test_a_block_is_freed_once() -> None:
    made = allocator()
    block = made.malloc(512)
    made.free(block)
    with pytest.raises(ValueError, match="not allocated"):
        made.free(block)


def test_an_empty_tensor_allocates_nothing() -> None:
    with pytest.raises(ValueError, match="malloc of 0 bytes"):
        allocator().malloc(0)


# max_split_size_mb:32. Blocks of 32 MiB and more are oversize.


def test_an_oversize_block_is_not_given_to_a_smaller_request() -> None:
    made = allocator("max_split_size_mb:32")
    made.free(made.malloc(40 * MIB))
    made.malloc(30 * MIB)
    assert changes(made) == [("alloc", 40), ("alloc", 30)]


def test_an_oversize_block_goes_whole_to_a_request_less_than_20_mib_smaller() -> None:
    made = allocator("max_split_size_mb:32")
    oversize = made.malloc(60 * MIB)
    made.free(oversize)
    made.malloc(40 * MIB)  # 60 ≥ 40 + 20: too large for it
    assert made.reserved == 100 * MIB
    assert made.malloc(42 * MIB).size == 60 * MIB
    assert made.reserved == 100 * MIB


# Expandable segments.


def test_an_expandable_segment_grows_by_pages_and_blocks_lie_end_to_end() -> None:
    # 3 MiB map one page of 20 MiB. 17 of it are cached when 18 are asked for: a page more, and they begin at 3 MiB.
    made = allocator("expandable_segments:True")
    first, second = made.malloc(3 * MIB), made.malloc(18 * MIB)
    assert changes(made) == [("map", 20), ("map", 20)]
    assert second.address == first.address + 3 * MIB
    (segment,) = made.snapshot().segments
    assert (segment.size_bytes, segment.expandable, segment.pool) == (40 * MIB, True, "large")


def test_small_blocks_have_an_expandable_segment_of_2_mib_pages() -> None:
    made = allocator("expandable_segments:True")
    for _ in range(3):
        made.malloc(MIB)
    assert changes(made) == [("map", 2), ("map", 2)]


def test_an_expandable_block_keeps_no_slack() -> None:
    made = allocator("expandable_segments:True")
    assert made.malloc(19 * MIB).size == 19 * MIB
    assert cached(made) == [MIB]


def test_empty_cache_unmaps_whole_unused_pages_and_the_gap_is_filled_first() -> None:
    # Pages end at 20, 40, 60 and 80 MiB; blocks lie at 0 (3 MiB), 3 (50 MiB) and 53 (10 MiB). Without the 50, the range
    # 3 to 53 is unused and contains the page 20 to 40. The range 63 to 80 is unused too, but contains no whole page.
    made = allocator("expandable_segments:True")
    base = made.malloc(3 * MIB).address
    middle = made.malloc(50 * MIB)
    made.malloc(10 * MIB)
    made.free(middle)
    assert made.reserved == 80 * MIB
    assert made.snapshot().unreleasable_bytes == (80 - 13 - 20) * MIB
    made.empty_cache()
    assert changes(made)[-1] == ("unmap", 20)
    assert made.reserved == 60 * MIB
    assert [s.address - base for s in made.snapshot().segments] == [0, 40 * MIB]
    assert made.malloc(40 * MIB).address == base + 3 * MIB
    assert changes(made)[-1] == ("map", 20)


def test_an_expandable_segment_has_addresses_for_nine_eighths_of_the_device() -> None:
    # 180 for a device of 160 MiB. After 160 of them, 20 still fit; 30 need another segment.
    made = CachingAllocator(AllocatorSettings(expandable_segments=True), device_bytes=160 * MIB)
    full = made.malloc(160 * MIB)
    assert made.malloc(30 * MIB).address != full.address + full.size
    assert made.malloc(20 * MIB).address == full.address + full.size


def test_an_empty_expandable_segment_is_given_back_whole() -> None:
    made = allocator("expandable_segments:True")
    made.free(made.malloc(50 * MIB))
    made.empty_cache()
    assert made.reserved == 0
    assert made.snapshot().segments == ()
    made.malloc(50 * MIB)
    assert changes(made) == [("map", 60), ("unmap", 60), ("map", 60)]


# A full device.


def test_a_full_device_gets_its_unused_segments_back_before_memory_runs_out() -> None:
    made = allocator(capacity_mib=100)
    first, second = made.malloc(40 * MIB), made.malloc(30 * MIB)
    made.free(second)
    made.free(first)
    made.malloc(80 * MIB)
    assert changes(made) == [("alloc", 40), ("alloc", 30), ("free", 30), ("free", 40), ("alloc", 80)]
    assert [event.event for event in made.segment_events] == [0, 1, 4, 4, 4]


def test_an_oversize_block_that_is_large_enough_is_given_back_alone() -> None:
    # 42 MiB do not fit in 40, and 64 ≥ 42 + 20. 40 + 64 + 42 > 120: giving back the 64 is enough; the 40 stay cached.
    made = allocator("max_split_size_mb:32", capacity_mib=120)
    for block in [made.malloc(40 * MIB), made.malloc(64 * MIB)]:
        made.free(block)
    made.malloc(42 * MIB)
    assert changes(made)[2:] == [("free", 64), ("alloc", 42)]
    assert made.reserved == 82 * MIB


def test_several_oversize_blocks_are_given_back_largest_first() -> None:
    made = allocator("max_split_size_mb:32", capacity_mib=110)
    for block in [made.malloc(size * MIB) for size in (34, 40, 36)]:
        made.free(block)
    made.malloc(76 * MIB)  # 40 + 36 is just enough
    assert changes(made)[3:] == [("free", 40), ("free", 36), ("alloc", 76)]
    assert made.reserved == (34 + 76) * MIB


def test_out_of_memory_reports_the_failed_request_and_the_free_memory() -> None:
    # 2 MiB sit in a segment of 20, so its other 18 cannot be given back. 19 MiB ask for 20 more: 40 > 36.
    made = allocator(capacity_mib=36)
    made.malloc(2 * MIB)
    made.free(made.malloc(10 * MIB))
    made.free(made.malloc(12 * MIB, stream=7))
    with pytest.raises(
        AllocationFailed, match=r"out of device memory while allocating 19.0 MiB \(20.0 MiB of 36.0 MiB reserved"
    ) as info:
        made.malloc(19 * MIB, stream=7)
    assert info.value.record == OutOfMemory(
        event=5,
        requested_bytes=19 * MIB,
        segment_bytes=20 * MIB,
        stream=7,
        allocated_bytes=2 * MIB,
        reserved_bytes=20 * MIB,
        largest_free_bytes=18 * MIB,
        limit_bytes=36 * MIB,
    )
    assert info.value.record.free_cached_bytes == 18 * MIB
    assert info.value.exit_code == 4
    assert changes(made) == [("alloc", 20), ("alloc", 12), ("free", 12)]


def test_the_allocator_works_after_running_out_of_memory() -> None:
    made = allocator(capacity_mib=36)
    made.malloc(20 * MIB)
    with pytest.raises(AllocationFailed):
        made.malloc(30 * MIB)
    assert made.malloc(16 * MIB).size == 16 * MIB


def test_expandable_segments_fit_where_another_segment_does_not() -> None:
    # Two blocks of 5 MiB take 20 MiB. 30 more need a new segment, 50 > 45; or the 10 MiB cached and one page, 40.
    plain, expandable = allocator(capacity_mib=45), allocator("expandable_segments:True", capacity_mib=45)
    for made in (plain, expandable):
        made.malloc(5 * MIB)
        made.malloc(5 * MIB)
    with pytest.raises(AllocationFailed):
        plain.malloc(30 * MIB)
    expandable.malloc(30 * MIB)
    assert expandable.reserved == expandable.allocated == 40 * MIB
    # Now every page is full, and one more makes 60.
    with pytest.raises(AllocationFailed):
        expandable.malloc(2 * MIB)


def test_a_fraction_of_the_device_is_a_limit_below_its_capacity() -> None:
    made = CachingAllocator(
        AllocatorSettings.parse("per_process_memory_fraction:0.5"), 90 * MIB, device_bytes=100 * MIB
    )
    made.malloc(40 * MIB)
    with pytest.raises(AllocationFailed) as info:
        made.malloc(5 * MIB)  # which asks for a segment of 20
    assert info.value.record.limit_bytes == 50 * MIB


def test_garbage_collection_gives_back_blocks_unused_for_long() -> None:
    # 90 of 100 MiB are allowed and half of that, 45, is the threshold: 20 + 30 are over it when 32 more are needed. The
    # clock counts searches of the large pool: 20 was cached at 2, 30 at 3, and now it is 4. Their ages are 2 and 1, the
    # average is 1.5: giving back the 20 is enough.
    made = allocator("garbage_collection_threshold:0.5,per_process_memory_fraction:0.9", capacity_mib=100)
    for block in [made.malloc(20 * MIB), made.malloc(30 * MIB)]:
        made.free(block)
    made.free(made.malloc(30 * MIB))
    made.malloc(32 * MIB)
    assert changes(made) == [("alloc", 20), ("alloc", 30), ("free", 20), ("alloc", 32)]


def test_garbage_collection_gives_back_all_blocks_of_equal_age() -> None:
    # Both blocks were cached at 2, and their age is the average: blocks of at least that age are given back.
    made = allocator("garbage_collection_threshold:0.5,per_process_memory_fraction:0.9", capacity_mib=100)
    for block in [made.malloc(20 * MIB), made.malloc(30 * MIB)]:
        made.free(block)
    made.malloc(32 * MIB)
    assert changes(made) == [("alloc", 20), ("alloc", 30), ("free", 20), ("free", 30), ("alloc", 32)]


def test_garbage_collection_goes_on_with_the_average_age_of_the_blocks_that_are_left() -> None:
    # 36 of 90 MiB are the threshold, 66 are reserved: 30 must go. The 20 are cached at 3, the 22 at 7 and the 24 at 8;
    # now it is 9. Ages of 6, 2 and 1 average to 3: the 20 go, which is too little. 2 and 1 average to 1.5: the 22 go.
    made = allocator("garbage_collection_threshold:0.4,per_process_memory_fraction:0.9", capacity_mib=100)
    oldest, middle, youngest = (made.malloc(size * MIB) for size in (20, 22, 24))

    def search(times: int) -> None:
        nonlocal youngest
        for _ in range(times):
            made.free(youngest)
            youngest = made.malloc(24 * MIB)

    made.free(oldest)
    search(4)
    made.free(middle)
    search(1)
    made.free(youngest)
    made.malloc(40 * MIB)
    assert changes(made)[3:] == [("free", 20), ("free", 22), ("alloc", 40)]


def test_garbage_is_not_collected_in_a_process_without_a_limit() -> None:
    made = allocator("garbage_collection_threshold:0.1", capacity_mib=100)
    for block in [made.malloc(20 * MIB), made.malloc(30 * MIB)]:
        made.free(block)
    made.malloc(32 * MIB)
    assert changes(made) == [("alloc", 20), ("alloc", 30), ("alloc", 32)]


def test_throw_on_oom_fails_without_giving_back_cached_blocks() -> None:
    made = allocator("throw_on_cudamalloc_oom:True", capacity_mib=50)
    made.free(made.malloc(40 * MIB))
    with pytest.raises(AllocationFailed) as info:
        made.malloc(42 * MIB)
    assert info.value.record.reserved_bytes == 40 * MIB
