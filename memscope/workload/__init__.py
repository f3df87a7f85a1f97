"""The training step: workloads, batches, `run_step`, settings, and finding targets."""
