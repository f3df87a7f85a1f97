"""Where the memory of a PyTorch training step goes, what a technique would change, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memscope.advisor.advise import advise
    from memscope.hooks.record import record
    from memscope.hooks.recorder import Recorder
    from memscope.simulation.simulate import simulate
    from memscope.strategies import Plan, Strategy
    from memscope.trace import Trace
    from memscope.workload.description import StepPlan, Workload

__all__ = ["Plan", "Recorder", "StepPlan", "Strategy", "Trace", "Workload", "advise", "record", "simulate"]
__version__ = "0.1.0"

_HOME = {
    "Plan": "memscope.strategies",
    "Recorder": "memscope.hooks.recorder",
    "StepPlan": "memscope.workload.description",
    "Strategy": "memscope.strategies",
    "Trace": "memscope.trace",
    "Workload": "memscope.workload.description",
    "advise": "memscope.advisor.advise",
    "record": "memscope.hooks.record",
    "simulate": "memscope.simulation.simulate",
}


def __getattr__(name: str) -> Any:
    """Public names load what they need when first used, so that `memscope --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'memscope' has no attribute '{name}'")
    from importlib import import_module

    import_module("memscope.analysis.summary")  # registers how a trace is shown
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, also before any of them is loaded."""
    return [*__all__, "__version__"]
