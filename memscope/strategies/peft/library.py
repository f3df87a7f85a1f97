"""PEFT's methods, their settings, and the models that PEFT makes. PEFT is imported when one of these is called."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memscope.errors import UsageError, nearest
from memscope.workload.settings import read_value

__all__ = ["adapted_model", "config_class", "default_targets", "has_peft_modules", "values_of"]

_KEPT_BACK = {
    "target_modules", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip
"""Fields of a configuration that say nothing about memory, and the one that is the setting `targets`."""


def _peft(module: str = "peft") -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise UsageError("PEFT is not installed: pip install peft") from error


def config_class(method: str) -> Any:
    """PEFT's configuration of a method, such as `VeraConfig` for `vera`.

    Raises:
        UsageError: PEFT is not installed, or has no such method.
    """
    methods: Mapping[Any, Any] = _peft("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    kinds = {str(getattr(name, "value", name)).lower(): kind for name, kind in methods.items()}
    if method.lower() not in kinds:
        version = _peft().__version__
        raise UsageError(f'PEFT {version} has no method "{method}": {nearest(method.lower(), kinds)}')
    return kinds[method.lower()]


def values_of(kind: Any, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Settings of a method, read from text as the fields of its configuration say.

    Raises:
        UsageError: a key is no field of the configuration, or a value has the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in _KEPT_BACK]
    values = {}
    for key, text in texts:
        if key == "target_modules":
            raise UsageError('setting "target_modules" is called targets here: write targets=NAME+NAME')
        if key not in fields:
            raise UsageError(f'{kind.__name__} has no setting "{key}": {nearest(key, fields)}')
        values[key] = read_value(text, hints[key], f'setting "{key}"')
    return values


def default_targets(method: str, model_type: str | None) -> bool:
    """Whether PEFT itself knows which modules of a type of transformers models a method changes."""
    tuners: Mapping[Any, Any] = _peft("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING
    # Until 0.18, the tables were not attributes of the tuners.
    name = f"TRANSFORMERS_MODELS_TO_{method.upper().replace('_', '')}_TARGET_MODULES_MAPPING"
    listed = getattr(tuners.get(method.upper()), "target_module_mapping", None)
    return model_type in (listed or getattr(_peft("peft.utils.constants"), name, {}))


def adapted_model(model: nn.Module, config: Any, *, float32: bool = True) -> nn.Module:
    """The model with the adapter of a configuration, as `peft.get_peft_model` makes it.

    Where PEFT replaces modules inside the model and adds nothing around it, this is the model itself, whose modules
    keep their names; otherwise it is PEFT's model, which has another forward.

    Args:
        model: the base model, which PEFT changes.
        config: a configuration of PEFT.
        float32: keep adapters of 16-bit weights in float32, as PEFT does by default.

    Raises:
        UsageError: PEFT rejects the configuration for this model.
    """
    try:
        with warnings.catch_warnings(), _without_compiler(model):
            warnings.simplefilter("ignore")
            outer: nn.Module = _peft().get_peft_model(model, config, autocast_adapter_dtype=float32)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"PEFT rejects it: {' '.join(str(error).split())[:300]}") from error
    tuner: Any = outer.base_model
    is_inside = getattr(tuner, "model", None) is model
    changes_forward = getattr(type(tuner), "forward", None) is not _peft("peft.tuners.tuners_utils").BaseTuner.forward
    return model if is_inside and not changes_forward else outer


def has_peft_modules(model: nn.Module) -> bool:
    """Whether a model has modules of PEFT already."""
    return any(kind.__module__.startswith("peft.") for module in model.modules() for kind in type(module).__mro__)


@contextlib.contextmanager
def _without_compiler(model: nn.Module) -> Iterator[None]:
    """For a simulated model, leave out the CUDA extension that BOFT compiles for each layer; it has a fallback."""
    boft = _peft("peft.tuners.boft.layer")
    if not any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        yield
        return
    compiled, boft.get_fbd_cuda = boft.get_fbd_cuda, lambda: None
    try:
        yield
    finally:
        boft.get_fbd_cuda = compiled
