"""Images for a model, and text with images in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from memscope.errors import UsageError, nearest

__all__ = ["image_text_sample", "pixels"]

_ANY_SIZE = 448
"""Side of an image, where a model takes any size: a multiple of Qwen's 28 pixels, as in its documentation."""

_FIXED = ("llava", "gemma3", "paligemma", "aya_vision", "got_ocr2", "internvl")
_IN_PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def pixels(config: Any, size: int | None) -> Tensor:
    """Pixels `[1, channels, height, width]` of the size in the configuration, or of the given one."""
    side = size or getattr(config, "image_size", None) or 224
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width)


def image_text_sample(
    config: Any, length: int, size: int | None, ids_of: Callable[[int], Tensor], accepted: Collection[str]
) -> Mapping[str, Tensor]:
    """One image, then text, together `length` tokens.

    Args:
        config: the configuration of the model.
        length: tokens of the sample.
        size: height and width of the image in pixels; None: as in the configuration.
        ids_of: makes the ids of so many tokens of text, `[1, length]`.
        accepted: names of the arguments that the model takes.

    Raises:
        UsageError: how this model's text refers to images is not known, or the image alone is longer than `length`.
    """
    kind = config.model_type
    if kind in _FIXED:
        vision = config.vision_config
        sample = {"pixel_values": pixels(vision, size)}
        tokens = _tokens_of_image(config, vision, sample["pixel_values"].shape[-1])
    elif kind in _IN_PATCHES:
        sample, tokens = _patches(config.vision_config, size or _ANY_SIZE)
    else:
        raise UsageError(
            f"hf: how text refers to images in a {kind} model is not known. {nearest(kind, [*_FIXED, *_IN_PATCHES])}; "
            "for others write a target (docs/profile-your-own-model.md)"
        )
    if tokens + 2 > length:
        raise UsageError(f"hf: seq_len={length}: an image alone takes {tokens} tokens: choose at least {tokens + 2}")
    ids = ids_of(length)
    ids[0, 1 : 1 + tokens] = _image_token(config)
    types = torch.zeros_like(ids)
    types[0, 1 : 1 + tokens] = 1
    sample |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if kind in ("gemma3", "paligemma"):
        sample["token_type_ids"] = types
    elif "mm_token_type_ids" in accepted:
        sample["mm_token_type_ids"] = types
    return sample


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise UsageError(f"hf: the configuration of the {config.model_type} model names no image_token_id")


def _tokens_of_image(config: Any, vision: Any, side: int) -> int:
    for name in ("mm_tokens_per_image", "image_seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and side == vision.image_size:
            return value
    return int((side // vision.patch_size) ** 2)


def _patches(vision: Any, side: int) -> tuple[dict[str, Tensor], int]:
    """An image as Qwen-VL takes it: rows of patches, and their grid (`[1, 3]`: frames, height, width)."""
    merge, patch = vision.spatial_merge_size, vision.patch_size
    if side % (merge * patch):
        raise UsageError(f"hf: image_size={side}: expected a multiple of {merge * patch}")
    grid = side // patch
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    width = channels * vision.temporal_patch_size * patch * patch
    return (
        {"pixel_values": torch.zeros(grid * grid, width), "image_grid_thw": torch.tensor([[1, grid, grid]])},
        (grid // merge) ** 2,
    )
