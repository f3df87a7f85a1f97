"""Build the model of a configuration as transformers does, without its weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memscope.errors import UsageError, excerpt, nearest
from memscope.targets.hf.libraries import needed
from memscope.targets.hf.program import Program
from memscope.targets.hf.quantization import quantized, read_quantization
from memscope.targets.hf.sources import ModelSource

__all__ = ["DTYPES", "build_model", "read_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_config(source: ModelSource, program: Program) -> Any:
    """The configuration as transformers' class, with the overrides and the resized vocabulary.

    Raises:
        UsageError: its type is unknown to the installed transformers, it needs code that is not trusted, it is
            quantized, or an override names nothing in it.
    """
    transformers = needed("transformers")
    values = {**source.values}
    stored = values.pop("quantization_config", None)
    if stored:
        read_quantization(stored, source.place)
        if program.quantization is not None:
            raise UsageError(
                f"{source.place}: the weights are quantized already (quantization_config), and quantization is given "
                "too: leave it out, or give the model that was quantized"
            )
    kind = values.get("model_type", "")
    known = transformers.CONFIG_MAPPING
    if kind in known:
        config = known[kind].from_dict(values)
    else:
        _require_trust(source, kind, known, program)
        config = transformers.AutoConfig.from_pretrained(source.code, trust_remote_code=True)
    _override(config, program.overrides, source)
    if program.vocab_size is not None:
        config.get_text_config().vocab_size = program.vocab_size
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        if hasattr(part, "use_cache"):
            part.use_cache = program.use_cache
    return config


def _require_trust(source: ModelSource, kind: str, known: Mapping[str, Any], program: Program) -> None:
    if not source.values.get("auto_map") or source.code is None:
        version = needed("transformers").__version__
        raise UsageError(
            f'{source.place}: the model_type is "{kind}", which transformers {version} does not know. '
            f"{nearest(kind, known) if len(nearest(kind, known)) < 200 else _nearest_only(kind, known)}"
        )
    if not program.trust_remote_code:
        raise UsageError(
            f'{source.place}: the model_type "{kind}" is not part of transformers: its Python code comes with the '
            "model (auto_map), and memscope does not run it unasked. Read that code, then add --trust-remote-code"
        )


def _nearest_only(kind: str, known: Mapping[str, Any]) -> str:
    hint = nearest(kind, known).partition(" Valid:")[0]
    return hint if hint.startswith("did you") else "A newer transformers may know it"


def _override(config: Any, overrides: Mapping[str, Any], source: ModelSource) -> None:
    for key, value in overrides.items():
        holder = config if hasattr(config, key) else config.get_text_config()
        if not hasattr(holder, key):
            raise UsageError(
                f'{source.place}: overrides: "{key}" is not in the configuration: {_nearest_key(key, config)}'
            )
        setattr(holder, key, value)


def _nearest_key(key: str, config: Any) -> str:
    return nearest(key, [name for name in config.to_dict() if not name.startswith("_")])


def build_model(made: Any, config: Any, program: Program, source: ModelSource) -> nn.Module:
    """The model for training, in its dtype, with its attention and gradient checkpointing.

    Args:
        made: its class, or an Auto class of transformers.
        config: its configuration; unchanged.
        program: how it is trained.
        source: where the configuration is from, for messages.

    Raises:
        UsageError: transformers cannot build it with these settings; the message is that of transformers.
    """
    config = copy.deepcopy(config)
    dtype = _dtype(config, program)
    options: dict[str, Any] = {"attn_implementation": program.attention} if program.attention else {}
    options["dtype" if hasattr(config, "dtype") else "torch_dtype"] = dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(made, "_from_config"):
                model: Any = made._from_config(config, **options)
            else:  # an Auto class, for code that comes with the model
                model = made.from_config(config, trust_remote_code=program.trust_remote_code, **options)
            _keep_in_fp32(model, dtype, program)
            quantization = program.quantization or source.values.get("quantization_config")
            if quantization:
                quantized(model, quantization, source.place)
            if program.gradient_checkpointing:
                _checkpoint(model, program)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{source.place}: transformers cannot build the model: {_first_sentence(error)}") from error
    if program.trained is not None:
        _freeze(model, program.trained)
    return model  # type: ignore[no-any-return]


def _dtype(config: Any, program: Program) -> torch.dtype:
    if program.dtype != "auto":
        return DTYPES[program.dtype]
    key = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # its name before transformers 4.56
    named = getattr(config, key, None) or getattr(config.get_text_config(), key, None)
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _keep_in_fp32(model: nn.Module, dtype: torch.dtype, program: Program) -> None:
    """Keep some weights in float32: those that `from_pretrained` keeps, and the program's own.

    Source: `_get_dtype_plan` in transformers/modeling_utils.py (5.23): `_keep_in_fp32_modules` for float16 alone.
    """
    if dtype == torch.float32:
        return
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(rf"(^|\.){name}($|\.)") for name in kept]
    for name, parameter in model.named_parameters():
        if any(pattern.search(name) for pattern in patterns) or any(part in name for part in program.fp32_modules):
            parameter.data = parameter.data.float()


def _checkpoint(model: Any, program: Program) -> None:
    options = None if program.reentrant is None else {"use_reentrant": program.reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(options)
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if program.reentrant is not False:
        model.enable_input_require_grads()  # as PEFT does: reentrant checkpoints need an input with a gradient


def _freeze(model: nn.Module, trained: str) -> None:
    try:
        pattern = re.compile(trained)
    except re.error as error:
        raise UsageError(f"hf: trained={excerpt(trained)}: not a regular expression ({error})") from error
    chosen = {name for name, _ in model.named_parameters() if pattern.search(name)}
    if not chosen:
        names = [name for name, _ in model.named_parameters()]
        raise UsageError(f"hf: trained={excerpt(trained)} matches no parameter; the first are {', '.join(names[:3])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
