"""The combinations of strategies that may be used, from what the strategies declare."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product

from memscope.errors import UsageError, nearest
from memscope.strategies import Plan, Strategy, available
from memscope.strategies.plugins import called
from memscope.workload.description import Workload

__all__ = ["CHECKPOINTING", "combinations", "forbidden", "require_known"]

CHECKPOINTING = "ckpt"
"""Planned layer by layer rather than searched."""


def require_known(allowed: Collection[str]) -> None:
    """Refuse names of unknown strategies.

    Raises:
        UsageError: for the first such name, with the nearest valid name.
    """
    for name in allowed:
        if name not in available():
            raise UsageError(f'--allow {name}: there is no strategy "{name}": {nearest(name, available())}')


def combinations(workload: Workload, always: Plan, allowed: Collection[str]) -> list[Plan]:
    """Every combination of `always` with strategies that are exact or allowed.

    Each strategy is left out, or used with one of its candidates for this workload. Combinations that conflict or
    do not apply are left out. `always` alone comes first, then `always` with one more strategy, and so on.
    """
    choices = [
        [None, *found]
        for kind in _others(always)
        if (found := [s for s in _candidates(kind, workload) if s.name in allowed or called(s, "is_exact", workload)])
    ]
    plans = []
    for picked in product(*choices):
        try:
            plans.append(Plan.of(*always.strategies, *(strategy for strategy in picked if strategy)))
        except UsageError:  # strategies that conflict
            continue
    return sorted(plans, key=lambda plan: len(plan.strategies))


def forbidden(workload: Workload, always: Plan, allowed: Collection[str]) -> dict[str, Plan]:
    """`always` with one more strategy that was not allowed, by the name of that strategy."""
    plans = {}
    for kind in _others(always):
        if kind.name not in allowed:
            inexact = [s for s in _candidates(kind, workload) if not called(s, "is_exact", workload)]
            for strategy in inexact[:1]:
                try:
                    plans[kind.name] = Plan.of(*always.strategies, strategy)
                except UsageError:  # it conflicts with a strategy of `always`
                    continue
    return plans


def _others(always: Plan) -> list[type[Strategy]]:
    used = {CHECKPOINTING, *(strategy.name for strategy in always.strategies)}
    return [kind for name, kind in available().items() if name not in used]


def _candidates(kind: type[Strategy], workload: Workload) -> list[Strategy]:
    found = [kind(config) for config in called(kind(), "candidates", workload)]
    return [strategy for strategy in found if not called(strategy, "check", workload)]
