"""Traces for other tools: the files can be read by them and hold the content of the trace."""

import csv
import dataclasses
import io
import json
import pickle
import pickletools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from snapshots import dumped
from traces import TraceBuilder, random_traces

from memscope import simulate
from memscope.errors import TraceFileError, UsageError
from memscope.exchange import chrome_trace
from memscope.exchange.chrome_trace import chrome_trace_bytes
from memscope.exchange.tables import csv_bytes, parquet_bytes
from memscope.exchange.torch_reader import import_snapshot
from memscope.exchange.torch_writer import torch_snapshot, torch_snapshot_bytes
from memscope.testing.toy import toy_workload
from memscope.trace import CATEGORIES, PHASES

MIB = 2**20
NUMBERS = (
    "size", "requested", "category", "phase", "step", "micro_batch", "born", "freed", "reserved",
    "mark_event", "mark_phase", "mark_step", "mark_micro_batch",
)  # fmt: skip


def small():
    """A permanent weight, an activation from forward to backward, and a temporary with the same lifetime."""
    builder = TraceBuilder()
    builder.phase("setup")
    builder.new("parameter", 4 * MIB, module="head", op="aten.empty")
    builder.phase("forward", 0)
    activation = builder.new("activation", 3 * MIB, module="head", op="aten.mm")
    builder.phase("backward", 0, 1)
    builder.free(activation)
    return builder.trace({"target": "small"})


@pytest.fixture(scope="module")
def simulated():
    return simulate(lambda: toy_workload())


def differing(ours, theirs):
    """Columns in which two traces differ, modules and operators by name, and "meta"."""
    found = [name for name in NUMBERS if not np.array_equal(getattr(ours, name), getattr(theirs, name))]
    for column, table in (("module", "modules"), ("op", "ops")):
        names = [[getattr(t, table)[code] for code in getattr(t, column)] for t in (ours, theirs)]
        found += [column] if names[0] != names[1] else []
    return found + (["meta"] if dict(ours.meta) != dict(theirs.meta) else [])


# PyTorch's snapshots.


@given(random_traces())
@settings(deadline=None, max_examples=50)
def test_any_trace_comes_back_from_a_torch_snapshot_as_it_was(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("export") / "snapshot.pickle"
    path.write_bytes(torch_snapshot_bytes(trace))
    assert differing(import_snapshot(path), trace) == []


def test_a_trace_read_back_names_the_allocations_at_the_peak_and_their_origin(tmp_path):
    trace = import_snapshot(dumped(torch_snapshot(small()), tmp_path))
    assert trace.peak == (1, 7 * MIB, 0, "forward", 0)
    assert trace.by("category", "module", "op") == {
        ("parameter", "head", "aten.empty"): 4 * MIB,
        ("activation", "head", "aten.mm"): 3 * MIB,
    }
    assert trace.freed.tolist() == [-1, 2]
    assert trace.meta == {"target": "small"}


def test_a_simulated_trace_comes_back_with_its_reserved_memory(simulated, tmp_path):
    trace = import_snapshot(dumped(torch_snapshot(simulated), tmp_path))
    assert differing(trace, simulated) == []
    # From the replay of PyTorch's allocator, in whole segments of 2 MiB: a value that can be lost.
    assert trace.reserved.max() == simulated.meta["peak_reserved"] > 0
    assert not (trace.reserved % (2 * MIB)).any()


def test_reserved_memory_that_a_replay_cannot_give_is_kept(simulated, tmp_path):
    other = dataclasses.replace(simulated, reserved=simulated.reserved + 2 * MIB)
    trace = import_snapshot(dumped(torch_snapshot(other), tmp_path))
    assert differing(trace, other) == []
    assert (trace.reserved - simulated.reserved).tolist() == [2 * MIB] * simulated.events


def test_without_memscopes_additions_the_file_is_a_snapshot_with_the_same_sizes(simulated, tmp_path):
    data = torch_snapshot(simulated)
    del data["memscope"]
    trace = import_snapshot(dumped(data, tmp_path))
    assert np.array_equal(trace.size, simulated.size)
    assert np.array_equal(trace.requested, simulated.requested)
    assert np.array_equal(trace.reserved, simulated.reserved)
    assert np.array_equal(trace.freed, simulated.freed)
    assert trace.meta["size_differences"] == 0


def test_pytorchs_viewer_accepts_it_and_finds_the_same_memory(simulated):
    from torch.cuda import _memory_viz

    data = pickle.loads(torch_snapshot_bytes(simulated))
    for page in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        assert "MemoryViz.js" in page
    # A line of a flame graph: name, space, bytes; <gaps> are the bytes of blocks beyond the request.
    flames = _memory_viz.memory(data, format_flamegraph=lambda lines: lines).splitlines()
    alive = [int(line.rpartition(" ")[2]) for line in flames if "active_allocated" in line and "<gaps>" not in line]
    assert sum(alive) == simulated.requested[simulated.freed < 0].sum()
    assert _memory_viz.trace(data).count("\ndel ") == (simulated.freed >= 0).sum()


def test_the_official_viewers_check_of_all_memory_holds(simulated):
    from torch.cuda import _memory_viz

    reserved = int(simulated.reserved[-1])
    assert f"total_reserved: {_memory_viz.Bytes(reserved)}" in _memory_viz.segsum(torch_snapshot(simulated))


def test_it_uses_only_instructions_that_the_viewers_page_supports(simulated):
    # All constants of `unpickle` in torch/utils/viz/MemoryViz.js (PyTorch 2.6), which reads protocols 2 to 4.
    known = """
        APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT EMPTY_LIST EMPTY_TUPLE
        FRAME LIST LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE PROTO SETITEM SETITEMS
        SHORT_BINUNICODE STOP TUPLE TUPLE1 TUPLE2 TUPLE3
    """
    data = torch_snapshot_bytes(simulated)
    assert {op.name for op, _, _ in pickletools.genops(data)} <= set(known.split())
    assert data[:2] == b"\x80\x04"


def test_the_viewer_colors_by_category_and_finds_the_category_it_would_fail_to_add(simulated):
    # `annotate_snapshot` in MemoryViz.js appends "unknown" to a misspelled list if no entry has this category.
    told = {entry["category"] for entry in torch_snapshot(simulated)["device_traces"][0] if "category" in entry}
    assert told == {CATEGORIES[code] for code in np.unique(simulated.category)} | {"unknown"}


def test_the_stack_of_an_allocation_holds_its_columns_in_the_trace():
    alloc = [entry for entry in torch_snapshot(small())["device_traces"][0] if entry["action"] == "alloc"][1]
    assert [(frame["filename"], frame["line"], frame["name"]) for frame in alloc["frames"]] == [
        ("memscope/op", 0, "aten.mm"),
        ("memscope/module", 0, "head"),
        ("memscope/category", 0, "activation"),
        ("memscope/phase", 0, "forward"),
        ("memscope/step", 0, "step"),
        ("memscope/micro_batch", 0, "micro-batch"),
        ("memscope/size", 3 * MIB, "bytes of its block"),
    ]


def test_allocations_of_no_bytes_keep_their_place(tmp_path):
    builder = TraceBuilder()
    builder.phase("setup")
    empty = builder.new("other", 0, module="m", op="o")
    builder.new("other", 512)
    builder.free(empty)
    trace = import_snapshot(dumped(torch_snapshot(builder.trace()), tmp_path))
    assert trace.size.tolist() == [0, 512]
    assert trace.born.tolist() == [0, 1]
    assert trace.freed.tolist() == [2, -1]
    assert [(trace.modules[m], trace.ops[o]) for m, o in zip(trace.module, trace.op, strict=True)] == [
        ("m", "o"),
        ("", ""),
    ]


def changed(change):
    data = torch_snapshot(small())
    change(data, data["device_traces"][0])
    return data


def first(entries, action):
    return next(place for place, entry in enumerate(entries) if entry["action"] == action)


def endless():
    """A list of 2^60 numbers, in 60 lists of two."""
    found = [1, 1]
    for _ in range(60):
        found = [found, found]
    return found


CHANGED = {
    "schema to come": lambda data, _: data["memscope"].update(schema_version=3),
    "a schema of before": lambda data, _: data["memscope"].update(schema_version=1),
    "what is freed was never there": lambda _, entries: entries.pop(first(entries[::-1], "alloc") * -1 - 1),
    "an unknown category": lambda _, entries: entries[first(entries, "alloc")]["frames"][2].update(name="weights"),
    "frames of another type": lambda _, entries: [e.update(frames=7) for e in entries],
    "a step that is no number": lambda _, entries: [f.update(line="x") for e in entries for f in e["frames"]],
    "marks out of order": lambda _, entries: entries.reverse(),
    "an empty history": lambda data, _: data.update(device_traces=[]),
    "reserved of another type": lambda data, _: data["memscope"].update(reserved=[["x"]]),
    "reserved out of order": lambda data, _: data["memscope"].update(reserved=[[1, 5], [0, 5]]),
    "reserved beyond the end": lambda data, _: data["memscope"].update(reserved=[[10**6, 5]]),
    "reserved of lists without end": lambda data, _: data["memscope"].update(reserved=[[0, endless()]]),
    "frames of lists without end": lambda _, entries: [f.update(line=endless()) for e in entries for f in e["frames"]],
    "sizes of lists without end": lambda _, entries: [e.update(size=endless()) for e in entries],
    "meta of another type": lambda data, _: data["memscope"].update(meta=7),
    "meta nested without end": lambda data, _: data["memscope"].update(meta="[" * 10**5),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_snapshot_by_memscope_that_was_changed_is_refused(tmp_path, name):
    with pytest.raises(TraceFileError, match=r"snapshot\.pickle: .*memscope wrote it"):
        import_snapshot(dumped(changed(CHANGED[name]), tmp_path))


def test_changed_metadata_is_refused_by_its_field(tmp_path):
    data = changed(lambda data, _: data["memscope"].update(meta='{"target": "small", "device": {"name": 3}}'))
    with pytest.raises(TraceFileError, match=r"changed afterwards \(meta\.device\.name is 3: expected a string\)"):
        import_snapshot(dumped(data, tmp_path))


# Perfetto and Chrome.


def events(trace, kind):
    return [event for event in json.loads(chrome_trace_bytes(trace))["traceEvents"] if event["ph"] == kind]


def test_counters_follow_each_category_and_the_total():
    found = {}
    for event in events(small(), "C"):
        found.setdefault(event["name"], []).append((event["ts"], event["args"]["bytes"]))
    assert found == {
        "allocated": [(0, 4 * MIB), (1, 7 * MIB), (2, 4 * MIB)],
        "parameter": [(0, 4 * MIB), (2, 4 * MIB)],
        "activation": [(1, 3 * MIB), (2, 0)],
    }


def test_steps_hold_their_phases():
    assert [(e["name"], e["ts"], e["dur"]) for e in events(small(), "X")] == [
        ("step 0", 1, 2),
        ("setup", 0, 1),
        ("forward", 1, 1),
        ("backward", 2, 1),
    ]


def test_allocations_are_slices_from_birth_to_death():
    begins, ends = events(small(), "b"), events(small(), "e")
    assert [(e["name"], e["cat"], e["ts"], e["args"]["module"], e["args"]["bytes"]) for e in begins] == [
        ("aten.empty", "parameter", 0, "head", 4 * MIB),
        ("aten.mm", "activation", 1, "head", 3 * MIB),
    ]
    assert [(e["id"], e["name"], e["cat"], e["ts"]) for e in ends] == [
        (0, "aten.empty", "parameter", 3),
        (1, "aten.mm", "activation", 2),
    ]


def test_with_very_many_allocations_only_the_largest_are_slices_but_counters_include_all(monkeypatch):
    monkeypatch.setattr(chrome_trace, "MOST_SLICES", 1)
    assert [event["id"] for event in events(small(), "b")] == [0]
    assert len([event for event in events(small(), "C") if event["name"] == "allocated"]) == 3


@given(random_traces())
@settings(deadline=None, max_examples=50)
def test_any_trace_is_valid_for_chrome_and_ends_with_the_live_bytes(trace):
    counters = {event["name"]: event["args"]["bytes"] for event in events(trace, "C")}
    assert counters.get("allocated", 0) == (trace.allocated[-1] if trace.events else 0)
    assert len(events(trace, "b")) == len(events(trace, "e")) == len(trace)


# Tables.


@given(random_traces())
@settings(deadline=None, max_examples=50)
def test_csv_has_one_row_per_allocation_with_names_and_bytes(trace):
    rows = list(csv.DictReader(io.StringIO(csv_bytes(trace).decode(), newline="")))
    assert [int(row["size_bytes"]) for row in rows] == trace.size.tolist()
    assert [row["category"] for row in rows] == [CATEGORIES[code] for code in trace.category]
    assert [row["phase"] for row in rows] == [PHASES[code] for code in trace.phase]
    assert [row["module"] for row in rows] == [trace.modules[code] for code in trace.module]
    assert [int(row["freed_event"] or -1) for row in rows] == trace.freed.tolist()


def test_parquet_has_the_same_columns_and_the_traces_own_meta(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = parquet.read_table(io.BytesIO(parquet_bytes(small())))
    assert table.column_names == next(csv.reader(io.StringIO(csv_bytes(small()).decode())))
    assert table.to_pydict() == {
        "size_bytes": [4 * MIB, 3 * MIB],
        "requested_bytes": [4 * MIB, 3 * MIB],
        "step": [-1, 0],
        "micro_batch": [0, 0],
        "born_event": [0, 1],
        "freed_event": [None, 2],
        "category": ["parameter", "activation"],
        "module": ["head", "head"],
        "op": ["aten.empty", "aten.mm"],
        "phase": ["setup", "forward"],
    }
    assert json.loads(table.schema.metadata[b"memscope"]) == {"target": "small"}


def test_without_pyarrow_parquet_export_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        parquet_bytes(small())


@pytest.mark.parametrize("write", [torch_snapshot_bytes, chrome_trace_bytes, csv_bytes])
def test_a_trace_without_allocations_is_written_too(write):
    builder = TraceBuilder()
    builder.phase("setup")
    assert write(builder.trace())
