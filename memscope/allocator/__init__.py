"""PyTorch's caching allocator: settings, blocks and segments, replay, and histories of real allocators."""
