"""Reader of pickles that hold plain data. Any other pickle is refused before one byte of it is executed.

A pickle is a program, and Python's unpickler runs it. Here, two locks prevent that. First, `pickle_scan` checks every
instruction of the file without running it. Only then does the standard library's unpickler read the file, with the
methods that reach anything but plain data (`find_class`, `persistent_load`) overridden to refuse.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from memscope.errors import TraceFileError, excerpt
from memscope.exchange.pickle_scan import AsksForName, Refused, refused, scan
from memscope.trace import Progress, no_progress

__all__ = ["read_plain_pickle"]

_BUFFER_BYTES = 2**20


def read_plain_pickle(path: str | os.PathLike[str], progress: Progress = no_progress) -> Any:
    """Return the plain data in a pickle of protocol 2 to 5, without executing or importing anything.

    Reading takes about 3.3 bytes of memory per byte of a PyTorch snapshot.

    Raises:
        TraceFileError: the file is missing, not a pickle, truncated or damaged, or asks for more than plain data. The
            message names the first such request.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        try:
            scan(data, progress)
        except AsksForName as refusal:
            raise _named(data, refusal) from None
        del data
        with open(path, "rb") as file, _no_collection():
            counted = _Counted(file, os.fstat(file.fileno()).st_size, progress)
            return _PlainUnpickler(io.BufferedReader(counted, _BUFFER_BYTES)).load()
    except FileNotFoundError:
        raise TraceFileError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Refused as refusal:
        raise TraceFileError(f"{path}: {refusal}") from None
    except MemoryError:
        raise TraceFileError(f"{path}: not enough memory: reading takes about 3.3 times the file's size") from None
    except Exception as error:  # the unpickler raises nearly anything on bytes that no pickler wrote
        raise TraceFileError(f"{path}: a damaged pickle ({error or type(error).__name__})") from None


def _named(data: bytes, refusal: Refused) -> Refused:
    """The refusal of a file that asks for a class or function, with its name where it can be read.

    All data before the request is plain, so the second lock can read up to it.
    """
    try:
        _PlainUnpickler(io.BytesIO(data)).load()
    except Refused as named:
        return named
    except Exception:  # the name in the request cannot be read
        pass
    return refusal


class _PlainUnpickler(pickle.Unpickler):
    """The second lock: an unpickler that cannot reach anything but plain data."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise Refused(refused(f"for {excerpt(module)}.{excerpt(name)}"))

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise Refused(refused("for something outside the file"))


class _Counted(io.RawIOBase):
    """A file that reports the progress of reading it."""

    def __init__(self, file: io.BufferedReader, size_bytes: int, progress: Progress) -> None:
        self._file, self._size_bytes, self._progress = file, size_bytes, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._progress("reading", self._file.tell(), self._size_bytes)
        return count


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: there is nothing to collect, and it takes three times as long as reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
