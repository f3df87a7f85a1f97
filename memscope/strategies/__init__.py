"""Strategies: what can be done to a training step to change its memory, as plugins.

A strategy changes a `Workload` before its first step. It is found through the entry-point group `memscope.strategies`;
the built-in ones use the same table. A *plan* is text such as `lora:r=16,targets=wq+wv,amp:dtype=bf16,ckpt`: a
comma-separated word that has a `=` before any `:` belongs to the strategy before it, any other word starts a new one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from memscope.errors import UsageError, nearest
from memscope.settings import fill, non_defaults

if TYPE_CHECKING:
    from memscope.workload import Workload

__all__ = ["Plan", "Problem", "Stage", "Strategy", "available"]

_GROUP = "memscope.strategies"


class Stage(enum.IntEnum):
    """When a strategy is applied; within a stage the order is by name."""

    LOAD = 0
    """Changes how weights are held: dtype, quantization."""
    ADAPT = 1
    """Changes what is trained."""
    WRAP = 2
    """Wraps modules: checkpointing, offload."""
    SHARD = 3
    """Spreads over devices."""
    OPTIM = 4
    """Changes the optimizer."""
    STEP = 5
    """Changes how a step goes."""


@dataclass(frozen=True)
class Problem:
    """Why a strategy cannot be applied, and what to do instead."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


class Strategy(Protocol):
    """One way to change a training step. Subclass it, name it, write `apply`; the class docstring is its help text."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exact: ClassVar[bool]
    """True: losses and gradients stay what they were; `memscope.testing.check_strategy` holds it to that."""
    Config: ClassVar[type]
    """Frozen dataclass of its settings, all with defaults; the docstring under each field is its help text."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Features that another strategy of the plan must provide."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """Features it brings."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """Strategies or features it cannot be combined with."""
    textbook: ClassVar[Mapping[str, str]] = {}
    """What is usually said of it: row of Table 1 to ↑, ↓ or –. Only used to point out where a run says otherwise."""
    config: Any

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def check(self, workload: Workload) -> list[Problem]:
        """Everything that stands against applying it to a workload, at once; empty when nothing does."""
        return []

    def baseline(self, workload: Workload) -> None:
        """Change the workload that runs without this strategy, so that the comparison is fair. Usually nothing."""
        return None  # a body, or type checkers would take it for abstract

    def apply(self, workload: Workload) -> None:
        """Change the workload. Called only when `check` found no problem; changing nothing is an error."""
        ...

    @property
    def spec(self) -> str:
        """The strategy and its settings, as a plan writes them; settings at their defaults are left out."""
        words = [f"{key}={value}" for key, value in non_defaults(self.config).items()]
        return f"{self.name}:{','.join(words)}" if words else self.name


@cache
def available() -> dict[str, type[Strategy]]:
    """Every strategy installed, by name.

    Raises:
        UsageError: when two packages bring a strategy of the same name, or one cannot be imported.
    """
    found: dict[str, type[Strategy]] = {}
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        if entry.name in found:
            raise UsageError(
                f'two installed packages bring a strategy "{entry.name}" ({entry.value}): uninstall one of them'
            )
        try:
            found[entry.name] = entry.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(f'strategy "{entry.name}" ({entry.value}) cannot be imported: {error}') from error
    return found


@dataclass(frozen=True)
class Plan:
    """Strategies in the order they are applied: by stage, then by name."""

    strategies: tuple[Strategy, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            UsageError: when it is malformed, or names an unknown strategy, key or value.
        """
        strategies = []
        for name, words in _words(text):
            if name not in available():
                raise UsageError(f'unknown strategy "{name}" in plan "{text}": {nearest(name, available())}')
            kind = available()[name]
            strategies.append(kind(fill(kind.Config, words, of=f'strategy "{name}"')))
        return cls.of(*strategies)

    @classmethod
    def of(cls, *strategies: Strategy) -> Plan:
        """Put strategies into order.

        Raises:
            UsageError: when one is there twice, two conflict, or one lacks what it requires; all of that at once.
        """
        ordered = tuple(sorted(strategies, key=lambda s: (s.stage, s.name)))
        names = [s.name for s in ordered]
        wrong = [
            f'"{name}" is there {names.count(name)} times: name it once'
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        wrong += _conflicts(ordered) + _lacks(ordered)
        if wrong:
            raise UsageError(_listed("the plan cannot be used", wrong))
        return cls(ordered)

    @property
    def specs(self) -> list[str]:
        """Each strategy as text, in order."""
        return [strategy.spec for strategy in self.strategies]

    def __str__(self) -> str:
        return ",".join(self.specs)

    def __bool__(self) -> bool:
        return bool(self.strategies)

    def check(self, workload: Workload) -> None:
        """Look for everything that stands against the plan on this workload; changes nothing.

        Raises:
            UsageError: with every problem of every strategy.
        """
        wrong = [f"{s.name}: {problem}" for s in self.strategies for problem in s.check(workload)]
        if wrong:
            raise UsageError(_listed(f'the plan "{self}" cannot be applied to "{workload.name}"', wrong))

    def apply(self, workload: Workload) -> None:
        """Check every strategy against the workload, then apply them in order.

        Raises:
            UsageError: with every problem of every strategy, before anything is changed.
        """
        self.check(workload)
        for strategy in self.strategies:
            strategy.apply(workload)


def _words(text: str) -> list[tuple[str, dict[str, str]]]:
    """The strategies of a plan with their settings, still as text."""
    found: list[tuple[str, dict[str, str]]] = []
    for word in [w.strip() for w in text.split(",")] if text.strip() else []:
        equals, colon = word.find("="), word.find(":")
        if equals >= 0 and (colon < 0 or equals < colon):
            if not found:
                raise UsageError(
                    f'malformed plan "{text}": "{word}" is a setting before any strategy; write STRATEGY:{word}'
                )
            setting = word
        else:
            name, _, setting = word.partition(":")
            if not name or (colon >= 0 and not setting):
                raise UsageError(
                    f'malformed plan "{text}": expected STRATEGY or STRATEGY:KEY=VALUE,… but found "{word}"'
                )
            found.append((name, {}))
            if not setting:
                continue
        key, equal, value = setting.partition("=")
        if not equal or not key or not value:
            raise UsageError(
                f'malformed plan "{text}": expected KEY=VALUE after "{found[-1][0]}" but found "{setting}"'
            )
        if key in found[-1][1]:
            raise UsageError(f'malformed plan "{text}": "{key}" is set twice for "{found[-1][0]}"')
        found[-1][1][key] = value
    return found


def _conflicts(strategies: tuple[Strategy, ...]) -> list[str]:
    return [
        f'"{one.name}" and "{other.name}" cannot be combined: leave one out'
        for i, one in enumerate(strategies)
        for other in strategies[i + 1 :]
        if one.conflicts & {other.name, *other.provides} or other.conflicts & {one.name, *one.provides}
    ]


def _lacks(strategies: tuple[Strategy, ...]) -> list[str]:
    provided = frozenset().union(*(s.provides | {s.name} for s in strategies)) if strategies else frozenset()
    return [
        f'"{s.name}" requires "{feature}": add a strategy that provides it'
        for s in strategies
        for feature in sorted(s.requires - provided)
    ]


def _listed(title: str, wrong: list[str]) -> str:
    return f"{title}: {wrong[0]}" if len(wrong) == 1 else title + ":" + "".join(f"\n  - {line}" for line in wrong)
