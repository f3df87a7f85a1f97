"""Runs of one target, each in its own process."""
