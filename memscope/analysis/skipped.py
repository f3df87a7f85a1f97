"""Optimizer steps that a gradient scaler left out, because gradients overflowed: said wherever such a run is shown."""

from __future__ import annotations

from memscope.trace import Trace

__all__ = ["how_skipped"]


def how_skipped(trace: Trace) -> str:
    """In a sentence what is missing of a run; empty where nothing is."""
    count = trace.meta.get("skipped_steps", 0)
    if not count:
        return ""
    return (
        f"Gradients overflowed, and the gradient scaler left out {count} of {len(trace.steps)} optimizer steps: what "
        "the optimizer takes may be missing. Record more steps (--steps), or use amp:dtype=bf16"
    )
