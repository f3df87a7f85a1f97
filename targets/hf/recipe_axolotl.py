"""An axolotl YAML as a recipe. Schema: axolotl 0.18.0 (src/axolotl/utils/schemas)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memscope.errors import UsageError, excerpt, nearest
from memscope.targets.hf.axolotl_keys import HANDLED, NOTED, REFUSED, WITHOUT_EFFECT
from memscope.targets.hf.program import HfRecipe

__all__ = ["read"]

_Values = Mapping[str, Any]

_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}
"""`LEGACY_ATTN_FLAG_TO_IMPL` in enums.py."""
_JOINS_SAMPLES = ("flash_attention_2", "flash_attention_3")
"""Attention with which axolotl packs a micro-batch into one row (core/builders/causal.py: `multipack_real_batches`)."""
_EXCLUSIVE = (("load_in_4bit", "load_in_8bit"), ("bf16", "fp16"), ("bfloat16", "float16"))


def read(values: _Values, place: str) -> HfRecipe:
    """The recipe of an axolotl YAML.

    Raises:
        UsageError: keys contradict each other, or one cannot be simulated; the message names it.
    """
    if not isinstance(values.get("base_model"), str):
        raise UsageError(f'{place}: expected an axolotl recipe, which has a "base_model"; found {_listed(values)}')
    _refuse(values, place)
    attention = _attention(values, place)
    base = values.get("base_model_config") or values["base_model"]
    checkpointing = bool(values.get("gradient_checkpointing"))
    settings: dict[str, Any] = {
        "model": base,
        "seq_len": _count(values, "sequence_len", place, 512),
        "micro_batch": _count(values, "micro_batch_size", place, 1),
        "accumulation": _count(values, "gradient_accumulation_steps", place, 1),
        "attention": attention,
        "packing": bool(values.get("sample_packing")) and attention in _JOINS_SAMPLES
        and not values.get("multipack_real_batches"),
        "gradient_checkpointing": checkpointing,
        "reentrant": _reentrant(values) if checkpointing else None,
        "optimizer": str(values.get("optimizer") or "adamw_torch_fused").lower(),
        "clip_grad_norm": _norm(values, place),
        "trust_remote_code": bool(values.get("trust_remote_code")),
        "trained": _trained(values.get("unfrozen_parameters")),
        "overrides": values.get("overrides_of_model_config"),
        "empty_cache_every": values.get("torch_empty_cache_steps") or values.get("gc_steps"),
        "keep_batch": True,
        **_precision(values, attention),
        **_quantization(values),
        **_adapter(values, place),
    }  # fmt: skip
    return HfRecipe({key: value for key, value in settings.items() if value is not None}, tuple(_notes(values, place)))


def _refuse(values: _Values, place: str) -> None:
    for first, second in _EXCLUSIVE:
        if values.get(first) and values.get(second) and "auto" not in (values[first], values[second]):
            raise UsageError(f"{place}: {first} and {second} are both {excerpt(values[first])}: choose one")
    adapter, four, eight = (values.get(key) for key in ("adapter", "load_in_4bit", "load_in_8bit"))
    if adapter == "qlora" and not four:
        raise UsageError(f"{place}: adapter: qlora needs load_in_4bit: true")
    if four and adapter != "qlora":
        raise UsageError(f"{place}: load_in_4bit: true needs adapter: qlora")
    if eight and adapter != "lora":
        raise UsageError(f"{place}: load_in_8bit: true needs adapter: lora")
    for key, why in REFUSED.items():
        value = values.get(key)
        if value and (value is True or value != 1):
            raise UsageError(f"{place}: {key}: {excerpt(value)} is not supported: {why}")


def _attention(values: _Values, place: str) -> str | None:
    chosen = {implementation for flag, implementation in _FLAGS.items() if values.get(flag) is True}
    if values.get("attn_implementation"):
        chosen.add(values["attn_implementation"])
    if len(chosen) > 1:
        raise UsageError(f"{place}: attention is given more than once: {' and '.join(sorted(chosen))}: choose one")
    return chosen.pop() if chosen else None


def _precision(values: _Values, attention: str | None) -> dict[str, Any]:
    """Dtype of the weights and mixed precision (`resolve_dtype` in utils/config/__init__.py).

    Without an adapter, and with an attention that takes float32, norms, embedding and head are float32
    (`_configure_embedding_dtypes` in loaders/model.py).
    """
    mixed = values.get("bf16", "auto")
    mixed = not values.get("fp16") if mixed == "auto" else mixed
    dtype = "fp32"
    if mixed or values.get("bfloat16"):
        dtype = "bf16"
    elif values.get("fp16") or values.get("float16"):
        dtype = "fp16"
    keeps = not values.get("adapter") and attention in (None, "eager", "sdpa") and dtype != "fp32"
    return {
        "dtype": dtype,
        "autocast": "bf16" if mixed else "fp16" if values.get("fp16") else "off",
        "fp32_modules": ("norm", "embed_tokens", "lm_head") if keeps else None,
    }


def _quantization(values: _Values) -> dict[str, Any]:
    """Keys of `BitsAndBytesConfig` (`_set_quantization_config` in loaders/model.py).

    axolotl converts norms, embedding and head to float32 (`prepare_model_for_kbit_training`), and back
    (`_configure_embedding_dtypes`).
    """
    if values.get("load_in_8bit"):
        return {"quantization": {"load_in_8bit": True}, "kbit_training": False}
    if not values.get("load_in_4bit"):
        return {}
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[_precision(values, None)["dtype"]]
    config = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        **(values.get("bnb_config_kwargs") or {}),
    }
    return {"quantization": config, "kbit_training": False}


def _reentrant(values: _Values) -> bool:
    """`normalize_config` in utils/config/__init__.py."""
    options = values.get("gradient_checkpointing_kwargs")
    if isinstance(options, Mapping):
        return bool(options.get("use_reentrant", False))
    return not values.get("unfrozen_parameters")


def _adapter(values: _Values, place: str) -> dict[str, Any]:
    """PEFT's configuration (`_build_peft_lora_config` in loaders/adapter.py)."""
    kind = values.get("adapter")
    if not kind:
        return {}
    if kind not in ("lora", "qlora"):
        raise UsageError(
            f"{place}: adapter: {excerpt(kind)}: expected lora or qlora. {nearest(str(kind), ['lora', 'qlora'])}"
        )
    if not values.get("lora_r") and not values.get("lora_model_dir"):
        raise UsageError(f"{place}: adapter: lora needs lora_r, the rank")
    targets = values.get("lora_target_modules")
    named = {
        "target_modules": "all-linear" if values.get("lora_target_linear") else targets,
        "target_parameters": values.get("lora_target_parameters"),
        "modules_to_save": values.get("lora_modules_to_save"),
        "layers_to_transform": values.get("peft_layers_to_transform"),
        "layers_pattern": values.get("peft_layers_pattern"),
        "use_dora": values.get("peft_use_dora"),
        "use_rslora": values.get("peft_use_rslora"),
        "rank_pattern": values.get("lora_rank_pattern"),
        "alpha_pattern": values.get("lora_alpha_pattern"),
        "layer_replication": values.get("peft_layer_replication"),
        "trainable_token_indices": values.get("peft_trainable_token_indices"),
        "fan_in_fan_out": values.get("lora_fan_in_fan_out"),
    }
    adapter = {
        "peft_type": "LORA",
        "r": values.get("lora_r"),
        "lora_alpha": values.get("lora_alpha") or values.get("lora_r"),
        "lora_dropout": values.get("lora_dropout") or 0.0,
        **{key: value for key, value in named.items() if value},
    }
    if not (adapter.get("target_modules") or adapter.get("target_parameters")):
        raise UsageError(f"{place}: adapter: lora needs lora_target_modules or lora_target_linear: true")
    kept = values.get("peft_autocast_adapter_dtype") is False
    return {"adapter": adapter} | ({"adapter_dtype": _precision(values, None)["dtype"]} if kept else {})


def _trained(patterns: Any) -> str | None:
    """One regular expression of several; ranges such as `[:32000]` zero gradients and freeze nothing."""
    if not patterns:
        return None
    return "|".join(f"(?:^{str(pattern).split('[:')[0].removeprefix('^')})" for pattern in patterns)


def _notes(values: _Values, place: str) -> Iterator[str]:
    for key, text in NOTED.items():
        if values.get(key):
            yield f"{place}: {key} was ignored: {text}"
    if values.get("sample_packing") and _attention(values, place) not in _JOINS_SAMPLES:
        yield f"{place}: sample_packing was simulated as full rows that attend within themselves, without a block mask"
    kernels = [f"lora_{part}_kernel" for part in ("mlp", "qkv", "o")]
    if (
        values.get("adapter")
        and not values.get("lora_dropout")
        and any(values.get(key) is not False for key in kernels)
    ):
        yield f"{place}: axolotl's LoRA kernels, which keep fewer activations, were not simulated"
    for plugin in values.get("plugins") or ():
        yield f"{place}: the plugin {str(plugin).rpartition('.')[2]} was ignored: its kernels run on a GPU only"
    unknown = sorted(key for key in values if key not in {*HANDLED, *NOTED, *REFUSED, *WITHOUT_EFFECT})
    unknown = [key for key in unknown if not key.startswith(("liger_", "cut_cross_entropy"))]
    if unknown:
        near = nearest(unknown[0], HANDLED).partition(" Valid")[0]
        hint = f" ({unknown[0]}: {near})" if near.startswith("did you") else ""
        yield f"{place}: not keys of axolotl 0.18.0, ignored: {', '.join(unknown)}{hint}"


def _count(values: _Values, key: str, place: str, default: int) -> int:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{place}: {key}: {excerpt(value)}: expected a whole number from 1")
    return value


def _norm(values: _Values, place: str) -> float:
    value = values.get("max_grad_norm")
    if value is None:
        return 1.0  # the default of TrainingArguments
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UsageError(f"{place}: max_grad_norm: {excerpt(value)}: expected a number from 0")
    return float(value)


def _listed(values: _Values) -> str:
    return ", ".join([*values][:5]) or "nothing"
