"""The settings of `hf:WHAT`. Nothing here imports torch or transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memscope.targets.hf.catalogue import load_catalogue

__all__ = ["ARGUMENT", "EXAMPLES", "PRESETS", "SLOW_IMPORTS", "HfConfig", "Task"]

Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "image-text",
    "speech-seq2seq",
    "ctc",
]


@dataclass(frozen=True)
class HfConfig:
    """What to train, and how. `none`: as the recipe says, or else the default that is named."""

    model: str = "llama-2-7b"
    """WHAT: a name of the list above, a folder with config.json, a name on the hub (org/name), or a recipe."""
    recipe: str | None = None
    """HfRecipe for the model: an axolotl YAML, a TrainingArguments JSON, or a PEFT adapter folder; none: no recipe."""
    task: Task | None = None
    """What the model is trained for; none: as the architecture in config.json says, or else causal-lm."""
    overrides: str | None = None
    """Changes of config.json as KEY=VALUE joined by commas, such as num_hidden_layers=2,hidden_size=512."""
    vocab_size: int | None = None
    """Rows of a resized embedding and head; none: as in config.json."""
    seq_len: int | None = None
    """Tokens a sample; none: 1,024, or the model's positions if they are fewer."""
    target_len: int | None = None
    """Tokens of a target sequence (encoder-decoder, speech); none: 128, or the positions if they are fewer."""
    image_size: int | None = None
    """Height and width of an image in pixels; none: as in config.json, or 448 where images may have any size."""
    micro_batch: int | None = None
    """Samples per micro-batch; none: 1."""
    accumulation: int | None = None
    """Micro-batches per optimizer step; none: 1."""
    padding: int | None = None
    """Tokens of padding in every sample of a micro-batch but the first: masks then matter; none: equal lengths."""
    packing: bool | None = None
    """Join the samples of a micro-batch to one row with restarting position_ids and no mask; none: false."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """Dtype of the weights; auto: that in config.json, or else fp32; none: auto."""
    autocast: Literal["off", "bf16", "fp16"] | None = None
    """Mixed precision, as bf16=True or fp16=True of TrainingArguments; fp16 with a gradient scaler; none: off."""
    quantization: str | None = None
    """Weights quantized by bitsandbytes: load_in_4bit or load_in_8bit, with other keys of BitsAndBytesConfig, such as
    load_in_4bit,bnb_4bit_quant_type=nf4,bnb_4bit_compute_dtype=bfloat16; none: as in config.json."""
    kbit_training: bool | None = None
    """Convert what is not quantized to float32, as prepare_model_for_kbit_training of PEFT; none: true with an adapter
    on quantized weights."""
    fp32_modules: tuple[str, ...] | None = None
    """Modules with float32 weights, by a part of their names, joined by +, such as norm+lm_head; none: none."""
    attention: str | None = None
    """eager, sdpa, flash_attention_2, ... as attn_implementation of transformers; none: its default for the model."""
    gradient_checkpointing: bool | None = None
    """Checkpoint each layer, as transformers does; none: false."""
    reentrant: bool | None = None
    """use_reentrant of gradient checkpointing; none: the default of the installed transformers."""
    use_cache: bool | None = None
    """Build the key-value cache in training; none: false, as the Trainer of transformers 5."""
    adapter: str | None = None
    """PEFT adapter: a folder, or METHOD:KEY=VALUE,... as lora:r=16,target_modules=q_proj+v_proj; none: no adapter."""
    adapter_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the adapter's weights; none: PEFT's, which is fp32 for weights of 16 bits."""
    trained: str | None = None
    """Regular expression for the names of the parameters to train, others are frozen; none: all."""
    optimizer: str | None = None
    """Optimizer, by its name in TrainingArguments.optim; none: adamw_torch."""
    clip_grad_norm: float | None = None
    """Maximum norm of the gradients, 0: no clipping; none: no clipping."""
    keep_batch: bool | None = None
    """Keep the last micro-batch on the device until the next one, as the Trainer does; none: false."""
    keep_outputs: bool | None = None
    """Keep the outputs (logits, caches) until the next ones are there, as a variable of a loop does; none: false."""
    empty_cache_every: int | None = None
    """Call torch.cuda.empty_cache() in every step of this number; none: never."""
    empty_cache_after: Literal["loss", "step"] | None = None
    """Whether that is after the loss, as in the Trainer, or after the optimizer's step; none: loss."""
    trust_remote_code: bool | None = None
    """Run Python code that comes with the model (auto_map in config.json); none: false."""


PRESETS = {"default": HfConfig()}
ARGUMENT = "model"
"""The setting that WHAT in `hf:WHAT` fills."""
EXAMPLES = {name: model.about for name, model in load_catalogue().items()}
"""Known WHATs, with a line about each."""
SLOW_IMPORTS = ("transformers", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
"""What processes share by importing it before they are forked."""
