"""Workloads shipped with memscope: one folder a target, each with a `target.py`. Installed as `memscope.targets`."""
