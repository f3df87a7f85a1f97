"""Files of other tools: reads and writes PyTorch's memory snapshots, and writes Perfetto traces and tables."""
