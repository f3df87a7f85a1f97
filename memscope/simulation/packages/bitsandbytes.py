"""bitsandbytes in a simulation: its own layers and functions run, its kernels are replaced by what they allocate.

Its operators have fake implementations, which return what the kernels return; those of its products hide the weight
that a kernel unpacks. Read in 0.50.2: backends/cuda/ops.py, autograd/_functions.py, functional.py.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memscope.simulation.assumptions import Assumptions, Origin
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.packages.operators import memscope_ops
from memscope.strategies.quantized import kernels

__all__ = ["BitsandbytesKernels"]

_LARGEST_FUSED = 1536
"""Rows from which a 4-bit weight is always unpacked: `_gemm_4bit_custom_max_m`."""
_CHOICE = "_gemm_4bit_use_custom_cuda"
"""The function that decides whether a kernel multiplies with the packed weight itself."""


class BitsandbytesKernels:
    """Context in which the kernels of bitsandbytes are simulated, also if it is imported later.

    Code books that it computes inside are forgotten afterwards: they hold fake tensors.
    """

    def __init__(self, device: Device, assumptions: Assumptions) -> None:
        self._device, self._assumptions = device, assumptions
        self._scopes = contextlib.ExitStack()
        self._is_changed = False

    def __enter__(self) -> BitsandbytesKernels:
        logger = logging.getLogger("bitsandbytes")  # it warns at every product of another dtype
        self._scopes.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        self.look()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.close()
        self._is_changed = False

    def look(self) -> None:
        """Change the library if it has been imported since the last call."""
        functional: Any = sys.modules.get("bitsandbytes.functional")
        if self._is_changed or functional is None or not hasattr(sys.modules["bitsandbytes"], "nn"):
            return
        self._is_changed = True
        self._scopes.enter_context(replaced(functional, "name2qmap", {}))
        if self._device.kind != "cuda":
            return
        ops: Any = torch.ops.bitsandbytes
        for name, run in self._kernels(ops).items():
            if hasattr(ops, name):  # bitsandbytes before 0.50 has no gemm_4bit, and unpacks weights in Python
                self._scopes.enter_context(replaced(ops, name, _Operator(run)))

    def _kernels(self, ops: Any) -> dict[str, Callable[..., Any]]:
        return {
            "gemm_4bit": self._gemm_4bit(ops),
            "int8_vectorwise_quant": self._int8_vectorwise_quant(ops),
            "int8_scaled_mm": partial(kernels.int8_scaled_mm, ops),
            "int8_mixed_scaled_mm": partial(kernels.int8_mixed_scaled_mm, ops),
        }

    def _gemm_4bit(self, ops: Any) -> Callable[..., Tensor]:
        fuses = _fuses(self._device)

        def product(
            values: Tensor,
            weight: Tensor,
            shape: Any,
            absmax: Tensor,
            blocksize: int,
            quant_type: str,
            **scales: Tensor | None,
        ) -> Tensor:
            rows = values.numel() // values.shape[-1]
            if values.shape[-1] % blocksize == 0 and fuses(values.dtype, rows, *shape):
                return memscope_ops.gemm_4bit.default(values.contiguous(), weight, shape)  # type: ignore[no-any-return]
            given = map(scales.get, ("bias", "absmax_8bit", "absmax_code", "absmax_offset"))
            return kernels.gemm_4bit(ops, values, weight, shape, absmax, blocksize, quant_type, *given)

        return product

    def _int8_vectorwise_quant(self, ops: Any) -> Callable[..., Any]:
        def quantized(values: Tensor, threshold: float = 0.0) -> Any:
            rounded, scales, columns = kernels.int8_vectorwise_quant(ops, values, threshold)
            if columns is not None:
                what = "columns of a layer's input with an outlier (LLM.int8())"
                self._assumptions.rest_on([Origin.here(what, str(columns.numel()))])
            return rounded, scales, columns

        return quantized


class _Operator(NamedTuple):
    """An operator that is called by itself or as its only overload."""

    default: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.default(*args, **kwargs)


def _fuses(device: Device) -> Callable[[torch.dtype, int, int, int], bool]:
    """Whether a kernel multiplies `[rows, in]` with a packed weight `[out, in]`, as bitsandbytes itself decides.

    Its function is taken from its source: the module can be imported with CUDA only.
    """
    choose = _choice_of_library((device.multiprocessors, *device.capability))
    if choose is None:
        return lambda dtype, rows, outputs, inputs: False
    return lambda dtype, rows, outputs, inputs: rows <= _LARGEST_FUSED and bool(choose(0, dtype, rows, outputs, inputs))


def _choice_of_library(properties: tuple[int | None, ...]) -> Any:
    """The function of bitsandbytes that chooses between kernels; None: this version has no such choice.

    Args:
        properties: number of multiprocessors, and compute capability.
    """
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "backends" / "cuda" / "ops.py"
    if not file.is_file():
        return None
    kept = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if _is_of_choice(node)]
    names: dict[str, Any] = {"torch": torch, "functools": functools, "_gpu_dispatch_props": lambda index: properties}
    exec(compile(ast.Module(kept, []), str(file), "exec"), names)
    return names.get(_CHOICE)


def _is_of_choice(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == _CHOICE
    return isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Name) and target.id == "_GEMM_4BIT_CUSTOM_FLOOR_M" for target in node.targets
    )
