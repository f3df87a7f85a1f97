"""The columns of a trace that were inferred instead of recorded; marked wherever they are shown."""

from __future__ import annotations

from memscope.trace import Trace

__all__ = ["how_inferred", "inferred_columns", "marked"]

_NAMES = {"op": "operator", "micro_batch": "micro-batch"}


def inferred_columns(trace: Trace) -> tuple[str, ...]:
    """Names of the inferred columns of a trace, such as `category`; empty for a recorded or simulated trace."""
    match trace.meta.get("inferred"):
        case [*names]:
            return tuple(map(str, names))
    return ()


def marked(name: str, column: str, *traces: Trace) -> str:
    """`category (inferred)`: a heading, marked where its column was inferred in one of the traces."""
    return f"{name} (inferred)" if any(column in inferred_columns(trace) for trace in traces) else name


def how_inferred(trace: Trace) -> str:
    """One sentence on the inferred columns and how they were inferred; empty where all were recorded."""
    names = [_NAMES.get(name, name) for name in inferred_columns(trace)]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return (
        f"Inferred from stacks, not recorded: {listed}, by the functions that ran at each allocation and by its "
        "lifetime. Sizes and lifetimes are PyTorch's own"
    )
