"""Where a device runs out of memory: the failed request and the memory in use at that moment."""

from __future__ import annotations

from collections.abc import Iterator

from memscope.analysis.alive import occasion, together
from memscope.trace import CATEGORIES, Category, Trace
from memscope.units import format_bytes, format_part

__all__ = ["about_fragments", "alive_before", "in_use", "ran_out"]


def alive_before(trace: Trace, event: int) -> dict[Category, int]:
    """Bytes of every category before an event: the memory in use when a request failed there."""
    return trace.by_category(at=event - 1) if event else dict.fromkeys(CATEGORIES, 0)


def in_use(trace: Trace) -> list[tuple[tuple[Category, str], int]]:
    """Bytes by category and module when the request failed, largest first; empty when the run fits.

    Names of modules that differ only in a layer's index are merged.
    """
    oom = trace.meta.get("out_of_memory")
    if not oom or not oom["event"]:
        return []
    sizes: dict[tuple[Category, str], int] = {}
    for (category, module), size_bytes in trace.by("category", "module", at=oom["event"] - 1).items():
        group = category, together(module)
        sizes[group] = sizes.get(group, 0) + size_bytes
    return sorted(sizes.items(), key=lambda item: -item[1])


def about_fragments(trace: Trace) -> Iterator[str]:
    """A sentence on the reserved memory that nothing occupied when a request failed, if there was any."""
    oom = trace.meta.get("out_of_memory")
    if oom and (free := oom["reserved"] - oom["allocated"]):
        text = f"{format_bytes(free)} were reserved but free, the largest block {format_bytes(oom['largest_free'])}"
        yield f"{text}: enough for the request, but in pieces" if free >= oom["requested"] else text


def ran_out(trace: Trace) -> str:
    """One sentence on the request that failed and on the memory in use; empty when the run fits."""
    oom = trace.meta.get("out_of_memory")
    if not oom:
        return ""
    when = occasion(oom["step"], oom["phase"]).replace(" · ", ", ") if oom["step"] >= 0 else "setup, before step 0"
    largest = sorted(oom["by_category"].items(), key=lambda item: -item[1])[:3]
    used = ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest if size)
    simulated = trace.meta["device"]["simulated"]
    values = "values below assume unlimited memory" if simulated else "values below end there"
    return (
        f"it runs out of memory in {when}, {oom['module']}, while allocating {format_bytes(oom['requested'])} "
        f"({format_part(oom['reserved'], oom['limit'])} reserved: {used}); {values}"
    )
