"""Vision, multimodal and speech models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from architectures.row import ByHand, Hf, Row

__all__ = ["MULTIMODAL", "SPEECH", "VISION"]

_BOTH = ("eager", "sdpa")
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_LLAMA = {"model_type": "llama", **_TEXT, "num_key_value_heads": 2}
_QWEN = {
    **_TEXT,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
}


def _pixels(size: int, samples: int = 2) -> Tensor:
    return torch.zeros(samples, 3, size, size)


def _ids(config: Any, length: int) -> Tensor:
    return 3 + torch.arange(2 * length).view(2, length) % (config.vocab_size - 3)


def _images(
    name: str,
    kind: str,
    attentions: tuple[str, ...] = _BOTH,
    *,
    usual: Any = None,
    about: str = "",
    base: Any = _VIT,
    **tiny: Any,
) -> Row:
    how = Hf({"model_type": kind, **base, **tiny}, usual or {}, task="image-classification")
    return Row(name, "Vision", how, attentions, about)


def _segformer(config: Any) -> dict[str, Any]:
    size = 512 if config.depths[0] > 1 else 64
    return {"pixel_values": _pixels(size), "labels": torch.zeros(2, size, size, dtype=torch.int64)}


def _dpt(config: Any) -> dict[str, Any]:
    size = config.image_size
    return {"pixel_values": _pixels(size), "labels": torch.zeros(2, size, size, dtype=torch.int64)}


def _detr(config: Any) -> dict[str, Any]:
    size = 800 if config.d_model > 32 else 64
    return {"pixel_values": _pixels(size)}


def _sam(config: Any) -> dict[str, Any]:
    size = config.vision_config.image_size
    return {"pixel_values": _pixels(size), "input_points": torch.zeros(2, 1, 1, 2)}


def _sum_of_squares(*names: str) -> Any:
    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        out = model(**batch)
        return torch.stack([getattr(out, name).float().square().mean() for name in names]).sum()

    return loss


_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
_SEGFORMER = {
    "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
    "sr_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip
_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
}  # fmt: skip
_SAM = {
    "vision_config": {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    },
}  # fmt: skip

VISION = [
    _images("ViT", "vit"),
    _images("DeiT", "deit"),
    _images("BEiT", "beit"),
    _images("DINOv2", "dinov2"),
    _images("ViT-MSN", "vit_msn"),
    _images("ConvNeXt", "convnext", (), base={"image_size": 32}, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    _images("ConvNeXt V2", "convnextv2", (), base={"image_size": 32}, hidden_sizes=[8, 16], depths=[1, 1],
            num_stages=2),
    _images("Swin", "swin", base=_SWIN),
    _images("Swin V2", "swinv2", ("eager",), base=_SWIN),
    _images("ResNet", "resnet", (), base=_RESNET, image_size=32),
    _images("RegNet", "regnet", (), base={"image_size": 32}, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
            groups_width=4),
    _images("EfficientNet", "efficientnet", (), base={"image_size": 32}, width_coefficient=0.25, depth_coefficient=0.3,
            hidden_dim=320),
    _images("MobileNetV2", "mobilenet_v2", (), base={"image_size": 32}, depth_multiplier=0.25),
    _images("PoolFormer", "poolformer", (), base={"image_size": 32}, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
    Row("SegFormer", "Vision", ByHand("SegformerForSemanticSegmentation", _SEGFORMER, _segformer), ("eager",)),
    Row("DPT", "Vision", ByHand("DPTForSemanticSegmentation", {**_VIT, "num_hidden_layers": 4, "image_size": 32,
        "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}, _dpt)),
    Row("ViT-MAE", "Vision", ByHand("ViTMAEForPreTraining", {**_VIT, "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
        lambda config: {"pixel_values": _pixels(config.image_size)}), _BOTH),
    Row("DETR", "Vision", ByHand("DetrForObjectDetection",
        {**_DETR, "use_timm_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", **_RESNET, "out_features": ["stage2"]}},
        _detr, {"use_timm_backbone": False, "backbone": None,
                "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}},
        _sum_of_squares("logits", "pred_boxes")), ("eager",),
        "loss of our own: its Hungarian matching needs scipy; its ResNet backbone has no SDPA"),
    Row("SAM", "Vision", ByHand("SamModel", _SAM, _sam, {}, _sum_of_squares("pred_masks", "iou_scores")), _BOTH,
        "loss of our own: transformers has none"),
]  # fmt: skip


def _towers(config: Any) -> dict[str, Any]:
    return {
        "input_ids": _ids(config.text_config, min(64, config.text_config.max_position_embeddings)),
        "pixel_values": _pixels(config.vision_config.image_size),
    }


def _contrast(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch, return_loss=True).loss  # type: ignore[no-any-return]


def _caption(config: Any) -> dict[str, Any]:
    towers = _towers(config)
    return {**towers, "labels": towers["input_ids"].clone()}


_TOWERS = {"text_config": _TEXT, "vision_config": _VIT, "projection_dim": 16}
_QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
_QWEN25_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
    "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
_LLAVA = {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VIT}, "text_config": _LLAMA}
_GROUP = "Text and images"
_QWEN_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"},
}  # fmt: skip
_QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}

MULTIMODAL = [
    Row("CLIP", _GROUP, ByHand("CLIPModel", _TOWERS, _towers, {}, _contrast)),
    Row("SigLIP", _GROUP, ByHand("SiglipModel", {"text_config": _TEXT, "vision_config": _VIT}, _towers, {}, _contrast)),
    Row("BLIP", _GROUP, ByHand("BlipForConditionalGeneration",
        {**_TOWERS, "text_config": {**_TEXT, "encoder_hidden_size": 32}}, _caption), ("eager",)),
    Row("LLaVA", _GROUP, Hf({"model_type": "llava", **_LLAVA, "image_token_index": 63, "image_seq_length": 4},
        {}, {"seq_len": 12}, {"seq_len": 1024, "micro_batch": 1}, "image-text"), about="one sample of 1,024 tokens"),
    Row("PaliGemma", _GROUP, Hf({"model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", **_VIT},
        "text_config": {"model_type": "gemma", **_TEXT, "num_key_value_heads": 2, "head_dim": 8},
        "image_token_index": 63, "projection_dim": 32, "hidden_size": 32},
        {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14,
          "hidden_size": 1152,
          "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
         "text_config": {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18,
          "intermediate_size": 16384,
          "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257216},
         "image_token_index": 257152, "projection_dim": 2048},
        {"seq_len": 12}, {"micro_batch": 1}, "image-text"), about="usual size: paligemma-3b-224, one sample"),
    Row("Qwen2-VL", _GROUP, Hf({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", **_QWEN},
        "vision_config": _QWEN_VISION, **_QWEN_IDS}, {"text_config": {"model_type": "qwen2_vl_text", **_QWEN_7B}},
        {"image_size": 16}, {"micro_batch": 1}, "image-text"), about="usual size: Qwen2-VL-7B, one sample"),
    Row("Qwen2.5-VL", _GROUP, Hf({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", **_QWEN},
        "vision_config": _QWEN25_VISION, **_QWEN_IDS},
        {"text_config": {"model_type": "qwen2_5_vl_text", **_QWEN_7B}},
        {"image_size": 16}, {"micro_batch": 1}, "image-text"), about="usual size: Qwen2.5-VL-7B, one sample"),
]  # fmt: skip

_WAV = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": [16, 16], "conv_stride": [320, 4], "conv_kernel": [400, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
}  # fmt: skip

SPEECH = [
    Row("Whisper", "Speech", Hf({"model_type": "whisper", "vocab_size": 64, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
        "decoder_start_token_id": 1, **_IDS}, task="speech-seq2seq")),
    *(Row(name, "Speech", Hf({"model_type": kind, **_WAV}, {"layerdrop": 0.0}, task="ctc"),
          about="without dropped layers, which are random")
      for name, kind in (("Wav2Vec2", "wav2vec2"), ("HuBERT", "hubert"))),
]  # fmt: skip
