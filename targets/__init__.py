"""Targets shipped with memscope, one folder each with a `target.py`. Installed as `memscope.targets`."""
