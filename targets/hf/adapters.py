"""Put a PEFT adapter on the model, with PEFT itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memscope.errors import UsageError, nearest
from memscope.strategies.peft.library import adapted_model, config_class
from memscope.targets.hf import recipe_peft
from memscope.targets.hf.files import read_json
from memscope.targets.hf.model import DTYPES
from memscope.targets.hf.sources import ADAPTER

__all__ = ["adapted", "read_adapter"]


def read_adapter(text: str) -> Mapping[str, Any]:
    """The configuration of an adapter: of a folder, a file, or METHOD:KEY=VALUE,... .

    Raises:
        UsageError: it is none of these.
    """
    path = Path(text).expanduser()
    if path.exists():
        file = path / ADAPTER if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"hf: adapter={text}: the folder has no {ADAPTER}, so it is not a PEFT adapter")
        adapter: Mapping[str, Any] = recipe_peft.read(read_json(file), str(file)).settings["adapter"]
        return adapter
    return recipe_peft.parse(text)


def adapted(model: nn.Module, adapter: Mapping[str, Any], dtype: str | None) -> nn.Module:
    """The model with the adapter, whose weights alone are trained.

    Args:
        model: the base model.
        adapter: the content of an adapter_config.json.
        dtype: dtype of the adapter's weights; None: PEFT's default, float32 for weights of 16 bits.

    Raises:
        UsageError: PEFT does not know the method, or rejects its configuration for this model.
    """
    try:
        kind = config_class(str(adapter["peft_type"]))
        result = adapted_model(model, _config(kind, adapter), float32=dtype in (None, "fp32"))
    except UsageError as error:
        raise UsageError(f"hf: adapter: {error}") from error
    if dtype is not None:
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[dtype])
    return result


def _config(kind: Any, adapter: Mapping[str, Any]) -> Any:
    """PEFT's configuration with the values of a file.

    Raises:
        UsageError: the installed PEFT does not know a key, or rejects a value.
    """
    taken = inspect.signature(kind).parameters
    unknown = [key for key in adapter if key not in taken and key not in ("auto_mapping", "peft_version")]
    if unknown:
        raise UsageError(f'{kind.__name__} of the installed PEFT has no "{unknown[0]}": {nearest(unknown[0], taken)}')
    values = {key: value for key, value in adapter.items() if key in taken and key not in ("peft_type", "auto_mapping")}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"PEFT rejects it: {' '.join(str(error).split())[:300]}") from error
