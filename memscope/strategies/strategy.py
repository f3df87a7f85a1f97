"""The interface of a strategy: one way to change a training step, provided by a plugin."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from memscope.strategies.names import installed_names
from memscope.workload.settings import plan_words

if TYPE_CHECKING:
    from memscope.workload.description import Workload

__all__ = ["Problem", "Stage", "Strategy"]


class Stage(enum.IntEnum):
    """The order in which strategies are applied; within a stage, by name."""

    LOAD = 0
    """Changes how weights are stored: dtype, quantization."""
    ADAPT = 1
    """Changes which parameters are trained."""
    WRAP = 2
    """Wraps modules: checkpointing, offload."""
    SHARD = 3
    """Spreads the model over devices."""
    OPTIM = 4
    """Changes the optimizer."""
    STEP = 5
    """Changes how a step runs."""


@dataclass(frozen=True)
class Problem:
    """Why a strategy cannot be applied, and what to do instead."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


class Strategy(Protocol):
    """One way to change a training step.

    Subclass it, set `name`, `stage`, `exact` and `Config`, and write `apply`. The class docstring is its help text.

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
    """True: losses, gradients and buffers are unchanged, up to rounding; `memscope.testing.check_strategy` tests it.
    This is the default of `is_exact`, which every decision asks."""
    changes: ClassVar[str] = ""
    """What a strategy changes that is not exact, or not for every workload, in a few words, such as "what is trained".
    Where it is not exact, `memscope advise` uses it only if `--allow` names it."""
    takes_more: ClassVar[str] = ""
    """What the strategy takes that no budget of device memory counts, such as "memory of the host". Where that is
    something, `memscope advise` uses it only if `--allow` names it, exact or not."""
    trains: ClassVar[str] = ""
    """What of training the strategy changes, such as "gradients": a workload for inference, which has none, refuses it.
    Empty: the strategy makes sense without training too."""
    Config: ClassVar[type]
    """Frozen dataclass of the settings, all with defaults; the docstring under each field is its help text."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Features that another strategy of the plan must provide."""
    provides: frozenset[str] = frozenset()
    """Features that the strategy provides; an instance may add features that its settings provide."""
    conflicts: frozenset[str] = frozenset()
    """Strategies and features that cannot be combined with this one; an instance may add those of its settings."""
    textbook: ClassVar[Mapping[str, str]] = {}
    """Textbook effect: rows of Table 1 to ↑, ↓ or –. Used only to point out where a run differs."""
    config: Any
    chosen: Mapping[str, str] = {}
    """Settings that `apply` chose for the workload, in plan syntax, such as the layers of `lora:targets=auto`."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Any]:
        """The settings that `memscope advise` tries, for a workload that no strategy has changed yet.

        The caller leaves out candidates that `check` rejects. For a strategy that is not `exact`, the advisor prefers
        the first candidate unless another one saves enough. Default: only the default settings.
        """
        return [cls.Config()]

    @classmethod
    def left_out(cls, workload: Workload) -> Sequence[Any]:
        """Further settings, which take too long to simulate; `memscope advise` names them as not tried.

        Default: none.
        """
        return []

    def check(self, workload: Workload) -> list[Problem]:
        """All problems that prevent applying the strategy to a workload; empty if there is none."""
        return []

    def is_exact(self, workload: Workload) -> bool:
        """Whether a workload that is not changed yet keeps its losses, gradients and buffers, up to rounding.

        Default: `exact`. Override it if that depends on the model.
        """
        return self.exact

    def baseline(self, workload: Workload) -> None:
        """Change the workload that runs without this strategy to make the comparison fair. Default: no change.

        Reports show the docstring of an overriding method as the description of the baseline.
        """
        return None  # without a body, type checkers would treat this method as abstract

    def apply(self, workload: Workload) -> None:
        """Change the workload. Called only if `check` found no problem; changing nothing is an error."""
        ...

    @property
    def spec(self) -> str:
        """The strategy and its settings in plan syntax; settings at their defaults are left out."""
        words = plan_words(self.config, installed_names())
        return f"{self.name}:{','.join(words)}" if words else self.name
