"""What a target does and a simulation cannot follow."""

from __future__ import annotations

from memscope.errors import TargetError

__all__ = ["NotSimulated"]


class NotSimulated(TargetError):
    """A target does what cannot be simulated; the message says what, why, and what to do."""
