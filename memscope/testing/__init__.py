"""The conformance kit for strategies, and toy workloads. Names are loaded, and torch with them, on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memscope.testing.conformance import TOLERANCE, check_strategy
    from memscope.testing.toy import toy_workload

__all__ = ["TOLERANCE", "check_strategy", "toy_workload"]

_HOME = {
    "TOLERANCE": "memscope.testing.conformance",
    "check_strategy": "memscope.testing.conformance",
    "toy_workload": "memscope.testing.toy",
}


def __getattr__(name: str) -> Any:
    """Load a name on first use: pytest imports this package in every project, which must not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'memscope.testing' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
