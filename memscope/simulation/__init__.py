"""Simulation of a GPU: the allocations a training step would make on it, without running on one."""
