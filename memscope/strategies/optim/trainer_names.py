"""The optimizers by their names in `TrainingArguments.optim` of transformers, which axolotl uses too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["TRAINER_NAMES", "trainer_name"]

TRAINER_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adamw_torch": ("adamw", {}),
    "adamw_torch_fused": ("adamw", {"fused": True}),
    "adafactor": ("adafactor", {}),
    "adagrad": ("adagrad", {}),
    "adamw_bnb_8bit": ("adamw-8bit", {"embeddings": 32}),
    "adamw_8bit": ("adamw-8bit", {"embeddings": 32}),
    "adamw_torch_4bit": ("adamw-4bit", {"block": 256}),
    "adamw_torch_8bit": ("torchao-adamw-8bit", {}),
    "lion_32bit": ("lion", {}),
    "lion_8bit": ("lion-8bit", {"embeddings": 32}),
    "paged_adamw_32bit": ("paged-adamw", {}),
    "paged_adamw_8bit": ("paged-adamw-8bit", {"embeddings": 32}),
    "paged_lion_32bit": ("paged-lion", {}),
    "paged_lion_8bit": ("paged-lion-8bit", {"embeddings": 32}),
    "rmsprop": ("rmsprop", {}),
    "schedule_free_adamw": ("schedulefree-adamw", {}),
    "sgd": ("sgd", {}),
}
"""Name → optimizer of `KINDS`, and its settings that differ from the optimizer's own.

Sources: `OptimizerNames` in training_args.py, the functions of trainer_optimizer.py, and `create_optimizer` in
trainer.py, which keeps the state of embeddings in 32 bits beside an 8-bit optimizer of bitsandbytes (5.23)."""


def trainer_name(name: str | None, *, fused: bool) -> str | None:
    """The Trainer's name of an optimizer, its own AdamW if it has no name; None: the Trainer has none."""
    for found, (kind, settings) in TRAINER_NAMES.items():
        if kind == (name or "adamw") and ("fused" in settings) is fused:
            return found
    return None
