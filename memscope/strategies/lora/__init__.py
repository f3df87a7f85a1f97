"""Low-rank adaptation: the strategy `lora`, the layers it adapts, and the adapted layers."""

from memscope.strategies.lora.adapted import LoRALinear, adapt, adapted_layers, merge, unmerge
from memscope.strategies.lora.lora import LoRA

__all__ = ["LoRA", "LoRALinear", "adapt", "adapted_layers", "merge", "unmerge"]
