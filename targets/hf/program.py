"""What `hf:WHAT` trains: the settings of the user, over those of the recipes, over the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memscope.errors import UsageError
from memscope.targets.hf.config import HfConfig

__all__ = ["HfRecipe", "Program", "completed"]


@dataclass(frozen=True)
class HfRecipe:
    """What a recipe says."""

    settings: Mapping[str, Any]
    """Fields of `Program`."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""


@dataclass(frozen=True)
class Program:
    """A training program; the fields are those of `HfConfig`, with the defaults filled in."""

    model: str
    task: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    seq_len: int | None = None
    target_len: int | None = None
    image_size: int | None = None
    micro_batch: int = 1
    accumulation: int = 1
    padding: int = 0
    packing: bool = False
    dtype: str = "auto"
    autocast: str = "off"
    quantization: Mapping[str, Any] | None = None
    kbit_training: bool = True
    fp32_modules: tuple[str, ...] = ()
    attention: str | None = None
    gradient_checkpointing: bool = False
    reentrant: bool | None = None
    use_cache: bool = False
    adapter: Mapping[str, Any] | None = None
    adapter_dtype: str | None = None
    trained: str | None = None
    optimizer: str = "adamw_torch"
    clip_grad_norm: float = 0.0
    keep_batch: bool = False
    keep_outputs: bool = False
    empty_cache_every: int | None = None
    empty_cache_after: str = "loss"
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = (
            "vocab_size",
            "seq_len",
            "target_len",
            "image_size",
            "micro_batch",
            "accumulation",
            "empty_cache_every",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"hf: {name}={value}: expected a whole number from 1")
        if self.padding < 0:
            raise UsageError(f"hf: padding={self.padding}: expected 0 or more")
        if self.padding and self.packing:
            raise UsageError("hf: padding and packing=true exclude each other: packed samples have no padding")
        if not self.clip_grad_norm >= 0:
            raise UsageError(f"hf: clip_grad_norm={self.clip_grad_norm}: expected 0 or more")


def completed(config: HfConfig, recipes: list[HfRecipe], said: Mapping[str, Any]) -> Program:
    """The program: `said`, then what `config` says, then the recipes (the later the stronger), then the defaults.

    Args:
        config: the user's settings.
        recipes: what the recipes say.
        said: fields that are no longer text, such as the adapter.
    """
    names = {one.name for one in dataclasses.fields(Program)}
    chosen: dict[str, Any] = {}
    for recipe in recipes:
        chosen |= recipe.settings
    chosen |= {name: value for name, value in vars(config).items() if value is not None and name in names}
    chosen |= said
    chosen["notes"] = tuple(dict.fromkeys(note for recipe in recipes for note in recipe.notes))
    return Program(**chosen)
