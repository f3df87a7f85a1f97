"""A trace of a stranger: what it unpacks to is bounded, and its metadata is checked once, when it is loaded."""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import TraceBuilder

from memscope.errors import TraceFileError
from memscope.trace import CATEGORIES, Trace

MIB = 2**20


def small(**meta: Any) -> Trace:
    """Two allocations in one step; four events."""
    build = TraceBuilder()
    build.phase("setup")
    kept = build.new("parameter", 512, module="lin")
    build.phase("forward", 0)
    build.free(build.new("activation", 1024, module="lin", op="mm"), kept)
    return build.trace(meta)


def refusal(path: Path) -> str:
    """The error for a file, without the path at its start."""
    with pytest.raises(TraceFileError) as caught:
        Trace.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ").removeprefix("a damaged memscope trace: ")


def packed(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """The file of the small trace with members changed, or left out where `change` returns None."""
    with zipfile.ZipFile(small().save(path, overwrite=True)) as before:
        members = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w", compression) as after:
        for name, content in members.items():
            changed = change(name.removesuffix(".npy"), content)
            if changed is not None:
                after.writestr(name, changed)
    return path


def declared(shape: tuple[int, ...], dtype: str = "|i1", data: bytes = b"") -> bytes:
    """An array that declares a shape, whatever its data."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
    return head.getvalue() + data


def peak_while(work: Callable[[], Any]) -> int:
    """Peak bytes of Python's and NumPy's memory while a function runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Size.


def test_an_unknown_array_is_never_unpacked(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", lambda name, content: content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("more.npy", declared((256 * MIB,), data=bytes(256 * MIB)))
    assert peak_while(lambda: Trace.load(path)) < 8 * MIB


@pytest.mark.parametrize(
    ("name", "shape"), [("born", (2**31,)), ("mark_event", (2**31,)), ("reserved", (10**15,)), ("size", (2**40,))]
)
def test_a_column_that_declares_more_than_a_trace_holds_is_refused_unread(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = packed(tmp_path / "a.npz", lambda own, content: declared(shape) if own == name else content)
    told = list[str]()
    assert peak_while(lambda: told.append(refusal(path))) < 8 * MIB
    assert "it unpacks to" in told[0]
    assert "has at most" in told[0]


def test_a_header_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    head = declared((), "<U300000000")  # four bytes a character
    path = packed(tmp_path / "a.npz", lambda name, content: head if name == "header" else content)
    # The bound: 64 MiB, and 200 bytes for each of the two allocations.
    assert refusal(path) == "it unpacks to 1.12 GiB, and one of 2 allocations has at most 64.0 MiB"


def test_columns_that_declare_another_length_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", lambda name, content: declared((3,), data=b"abc") if name == "op" else content)
    assert refusal(path) == "its column op has 3 values: expected 2, as in size"


@pytest.mark.parametrize("data", [b"\0", b"\0" * 3], ids=["less", "more"])
def test_a_column_of_another_length_than_it_declares_is_refused(data: bytes, tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", lambda name, content: declared((2,), data=data) if name == "op" else content)
    assert refusal(path) == "not a memscope trace, or truncated: expected a file written by memscope profile"


@pytest.mark.parametrize(("method", "number"), [(zipfile.ZIP_BZIP2, 12), (zipfile.ZIP_LZMA, 14)])
def test_compression_that_may_take_any_memory_is_refused(method: int, number: int, tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", lambda name, content: content, method)
    assert refusal(path) == f"header is compressed by method {number}: expected deflate"


def test_halves_of_characters_in_names_can_be_printed(tmp_path: Path) -> None:
    names = json.dumps(
        {"format": "memscope-trace", "schema_version": 1, "modules": ["\ud800x", "é"], "ops": ["", "😀"]}
    )
    header = np.array(names[:-1] + ', "meta": {}}')
    content = declared((), header.dtype.str, header.tobytes())
    trace = Trace.load(packed(tmp_path / "a.npz", lambda name, old: content if name == "header" else old))
    assert trace.modules == ("?x", "é")
    assert trace.ops == ("", "😀")


# Metadata.

WHOLE: dict[str, Any] = {
    "target": "toy",
    "strategies": ["lora", "ga:steps=2"],
    "settings": {"seq_len": 8, "rates": [0.1, None], "deep": {"a": {"b": [1]}}},
    "device": {"name": "a100-40gb", "simulated": True},
    "versions": {"torch": "2.13.0", "python": "3.11.2", "transformers": "5.0"},
    "notes": ["torch.compile was ignored"],
    "command": {"target": "toy", "preset": None, "settings": {"seq_len": "8"}},
    "samples_per_step": None,
    "parameters": {"total": 10, "trainable": 0},
    "flops": [3],
    "seconds": None,
    "cost": {"estimate": True, "assumed": [], "columns": ["step"], "rows": [[0, 0, 1, 0, 1, 1, 2, 3, 0.5]]},
    "capacity": 2**34,
    "context": 2**28,
    "allocator": {"settings": {"expandable_segments": True, "of_a_later_version": 7}, "cache_emptied": [1]},
    "peak_reserved": 2**21,
    "out_of_memory": {
        "event": 4, "step": 0, "micro_batch": 0, "phase": "forward", "module": "lin", "op": "mm", "category": None,
        "requested": 1, "allocated": 2, "reserved": 3, "largest_free": 4, "limit": 5,
        "by_category": dict.fromkeys(CATEGORIES, 0),
    },
    "of_a_later_version": {"anything": [1, {"else": None}]},
}  # fmt: skip


def test_metadata_that_memscope_writes_is_read_with_fields_of_later_versions(tmp_path: Path) -> None:
    assert Trace.load(small(**WHOLE).save(tmp_path / "a.npz")).meta == WHOLE


def changed(where: str, value: Any) -> dict[str, Any]:
    """The whole metadata with one field changed; `where` is its path, such as `device.name`."""
    meta = json.loads(json.dumps(WHOLE))
    *parents, last = where.split(".")
    at = meta
    for parent in parents:
        at = at[parent]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return meta  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("target", 3, "meta.target is 3: expected a string"),
        ("strategies", "lora", 'meta.strategies is "lora": expected a list'),
        ("strategies", ["lora", {}], "meta.strategies[1] is an empty object: expected a string"),
        ("settings", [1], "meta.settings is a list of 1: expected an object"),
        ("device", "gpu", 'meta.device is "gpu": expected an object'),
        ("device.simulated", None, "meta.device has no simulated"),
        ("device.simulated", 1, "meta.device.simulated is 1: expected true or false"),
        ("versions.torch", 2.13, "meta.versions[...]: expected a string"),
        ("notes", "x", 'meta.notes is "x": expected a list'),
        ("command.preset", 3, "meta.command.preset is 3: expected a string or null"),
        ("parameters.total", -1, "meta.parameters.total is -1: expected a whole number >= 0"),
        ("flops", [1.5], "meta.flops[0] is 1.5: expected a whole number"),
        ("flops", [10**100],
         f"meta.flops[0] is a number of more than 60 digits: expected a whole number <= {2**62 - 1}"),
        ("seconds", [float("nan")], "meta.seconds[0] is nan: expected a number >= 0.0"),
        ("seconds", [float("inf")], "meta.seconds[0] is inf: expected a number <= 1000000000000.0"),
        ("cost", {}, "meta.cost has no assumed"),
        ("cost.rows", [[1, 2]], "meta.cost.rows[0] is a list of 2: expected a list of length 9"),
        ("capacity", "16GB", 'meta.capacity is "16GB": expected a whole number or null'),
        ("allocator.settings.expandable_segments", "yes",
         'meta.allocator.settings.expandable_segments is "yes": expected true or false'),
        ("peak_reserved", 2**62, f"meta.peak_reserved is {2**62}: expected a whole number <= {2**62 - 1}"),
        ("out_of_memory.phase", "forwards",
         'meta.out_of_memory.phase is "forwards": expected one of the names that memscope writes'),
        ("out_of_memory.by_category", {"weights": 1},
         "a key of meta.out_of_memory.by_category: expected one of the names that memscope writes"),
        ("later", json.loads("[" * 70 + "]" * 70), "meta.later is nested more than 64 deep"),
        ("settings.deep", json.loads("[" * 70 + "]" * 70), "meta.settings is nested more than 64 deep"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_was_found_and_expected(
    where: str, value: Any, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(TraceFileError) as caught:
        small(**changed(where, value)).save(path)
    assert str(caught.value) == f"{path}: cannot be written: {told}"
    assert not path.exists()
    assert refusal(written(changed(where, value), path)) == told


def written(meta: dict[str, Any], path: Path) -> Path:
    """A file with any metadata."""
    trace = small()
    text = {"format": "memscope-trace", "schema_version": 1, "modules": trace.modules, "ops": trace.ops, "meta": meta}
    header = np.array(json.dumps(text))
    content = declared((), header.dtype.str, header.tobytes())
    return packed(path, lambda name, old: content if name == "header" else old)


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        (changed("flops", []) | {"flops": [1], "x": 1}, ""),
        (changed("context", 2**35), "meta.context is 34359738368: expected at most meta.capacity, 17179869184"),
        (changed("out_of_memory.event", 5), "meta.out_of_memory.event is 5: expected at most 4, the number of events"),
        (changed("out_of_memory.by_category", {}), "meta.out_of_memory.by_category: expected every category"),
        (changed("device", None), "meta has no device, which meta.out_of_memory needs"),
        (changed("capacity", None), "meta has no capacity, which meta.allocator needs"),
        (changed("cost.rows", [[0, 0, 9, 0, 0, 1, 1, 1, 0.0]]),
         "meta.cost.rows[0][2] is 9: expected the number of a phase, 0 to 8"),
        (changed("cost.rows", [[0, 0, 0, 0, 0, 1, 1, 1, 0.0], [0, 0, 0, 0, -1, 1, 1, 1, 0.0]]),
         "meta.cost.rows[1][4] is -1: expected the number of an operator, 0 to 1"),
    ],
)  # fmt: skip
def test_metadata_that_contradicts_the_columns_is_refused(meta: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = written(meta, tmp_path / "a.npz")
    assert (refusal(path) if told else Trace.load(path).meta["x"]) == (told or 1)


def test_reserved_bytes_need_their_peak(tmp_path: Path) -> None:
    trace = dataclasses.replace(small(), reserved=np.zeros(4, dtype=np.int64))
    assert (
        refusal(trace.save(tmp_path / "a.npz")) == "meta has no peak_reserved, which a trace with reserved bytes needs"
    )
