"""What is trained and how one step goes: workloads, batches, `run_step`, settings, and finding targets."""
