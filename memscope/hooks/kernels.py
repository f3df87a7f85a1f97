"""What the tracker asks of whoever knows the memory that kernels take inside themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Kernels", "Workspace"]


class Workspace(Protocol):
    """Memory that a kernel takes inside itself; see `memscope.simulation.workspaces`."""

    @property
    def name(self) -> str:
        """What it holds."""

    @property
    def size_bytes(self) -> int:
        """Bytes asked of the allocator."""

    @property
    def lifetime(self) -> str:
        """`op`: until the operator returns; `handle`: kept."""

    @property
    def key(self) -> str:
        """Which of a thread's kept workspaces it is."""

    @property
    def before_outputs(self) -> bool:
        """Whether it is taken before the operator's outputs."""

    @property
    def frees(self) -> tuple[str, ...]:
        """Names of workspaces of the same call that are free again when this one is taken."""


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
