"""The description of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from memscope.targets.llama2.config import Config
from memscope.targets.training.job import TrainingJob
from memscope.targets.training.recipe import Recipe

__all__ = ["FinetuneRecipe", "Job"]


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """The settings of a fine-tuning run besides model and data."""

    format: Literal["huggingface", "meta"] = "huggingface"
    """Format of the weights saved at the end: huggingface or meta; LoRA updates are saved in PEFT's format."""


@dataclass(frozen=True)
class Job(TrainingJob):
    """All settings of a fine-tuning run."""

    TARGET: ClassVar[str] = "llama2"
    CONFIG: ClassVar[type] = Config
    RECIPE: ClassVar[type[Recipe]] = FinetuneRecipe
