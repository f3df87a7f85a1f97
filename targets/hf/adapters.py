"""Put a PEFT adapter on the model, with PEFT itself."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memscope.errors import UsageError, nearest
from memscope.targets.hf import recipe_peft
from memscope.targets.hf.files import read_json
from memscope.targets.hf.libraries import needed
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
    peft = needed("peft")
    methods: Mapping[str, type] = needed("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    method = str(adapter["peft_type"]).upper()
    if method not in methods:
        names = [getattr(one, "value", one) for one in methods]
        raise UsageError(f'hf: adapter: PEFT has no method "{method}": {nearest(method, names)}')
    kind = methods[method]
    taken = inspect.signature(kind).parameters
    unknown = [key for key in adapter if key not in taken and key not in ("auto_mapping", "peft_version")]
    if unknown:
        raise UsageError(
            f'hf: adapter: {method} of the installed PEFT has no "{unknown[0]}": {nearest(unknown[0], taken)}'
        )
    values = {key: value for key, value in adapter.items() if key in taken and key not in ("peft_type", "auto_mapping")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = kind(**values)
            result: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype in (None, "fp32"))
    except (ValueError, TypeError) as error:
        raise UsageError(f"hf: adapter: PEFT rejects it: {' '.join(str(error).split())[:300]}") from error
    if dtype is not None:
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[dtype])
    return result
