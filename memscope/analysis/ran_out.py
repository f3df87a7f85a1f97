"""Where and by what a device ran out of memory, or would run out: what was alive then, and all of it in a sentence."""

from __future__ import annotations

from memscope.analysis.alive import occasion
from memscope.trace import CATEGORIES, Category, Trace
from memscope.units import format_bytes

__all__ = ["alive_before", "ran_out"]


def alive_before(trace: Trace, event: int) -> dict[Category, int]:
    """Bytes of every category before an event: what filled the memory when a request failed there."""
    return trace.by_category(at=event - 1) if event else dict.fromkeys(CATEGORIES, 0)


def ran_out(trace: Trace) -> str:
    """What was asked for where, and what fills the memory; empty when the run fits."""
    oom = trace.meta.get("out_of_memory")
    if not oom:
        return ""
    when = occasion(oom["step"], oom["phase"]).replace(" · ", ", ") if oom["step"] >= 0 else "setup, before step 0"
    largest = sorted(oom["by_category"].items(), key=lambda item: -item[1])[:3]
    filled = ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest if size)
    simulated = trace.meta["device"]["simulated"]
    shown = "what is shown is what it would need" if simulated else "what is shown ends there"
    return (
        f"runs out in {when}, {oom['module']}, "
        f"asking {format_bytes(oom['requested'])} with {format_bytes(oom['reserved'])} of {format_bytes(oom['limit'])} "
        f"taken ({filled}); {shown}"
    )
