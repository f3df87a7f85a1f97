"""Files of weights and adapters: tensors that are read on demand, checked JSON, folders written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memscope.errors import MemscopeError, UsageError

__all__ = ["JsonFile", "StoredTensor", "listed", "new_folder", "open_safetensors"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the shape and dtype in its header, and a function that reads it."""

    place: str
    """Name and file, for messages."""
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """The name in the file, for a dtype that is not in `_DTYPES`."""
    read: Callable[[], Tensor]
    """Returns the tensor in host memory, mapped from the file unless rows must be reordered."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Reads only the header and runs nothing from the file.

    Raises:
        UsageError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        # The functions that read the tensors keep the file open.
        file: Any = safe_open(path, framework="pt", device="cpu")
        names: list[str] = file.keys()
        return {name: _stored(file, name, path) for name in names}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: truncated, or not a safetensors file ({error})") from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stored(file: Any, name: str, path: Path) -> StoredTensor:
    header = file.get_slice(name)
    dtype = header.get_dtype()
    shape = tuple(header.get_shape())
    return StoredTensor(f"{name} in {path.name}", shape, _DTYPES.get(dtype, dtype), lambda: file.get_tensor(name))


@dataclass(frozen=True)
class JsonFile:
    """A JSON object in a file. Each value is checked when it is read."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> JsonFile:
        """Read a file that holds one JSON object.

        Raises:
            UsageError: the file is missing, is not JSON, or is not one object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise UsageError(f"{path}: expected one JSON object, found {type(values).__name__}")
        return cls(path, values)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1; the default if the key is absent or null.

        Raises:
            UsageError: the value is anything else, or is absent and there is no default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f'{self.path}: "{key}" is {json.dumps(value)}, expected a whole number from 1')
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; the default if the key is absent or null.

        Raises:
            UsageError: the value is anything else, or is absent and there is no default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f'{self.path}: "{key}" is {json.dumps(value)}, expected a number above 0')
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise UsageError(f'{self.path}: missing "{key}"; the file has {listed(self.values) or "no keys"}')
        return default if value is None else value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, then rename it to `path`; if filling it fails, remove it.

    Raises:
        UsageError: the path exists already, or its parent folder does not.
        MemscopeError: the disk is full or cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path}: already exists and is not overwritten: choose another folder, or remove this one")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: create it first")
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: PyTorch's writer on a full disk
        raise MemscopeError(f"{path}: cannot be written, so nothing was saved; is the disk full? ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
