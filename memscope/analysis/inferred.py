"""What of a trace was not recorded but inferred, and how: said wherever it is shown."""

from __future__ import annotations

from memscope.trace import Trace

__all__ = ["how_inferred", "inferred_columns", "marked"]

_NAMES = {"op": "operator", "micro_batch": "micro-batch"}


def inferred_columns(trace: Trace) -> tuple[str, ...]:
    """Names of the trace's columns that were inferred, such as `category`; none of a recorded or simulated trace."""
    match trace.meta.get("inferred"):
        case [*names]:
            return tuple(map(str, names))
    return ()


def marked(name: str, column: str, *traces: Trace) -> str:
    """`By category (inferred)`: what is shown under a name, marked where that column was inferred in a trace."""
    return f"{name} (inferred)" if any(column in inferred_columns(trace) for trace in traces) else name


def how_inferred(trace: Trace) -> str:
    """In a sentence what was inferred, and how; empty where nothing was."""
    names = [_NAMES.get(name, name) for name in inferred_columns(trace)]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return (
        f"Inferred from stacks, not recorded: {listed}, by the functions that ran at each birth and by how long "
        "each allocation lived. Sizes and lifetimes are PyTorch's own"
    )
