"""Functions of libraries that a simulated program must not run as they are: they read weights, save, or upload.

A library is changed when it has been imported, wherever its functions have been bound. Classes keep their changes until
the machine is left.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from memscope.simulation.facade.stand_in import replaced

__all__ = ["ChangedLibraries", "Changes", "merged"]

Changes: TypeAlias = dict[str, dict[str, Callable[[Any], Any]]]
"""Module → name of a function, or of a class and its method → the replacement, made from the original."""


def merged(*tables: Changes) -> Changes:
    """All changes in one table."""
    found: Changes = {}
    for table in tables:
        for module, changes in table.items():
            found[module] = {**found.get(module, {}), **changes}
    return found


class ChangedLibraries:
    """Context in which functions of libraries are replaced, also of those that are imported later."""

    def __init__(self, changes: Changes) -> None:
        self._waiting = dict(changes)
        self._scopes = contextlib.ExitStack()

    def __enter__(self) -> ChangedLibraries:
        self.look()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.close()

    def look(self) -> None:
        """Change the libraries that have been imported since the last call."""
        functions: dict[int, Any] = {}  # id of a function, which its module keeps alive → its replacement
        for name in [name for name in self._waiting if name in sys.modules]:
            module, changes = sys.modules[name], self._waiting.pop(name)
            for path, make in changes.items():
                kind, _, function = path.rpartition(".")
                owner = getattr(module, kind, None) if kind else module
                if owner is None or not hasattr(owner, function):
                    continue
                if kind:
                    self._change_method(owner, function, make)
                else:
                    functions[id(getattr(owner, function))] = make(getattr(owner, function))
        for owner, name, value in list(_bindings(functions)) if functions else ():
            self._scopes.enter_context(replaced(owner, name, value))

    def _change_method(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = vars(owner).get(name, getattr(owner, name))
        if isinstance(original, classmethod):
            value: Any = classmethod(make(original.__func__))
        elif isinstance(original, staticmethod):
            value = staticmethod(make(original.__func__))
        else:
            value = make(original)
        self._scopes.enter_context(replaced(owner, name, value))


def _bindings(replacements: dict[int, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Every module that has one of some values, the value's name there, and its replacement."""
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(getattr(module, "__dict__", None), dict) else {}
        for name, one in list(names.items()):
            if id(one) in replacements:
                yield module, name, replacements[id(one)]
