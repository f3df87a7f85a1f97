"""The head of a page: device, simulated or measured, and settings of all its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from memscope.analysis.effects import Run
from memscope.dashboards.html import facts
from memscope.trace import Trace
from memscope.units import format_bytes

__all__ = ["device_of", "how_made", "page_head", "targets_of"]


def targets_of(runs: Sequence[Run]) -> str:
    """The targets of the runs, each once: `llama2`."""
    return ", ".join(dict.fromkeys(str(run.trace.meta.get("target", "unnamed target")) for run in runs))


def device_of(trace: Trace) -> str:
    """`a100-40gb`; empty when the trace names no device."""
    match trace.meta.get("device"):
        case {"name": name} | str(name):
            return str(name)
    return ""


def how_made(trace: Trace) -> str:
    """`simulated`, `measured`, or `imported`; empty when the trace does not say."""
    if "imported" in trace.meta:
        return "imported"
    match trace.meta.get("device"):
        case {"simulated": bool(simulated)}:
            return "simulated" if simulated else "measured"
    return ""


def page_head(runs: Sequence[Run]) -> str:
    """The facts that all runs share, and their settings, folded: HTML. A fact with several values lists them all."""
    return facts(_facts(runs), "facts head") + _settings([run.trace for run in runs])


def _facts(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    traces = [run.trace for run in runs]
    if len(runs) > 1:
        yield "runs", f"{len(runs)}"
    for name, values in (
        ("device", [device_of(trace) for trace in traces]),
        ("recorded", [how_made(trace) for trace in traces]),
        ("capacity", [_capacity(trace) for trace in traces]),
        ("parameters", [_parameters(trace) for trace in traces]),
        ("samples a step", [_number(trace.meta.get("samples_per_step")) for trace in traces]),
        ("torch", [_torch(trace) for trace in traces]),
    ):
        told = list(dict.fromkeys(filter(None, values)))
        if told:
            yield name, " · ".join(told)


def _capacity(trace: Trace) -> str:
    return format_bytes(capacity) if isinstance(capacity := trace.meta.get("capacity"), int) else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _parameters(trace: Trace) -> str:
    match trace.meta.get("parameters"):
        case {"total": int(total)}:
            return f"{total:,}"
    return ""


def _torch(trace: Trace) -> str:
    match trace.meta.get("versions"):
        case {"torch": version}:
            return str(version)
    return ""


def _settings(traces: Sequence[Trace]) -> str:
    """The settings of the target; a setting in which runs differ lists the value of each run."""
    tables = [table if isinstance(table := trace.meta.get("settings"), dict) else {} for trace in traces]
    names = list(dict.fromkeys(str(name) for table in tables for name in table))
    if not names:
        return ""
    pairs = []
    for name in names:
        values = [_value(table[name]) for table in tables if name in table]
        same = len(set(values)) == 1 and len(values) == len(tables)
        pairs.append((name, values[0] if same else " | ".join(values)))
    gist = ", ".join(f"{name}={value}" for name, value in pairs[:4])
    return (
        f'<details class="settings"><summary>Settings <span class="gist">{escape(gist)}'
        f"{', …' if len(pairs) > 4 else ''}</span></summary>{facts(pairs)}</details>"
    )


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)
