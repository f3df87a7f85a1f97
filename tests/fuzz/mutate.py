"""Changes of files: of bytes, and of the values in a zip archive of arrays, a JSON or TOML text, or a pickle.

Every change follows from the state of a `random.Random` alone, so that a finding can be made again from its number.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

__all__ = ["Mutator", "json_text", "npz", "pickled", "raw", "words"]

Mutator = Callable[[Random, bytes], bytes]
_NUMBERS = (0, 1, -1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400)
_FLOATS = (0.0, -1.0, 0.5, 1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "é",
    "\ud800",
    "\0",
    "a.b",
    "../../x",
    "9" * 400,
    "k" * 20_000,
    "[red]",
    "\x1b[31m",
    "40Gb",
    "%s",
    "{0}",
)
_SNIPPETS = (
    b"cos\nsystem\n(X\x04\x00\x00\x00true\x85R", b"\x8c\x02os\x8c\x06system\x93", b"R", b"\x81", b"\x83\x01\x00", b"b",
    b"o",
    b"))\x86", b"h\x00h\x00\x86", b"u", b"s", b"e", b"(", b"0", b"2", b"}", b"]", b"N", b"\x94", b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\x3f", b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"\x8a\xff", b"\x8b\xff\xff\xff\x7f",
)  # fmt: skip


def raw(rng: Random, data: bytes) -> bytes:
    """One to four changes of bytes: flipped, set, cut out, inserted, doubled, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(found)
        at = rng.randrange(size + 1)
        match rng.randrange(8):
            case 0 if size:
                found[rng.randrange(size)] ^= 1 << rng.randrange(8)
            case 1 if size:
                found[rng.randrange(size)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del found[at : at + rng.randint(1, 16)]
            case 3:
                found[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                found[at:at] = found[at : at + rng.randint(1, 64)] * rng.choice((1, 2, 100))
            case 5:
                del found[at:]
            case 6 if size > 4:
                place = rng.randrange(size - 4)
                found[place : place + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, size)).to_bytes(4, "little")
            case _:
                other = rng.randrange(size + 1)
                found[at:at] = found[other : other + rng.randint(1, 32)]
    return bytes(found)


def words(rng: Random, data: bytes) -> bytes:
    """A change of one word or line of a text, or of its bytes."""
    if rng.random() < 0.4:
        return raw(rng, data)
    parts = re.split(rb"([\s=,:\[\]{}+]+)", data)
    at = rng.randrange(len(parts))
    match rng.randrange(5):
        case 0:
            parts[at] = str(rng.choice((*_NUMBERS, *_FLOATS))).encode()
        case 1:
            parts[at] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")
        case 2:
            parts[at : at + 1] = []
        case 3:
            parts[at:at] = parts[rng.randrange(len(parts)) :][:9]
        case _:
            parts[at] = rng.choice((b"[" * 2000, b"{a=" * 500, b"a." * 400, b"1e999", b"0x" + b"f" * 900, b"\xff"))
    return b"".join(parts)


def _value(rng: Random) -> Any:
    """A value that a file should not have."""
    nested: Any = [] if rng.random() < 0.5 else {}
    for _ in range(rng.choice((1, 3, 70, 900))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    small: Any = rng.choice((None, True, False, [], {}, [1, 2], {"a": 1}, [[]], ["x"]))
    return rng.choice((rng.choice(_NUMBERS), rng.choice(_FLOATS), rng.choice(_TEXTS), small, nested))


def _changed(rng: Random, tree: Any, value: Callable[[Random], Any] = _value) -> Any:
    """A copy of nested dicts and lists with one value changed, removed, doubled or exchanged."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        if type(tree) in (int, float) and rng.random() < 0.5:
            return tree + rng.choice((1, -1, tree))
        return value(rng)
    found: Any = tree.copy()
    keys = list(found) if isinstance(found, dict) else range(len(found))
    key = rng.choice(keys)
    match rng.randrange(12):
        case 0:
            del found[key]
        case 1 if isinstance(found, list):
            found.insert(rng.randrange(len(found) + 1), found[key])
        case 1:
            found[rng.choice(_TEXTS)] = found[key]
        case 2:
            other = rng.choice(keys)
            found[key], found[other] = found[other], found[key]
        case 3 if isinstance(found, list):
            found[:] = found * rng.choice((0, 2, 30)) if len(found) < 200 else found[::-1]
        case _:
            found[key] = _changed(rng, found[key], value)
    return found


def json_text(rng: Random, data: bytes) -> bytes:
    """A change of a value in a JSON text, or of its bytes."""
    if rng.random() < 0.3:
        return raw(rng, data)
    try:
        tree = json.loads(data)
        for _ in range(rng.randint(1, 2)):
            tree = _changed(rng, tree)
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return raw(rng, data)


def npz(rng: Random, data: bytes) -> bytes:
    """A change of one array of an archive: its head, its values or its JSON; or of the members; or of the bytes."""
    if rng.random() < 0.25:
        return raw(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # a seed that is no archive
        return raw(rng, data)
    if not members:
        return raw(rng, data)
    compression = rng.choice((zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    name = "header.npy" if "header.npy" in members and rng.random() < 0.5 else rng.choice(list(members))
    match rng.randrange(10):
        case 0:
            del members[name]
        case 1:
            members[rng.choice(list(members))] = members[name]
        case 2:
            members[name] = raw(rng, members[name])
        case 3:
            members[name] = re.sub(
                rb"'descr': '[^']*'|'shape': \([^)]*\)", lambda found: _head(rng, found[0]), members[name], count=2
            )
        case _:
            members[name] = _array(rng, members[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for member, content in members.items():
            info = zipfile.ZipInfo(member)  # of 1980, not of now
            info.compress_type = compression
            archive.writestr(info, content)
    return raw(rng, packed.getvalue()) if rng.random() < 0.05 else packed.getvalue()


def _head(rng: Random, part: bytes) -> bytes:
    """Another type or shape, of any length: NumPy pads the head with spaces, and reads it as it is."""
    if rng.random() < 0.3:
        return part
    if part.startswith(b"'shape'"):
        return b"'shape': (%s)" % rng.choice((b"", b"0,", b"1,", b"9999999999,", b"-1,", b"2, 2", b"1e9,", b"2**40,"))
    return b"'descr': '%s'" % rng.choice(
        (b"|i1", b"<i8", b">i4", b"|u1", b"<f8", b"|O", b"<U9", b"<M8[s]", b"|V9999999")
    )


def _array(rng: Random, member: bytes) -> bytes:
    try:
        array = np.load(io.BytesIO(member), allow_pickle=False)
        if array.dtype.kind == "U":
            array = np.array(json_text(rng, str(array).encode()).decode("utf-8", "replace"))
        else:
            array = array.astype(np.int64)
            match rng.randrange(4):
                case 0:
                    array = array[: rng.randrange(array.size + 1)]
                case 1:
                    array = np.concatenate([array, array[: rng.randint(1, 3)]])
                case _ if array.size:
                    for _ in range(rng.randint(1, 3)):
                        number = rng.choice((*_NUMBERS[:12], int(rng.choice(array)) + rng.choice((-1, 1))))
                        array[rng.randrange(array.size)] = number
    except Exception:  # no array
        return raw(rng, member)
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


def pickled(rng: Random, data: bytes) -> bytes:
    """A change of a value of a snapshot; of its instructions; or of its bytes."""
    chance = rng.random()
    if chance < 0.3:
        return raw(rng, data)
    if chance < 0.5:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(_SNIPPETS) * rng.choice((1, 1, 1, 40, 3000)) + data[at:]
    try:
        tree = _Plain(io.BytesIO(data)).load()
        for _ in range(rng.randint(1, 3)):
            tree = _changed(rng, tree, _plain_value)
        return pickle.dumps(tree, rng.choice((2, 3, 4, 5)))
    except Exception:  # a seed that is no plain data
        return raw(rng, data)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def _plain_value(rng: Random) -> Any:
    if rng.random() < 0.7:
        return _value(rng)
    shared: Any = rng.choice(([1, 1], (0, 0), {"a": 1}, {"b": 2, "c": 3}))
    for _ in range(rng.choice((2, 60))):
        shared = [shared, shared] if rng.random() < 0.7 else {"a": shared, "b": shared}
    return rng.choice((shared, (1, 2), ("a",), b"bytes", {1: 2}, {(1, 2): 3}, {0.5: 1}, ((), ())))
