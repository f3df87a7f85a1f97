"""A real GPU: its allocator's history, its driver's memory count, and both joined with the tags of the hooks."""
