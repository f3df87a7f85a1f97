"""Where the memory of a PyTorch training step goes, what a technique would change, and whether it fits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memscope.advisor.advise import advise
    from memscope.advisor.fit.fit import fit
    from memscope.hooks.record import record
    from memscope.hooks.recorded import recorded
    from memscope.hooks.recorder import Recorder
    from memscope.simulation.simulate import simulate
    from memscope.strategies import Plan, Strategy
    from memscope.targets.hf.target import hf
    from memscope.trace import Trace
    from memscope.workload.description import StepPlan, Workload

__all__ = [
    "Plan",
    "Recorder",
    "StepPlan",
    "Strategy",
    "Trace",
    "Workload",
    "advise",
    "fit",
    "hf",
    "record",
    "recorded",
    "simulate",
]
__version__ = "0.1.0"

_HOME = {
    "Plan": "memscope.strategies",
    "Recorder": "memscope.hooks.recorder",
    "StepPlan": "memscope.workload.description",
    "Strategy": "memscope.strategies",
    "Trace": "memscope.trace",
    "Workload": "memscope.workload.description",
    "advise": "memscope.advisor.advise",
    "fit": "memscope.advisor.fit.fit",
    "hf": "memscope.targets.hf.target",
    "record": "memscope.hooks.record",
    "recorded": "memscope.hooks.recorded",
    "simulate": "memscope.simulation.simulate",
}


def __getattr__(name: str) -> Any:
    """Public names load what they need when first used, so that `memscope --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'memscope' has no attribute '{name}'")
    import_module("memscope.analysis.summary")  # registers how a trace is shown
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, also before any of them is loaded."""
    return [*__all__, "__version__"]


_MOVED = {
    "memscope.diff": "memscope.analysis.diff",
    "memscope.grid": "memscope.analysis.grid",
    "memscope.live": "memscope.hooks.live_state",
    "memscope.simulation.cost": "memscope.analysis.cost",
    "memscope.strategies.layer_plan": "memscope.strategies.ckpt.layer_plan",
}
"""Modules under the names that the documentation of 0.1 gave them → their names now."""


class _MovedModules:
    """Imports a moved module under its old name, with a warning that tells the new one.

    A finder and a loader by their methods: the base classes of `importlib.abc` take ten times as long to import as this
    module.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader: Any = self
        return ModuleSpec(fullname, loader) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Python makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} has moved: import {_MOVED[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(_MOVED[old])


sys.meta_path.append(_MovedModules())
