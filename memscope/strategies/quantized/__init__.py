"""Quantized weights: the strategies `qlora` and `int8`, and the layers of bitsandbytes that they use."""

from memscope.strategies.quantized.int8 import Int8
from memscope.strategies.quantized.layers import Bits4, Bits8, quantize
from memscope.strategies.quantized.qlora import QLoRA

__all__ = ["Bits4", "Bits8", "Int8", "QLoRA", "quantize"]
