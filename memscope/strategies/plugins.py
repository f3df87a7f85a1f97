"""Find installed strategies, built-in ones included, through the entry-point group `memscope.strategies`.

An error inside a strategy of another package is reported with the strategy's name and the line.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from memscope.errors import MemscopeError, UsageError, where
from memscope.strategies.names import GROUP
from memscope.strategies.strategy import Stage, Strategy

if TYPE_CHECKING:
    from memscope.workload.description import Workload

__all__ = ["available", "called"]


@cache
def available() -> dict[str, type[Strategy]]:
    """Every installed strategy, by name.

    Raises:
        UsageError: two packages provide a strategy of the same name, or a strategy cannot be imported or used.
    """
    found: dict[str, type[Strategy]] = {}
    # A checkout beside an installation lists the same class twice: that is one strategy.
    for entry in sorted({(e.name, e.value): e for e in entry_points(group=GROUP)}.values(), key=lambda e: e.name):
        if entry.name in found:
            raise UsageError(
                f'two installed packages provide a strategy "{entry.name}" ({entry.value}): uninstall one of them'
            )
        found[entry.name] = _loaded(entry)
    return found


def _loaded(entry: EntryPoint) -> type[Strategy]:
    """Load the strategy that an entry point names.

    Raises:
        UsageError: the object cannot be imported, or is not a strategy.
    """
    named = f'strategy "{entry.name}" ({entry.value})'
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{named} cannot be imported: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(f"{named} cannot be imported: {type(error).__name__}: {error}{where(error)}") from error
    wrong = _wrong(kind, entry.name)
    if wrong:
        raise UsageError(f"{named} cannot be used: {wrong}. Fix or uninstall the package")
    strategy: type[Strategy] = kind
    return strategy


def _wrong(kind: Any, name: str) -> str:
    if Strategy not in getattr(kind, "__mro__", ()):
        return "it is not a subclass of memscope.Strategy"
    found: Any = {key: getattr(kind, key, None) for key in ("name", "stage", "exact", "Config")}
    if found["name"] != name:
        return f"its entry point is named {name!r}, but its class has name = {found['name']!r}"
    if not isinstance(found["stage"], Stage):
        return f"its stage is {found['stage']!r}, expected one of memscope.strategies.Stage"
    if not isinstance(found["exact"], bool):
        return f"its exact is {found['exact']!r}, expected True or False"
    if not (isinstance(found["Config"], type) and dataclasses.is_dataclass(found["Config"])):
        return f"its Config is {found['Config']!r}, expected a frozen dataclass of its settings"
    try:
        found["Config"]()
    except Exception as error:
        return f"its Config cannot be created without arguments: {error}"
    return ""


Method = Literal["candidates", "left_out", "check", "is_exact", "baseline", "apply"]


def called(strategy: Strategy, what: Method, workload: Workload) -> Any:
    """Call a method of a strategy on a workload and return its result.

    Raises:
        MemscopeError: the method fails. An error that is already a MemscopeError is passed on unchanged.
    """
    try:
        found = getattr(strategy, what)(workload)
    except (MemscopeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise MemscopeError(
            f'strategy "{strategy.name}" failed in {what}(): {type(error).__name__}: {error}{where(error)}'
        ) from error
    if what == "check" and not isinstance(found, list | tuple):
        raise MemscopeError(
            f'strategy "{strategy.name}": check() returned {found!r}, expected a list of Problem, which may be empty'
        )
    if what == "is_exact" and not isinstance(found, bool):
        raise MemscopeError(f'strategy "{strategy.name}": is_exact() returned {found!r}, expected True or False')
    return found
