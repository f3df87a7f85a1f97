"""The strategies that are installed, as far as a test wants to see them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest

from memscope.strategies import Strategy, available, plugins

__all__ = ["SHIPPED", "Install", "installing"]

GROUP = "memscope.strategies"
_POINTS = [point for point in distribution("torch-memscope").entry_points if point.group == GROUP]
SHIPPED = tuple(sorted(point.name for point in _POINTS))
"""The strategies that come with memscope."""
Install = Callable[..., None]


@contextlib.contextmanager
def installing() -> Iterator[Install]:
    """A function that installs strategies beside some of the shipped ones, by default all, until the context ends."""

    def install(*kinds: type[Strategy], beside: Sequence[str] = SHIPPED) -> None:
        shipped = [point for point in _POINTS if point.name in beside]
        added = [SimpleNamespace(name=kind.name, value=str(kind), load=lambda kind=kind: kind) for kind in kinds]
        patch.setattr(plugins, "entry_points", lambda group: [*shipped, *added])
        available.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        yield install
    available.cache_clear()
