"""Optimizer steps that a gradient scaler skipped because gradients overflowed; noted wherever such a run is shown."""

from __future__ import annotations

from memscope.trace import Trace

__all__ = ["how_skipped"]


def how_skipped(trace: Trace) -> str:
    """One sentence on the skipped steps; empty where there are none."""
    count = trace.meta.get("skipped_steps", 0)
    if not count:
        return ""
    return (
        f"Gradients overflowed, and the gradient scaler skipped {count} of {len(trace.steps)} optimizer steps: "
        "optimizer state may be missing. Record more steps (--steps), or use amp:dtype=bf16"
    )
