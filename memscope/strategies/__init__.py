"""Strategies: what can be done to a training step to change its memory, as plugins.

A strategy changes a `Workload` before its first step. It is found through the entry-point group `memscope.strategies`;
the built-in ones use the same table. A *plan* is text such as `lora:r=16,targets=wq+wv,adamw:fused,ckpt`: a
comma-separated word that has a `=` before any `:` belongs to the strategy before it, any other word starts a new one.
A bare word straight after the colon is a switch: `adamw:fused` is `adamw:fused=true`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from memscope.errors import UsageError, nearest
from memscope.settings import fill, is_switch, non_defaults
from memscope.strategies.plugins import called, loaded

if TYPE_CHECKING:
    from memscope.workload import Workload

__all__ = ["Plan", "Problem", "Stage", "Strategy", "available", "read_strategies"]

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
    """One way to change a training step. Subclass it, name it, write `apply`; the class docstring is its help text.

    Examples:
        >>> from dataclasses import dataclass, replace
        >>> from memscope import Plan, Strategy
        >>> from memscope.strategies import Stage
        >>> from memscope.testing import toy_workload
        >>> class Clip(Strategy):
        ...     '''Clip the total norm of the gradients.'''
        ...
        ...     name, stage, exact = "clip", Stage.STEP, False
        ...
        ...     @dataclass(frozen=True)
        ...     class Config:
        ...         norm: float = 1.0
        ...
        ...     def apply(self, workload):
        ...         workload.plan = replace(workload.plan, clip_grad_norm=self.config.norm)
        >>> workload = toy_workload()
        >>> Plan.of(Clip(Clip.Config(norm=0.5))).apply(workload)
        >>> workload.plan.clip_grad_norm
        0.5
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exact: ClassVar[bool]
    """True: losses and gradients stay what they were, up to rounding; `memscope.testing.check_strategy` tests it."""
    changes: ClassVar[str] = ""
    """What it changes, in a few words, where it is not `exact`: "what is trained". Only used where that is allowed."""
    Config: ClassVar[type]
    """Frozen dataclass of its settings, all with defaults; the docstring under each field is its help text."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Features that another strategy of the plan must provide."""
    provides: frozenset[str] = frozenset()
    """Features it brings; an instance may add those that its settings bring."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """Strategies or features it cannot be combined with."""
    textbook: ClassVar[Mapping[str, str]] = {}
    """What is usually said of it: row of Table 1 to ↑, ↓ or –. Only used to point out where a run says otherwise."""
    config: Any

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Any]:
        """The settings worth trying on a workload that no strategy has changed: what `memscope advise` searches.

        Those that `check` refuses are left out by whoever asks. Of a strategy that changes the mathematics, the first
        is taken unless another one is worth it. Here: the default settings alone.
        """
        return [cls.Config()]

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
        settings = non_defaults(self.config)
        switch = next((key for key in settings if getattr(self.config, key) is True), None)
        words = [switch] if switch else []
        words += [f"{key}={value}" for key, value in settings.items() if key != switch]
        return f"{self.name}:{','.join(words)}" if words else self.name


@cache
def available() -> dict[str, type[Strategy]]:
    """Every strategy installed, by name.

    Raises:
        UsageError: when two packages bring a strategy of the same name, or one cannot be imported or is none.
    """
    found: dict[str, type[Strategy]] = {}
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        if entry.name in found:
            raise UsageError(
                f'two installed packages bring a strategy "{entry.name}" ({entry.value}): uninstall one of them'
            )
        found[entry.name] = loaded(entry)
    return found


@dataclass(frozen=True)
class Plan:
    """Strategies in the order they are applied: by stage, then by name.

    Examples:
        >>> from memscope import Plan
        >>> plan = Plan.parse("amp,lora:r=8")
        >>> str(plan)
        'lora:r=8,amp'
    """

    strategies: tuple[Strategy, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            UsageError: when it is malformed, or names an unknown strategy, key or value.
        """
        return cls.of(*read_strategies(text))

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
        wrong = [f"{s.name}: {problem}" for s in self.strategies for problem in called(s, "check", workload)]
        if wrong:
            raise UsageError(_listed(f'the plan "{self}" cannot be applied to "{workload.name}"', wrong))

    def apply(self, workload: Workload) -> None:
        """Check every strategy against the workload, then apply them in order.

        Raises:
            UsageError: with every problem of every strategy, before anything is changed.
        """
        self.check(workload)
        self.carry_out(workload)

    def carry_out(self, workload: Workload) -> None:
        """Apply the strategies in order; for a workload that `check` has let through."""
        for strategy in self.strategies:
            called(strategy, "apply", workload)

    def prepare_baseline(self, workload: Workload, applied: Collection[str]) -> None:
        """Let each strategy whose name is not in `applied` make the run without it comparable."""
        for strategy in self.strategies:
            if strategy.name not in applied:
                called(strategy, "baseline", workload)


def read_strategies(text: str) -> list[Strategy]:
    """The strategies that a plan's text names, in its order, each by itself.

    Raises:
        UsageError: when the text is malformed, or names an unknown strategy, key or value.
    """
    strategies: list[Strategy] = []
    for name, words in _words(text):
        if name not in available():
            hint = nearest(name, available())
            if strategies and is_switch(strategies[-1].Config, name):
                hint = f'after a comma, the setting of "{strategies[-1].name}" is written {name}=true'
            raise UsageError(f'unknown strategy "{name}" in plan "{text}": {hint}')
        kind = available()[name]
        strategies.append(kind(fill(kind.Config, words, of=f'strategy "{name}"')))
    return strategies


def _words(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """The strategies of a plan with their settings, still as text; None for a switch."""
    found: list[tuple[str, dict[str, str | None]]] = []
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
            if "=" not in setting:
                found.append((name, {setting: None} if setting else {}))
                continue
            found.append((name, {}))
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
    found = []
    for i, one in enumerate(strategies):
        for other in strategies[i + 1 :]:
            features = sorted((one.conflicts & other.provides) | (other.conflicts & one.provides))
            if other.name in one.conflicts or one.name in other.conflicts:
                found.append(f'"{one.name}" and "{other.name}" cannot be combined: leave one out')
            elif features:
                found.append(
                    f'"{one.name}" and "{other.name}" cannot be combined, because of "{features[0]}": '
                    "leave one out, or change the setting that brings it"
                )
    return found


def _lacks(strategies: tuple[Strategy, ...]) -> list[str]:
    provided = frozenset().union(*(s.provides | {s.name} for s in strategies)) if strategies else frozenset()
    return [
        f'"{s.name}" requires "{feature}": add a strategy that provides it'
        for s in strategies
        for feature in sorted(s.requires - provided)
    ]


def _listed(title: str, wrong: list[str]) -> str:
    return f"{title}: {wrong[0]}" if len(wrong) == 1 else title + ":" + "".join(f"\n  - {line}" for line in wrong)
