"""Releases of PyTorch whose allocators differ, and how.

The compiled allocators (libc10_cuda.so of the CUDA wheels) of 2.4.1, 2.5.1, 2.6.0, 2.7.1, 2.8.0, 2.9.1, 2.10.0, 2.11.0,
2.12.1, 2.14.1 and 2.15.0 were run over a CUDA runtime that only gives out addresses. With the differences named here, a
replay puts every block and segment where each of them does: with and without expandable segments, max_split_size_mb,
roundup_power2_divisions, garbage collection and a second stream, and on a full device. The settings that a release
knows are those named in its library.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import metadata

from memscope.errors import UsageError, excerpt

__all__ = [
    "AGE_OF_BLOCK", "FIRST_WITH", "LEAST_LIMIT_ALLOWED", "RANGE_AFTER_LAST", "RELEASES", "Release",
    "installed", "parse_release", "release_text",
]  # fmt: skip

Release = tuple[int, int]

RELEASES: tuple[Release, ...] = tuple((2, minor) for minor in range(4, 16))
"""Releases whose allocator is followed."""

FIRST_WITH: dict[str, Release] = {
    "max_non_split_rounding_mb": (2, 6),
    "large_segment_size_mb": (2, 11),
    "throw_on_cudamalloc_oom": (2, 12),
    "expandable_segments_reserve": (2, 15),
    "expandable_segments_reserve_by_class": (2, 15),
}
"""The first release with a setting that older ones refuse.

`per_process_memory_fraction`, a setting since 2.10, is accepted for all of them, because every release has
torch.cuda.set_per_process_memory_fraction.
"""
LEAST_LIMIT_ALLOWED: Release = (2, 10)
"""Since then max_split_size_mb and max_non_split_rounding_mb may be as small as a large segment, before that not
(CUDAAllocatorConfig.cpp of 2.4.1: "must be > 20"; AllocatorConfig.cpp of 2.13.0: "must be >= 20")."""
RANGE_AFTER_LAST: Release = (2, 10)
"""Since then `>` in a list of roundup_power2_divisions begins after the last interval named; before that it replaces
the divisions of this interval too (pytorch/pytorch pull request 165304)."""
AGE_OF_BLOCK: Release = (2, 12)
"""The release that takes the oldest of several cached blocks of equal size, wherever it lies (pull request 178362).

Older ones take the one with the lowest address, newer ones the lowest one in the oldest segment (pull request 183591).
"""


def release_text(release: Release) -> str:
    """`2.4`."""
    return ".".join(map(str, release))


def parse_release(text: str) -> Release:
    """Parse a version such as `2.4`, `2.4.1` or `2.13.0+cu130`.

    Raises:
        UsageError: it is not a version, or none of `RELEASES`.
    """
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?:[.+a-z]|$)", text)
    known = f"{release_text(RELEASES[0])} to {release_text(RELEASES[-1])}"
    if found is None:
        raise UsageError(f"allocator setting version:{excerpt(text)}: expected a release of PyTorch, {known}")
    release = int(found[1]), int(found[2])
    if release not in RELEASES:
        raise UsageError(
            f"allocator setting version:{excerpt(text)}: the allocator of this release is not known to memscope; it "
            f"knows {known}"
        )
    return release


@lru_cache(maxsize=1)
def installed() -> Release:
    """The installed PyTorch; if it is none of `RELEASES`, the nearest of them."""
    try:
        major, minor = metadata.version("torch").split(".")[:2]
    except metadata.PackageNotFoundError:
        return RELEASES[-1]
    return min(max((int(major), int(minor)), RELEASES[0]), RELEASES[-1])
