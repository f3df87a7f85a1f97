"""Trace files: compressed `.npz` with a JSON header. Reading one executes nothing."""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memscope.errors import TraceFileError, UsageError, excerpt
from memscope.interrupts import interrupts_held
from memscope.trace.columns import Ints
from memscope.units import format_bytes

__all__ = ["SCHEMA_VERSION", "is_within", "read_columns", "read_json", "read_whole", "write_columns", "write_whole"]

SCHEMA_VERSION = 2
"""1: without host memory. 2: a file may have columns of host memory, named as the others after `host_`."""
_FORMAT = "memscope-trace"
_DAMAGED = "a damaged memscope trace"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_JSON = 2**24
_BYTES_OF_ALLOCATION, _BASE_BYTES, _MOST_BYTES = 200, 64 * 2**20, 4 * 2**30
"""Bound on the unpacked bytes of a file: for each allocation, for the header and short columns, and in all. A trace has
at most 96 bytes of columns for each allocation, and names and time estimates in the header."""


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


_Columns = dict[str, Any]
"""Columns by name: int64 `[rows]`."""


def read_columns(path: str | os.PathLike[str], names: tuple[str, ...]) -> tuple[_Columns, _Columns, dict[str, Any]]:
    """Read the columns called `names`, those of host memory, if any, and the header of a trace file; nothing else.

    The zip archive's directory and the head of each column come first: what is read is bounded by the number of
    allocations that the columns `size` declare.

    Raises:
        TraceFileError: the file is missing, not a trace, truncated, incomplete, too large, or of a newer schema.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return _read(archive, names)
    except FileNotFoundError:
        raise TraceFileError(f"{path}: no such file") from None
    except _Damaged as damage:
        raise TraceFileError(f"{path}: {damage}") from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise TraceFileError(f"{path}: not enough memory to read it") from None
    except Exception:  # zipfile, zlib and NumPy raise nearly anything on bytes they did not write
        raise TraceFileError(
            f"{path}: not a memscope trace, or truncated: expected a file written by memscope profile"
        ) from None


class _Damaged(Exception):
    """The file is not a trace, or a damaged one; the message gives the reason."""


@dataclass(frozen=True)
class _Array:
    """An array in the archive, before its content is read."""

    info: zipfile.ZipInfo
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    """Bytes before the content."""

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {excerpt(list(self.shape)) if len(self.shape) > 3 else list(self.shape)}"


def _read(archive: zipfile.ZipFile, names: tuple[str, ...]) -> tuple[_Columns, _Columns, dict[str, Any]]:
    of_host = tuple(f"host_{name}" for name in names)
    heads = {name: _head(archive, name) for name in ("header", *names, *of_host)}
    sizes = [heads.get(name) for name in ("size", "host_size")]
    allocations = sum(size.shape[0] for size in sizes if size and len(size.shape) == 1)
    most = min(_BASE_BYTES + _BYTES_OF_ALLOCATION * allocations, _MOST_BYTES)
    whole = sum(array.size_bytes for array in heads.values() if array)
    if whole > most:
        raise _Damaged(
            f"{_DAMAGED}: it unpacks to {format_bytes(whole)}, and one of {allocations:,} allocations "
            f"has at most {format_bytes(most)}"
        )
    header = _header(archive, heads["header"])
    has_host = any(heads[name] for name in of_host)
    columns = {}
    for name in (*names, *(of_host if has_host else ())):
        array = heads[name]
        if array is None:
            raise _Damaged(f"{_DAMAGED}: it has no column {name}")
        if array.dtype.kind != "i" or len(array.shape) != 1:
            raise _Damaged(f"{_DAMAGED}: its column {name} is {array}: expected integers of shape [n]")
        columns[name] = np.frombuffer(_content(archive, array), array.dtype).astype(np.int64)
    found = {name: columns.pop(name) for name in of_host if has_host}
    return columns, {name.removeprefix("host_"): column for name, column in found.items()}, header


def _head(archive: zipfile.ZipFile, name: str) -> _Array | None:
    """What the archive says about an array; None if it has none."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        return None
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for any memory
        raise _Damaged(f"{_DAMAGED}: {name} is compressed by method {info.compress_type}: expected deflate")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        begin = member.tell()
    if dtype.hasobject:
        raise ValueError("a pickle in the place of an array")
    return _Array(info, dtype, shape, begin)


def _content(archive: zipfile.ZipFile, array: _Array) -> bytes:
    with archive.open(array.info) as member:
        data = member.read(array.begin + array.size_bytes + 1)
    if len(data) != array.begin + array.size_bytes:
        raise ValueError("an array of another length than it says")
    return data[array.begin :]


def _header(archive: zipfile.ZipFile, array: _Array | None) -> dict[str, Any]:
    """The fields of the header.

    Raises:
        _Damaged: the header is missing, is not one of memscope, or is of a newer schema.
    """
    header: Any = None
    if array and array.dtype.kind == "U" and not array.shape:
        text = str(np.frombuffer(_content(archive, array), array.dtype)[0])
        try:
            header = json.loads(_printable(text))
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT or type(header.get("schema_version")) is not int:
        raise _Damaged("not a memscope trace: it has no memscope header")
    if header["schema_version"] > SCHEMA_VERSION:
        version = excerpt(header["schema_version"])
        raise _Damaged(
            f"has trace schema {version}; this memscope reads schemas up to {SCHEMA_VERSION}: upgrade memscope"
        )
    return header


def _printable(text: str) -> str:
    """JSON whose texts can be printed: halves of characters, which JSON and NumPy can hold, become `?`."""
    if _HALF.search(text):
        text = json.dumps(json.loads(text), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def is_within(column: Ints, least: int, most: int) -> bool:
    """Whether every value of a column lies in `least..most`."""
    return not column.size or bool(least <= column.min() and column.max() <= most)


def _narrow(column: Ints) -> npt.NDArray[Any]:
    """Convert a column to the smallest signed type that holds it: files stay small, values stay exact."""
    for dtype in (np.int8, np.int16, np.int32):
        if is_within(column, np.iinfo(dtype).min, np.iinfo(dtype).max):
            return column.astype(dtype)
    return column


def read_whole(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a file of text.

    Raises:
        UsageError: the file has more bytes than any file of its kind.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UsageError(f"{path}: has more than {format_bytes(most_bytes)}: expected a much smaller file")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file whose texts can be printed.

    Raises:
        UsageError: the file has more than 16 MiB.
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8.
        RecursionError: it is nested too deep.
    """
    return json.loads(_printable(read_whole(path, _MOST_JSON).decode()))


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
