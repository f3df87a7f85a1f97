"""Reader of pickles that hold plain data. Any other pickle is refused before one byte of it is executed.

A pickle is a program, and Python's unpickler runs it. Here, two locks prevent that. First, the whole file is scanned
without running it: every instruction must be one that makes or fills dicts, lists, tuples, strings, bytes, numbers,
True, False and None. Only then does the standard library's unpickler read the file, with the methods that reach
anything else (`find_class`, `persistent_load`) overridden to refuse. Source of the instructions: pickletools.opcodes,
Python 3.11 to 3.14.

The scan also prevents a small file from requesting all memory: a length beyond the end of the file, or a memo index far
beyond the entries made so far (nine bytes can request 64 GiB), never reaches the unpickler.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from memscope.errors import TraceFileError
from memscope.trace import Progress, no_progress

__all__ = ["read_plain_pickle"]

_PROTOCOLS = range(2, 6)
_INTEGER = rb"(?:K.|M..|J....|\x8a(?:\x00|\x01.|\x02.{2}|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_RUN = re.compile(
    rb"(?:(?:[hq].)++"  # BINGET, BINPUT
    rb"|(?:j....)++"  # LONG_BINGET
    # BININT, BININT1, BININT2, LONG1; with TUPLE1 after one, TUPLE2 after two, TUPLE3 after three: pool ids
    rb"|" + _INTEGER + rb"(?:\x85|" + _INTEGER + rb"(?:\x86|" + _INTEGER + rb"\x87)?+)?+"
    # MEMOIZE, MARK, EMPTY_DICT, EMPTY_LIST, SETITEM(S), APPEND(S), EMPTY_TUPLE, NEWTRUE, NEWFALSE, NONE
    rb"|[\x94(}\]usea)\x88\x89N]++"
    rb"|G.{8})*+",  # BINFLOAT
    re.DOTALL,
)
"""A run of instructions of known length. Quantifiers are possessive, so the match never backtracks."""
_LENGTH_BYTES = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x8A: 1, 0x8B: 4, 0x95: 8}
"""Instruction → bytes of its length field, which precedes a string, bytes, a long integer or a frame."""
_LONGEST = 16
"""Upper bound on the bytes of any other instruction."""
_FRAME, _LONG_BINPUT, _STOP = 0x95, 0x72, 0x2E
_NESTING = frozenset(b"t\x85\x86\x87")
_MOST_NESTING = 10_000
"""Number of tuples a file may hold, apart from tuples of integers. Python hashes nested tuples by unlimited recursion,
and each level takes about 100 bytes of a thread's stack, which usually has 8 MiB."""
_INSTRUCTIONS = {ord(op.code): op.name for op in pickletools.opcodes}
_ASKS = {
    **dict.fromkeys(("REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX"), "to call a function"),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"), "for a class or function"),
    **dict.fromkeys(("PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"), "for something outside the file"),
}
_NAMING = ("GLOBAL", "INST", "STACK_GLOBAL")
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
        _check(path, progress)
        with open(path, "rb") as file, _no_collection():
            counted = _Counted(file, os.fstat(file.fileno()).st_size, progress)
            return _PlainUnpickler(io.BufferedReader(counted, _BUFFER_BYTES)).load()
    except FileNotFoundError:
        raise TraceFileError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _Refused as refusal:
        raise TraceFileError(f"{path}: {refusal}") from None
    except MemoryError:
        raise TraceFileError(f"{path}: not enough memory: reading takes about 3.3 times the file's size") from None
    except Exception as error:  # the unpickler raises nearly anything on bytes that no pickler wrote
        raise TraceFileError(f"{path}: a damaged pickle ({error or type(error).__name__})") from None


class _Refused(Exception):
    """The file must not be read; the message gives the reason."""


class _PlainUnpickler(pickle.Unpickler):
    """The second lock: an unpickler that cannot reach anything but plain data."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _refused(f"for {module}.{name}")

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise _refused("for something outside the file")


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


def _check(path: Path, progress: Progress) -> None:
    """The first lock: scan the instructions without running them.

    Raises:
        _Refused: an instruction is not allowed; the message describes the first one.
    """
    data = path.read_bytes()
    _check_beginning(data)
    end, at, memo, nesting, told = len(data), 2, 0, 0, 0
    while True:
        at = _RUN.match(data, at).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
        if at - told > _BUFFER_BYTES:
            told = at
            progress("checking", at, end)
        if at >= end:
            raise _truncated(end)
        code = data[at]
        if code == _STOP:
            return
        if code in _LENGTH_BYTES:
            begin = at + 1 + _LENGTH_BYTES[code]
            length = int.from_bytes(data[at + 1 : begin], "little")
            if begin + length > end:
                raise _truncated(end)
            at = begin if code == _FRAME else begin + length
        elif code == _LONG_BINPUT:
            place = int.from_bytes(data[at + 1 : at + 5], "little")
            if place > max(memo, 2**8):  # picklers number memo entries in order, and BINPUT reaches 255
                raise _Refused(f"a damaged pickle: byte {at:,} stores a memo entry under number {place:,}")
            memo, at = max(memo, place + 1), at + 5
        elif code in _NESTING and nesting < _MOST_NESTING:
            nesting, at = nesting + 1, at + 1
        else:
            raise _refusal(data, at, nesting)


def _check_beginning(data: bytes) -> None:
    if not data:
        raise _Refused("the file is empty")
    if data[:4] == b"PK\x03\x04":
        raise _Refused(
            "a zip archive, as torch.save and memscope write: expected a pickle written by "
            "torch.cuda.memory._dump_snapshot (memscope's own traces need no import)"
        )
    if data[:2] == b"\x1f\x8b":
        raise _Refused("compressed with gzip: unpack it with gunzip first")
    if data[0] != 0x80:
        raise _Refused("not a pickle of protocol 2 to 5, such as torch.cuda.memory._dump_snapshot writes")
    if len(data) < 2:
        raise _truncated(len(data))
    if data[1] not in _PROTOCOLS:
        raise _Refused(f"a pickle of protocol {data[1]}: expected 2 to 5")


def _truncated(size_bytes: int) -> _Refused:
    return _Refused(f"a truncated pickle: its content continues beyond its last byte, number {size_bytes:,}")


def _refusal(data: bytes, at: int, nesting: int) -> _Refused:
    """The reason why the instruction at a position is not allowed."""
    tail = data[at : at + _LONGEST]
    name = _INSTRUCTIONS.get(data[at])
    if name is None:
        return _Refused(f"a damaged pickle: byte {at:,} is not an instruction ({data[at]:#04x})")
    if nesting == _MOST_NESTING and data[at] in _NESTING:
        return _Refused(f"more than {_MOST_NESTING:,} tuples, apart from tuples of integers: no snapshot has so many")
    if at + _LONGEST > len(data) and _RUN.match(tail + bytes(_LONGEST)).end() > len(tail):  # type: ignore[union-attr]
        return _truncated(len(data))
    if name in _NAMING:
        try:  # all data before it is plain, so the second lock can read up to it and name the request
            _PlainUnpickler(io.BytesIO(data)).load()
        except _Refused as refusal:
            return refusal
        except Exception:  # the name in the request cannot be read
            pass
    asks = _ASKS.get(name, "for more than dicts, lists, tuples, strings, bytes, numbers, True, False and None")
    return _refused(f"{asks} ({name}, byte {at:,})")


def _refused(asks: str) -> _Refused:
    return _Refused(f"refused: the file asks {asks}, but a snapshot holds plain data only. Nothing in it was executed")
