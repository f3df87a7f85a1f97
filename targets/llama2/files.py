"""What weights and adapters share as files: tensors not read yet, checked JSON, folders that appear whole."""

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
    """A tensor in a file: what its header says, and a way to read it."""

    place: str
    """Name and file, for messages."""
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A name instead where PyTorch has no such dtype."""
    read: Callable[[], Tensor]
    """The tensor, on the host, mapped from the file where nothing has to be rearranged."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Reads its header only; nothing in such a file is ever run.

    Raises:
        UsageError: when it is missing, truncated or something else.
    """
    try:
        # Kept open by the functions that read from it.
        file: Any = safe_open(path, framework="pt", device="cpu")
        names: list[str] = file.keys()
        return {name: _stored(file, name, path) for name in names}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: truncated, or no safetensors file ({error})") from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stored(file: Any, name: str, path: Path) -> StoredTensor:
    header = file.get_slice(name)
    dtype = header.get_dtype()
    shape = tuple(header.get_shape())
    return StoredTensor(f"{name} in {path.name}", shape, _DTYPES.get(dtype, dtype), lambda: file.get_tensor(name))


@dataclass(frozen=True)
class JsonFile:
    """A JSON object in a file; its values are checked when they are asked for."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> JsonFile:
        """Read a file that holds one JSON object.

        Raises:
            UsageError: when it is missing, not JSON, or not one object.
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
        """A whole number from 1; the default where the key is absent or null.

        Raises:
            UsageError: when it is something else, or absent without a default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f'{self.path}: "{key}" is {json.dumps(value)}, expected a whole number from 1')
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; the default where the key is absent or null.

        Raises:
            UsageError: when it is something else, or absent without a default.
        """
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f'{self.path}: "{key}" is {json.dumps(value)}, expected a number above 0')
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise UsageError(f'{self.path}: lacks "{key}"; it has {listed(self.values) or "nothing"}')
        return default if value is None else value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when it is complete; if filling it fails, nothing is left.

    Raises:
        UsageError: when the path exists already, or the folder to hold it does not.
        MemscopeError: when the disk is full or cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path}: exists already and is not overwritten: choose another folder, or remove it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it first")
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # PyTorch's writer tells a full disk as RuntimeError
        raise MemscopeError(
            f"{path}: cannot be written, nothing was saved; is there room on the disk? ({error})"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
