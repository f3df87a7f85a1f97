"""The error for operations of a target that cannot be simulated."""

from __future__ import annotations

from memscope.errors import TargetError

__all__ = ["NotSimulated"]


class NotSimulated(TargetError):
    """A target's operation cannot be simulated. The message names the operation, the reason, and what to do instead."""
