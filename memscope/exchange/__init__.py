"""Files of other tools: memory snapshots of PyTorch, read and written; traces for Perfetto, tables, written."""
