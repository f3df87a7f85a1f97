"""The first lock of `plain_pickle`: a scan of a pickle's instructions, without running them.

Every instruction must be one that makes or fills dicts, lists, tuples, strings, bytes, numbers, True, False and None.
Source of the instructions: pickletools.opcodes, Python 3.11 to 3.14.

The scan also bounds what a small file can cost:

- memory: a length beyond the end of the file, or a memo index far beyond the entries made so far (nine bytes can
  request 64 GiB), never reaches the unpickler;
- time: Python hashes a tuple by hashing all that it holds, so 300 bytes of nested tuples as a key take forever, and
  many keys that are numbers can be chosen to collide. Tuples hold up to three integers, integers have 64 bits, and a
  dict has a bounded number of keys. Hashes of strings are salted: they cannot be chosen to collide.
"""

from __future__ import annotations

import pickletools
import re

from memscope.trace import Progress

__all__ = ["AsksForName", "Refused", "refused", "scan"]


class Refused(Exception):
    """The file must not be read; the message gives the reason."""


class AsksForName(Refused):
    """The file asks for a class or function, whose name the unpickler finds without importing it."""


_PROTOCOLS = range(2, 6)
_MOST_VALUES = 4096
"""Upper bound on the keys and values of one dict, counted with their memo entries: a snapshot's dicts are records."""
_MOST_SINGLE = 10_000
"""Upper bound on the items that are added to a dict one by one: picklers do so for dicts with one item."""


def _after_length(prefix: bytes, size_bytes: int, lengths: range) -> bytes:
    """Pattern of some bytes after their number, which is a little-endian integer of `size_bytes`."""
    heads = (re.escape(prefix + length.to_bytes(size_bytes, "little")) for length in lengths)
    return b"|".join(head + b".{%d}" % length for head, length in zip(heads, lengths, strict=True))


_INTEGER = rb"(?:K.|M..|J.{4}|" + _after_length(b"\x8a", 1, range(9)) + rb"|\x8a\x09.{8}\x00)"
"""BININT1, BININT2, BININT, and LONG1 of up to 64 bits."""
_SHORT = range(25)
"""Lengths of the strings that `_VALUE` covers."""
_MEMO = rb"(?:\x94|q.)"
_VALUE = (
    rb"(?:[hq].|j.{4}"  # BINGET, BINPUT, LONG_BINGET
    rb"|" + _INTEGER + rb"(?:\x85|" + _INTEGER + rb"\x86|" + _INTEGER * 2 + rb"\x87)?+"  # TUPLE1, TUPLE2, TUPLE3
    rb"|[\x94a)\x88\x89N]"  # MEMOIZE, APPEND, EMPTY_TUPLE, NEWTRUE, NEWFALSE, NONE
    rb"|" + _after_length(b"\x8c", 1, _SHORT) + rb"|" + _after_length(b"X", 4, _SHORT) + rb"|G.{8})"  # BINFLOAT
)
_NOT_FILLED = rb"(?!(?:\x94|q.|r.{4})?\()"
_LIST = rb"\](?:" + _NOT_FILLED + rb"|" + _MEMO + rb"?+(?:\(" + _VALUE + rb"*+e)++(?!\())"  # filled in batches
_DICT = (
    rb"\}(?:" + _NOT_FILLED + rb"|" + _MEMO + rb"?+\((?:" + _VALUE + rb"|" + _LIST + rb"){0,%d}+u(?!\())" % _MOST_VALUES
)
_RUN = re.compile(rb"(?:" + _VALUE + rb"|" + _LIST + rb"|" + _DICT + rb")*+", re.DOTALL)
"""Values, with the lists of values and the dicts of both. Quantifiers are possessive: a match never backtracks."""
_TOKEN = re.compile(_VALUE + rb"|" + _LIST + rb"|" + _DICT, re.DOTALL)
_OPENED = re.compile(rb"[}\]](?:\x94|q.|r(.{4}))?+\(", re.DOTALL)
"""A new dict or list, its memo entry, and the MARK after which it is filled."""
_LENGTH_BYTES = {0x8C: 1, 0x58: 4, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x95: 8}
"""Instruction → bytes of its length field, which precedes a string, bytes or a frame."""
_LONGEST = 32
"""Upper bound on the bytes of any other instruction, and of a string in `_VALUE`."""
_FRAME, _LONG_BINPUT, _STOP, _MARK, _SETITEM, _SETITEMS, _APPENDS = 0x95, 0x72, 0x2E, 0x28, 0x73, 0x75, 0x65
_TUPLES, _LONGS = b"t\x85\x86\x87", b"\x8a\x8b"
_IN_LIST, _ELSEWHERE = -1, -2
"""In place of the number of values in a dict: the MARK is that of a list, or of something that is refused."""
_INSTRUCTIONS = {ord(op.code): op.name for op in pickletools.opcodes}
_ASKS = {
    **dict.fromkeys(("REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX"), "to call a function"),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"), "for a class or function"),
    **dict.fromkeys(("PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"), "for something outside the file"),
}
_NAMING = ("GLOBAL", "INST", "STACK_GLOBAL")
_TELL_EVERY = 2**20


def scan(data: bytes, progress: Progress) -> None:
    """Check the instructions of a pickle.

    Raises:
        AsksForName: the first instruction that is not allowed names a class or function.
        Refused: the file is no pickle, or an instruction is not allowed; the message describes the first one.
    """
    _check_beginning(data)
    end, at, told, memo, single = len(data), 2, 0, 0, 0
    filled = list[int]()  # values in each dict that is being filled, innermost last
    while True:
        begin, at = at, _RUN.match(data, at).end()  # type: ignore[union-attr]  # it also matches the empty string
        if filled and filled[-1] >= 0 and at > begin:
            filled[-1] += _count(data, begin, at)
        if filled and filled[-1] > _MOST_VALUES:
            raise Refused(f"a dict of more than {_MOST_VALUES // 2:,} items (byte {at:,}): no snapshot has one")
        if at - told > _TELL_EVERY:
            told = at
            progress("checking", at, end)
        if at >= end:
            raise _truncated(end)
        code, opened = data[at], _OPENED.match(data, at)
        if opened:
            memo = _memo_after(memo, opened[1], at)
            filled.append(0 if data[at : at + 1] == b"}" else _IN_LIST)
            at = opened.end()
        elif code == _STOP:
            return
        elif code == _MARK:
            filled.append(_ELSEWHERE)
            at += 1
        elif code in (_SETITEMS, _APPENDS):
            if not filled or (filled[-1] >= 0) != (code == _SETITEMS) or filled[-1] == _ELSEWHERE:
                raise Refused(f"a damaged pickle: byte {at:,} fills nothing that was begun")
            if data[at + 1 : at + 2] == b"(":  # picklers fill large dicts and lists in batches
                at += 2
            else:
                filled.pop()
                at += 1
        elif code == _SETITEM and single < _MOST_SINGLE:
            single, at = single + 1, at + 1
        elif code in _LENGTH_BYTES:
            begin = at + 1 + _LENGTH_BYTES[code]
            length = int.from_bytes(data[at + 1 : begin], "little")
            if begin + length > end:
                raise _truncated(end)
            at = begin if code == _FRAME else begin + length
            if filled and filled[-1] >= 0 and code != _FRAME:
                filled[-1] += 1
        elif code == _LONG_BINPUT:
            memo, at = _memo_after(memo, data[at + 1 : at + 5], at), at + 5
        else:
            raise _refusal(data, at)


def _count(data: bytes, begin: int, end: int) -> int:
    """The values in a run, or a larger number for a short one."""
    return end - begin if end - begin < _MOST_VALUES // 16 else sum(1 for _ in _TOKEN.finditer(data, begin, end))


def _memo_after(memo: int, index: bytes | None, at: int) -> int:
    """The number of memo entries after one is stored under an index; None: under the next one, or below 256."""
    place = 0 if index is None else int.from_bytes(index, "little")
    if place > max(memo, 2**8):  # picklers number memo entries in order, and BINPUT reaches 255
        raise Refused(f"a damaged pickle: byte {at:,} stores a memo entry under number {place:,}")
    return max(memo, place + 1)


def _check_beginning(data: bytes) -> None:
    if not data:
        raise Refused("the file is empty")
    if data[:4] == b"PK\x03\x04":
        raise Refused(
            "a zip archive, as torch.save and memscope write: expected a pickle written by "
            "torch.cuda.memory._dump_snapshot (memscope's own traces need no import)"
        )
    if data[:2] == b"\x1f\x8b":
        raise Refused("compressed with gzip: unpack it with gunzip first")
    if data[0] != 0x80:
        raise Refused("not a pickle of protocol 2 to 5, such as torch.cuda.memory._dump_snapshot writes")
    if len(data) < 2:
        raise _truncated(len(data))
    if data[1] not in _PROTOCOLS:
        raise Refused(f"a pickle of protocol {data[1]}: expected 2 to 5")


def _truncated(size_bytes: int) -> Refused:
    return Refused(f"a truncated pickle: its content continues beyond its last byte, number {size_bytes:,}")


def _refusal(data: bytes, at: int) -> Refused:
    """The reason why the instruction at a position is not allowed."""
    tail = data[at : at + _LONGEST]
    name = _INSTRUCTIONS.get(data[at])
    if name is None:
        return Refused(f"a damaged pickle: byte {at:,} is not an instruction ({data[at]:#04x})")
    if at + _LONGEST > len(data) and _RUN.match(tail + bytes(_LONGEST)).end() > len(tail):  # type: ignore[union-attr]
        return _truncated(len(data))
    if data[at] in _TUPLES:
        return Refused(f"a tuple of other than one to three integers (byte {at:,}): no snapshot has one")
    if data[at] in _LONGS:
        return Refused(f"an integer of more than 64 bits (byte {at:,}): no snapshot has one")
    if data[at] == _SETITEM:
        return Refused(f"more than {_MOST_SINGLE:,} dicts with one item: no snapshot has so many")
    kind = AsksForName if name in _NAMING else Refused
    asks = _ASKS.get(name, "for more than dicts, lists, tuples, strings, bytes, numbers, True, False and None")
    return kind(refused(f"{asks} ({name}, byte {at:,})"))


def refused(asks: str) -> str:
    """The message for a file that asks for more than plain data."""
    return f"refused: the file asks {asks}, but a snapshot holds plain data only. Nothing in it was executed"
