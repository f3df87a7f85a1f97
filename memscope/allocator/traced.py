"""What a simulated trace says about its allocator."""

from __future__ import annotations

from collections.abc import Sequence

from memscope.allocator.settings import AllocatorSettings
from memscope.trace import Trace

__all__ = ["cache_emptied_in", "settings_of"]


def settings_of(trace: Trace) -> AllocatorSettings:
    """The settings of the allocator in `meta["allocator"]`, which the trace must have.

    Raises:
        UsageError: PyTorch would refuse them.
    """
    known = AllocatorSettings.__dataclass_fields__  # a later memscope may know more
    given = {name: value for name, value in trace.meta["allocator"]["settings"].items() if name in known}
    if "roundup_power2_divisions" in given:
        given["roundup_power2_divisions"] = tuple(given["roundup_power2_divisions"])
    return AllocatorSettings(**given)


def cache_emptied_in(trace: Trace) -> Sequence[int]:
    """The events of a trace before which the target calls `torch.cuda.empty_cache()`."""
    emptied: Sequence[int] = trace.meta.get("allocator", {}).get("cache_emptied", ())
    return emptied
