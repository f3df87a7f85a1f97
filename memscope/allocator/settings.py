"""The allocator settings of PYTORCH_CUDA_ALLOC_CONF, and the block and segment sizes that follow from them.

Sources: c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDAAllocatorConfig.h and .cpp, and for the two sizes
c10/cuda/CUDACachingAllocator.cpp, all of PyTorch 2.13.0. `releases.py` has what other releases do differently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memscope.allocator.releases import (
    FIRST_WITH,
    LEAST_LIMIT_ALLOWED,
    RANGE_AFTER_LAST,
    Release,
    installed,
    parse_release,
    release_text,
)
from memscope.errors import UsageError, nearest

__all__ = ["ENVIRONMENT_VARIABLES", "LARGE_SEGMENT", "MIN_BLOCK", "SMALL_SEGMENT", "SMALL_SIZE", "AllocatorSettings"]

MIB = 1 << 20

MIN_BLOCK = 512
"""Minimum size of a block in bytes; all sizes are multiples of it (kMinBlockSize)."""
SMALL_SIZE = 1 * MIB
"""Maximum bytes of a block in the small pool (kSmallSize), and of the unused rest of a block in the large pool."""
SMALL_SEGMENT = 2 * MIB
"""Bytes of a segment or page of the small pool (kSmallBuffer)."""
LARGE_SEGMENT = 20 * MIB
"""Bytes of a segment for blocks under 10 MiB, and of a page of the large pool, unless large_segment_size_mb is set."""
MIN_LARGE = 10 * MIB
"""Blocks of at least this many bytes get a segment of their own size (kMinLargeAlloc), rounded up to ROUND_LARGE."""
ROUND_LARGE = 2 * MIB
"""Such a segment is a multiple of this many bytes (kRoundLarge)."""
INTERVALS = 16
"""Number of powers of two, from 1 MiB, with their own roundup_power2_divisions; other sizes use the nearest."""

ENVIRONMENT_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that PyTorch reads its settings from: the first one that is set, even if empty (AllocatorConfig.cpp)."""

# PyTorch reads these keys, but they do not influence the placement of device memory.
_PASSED_OVER = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    }
)
_REFUSED = frozenset({"expandable_segments_reserve", "expandable_segments_reserve_by_class"})
"""Keys that limit the virtual addresses of an expandable segment, by default 9/8 of the device's memory: a full segment
is followed by another, and no block may be larger than one (c10/cuda/CUDAAllocatorConfig.h of PyTorch 2.15.0)."""


@dataclass(frozen=True)
class AllocatorSettings:
    """Settings of PyTorch's CUDA caching allocator. The defaults are PyTorch's own.

    Raises:
        UsageError: PyTorch would refuse a value.
    """

    expandable_segments: bool = False
    """One growing segment per stream and pool, mapped page by page, instead of one segment per cudaMalloc."""
    max_split_size_bytes: int | None = None
    """Blocks of at least this size are neither split nor given to smaller requests. None: no limit."""
    max_non_split_rounding_bytes: int | None = None
    """Maximum bytes by which an unsplittable block may exceed a request. None: `large_segment_size_bytes`."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """Number of steps between one power of two and the next, to which sizes are rounded up: the first entry for sizes
    under 2 MiB, then one per power of two, the last for 32 GiB and more. 0 and 1: sizes are rounded up to 512 bytes."""
    garbage_collection_threshold: float | None = None
    """Fraction of the allowed memory above which old cached segments are released before new ones are reserved. Without
    effect, in PyTorch as here, unless `per_process_memory_fraction` is below 1."""
    large_segment_size_bytes: int = LARGE_SEGMENT
    """Bytes of a segment for blocks between 1 and 10 MiB, and of a page of an expandable segment for large blocks."""
    per_process_memory_fraction: float = 1.0
    """Fraction of the device's memory that the process may reserve (torch.cuda.set_per_process_memory_fraction)."""
    throw_on_cudamalloc_oom: bool = False
    """Reject a request that exceeds the device's memory without releasing cached segments first."""
    version: str | None = None
    """Release of PyTorch whose allocator is followed, such as `2.4` (see `RELEASES`). None: the installed one."""

    def __post_init__(self) -> None:
        segment = self.large_segment_size_bytes
        if segment <= MIN_LARGE:
            raise _refused("large_segment_size_mb", segment // MIB, "more than 10")
        for name, size in (
            ("max_split_size_mb", self.max_split_size_bytes),
            ("max_non_split_rounding_mb", self.max_non_split_rounding_bytes),
        ):
            least = self.release >= LEAST_LIMIT_ALLOWED
            if size is not None and (size < segment or (size == segment and not least)):
                words = f"{'at least' if least else 'more than'} {segment // MIB}, the size of a large segment"
                raise _refused(name, size // MIB, words)
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise _refused("garbage_collection_threshold", threshold, "a number between 0 and 1, both excluded")
        if not 0 <= self.per_process_memory_fraction <= 1:
            raise _refused("per_process_memory_fraction", self.per_process_memory_fraction, "a number from 0 to 1")
        steps = self.roundup_power2_divisions
        if len(steps) != INTERVALS or not all(n == 0 or _is_power_of_two(n) for n in steps):
            raise _refused("roundup_power2_divisions", steps, f"{INTERVALS} numbers, each 0 or a power of two")

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Parse a PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF value, for example `expandable_segments:True`.

        One key is memscope's own: `version:2.4` names the release of PyTorch whose allocator is followed. Keys without
        influence on device memory (pinned memory, locks) are accepted and ignored. Three mistakes that
        PyTorch accepts are errors here: text that is only partly a number (PyTorch reads `20.5` as 20 and `-1` as
        2⁶⁴−1), a key given twice (PyTorch keeps the last), and `>` before the end of its list. The reserves of
        expandable segments (PyTorch 2.15) are not modelled, and refused.

        Raises:
            UsageError: the text has one of these mistakes, that release of PyTorch would refuse it, it selects
                another allocator (`backend:cudaMallocAsync`), or it reserves addresses.
        """
        given: dict[str, object] = {}
        seen: dict[str, str] = {}
        pairs = _pairs(text)
        release = next((parse_release(value) for key, value in pairs if key == "version"), installed())
        for key, value in pairs:
            if key in seen:
                raise UsageError(
                    f'allocator settings "{text}": {key} is given twice ({seen[key]}, {value}); keep one of them'
                )
            seen[key] = value
            if key == "backend":
                _check_backend(value)
            elif key == "version":
                given[key] = release_text(release)
            elif key == "roundup_power2_divisions":
                given[key] = _read_divisions(key, value, release)
            elif key in _READERS:
                _check_known(key, release)
                field, read = _READERS[key]
                given[field] = read(key, value)
            elif key in _REFUSED:
                _check_known(key, release)
                raise UsageError(
                    f"allocator setting {key}: it limits the addresses of a segment, which memscope does not model; "
                    "expandable segments grow without end, as those of PyTorch do by default. Leave it out"
                )
            elif key not in _PASSED_OVER:
                known = {"backend", "version", "roundup_power2_divisions", *_READERS, *_PASSED_OVER, *_REFUSED}
                raise UsageError(f'allocator settings "{text}": unknown key "{key}"; {nearest(key, known)}')
        return cls(**given)  # type: ignore[arg-type]  # each reader returns what its field holds

    @classmethod
    def asked(cls, given: AllocatorSettings | str | None) -> AllocatorSettings:
        """The settings that are given, as a value or as `--allocator` takes them; None: those of this process.

        Raises:
            UsageError: they cannot be used (see `parse` and `from_environment`).
        """
        if given is None:
            return cls.from_environment(os.environ)
        return cls.parse(given) if isinstance(given, str) else given

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AllocatorSettings:
        """The settings of a process with these environment variables: those of the first variable PyTorch looks at.

        Raises:
            UsageError: the variable's value cannot be used (see `parse`).
        """
        for name in ENVIRONMENT_VARIABLES:
            if name in environment:
                try:
                    settings = cls.parse(environment[name])
                except UsageError as error:
                    raise UsageError(f"environment variable {name}: {error}") from error
                if settings.version is not None:
                    raise UsageError(
                        f"environment variable {name}: version is a setting of memscope, which PyTorch refuses: "
                        f"simulate with --allocator version:{settings.version}"
                    )
                return settings
        return cls()

    @property
    def release(self) -> Release:
        """The release whose allocator is followed."""
        return installed() if self.version is None else parse_release(self.version)

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Settings that PyTorch silently ignores, each as a sentence for the user."""
        idle = []
        if self.garbage_collection_threshold is not None and self.per_process_memory_fraction == 1:
            idle.append("garbage_collection_threshold does nothing unless per_process_memory_fraction is below 1")
        if self.max_non_split_rounding_bytes is not None and self.max_split_size_bytes is None:
            idle.append("max_non_split_rounding_mb does nothing without max_split_size_mb")
        return tuple(idle)

    def block_size(self, size_bytes: int) -> int:
        """Bytes of the block for a request (round_size): a positive multiple of 512."""
        if size_bytes < MIN_BLOCK:
            return MIN_BLOCK
        power = size_bytes.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(power - 20, 0), INTERVALS - 1)]
        if divisions > 1 and size_bytes > MIN_BLOCK * divisions:
            step = (1 << power) // divisions
            return -(-size_bytes // step) * step
        return -(-size_bytes // MIN_BLOCK) * MIN_BLOCK

    def segment_size(self, block_bytes: int) -> int:
        """Bytes requested from the driver for a block that is not cached (get_allocation_size)."""
        if block_bytes <= SMALL_SIZE:
            return SMALL_SEGMENT
        if block_bytes < MIN_LARGE:
            return self.large_segment_size_bytes
        return -(-block_bytes // ROUND_LARGE) * ROUND_LARGE


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _refused(key: str, value: object, expected: str) -> UsageError:
    return UsageError(f"allocator setting {key}:{value}: expected {expected}")


_PAIR = re.compile(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)")


def _pairs(text: str) -> list[tuple[str, str]]:
    """Split comma-separated `key:value` pairs; a value may be a list in brackets that contains commas and colons."""
    rest, pairs = "".join(text.split()), []
    while rest:
        match = _PAIR.match(rest)
        end = match.end() if match else 0
        if match is None or rest[end : end + 1] not in ("", ",") or rest[end:] == ",":
            raise UsageError(
                f'allocator settings "{text}": cannot read "{rest}"; expected comma-separated key:value pairs, '
                "for example max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,>:4]"
            )
        pairs.append((match[1], match[2]))
        rest = rest[end + 1 :]
    return pairs


def _check_known(key: str, release: Release) -> None:
    first = FIRST_WITH.get(key, release)
    if release < first:
        raise UsageError(
            f"allocator setting {key}: PyTorch {release_text(release)} refuses it; releases from {release_text(first)} "
            "on know it"
        )


def _check_backend(value: str) -> None:
    if value == "cudaMallocAsync":
        raise UsageError(
            "allocator setting backend:cudaMallocAsync: this is CUDA's own allocator, which memscope cannot replay; "
            "use backend:native, or measure on a GPU"
        )
    if value != "native":
        raise UsageError(f"allocator setting backend:{value}: unknown backend; {nearest(value, ['native'])}")


def _read_bool(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise _refused(key, value, "True or False, with a capital letter")
    return value == "True"


def _read_whole(key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise _refused(key, value, "a whole number")
    return int(value)


def _read_mebibytes(key: str, value: str) -> int:
    return _read_whole(key, value) * MIB


def _read_number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise _refused(key, value, "a number") from None


def _read_divisions(key: str, value: str, release: Release) -> tuple[int, ...]:
    """Parse one number for all sizes, or a list such as `[256:1,512:2,>:4]`: 1 from 256 MiB, 2 from 512 MiB, then 4.

    The first number also applies below its interval; an interval left out between two others has no divisions. Before
    2.10, the number after `>` also replaces that of the last interval.
    """
    if not value.startswith("["):
        count = _read_whole(key, value)
        if not _is_power_of_two(count):
            raise _refused(key, value, "a power of two")
        return (count,) * INTERVALS
    steps, last = [0] * INTERVALS, 0
    entries = [entry for entry in value[1:-1].split(",") if entry]
    for position, entry in enumerate(entries):
        bound, _, count_text = entry.partition(":")
        count = _read_whole(f"{key}:{entry}", count_text)
        if count and not _is_power_of_two(count):
            raise _refused(f"{key}:{value}", count, "divisions that are a power of two, or 0 for none")
        if bound == ">":
            if position < len(entries) - 1:
                raise _refused(key, value, '">" as the last entry of the list')
            start = last + 1 if release >= RANGE_AFTER_LAST else last
            steps[start:] = [count] * (INTERVALS - start)
            continue
        interval = _read_whole(f"{key}:{entry}", bound)
        if not _is_power_of_two(interval):
            raise _refused(f"{key}:{value}", interval, "intervals in MiB that are a power of two")
        last = min(interval.bit_length() - 1, INTERVALS - 1)
        if position == 0:
            steps[:last] = [count] * last
        steps[last] = count
    return tuple(steps)


_READERS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_number),
    "large_segment_size_mb": ("large_segment_size_bytes", _read_mebibytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mebibytes),
    "max_split_size_mb": ("max_split_size_bytes", _read_mebibytes),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_number),
    "throw_on_cudamalloc_oom": ("throw_on_cudamalloc_oom", _read_bool),
}
