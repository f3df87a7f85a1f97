"""What a strategy is: one way to change a training step, as a plugin writes it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from memscope.workload.settings import is_switch, non_defaults

if TYPE_CHECKING:
    from memscope.workload.description import Workload

__all__ = ["Problem", "Stage", "Strategy"]


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
        switch = next((key for key, text in settings.items() if text == "true" and is_switch(self.config, key)), None)
        words = [switch] if switch else []
        words += [f"{key}={value}" for key, value in settings.items() if key != switch]
        return f"{self.name}:{','.join(words)}" if words else self.name
