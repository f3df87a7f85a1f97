"""A PEFT adapter as a recipe: its `adapter_config.json`, which names the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memscope.errors import UsageError
from memscope.targets.hf.program import HfRecipe

__all__ = ["parse", "read"]

_DONE = {"inference_mode": False}
"""What `save_pretrained` writes of an adapter that is to be trained here: PeftConfig sets inference_mode."""


def read(values: Mapping[str, Any], place: str) -> HfRecipe:
    """The recipe of an `adapter_config.json`: the adapter, and the model it was trained on.

    Raises:
        UsageError: the file is no adapter's.
    """
    if not isinstance(values.get("peft_type"), str):
        raise UsageError(f'{place}: expected an adapter_config.json, which has a "peft_type"')
    base = values.get("base_model_name_or_path")
    return HfRecipe({"adapter": {**values, **_DONE}} | ({"model": base} if base else {}))


def parse(text: str) -> dict[str, Any]:
    """The adapter of a text METHOD:KEY=VALUE,KEY=VALUE; the keys are those of PEFT's configuration of that method.

    A list is joined by `+`. Numbers, true, false and null are read as such.

    Raises:
        UsageError: a word is not KEY=VALUE.
    """
    method, _, rest = text.partition(":")
    values: dict[str, Any] = {"peft_type": method.upper()}
    for word in filter(None, rest.split(",")):
        key, equal, value = word.partition("=")
        if not equal or not key:
            raise UsageError(
                f'hf: adapter="{text}": "{word}" is not KEY=VALUE; expected a folder with adapter_config.json, or '
                "METHOD:KEY=VALUE,... such as lora:r=16,target_modules=q_proj+v_proj"
            )
        values[key] = plain(value) if "+" not in value else [plain(item) for item in value.split("+")]
    return values


def plain(text: str) -> Any:
    """A text as a number, a truth value, None, or itself."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
