"""The interface between the tracker and the kernel workspace model: memory that kernels allocate internally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

__all__ = ["Kernels", "Workspace"]


@dataclass(frozen=True)
class Workspace:
    """One allocation made inside an operator."""

    name: str
    """Contents of the workspace."""
    size_bytes: int
    """Bytes requested from the allocator."""
    lifetime: Literal["op", "handle"]
    """`op`: freed when the operator returns. `handle`: kept; each thread allocates it once per stream and `key`.

    Autograd runs the backward pass, including recomputation, in its own thread; that thread and the main thread have
    separate workspaces.
    """
    source: str
    """Source file of the size."""
    key: str = ""
    """For the lifetime `handle`: identifies the workspace among those that a thread keeps."""
    before_outputs: bool = False
    """Whether the workspace is allocated before the operator's outputs."""
    frees: tuple[str, ...] = ()
    """Names of workspaces of the same call that are freed before this one is allocated."""
    estimate: bool = False
    """Whether the size is an estimate."""

    def uncertain(self) -> Workspace:
        """The same workspace, marked as an estimate."""
        return replace(self, estimate=True)


class Kernels(Protocol):
    """The kernel workspace model: memory that kernels allocate internally, for runs in which no real kernel runs."""

    def covers(self, name: str) -> bool:
        """Whether an operator, named with its overload, may allocate workspaces."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Workspace]:
        """The workspaces of one call, in order of allocation."""

    def has_own_order(self, name: str) -> bool:
        """Whether `born` may return an order for an operator, named with its overload."""

    def born(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """Indices of the results that one call makes on the device, in order; None: all, in the order returned."""
