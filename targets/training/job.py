"""The description of a training run: model, data, recipe, strategies and device, as one value and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from memscope.strategies import Plan
from memscope.targets.training.device import require_known_device
from memscope.targets.training.recipe import Recipe
from memscope.workload.settings import fill, format_value

__all__ = ["TrainedConfig", "TrainingJob"]


class TrainedConfig(Protocol):
    """What every target's settings have that can be trained."""

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch."""

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""

    @property
    def seed(self) -> int:
        """Seed of random weights, of the order of samples and of dropout."""


@dataclass(frozen=True)
class TrainingJob:
    """All settings of a run: those that decide its losses, and those that decide what it keeps.

    A target names its settings and its recipe in a class of its own.
    """

    TARGET: ClassVar[str]
    """Name of the target."""
    CONFIG: ClassVar[type]
    """The target's settings, a dataclass."""
    RECIPE: ClassVar[type[Recipe]]
    """The settings of its runs."""

    config: Any
    """A `TrainedConfig`, of the type `CONFIG`."""
    recipe: Any
    """Of the type `RECIPE`."""
    plan: str
    """Strategies, in the syntax of `Plan`."""
    device: str
    """cpu or cuda."""

    def __post_init__(self) -> None:
        require_known_device(self.device)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step."""
        config: TrainedConfig = self.config
        return config.micro_batch * config.accumulation

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text; `of` reads them back."""
        parts = ((self.config, self.CONFIG), (self.recipe, self.RECIPE))
        values = {field.name: getattr(part, field.name) for part, kind in parts for field in dataclasses.fields(kind)}
        return {name: format_value(value) for name, value in values.items()} | {
            "strategies": self.plan,
            "device": self.device,
        }

    @classmethod
    def of(cls, settings: Mapping[str, str], base: Any = None) -> Self:
        """Build a job from settings as text; others come from `base`, settings of the target, and the defaults.

        Raises:
            UsageError: a setting is unknown or has an invalid value.
        """
        words = dict(settings)
        plan, device = words.pop("strategies", ""), words.pop("device", "cpu")
        of_recipe = {field.name for field in dataclasses.fields(cls.RECIPE)}
        recipe = fill(cls.RECIPE(), {key: words.pop(key) for key in settings if key in of_recipe}, of="training")
        config = fill(base or cls.CONFIG(), words, of=f'target "{cls.TARGET}"')
        return cls(config, recipe, str(Plan.parse(plan)), device)

    def differences(self, other: TrainingJob) -> tuple[list[str], list[str]]:
        """Differences from another job: those that a resumed run must not have, and those that it may have.

        A resumed run may change its recipe and its learning rate: weights, data and optimizer state stay valid. Which
        samples are held out decides which are trained on.
        """
        free = {field.name for field in dataclasses.fields(self.RECIPE)} - {"held_out"} | {"lr"}
        mine, others = self.settings, other.settings
        told = {
            name: f"{name}: {mine[name] or 'none'} in the run, {others[name] or 'none'} given"
            for name in mine
            if mine[name] != others[name]
        }
        return [told[name] for name in told if name not in free], [told[name] for name in told if name in free]
