"""Trace files: compressed `.npz` with a JSON header. Reading one executes nothing."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memscope.errors import TraceFileError
from memscope.interrupts import interrupts_held
from memscope.trace.columns import Ints

__all__ = ["SCHEMA_VERSION", "is_within", "read_columns", "write_columns", "write_whole"]

SCHEMA_VERSION = 1
_FORMAT = "memscope-trace"


def write_columns(path: Path, columns: Mapping[str, Ints], texts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write columns and `texts` (JSON values) as one trace file.

    Raises:
        TraceFileError: the file exists and `overwrite` is False, it cannot be written, or `texts` is not JSON.
    """
    if path.exists() and not overwrite:
        raise TraceFileError(f"{path} exists already: choose another name, or overwrite it with -f")
    try:
        header = json.dumps({"format": _FORMAT, "schema_version": SCHEMA_VERSION, **texts})
    except (TypeError, ValueError) as error:
        raise TraceFileError(f"{path}: cannot be written: meta has a value that is not JSON ({error})") from None
    buffer = io.BytesIO()
    stored: dict[str, Any] = {name: _narrow(column) for name, column in columns.items()}
    np.savez_compressed(buffer, header=np.array(header), **stored)
    write_whole(path, buffer.getvalue())


def read_columns(
    path: str | os.PathLike[str], names: tuple[str, ...], texts: Mapping[str, type]
) -> tuple[dict[str, Ints], dict[str, Any]]:
    """Read the columns called `names` and the header of a trace file; `texts` are the types of the header's values.

    Raises:
        TraceFileError: the file is missing, not a trace, truncated, incomplete, or of a newer schema.
    """
    arrays = _arrays(path)
    try:
        header = json.loads(str(arrays["header"]))
        if header["format"] != _FORMAT:
            raise KeyError("format")
        version = int(header["schema_version"])
    except (KeyError, ValueError, TypeError):
        raise TraceFileError(f"{path}: not a memscope trace: it has no memscope header") from None
    if version > SCHEMA_VERSION:
        raise TraceFileError(
            f"{path}: has trace schema {version}; this memscope reads schemas up to {SCHEMA_VERSION}: upgrade memscope"
        )
    wrong = [n for n in names if n not in arrays or arrays[n].dtype.kind != "i" or arrays[n].ndim != 1]
    wrong += [name for name, kind in texts.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise TraceFileError(f"{path}: a damaged memscope trace: {', '.join(wrong)} missing or of a wrong type")
    return {name: arrays[name].astype(np.int64) for name in names}, header


def _arrays(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise TraceFileError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # zipfile, zlib and NumPy raise nearly anything on bytes they did not write
        raise TraceFileError(
            f"{path}: not a memscope trace, or truncated: expected a file written by memscope profile"
        ) from None


def is_within(column: Ints, least: int, most: int) -> bool:
    """Whether every value of a column lies in `least..most`."""
    return not column.size or bool(least <= column.min() and column.max() <= most)


def _narrow(column: Ints) -> npt.NDArray[Any]:
    """Convert a column to the smallest signed type that holds it: files stay small, values stay exact."""
    for dtype in (np.int8, np.int16, np.int32):
        if is_within(column, np.iinfo(dtype).min, np.iinfo(dtype).max):
            return column.astype(dtype)
    return column


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all: to a temporary file beside it, which is then renamed. Ctrl-C waits.

    Raises:
        TraceFileError: the folder is missing or not writable, or the disk is full.
    """
    with interrupts_held():
        _write_whole(path, data)


def _write_whole(path: Path, data: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
