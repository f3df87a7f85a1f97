"""The error for operations of a target that cannot be simulated."""

from __future__ import annotations

from memscope.errors import TargetError

__all__ = ["NotSimulated", "no_answer"]


class NotSimulated(TargetError):
    """A target's operation cannot be simulated. The message names the operation, the reason, and what to do instead."""


def no_answer(name: str, why: str) -> NotSimulated:
    """The error for a question about the device that a simulation cannot answer."""
    return NotSimulated(f"{name} has no answer in a simulation: {why}. Remove the call, or record a real run")
