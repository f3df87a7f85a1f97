"""The strategies of a run as text, with the settings that they chose for the workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memscope.trace import Trace

__all__ = ["chosen_settings", "strategies_of", "with_chosen"]


def chosen_settings(trace: Trace) -> dict[str, dict[str, str]]:
    """The settings that strategies chose, by the name of the strategy; see `Strategy.chosen`."""
    chosen: dict[str, dict[str, str]] = trace.meta.get("chosen", {})
    return chosen


def strategies_of(trace: Trace) -> list[str] | None:
    """The strategies of a run, such as `lora:r=8 (targets=wq+wv)`; None if the trace does not name any."""
    match trace.meta.get("strategies"):
        case str(one):
            return with_chosen([one], trace)
        case [*specs]:
            return with_chosen(specs, trace)
    return None


def with_chosen(specs: Sequence[Any], trace: Trace | None) -> list[str]:
    """The texts of strategies, each with the settings that it chose in this trace."""
    found = []
    for spec in map(str, specs):
        chosen = chosen_settings(trace).get(spec.partition(":")[0], {}) if trace else {}
        words = ", ".join(f"{key}={value}" for key, value in chosen.items())
        found.append(f"{spec} ({words})" if words else spec)
    return found
