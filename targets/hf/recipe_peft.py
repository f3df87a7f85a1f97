"""A PEFT adapter as a recipe: its `adapter_config.json`, which names the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memscope.errors import UsageError
from memscope.targets.hf.program import HfRecipe

__all__ = ["parse", "plain", "read"]

_DONE = {"inference_mode": False}
"""`save_pretrained` writes true; here the adapter is trained."""
_LISTS = ("target_modules", "modules_to_save", "feedforward_modules", "exclude_modules", "layers_to_transform")


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
        is_list = "+" in value or (key in _LISTS and value != "all-linear")  # a text is a regular expression
        values[key] = [plain(item) for item in value.split("+")] if is_list else plain(value)
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
