"""The settings of a program of `hf:`, and what a plan changes in them, as the keys of an axolotl YAML.

`targets/hf/recipe_axolotl.py` reads these keys back. Source: axolotl 0.18.0, `resolve_dtype` and `normalize_config` in
src/axolotl/utils/config/__init__.py, `_configure_embedding_dtypes` in loaders/model.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from memscope.strategies import Strategy

__all__ = ["axolotl_lines"]

_ATTENTION = {
    "flash_attention_2": "flash_attention: true",
    "sdpa": "sdp_attention: true",
    "eager": "eager_attention: true",
    "flex_attention": "flex_attention: true",
}
_PRECISION = {
    ("bf16", "bf16"): ("bf16: true",),
    ("fp16", "fp16"): ("bf16: false", "fp16: true"),
    ("bf16", "off"): ("bf16: false", "bfloat16: true"),
    ("fp16", "off"): ("bf16: false", "float16: true"),
    ("fp32", "off"): ("bf16: false",),
}
"""Dtype of the weights and of autocast → keys. `bf16: true` means both: axolotl then loads the weights in bfloat16."""
_IN_FLOAT32 = ("norm", "embed_tokens", "lm_head")
"""Modules that axolotl keeps in float32 if all weights are trained, with an attention that takes float32."""


def axolotl_lines(
    settings: Mapping[str, Any], strategies: Mapping[str, Strategy], optimizer: str | None
) -> Iterator[str]:
    """The lines of the model, the batch, the precision and the optimizer; a comment for what axolotl cannot express.

    Args:
        settings: those of a program of `hf:`, which give a whole recipe; of another target, the lines are what the plan
            changes.
        strategies: those of the plan, by name.
        optimizer: the optimizer of the plan, as transformers' Trainer calls it; None: that of the program.
    """
    is_program = {"model", "micro_batch", "accumulation", "packing", "dtype", "autocast"} <= settings.keys()
    steps = strategies["ga"].config.steps if "ga" in strategies else None
    if is_program:
        yield from _program(settings, steps)
    elif steps is not None:
        yield f"gradient_accumulation_steps: {steps}"
    yield from _precision(settings if is_program else {}, strategies)
    if optimizer:
        yield f"optimizer: {optimizer}"
    elif is_program:
        yield f"optimizer: {settings['optimizer']}"


def _program(settings: Mapping[str, Any], steps: int | None) -> Iterator[str]:
    samples = settings["micro_batch"] * settings["accumulation"]
    steps = steps or settings["accumulation"]
    yield f"base_model: {json.dumps(settings['model'])}"
    if settings.get("seq_len") is not None:
        yield f"sequence_len: {settings['seq_len']}"
    yield from (f"micro_batch_size: {samples // steps}", f"gradient_accumulation_steps: {steps}")
    attention = settings.get("attention")
    if attention in _ATTENTION:
        yield _ATTENTION[attention]
    elif attention is not None:
        yield f"attn_implementation: {attention}"
    if settings["packing"]:
        yield "sample_packing: true"
    yield f"max_grad_norm: {settings.get('clip_grad_norm', 0.0):g}"
    if settings.get("overrides"):
        yield f"overrides_of_model_config: {json.dumps(settings['overrides'])}"
    if settings.get("trust_remote_code"):
        yield "trust_remote_code: true"
    if settings.get("gradient_checkpointing"):
        yield "gradient_checkpointing: true"
        yield f"gradient_checkpointing_kwargs: {{use_reentrant: {json.dumps(settings.get('reentrant') is not False)}}}"
    for key in ("adapter", "trained", "padding", "vocab_size"):
        if settings.get(key):
            yield f"# not written here: {key} of the target, which the recipe needs too"


def _precision(settings: Mapping[str, Any], strategies: Mapping[str, Strategy]) -> Iterator[str]:
    dtype = "bf16" if "bf16" in strategies else settings.get("dtype", "auto")
    autocast = strategies["amp"].config.dtype if "amp" in strategies else settings.get("autocast", "off")
    if dtype == "auto" and autocast == "off":
        if settings:
            yield "# not expressible: weights in the dtype of the model (dtype=auto): choose bf16 or fp32"
        return
    lines = _PRECISION.get((dtype, autocast))
    if lines is None:
        known = "weights of another dtype" if dtype == "auto" else f"{dtype} weights"
        yield f"# not expressible: {known} with autocast in {autocast}: axolotl loads the weights in that dtype too"
        return
    yield from lines
    keeps = "lora" not in strategies and settings.get("attention") in (None, "eager", "sdpa") and dtype != "fp32"
    if settings and keeps and tuple(settings.get("fp32_modules", ())) != _IN_FLOAT32:
        yield "# not expressible: axolotl keeps norms, embedding and head in float32 with this attention"
