"""PyTorch's caching allocator: its settings, blocks and segments, their replay, and histories of real allocators."""
