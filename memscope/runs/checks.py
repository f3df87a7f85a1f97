"""Check a target and plans before anything runs, on a model without memory, in a process that the target may break."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memscope.errors import MemscopeError
from memscope.runs.processes import alone, preload
from memscope.workload.target import slow_imports

if TYPE_CHECKING:
    from memscope.strategies import Plan

__all__ = ["check_plans"]


def check_plans(
    target: str,
    preset: str | None,
    settings: Mapping[str, str],
    plans: Sequence[Plan],
    *,
    offered: Sequence[str] = (),
    timeout_seconds: float | None = None,
) -> list[str]:
    """Check the settings, the data and every plan; return those of the `offered` plans that can be applied.

    Raises:
        MemscopeError: the target, its settings, its data or a plan cannot be used, or its code ended the process or
            took longer than `timeout_seconds`.
    """
    preload(slow_imports(target))
    return alone(_checked, target, preset, settings, [*map(str, plans)], offered, timeout_seconds=timeout_seconds)


def _checked(
    target_text: str, preset: str | None, settings: Mapping[str, str], plans: Sequence[str], offered: Sequence[str]
) -> list[str]:
    from memscope.simulation.packages.meta import on_meta
    from memscope.strategies import Plan
    from memscope.workload.building import usable
    from memscope.workload.target import find_target

    target = find_target(target_text)
    config = target.configure(preset, settings)
    with on_meta():
        try:
            built: object = target.build(config)
        except (MemscopeError, KeyboardInterrupt):
            raise
        except BaseException:  # possibly only on the meta device; the runs report real errors
            return []
        workload = usable(built)
        for plan in plans:
            Plan.parse(plan).check(workload)
        found = []
        for plan in offered:
            with contextlib.suppress(MemscopeError):
                Plan.parse(plan).check(workload)
                found.append(plan)
    return found
