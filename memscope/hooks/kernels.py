"""What the tracker asks of whoever knows the memory that kernels take inside themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

__all__ = ["Kernels", "Workspace"]


@dataclass(frozen=True)
class Workspace:
    """One allocation made inside an operator."""

    name: str
    """What it holds."""
    size_bytes: int
    """Bytes asked of the allocator."""
    lifetime: Literal["op", "handle"]
    """`op`: free when the operator returns. `handle`: kept; a thread takes it once for each stream and `key`.

    Autograd runs the backward, and what it recomputes, in a thread of its own: that thread and the main one have one
    each.
    """
    source: str
    """The file it was read from."""
    key: str = ""
    """For the lifetime `handle`: which of a thread's kept workspaces this is."""
    before_outputs: bool = False
    """Whether it is taken before the operator's outputs."""
    frees: tuple[str, ...] = ()
    """Names of workspaces of the same call that are free again when this one is taken."""
    estimate: bool = False
    """Whether the size is not exactly known."""

    def uncertain(self) -> Workspace:
        """The same, marked as an estimate."""
        return replace(self, estimate=True)


class Kernels(Protocol):
    """Knows what kernels take inside themselves, where no real kernel runs to take it."""

    def covers(self, name: str) -> bool:
        """Whether an operator, named with its overload, may take any."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Workspace]:
        """What one call takes, in order."""

    def has_own_order(self, name: str) -> bool:
        """Whether `born` may say something of an operator, named with its overload."""

    def born(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """Which results of one call are made on the device, in which order; None: all, as they are given back."""
