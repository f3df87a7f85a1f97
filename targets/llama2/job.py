"""The description of a fine-tuning run: model, data, recipe, strategies and device, as one value and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memscope.strategies import Plan
from memscope.targets.llama2.device import require_known_device
from memscope.targets.llama2.recipe import Recipe
from memscope.targets.llama2.target import Config
from memscope.workload.settings import fill, format_value

__all__ = ["Job"]

# Settings that may change when a run is resumed: its weights, data and optimizer state stay valid.
_FREE = {field.name for field in dataclasses.fields(Recipe)} - {"held_out"} | {"lr"}
_RECIPE = {field.name for field in dataclasses.fields(Recipe)}


@dataclass(frozen=True)
class Job:
    """All settings of a run: those that decide its losses, and those that decide what it keeps."""

    config: Config
    recipe: Recipe
    plan: str
    """Strategies, in the syntax of `Plan`."""
    device: str
    """cpu or cuda."""

    def __post_init__(self) -> None:
        require_known_device(self.device)

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text; `of` reads them back."""
        values: dict[str, Any] = {
            **{field.name: getattr(self.config, field.name) for field in dataclasses.fields(Config)},
            **{field.name: getattr(self.recipe, field.name) for field in dataclasses.fields(Recipe)},
        }
        return {name: format_value(value) for name, value in values.items()} | {
            "strategies": self.plan,
            "device": self.device,
        }

    @classmethod
    def of(cls, settings: Mapping[str, str], base: Config | None = None) -> Job:
        """Build a job from settings as text; missing settings come from `base` and the defaults.

        Raises:
            UsageError: a setting is unknown or has an invalid value.
        """
        words = dict(settings)
        plan, device = words.pop("strategies", ""), words.pop("device", "cpu")
        recipe = fill(Recipe, {key: words.pop(key) for key in settings if key in _RECIPE}, of="fine-tuning")
        return cls(fill(base or Config(), words, of='target "llama2"'), recipe, str(Plan.parse(plan)), device)

    def differences(self, other: Job) -> tuple[list[str], list[str]]:
        """Differences from another job: those that a resumed run must not have, and those that it may have."""
        mine, others = self.settings, other.settings
        told = {
            name: f"{name}: {mine[name] or 'none'} in the run, {others[name] or 'none'} given"
            for name in mine
            if mine[name] != others[name]
        }
        return [told[name] for name in told if name not in _FREE], [told[name] for name in told if name in _FREE]
