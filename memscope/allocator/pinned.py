"""PyTorch's allocator of pinned host memory, without streams: what it takes from the system for tensors that are alive.

Settings are the defaults: `pinned_max_round_threshold` and `pinned_max_cached_size` without a limit. Sources:
`allocate`, `get_free_block` and `process_events` in ATen/core/CachingHostAllocator.h, and c10/core/AllocatorConfig.h
(2.13); the rounding is that of 2.11, too.
"""

from __future__ import annotations

from collections import Counter

__all__ = ["PinnedMemory"]


class PinnedMemory:
    """Blocks of pinned memory: each is a power of two, is reused for tensors of that size class, and is never returned.

    A block is free again as soon as its tensor is: that the copies in flight have ended by then is an assumption.

    Attributes:
        reserved_bytes: bytes of all blocks.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._free: Counter[int] = Counter()

    def allocate(self, size_bytes: int) -> int:
        """Bytes of the block for a tensor of `size_bytes`, at least 1."""
        block_bytes = 1 << (size_bytes - 1).bit_length()
        if self._free[block_bytes]:
            self._free[block_bytes] -= 1
        else:
            self.reserved_bytes += block_bytes
        return block_bytes

    def free(self, block_bytes: int) -> None:
        """Keep the block for the next tensor of its size class."""
        self._free[block_bytes] += 1
