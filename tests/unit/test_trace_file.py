"""Trace files: round trips, writing, and errors for files that are not traces."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from traces import TraceBuilder, random_traces

from memscope.errors import TraceFileError
from memscope.trace import SCHEMA_VERSION, Trace


def small() -> Trace:
    """Three allocations, four events, two phases."""
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 2**40, module="lin")
    build.phase("forward", 0)
    passing = build.new("temporary", 30, module="act", op="add")
    build.new("activation", 40, module="lin", op="mm")
    build.free(passing)
    return build.trace({"target": "linear", "flops": [10]})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Trace):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Trace))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one == other)


def with_host() -> Trace:
    """The small trace, with a copy of its weights in a block of pinned memory."""
    build = TraceBuilder()
    build.phase("forward", 0)
    build.new("parameter", 2**40, module="lin")
    trace = build.trace()
    host = dataclasses.replace(trace, reserved=trace.size, modules=small().modules, ops=small().ops)
    return dataclasses.replace(small(), host=host)


def stored(path: Path, **changed: Any) -> Path:
    """A file of the small trace with some of its arrays changed, or left out where the value is None."""
    small().save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def header(**changed: Any) -> Any:
    fields = {"format": "memscope-trace", "schema_version": 1, "modules": ["lin", "act"], "ops": ["", "add", "mm"]}
    return np.array(json.dumps(fields | {"meta": {}} | changed))


def refusal(path: Path) -> str:
    """The error message for a file that is not a trace, without the path at its start."""
    with pytest.raises(TraceFileError) as caught:
        Trace.load(path)
    start, text = str(caught.value)[: len(str(path)) + 2], str(caught.value)[len(str(path)) + 2 :]
    assert start == f"{path}: "
    return text


def test_memory_of_the_host_that_does_not_hold_together_is_refused(tmp_path: Path) -> None:
    path = with_host().save(tmp_path / "a.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | {"host_category": np.array([99])})
    assert refusal(path) == ("a damaged memscope trace: its host memory: its column category points outside its table")
    np.savez(path, **{name: array for name, array in arrays.items() if name != "host_op"})
    assert refusal(path) == "a damaged memscope trace: it has no column host_op"


@given(random_traces())
@example(TraceBuilder().trace())
@example(with_host())
def test_saved_trace_comes_back_the_same(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = trace.save(Path(folder) / "a.npz")
        loaded = Trace.load(path)
    assert same(loaded, trace)
    assert {loaded.size.dtype, loaded.mark_event.dtype} == {np.dtype(np.int64)}


def test_reserved_bytes_after_each_event_come_back(tmp_path: Path) -> None:
    meta = {"peak_reserved": 2**41}
    trace = dataclasses.replace(small(), reserved=np.array([2**41, 2**41, 2**41, 2**41]), meta=meta)
    assert Trace.load(trace.save(tmp_path / "a.npz")).reserved.tolist() == [2**41] * 4


@pytest.mark.parametrize("size", [127, 128, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**62])
def test_sizes_around_each_integer_type_stay_exact(size: int, tmp_path: Path) -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", size)
    assert Trace.load(build.trace().save(tmp_path / "a.npz")).size.tolist() == [size]


def test_path_is_used_as_given(tmp_path: Path) -> None:
    # NumPy itself would write to run.trace.npz.
    assert small().save(str(tmp_path / "run.trace")) == tmp_path / "run.trace"
    assert same(Trace.load(str(tmp_path / "run.trace")), small())


def test_existing_file_is_kept_unless_overwriting_is_requested(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("mine")
    with pytest.raises(TraceFileError, match=r"a\.npz exists already: choose another name, or overwrite it with -f"):
        small().save(path)
    assert path.read_text() == "mine"
    small().save(path, overwrite=True)
    assert same(Trace.load(path), small())


@contextmanager
def files_up_to(most_bytes: int) -> Iterator[None]:
    """Let this process write no file larger than this: the nearest thing to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_broken_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with files_up_to(16), pytest.raises(TraceFileError) as caught:
        small().save(tmp_path / "a.npz")
    assert str(caught.value) == f"{tmp_path / 'a.npz'}: cannot be written ({os.strerror(errno.EFBIG)})"
    assert list(tmp_path.iterdir()) == []


def test_broken_overwrite_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("old")
    with files_up_to(16), pytest.raises(TraceFileError, match="cannot be written"):
        small().save(path, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "chmod", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small().save(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match=r"runs/a\.npz: cannot be written \(No such file or directory\)"):
        small().save(tmp_path / "runs" / "a.npz")


def test_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(TraceFileError, match=r"runs: cannot be written \(Is a directory\)"):
        small().save(tmp_path / "runs", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = small().save(tmp_path / "a.npz")
    finally:
        left = os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert left == mask


def test_meta_beyond_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    trace = dataclasses.replace(small(), meta={"settings": {"data": Path("a.json")}})
    with pytest.raises(TraceFileError, match=r"cannot be written: meta has a value that is not JSON .*PosixPath"):
        trace.save(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


FOREIGN = "not a memscope trace, or truncated: expected a file written by memscope profile"
INTEGERS = ": expected integers of shape [n]"
NO_HEADER = "not a memscope trace: it has no memscope header"


def test_missing_file_and_folder_have_different_errors(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.npz") == "no such file"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"


@pytest.mark.parametrize("content", [b"", b"hello there\n", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY"])
def test_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    assert refusal(tmp_path / "a.npz") == FOREIGN


def test_single_array_of_numpy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    assert refusal(tmp_path / "a.npy") == FOREIGN


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.arange(3)}, {"header": np.arange(3)}, {"header": np.array('"memscope-trace"')},
        {"header": np.array("memscope-trace")}, {"header": header(format="other")},
        {"header": header(schema_version="x")},
    ],
    ids=["no header", "numbers", "text", "not JSON", "other format", "no version"],
)  # fmt: skip
def test_arrays_of_something_else_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert refusal(tmp_path / "a.npz") == NO_HEADER


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_pickled_is_ever_executed(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(sprung)], dtype=object)
    plain = tmp_path / "plain.npz"
    plain.write_bytes(pickle.dumps(Trap(sprung)))
    assert refusal(plain) == FOREIGN
    assert refusal(stored(tmp_path / "column.npz", size=trap)) == FOREIGN
    assert refusal(stored(tmp_path / "header.npz", header=trap)) == FOREIGN
    assert same(Trace.load(stored(tmp_path / "more.npz", more=trap)), small())  # unknown arrays are not read
    assert not sprung.exists()
    pickle.loads(plain.read_bytes())
    assert sprung.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small().save(tmp_path_factory.mktemp("saved") / "a.npz").read_bytes()


@given(data=st.data())
def test_truncated_file_is_refused(data: st.DataObject, saved: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(saved[: data.draw(st.integers(0, len(saved) - 1))])
        assert refusal(path) == FOREIGN


@given(data=st.data())
def test_flipped_byte_is_refused_or_changes_nothing(data: st.DataObject, saved: bytes) -> None:
    position, bits = data.draw(st.integers(0, len(saved) - 1)), data.draw(st.integers(1, 255))
    broken = saved[:position] + bytes([saved[position] ^ bits]) + saved[position + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(broken)
        with suppress(TraceFileError):
            assert same(Trace.load(path), small())


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    # Its columns may differ: only the version is read.
    path = stored(tmp_path / "a.npz", header=header(schema_version=SCHEMA_VERSION + 1, modules="other"), size=None)
    assert refusal(path) == "has trace schema 3; this memscope reads schemas up to 2: upgrade memscope"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": None}, "it has no column size"),
        ({"born": None, "op": None}, "it has no column op"),
        ({"size": np.array([1.0, 2.0, 3.0])}, f"its column size is float64 of shape [3]{INTEGERS}"),
        ({"size": np.array([[1], [2], [3]])}, f"its column size is int64 of shape [3, 1]{INTEGERS}"),
        ({"size": np.array(3)}, f"its column size is int64 of shape []{INTEGERS}"),
        ({"header": header(modules="lin")}, 'modules is "lin": expected a list'),
        ({"header": header(modules=["lin", 3])}, "modules[1] is 3: expected a string"),
        ({"header": header(ops=None, meta=[])}, "ops is None: expected a list"),
        ({"born": np.array([1, 2])}, "its column born has 2 values: expected 3, as in size"),
        ({"mark_step": np.array([-1])}, "its column mark_step has 1 values: expected 2, as in mark_event"),
        ({"reserved": np.array([1, 2, 3])}, "its column reserved has 3 values: expected 4, or none"),
        ({"reserved": np.array([1, 2, -3, 4])}, "its column reserved has a negative size"),
        ({"size": np.array([2**62, 2**62, 1])}, "its column size has sizes that no device has"),
        ({"category": np.array([0, 7, 10])}, "its column category points outside its table"),
        ({"category": np.array([0, -1, 5])}, "its column category points outside its table"),
        ({"phase": np.array([0, 9, 1])}, "its column phase points outside its table"),
        ({"module": np.array([0, 2, 0])}, "its column module points outside its table"),
        ({"op": np.array([0, 3, 0])}, "its column op points outside its table"),
        ({"mark_phase": np.array([0, 9])}, "its column mark_phase points outside its table"),
        ({name: np.array([], int) for name in ("mark_event", "mark_phase", "mark_step", "mark_micro_batch")},
         "it has allocations but no phase"),
        ({"mark_event": np.array([1, 0])}, "its phases are out of order"),
        ({"mark_event": np.array([0, 5])}, "its phases are out of order"),
        ({"size": np.array([1, -1, 1])}, "its column size has a negative size"),
        # As saved: born at 0, 1, 2; the second freed at 3.
        ({"born": np.array([0, 1, 1])}, "its events are not one unbroken sequence"),
        ({"born": np.array([0, 1, 4])}, "its events are not one unbroken sequence"),
        ({"born": np.array([1, 0, 2])}, "its events are not one unbroken sequence"),
        ({"born": np.array([0, 1, 3])}, "its events are not one unbroken sequence"),
        ({"freed": np.array([-1, 4, -1])}, "its events are not one unbroken sequence"),
        ({"freed": np.array([-1, 3, 3])}, "its events are not one unbroken sequence"),
        ({"born": np.array([0, 2, 3]), "freed": np.array([-1, 1, -1])}, "its events are not one unbroken sequence"),
    ],
)  # fmt: skip
def test_inconsistent_trace_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(stored(tmp_path / "a.npz", **changed)) == f"a damaged memscope trace: {message}"


def test_the_file_that_is_damaged_above_is_a_trace(tmp_path: Path) -> None:
    loaded = Trace.load(stored(tmp_path / "a.npz", header=header(meta=small().meta)))
    assert same(loaded, small())
