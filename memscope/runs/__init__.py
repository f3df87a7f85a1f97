"""Runs of one target in processes of their own."""
