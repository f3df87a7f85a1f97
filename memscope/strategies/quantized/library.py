"""bitsandbytes, or what stands in for it where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

__all__ = ["INSTALL", "Library", "is_installed", "library"]

INSTALL = "pip install bitsandbytes"


class Library(NamedTuple):
    """The names of bitsandbytes that quantize a layer."""

    linear_4bit: Any
    params_4bit: Any
    quantize_4bit: Any
    linear_8bit: Any
    params_8bit: Any
    quantize_8bit: Any


def is_installed() -> bool:
    """Whether bitsandbytes is installed; it is not imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def library() -> Library:
    """Return bitsandbytes where it is installed, else layers that allocate the same and compute nothing."""
    if is_installed():
        nn = importlib.import_module("bitsandbytes.nn")
        functional = importlib.import_module("bitsandbytes.functional")
    else:
        nn = functional = importlib.import_module("memscope.strategies.quantized.stand_in")
    return Library(
        linear_4bit=nn.Linear4bit,
        params_4bit=nn.Params4bit,
        quantize_4bit=functional.quantize_4bit,
        linear_8bit=nn.Linear8bitLt,
        params_8bit=nn.Int8Params,
        quantize_8bit=functional.int8_vectorwise_quant,
    )
