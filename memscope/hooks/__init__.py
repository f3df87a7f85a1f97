"""Hooks that find the owner and lifetime of each byte while a training step runs."""
