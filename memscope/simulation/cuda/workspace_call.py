"""The call of an operator in the form that the kernel workspace model reads. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memscope.errors import UsageError
from memscope.hooks.kernels import Workspace
from memscope.simulation.devices.catalogue import Device

__all__ = [
    "KernelSettings",
    "Limits",
    "OperatorCall",
    "TensorMeta",
    "broadcast",
    "contiguous_copy",
    "describe",
    "limits",
]

_ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    "complex128": 16,
}


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype and strides of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name without `torch.`, such as `bfloat16`."""
    strides: tuple[int, ...] | None = None
    """In elements; None: contiguous."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def accumulate_bytes(self) -> int:
        """Bytes of an element in the dtype of sums: float32 for 16-bit floats (toOpMathType), else its own dtype."""
        return 4 if self.dtype in ("float16", "bfloat16") else self.item_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of a contiguous tensor of this shape."""
        return self.numel * self.item_bytes

    @property
    def is_floating(self) -> bool:
        """Whether its elements are real floating-point numbers."""
        return self.dtype in ("float64", "float32", "float16", "bfloat16")

    @property
    def is_contiguous(self) -> bool:
        """Same as `torch.Tensor.is_contiguous`: strides of dimensions of size 1 do not matter."""
        if self.strides is None or self.numel == 0:
            return True
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def transposed(self, first: int, second: int) -> TensorMeta:
        """Return the view with two dimensions exchanged."""
        strides = list(self.strides or (math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))))
        shape = list(self.shape)
        shape[first], shape[second] = shape[second], shape[first]
        strides[first], strides[second] = strides[second], strides[first]
        return TensorMeta(tuple(shape), self.dtype, tuple(strides))


@dataclass(frozen=True)
class KernelSettings:
    """Environment variables and modes of PyTorch that change workspaces; None: not set."""

    cublas_bytes: int | None = None
    """CUBLAS_WORKSPACE_CONFIG in bytes."""
    cublaslt_bytes: int | None = None
    """CUBLASLT_WORKSPACE_SIZE in bytes."""
    unified: bool | None = None
    """TORCH_CUBLASLT_UNIFIED_WORKSPACE: cuBLASLt uses cuBLAS's workspace (PyTorch 2.8 and later)."""
    cached: bool | None = None
    """TORCH_CUBLAS_WORKSPACE_CACHE: workspaces are kept between calls (PyTorch 2.15 and later)."""
    addmm_lt: bool = True
    """Whether `addmm` may use cuBLASLt; DISABLE_ADDMM_CUDA_LT=1 forbids it."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms(True)."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, deterministic: bool = False) -> KernelSettings:
        """Read the settings from environment variables.

        Raises:
            UsageError: a value cannot be parsed. PyTorch would warn and use its default.
        """
        return cls(
            cublas_bytes=_workspace_config(environment.get("CUBLAS_WORKSPACE_CONFIG")),
            cublaslt_bytes=_kibibytes(environment.get("CUBLASLT_WORKSPACE_SIZE")),
            unified=_flag(environment, "TORCH_CUBLASLT_UNIFIED_WORKSPACE"),
            cached=_flag(environment, "TORCH_CUBLAS_WORKSPACE_CACHE"),
            addmm_lt=environment.get("DISABLE_ADDMM_CUDA_LT") != "1",
            deterministic=deterministic,
        )


def _workspace_config(text: str | None) -> int | None:
    """Parse `:4096:2:16:8`: 2 × 4096 KiB + 8 × 16 KiB (parseChosenWorkspaceSize in ATen/cuda/CublasHandlePool.cpp)."""
    if text is None:
        return None
    pairs = re.findall(r":(\d+):(\d+)", text)
    if not pairs:
        raise UsageError(f'CUBLAS_WORKSPACE_CONFIG="{text}": expected :SIZE:COUNT with SIZE in KiB, such as :4096:8')
    return sum(1024 * int(size) * int(count) for size, count in pairs)


def _kibibytes(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise UsageError(f'CUBLASLT_WORKSPACE_SIZE="{text}": expected a whole number of KiB, such as 1024')
    return 1024 * int(text)


def _flag(environment: Mapping[str, str], name: str) -> bool | None:
    text = environment.get(name)
    if text not in (None, "0", "1"):
        raise UsageError(f'{name}="{text}": expected 0 or 1')
    return None if text is None else text == "1"


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator: its name without overload, its arguments, and the device and PyTorch it runs on."""

    op: str
    arguments: Mapping[str, Any]
    device: Device
    torch: tuple[int, int]
    settings: KernelSettings

    def tensor(self, name: str) -> TensorMeta:
        """Return the tensor argument `name`."""
        found = self.arguments[name]
        assert isinstance(found, TensorMeta), f"{self.op}: {name} is {found!r}"
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Return the argument `name`, or `default` if the call does not give it."""
        return self.arguments.get(name, default)


@dataclass(frozen=True)
class Limits:
    """Two limits of a compute capability."""

    shared_bytes_per_block: int
    threads_per_multiprocessor: int
    exact: bool = True
    """Whether the limits are known for this compute capability; else they are those of the nearest lower one."""


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory a block can opt in to,
# resident threads.
_LIMITS = {
    (6, 0): (48 * 1024, 2048),
    (7, 0): (96 * 1024, 2048),
    (7, 5): (64 * 1024, 1024),
    (8, 0): (163 * 1024, 2048),
    (8, 6): (99 * 1024, 1536),
    (8, 9): (99 * 1024, 1536),
    (9, 0): (227 * 1024, 2048),
    (10, 0): (227 * 1024, 2048),
    (12, 0): (99 * 1024, 1536),
}


def limits(device: Device) -> Limits:
    """Return the limits of a device's compute capability."""
    lower = max((known for known in _LIMITS if known <= device.capability), default=min(_LIMITS))
    return Limits(*_LIMITS[lower], exact=lower == device.capability)


def describe(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, as a dispatch mode receives it, by their names in the operator's schema.

    Tensors become `TensorMeta`, lists become tuples, and dtypes become PyTorch's names without `torch.`.
    """
    names = [argument.name for argument in func._schema.arguments]
    return {name: _described(value) for name, value in [*zip(names, args, strict=False), *kwargs.items()]}


def _described(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if hasattr(value, "stride") and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        return TensorMeta(tuple(map(int, value.shape)), dtype, tuple(map(int, value.stride())))
    return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value


def contiguous_copy(name: str, tensor: TensorMeta, source: str) -> list[Workspace]:
    """The copy a kernel makes of an argument that must be contiguous; empty if it already is."""
    if tensor.is_contiguous:
        return []
    return [Workspace(f"contiguous copy of {name}", tensor.size_bytes, "op", source, before_outputs=True)]


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to which PyTorch expands all of the given shapes."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))
