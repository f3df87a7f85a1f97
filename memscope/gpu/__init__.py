"""A real GPU: the history of its allocator, what its driver counts, and both joined with the tags of the hooks."""
