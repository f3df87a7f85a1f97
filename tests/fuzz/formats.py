"""The file formats that memscope reads: files to begin with, how to change them, and all that is done with them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import click
import numpy as np
from fuzz.children import Task
from fuzz.mutate import Mutator, json_text, npz, pickled, words

from memscope.errors import MemscopeError

__all__ = ["CORPUS", "FORMATS", "Format", "corpus", "task"]

CORPUS = Path(__file__).with_name("corpus")
_TOLD = (MemscopeError, click.ClickException)
_PAGES = 40
"""One of so many files is also shown as a page, which takes longer than all else."""


@dataclass(frozen=True)
class Format:
    """A file format. `corpus/<name>/` has its files to begin with; `made` are larger ones, by name."""

    name: str
    suffix: str
    change: Mutator
    use: Callable[[Path, Random], None]
    made: dict[str, Callable[[], bytes]]


@cache
def corpus(name: str) -> dict[str, bytes]:
    """The files of a format to begin with, by name."""
    found = {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())}
    return found | {made: make() for made, make in FORMATS[name].made.items()}


def task(name: str, seed: int = 0) -> Task:
    """The changed files of a format: file `n` is always the same."""
    chosen, files = FORMATS[name], list(corpus(name).values())
    small = [data for data in files if len(data) < 2**13]  # none that unpacks to megabytes

    def make(number: int) -> bytes:
        if number < len(files):
            return files[number]
        rng = Random(f"{name} {seed} {number}")
        data = rng.choice(small)
        for _ in range(rng.choice((1, 1, 2))):
            data = chosen.change(rng, data)
        return data

    return Task(name, chosen.suffix, make, chosen.use, _TOLD)


# What is done with a file.


def _command(*words: object) -> None:
    from memscope.cli.main import cli

    cli.main([str(word) for word in words], prog_name="memscope", standalone_mode=False)


def _use_trace(path: Path, rng: Random) -> None:
    from memscope.exchange.chrome_trace import chrome_trace_bytes
    from memscope.exchange.tables import csv_bytes
    from memscope.exchange.torch_writer import torch_snapshot_bytes
    from memscope.trace import Trace

    trace, other = Trace.load(path), CORPUS / "trace" / "simulated.npz"
    repr(trace), trace._repr_html_()
    told = list[Exception]()
    for kind in ("terminal", "json", "markdown", "csv"):
        _told(told, lambda kind=kind: _command("report", path, "--format", kind))
    limits = [f"--fail-if={key}:1GB" for key in ("peak", "activation")]
    _told(told, lambda: _command("check", path, "--budget", "40GB", *limits, "--format", "junit"))
    for key in ("reserved:1GB", "device:1GB", "step_time:1s"):
        _told(told, lambda key=key: _command("check", path, "--fail-if", key))
    _told(told, lambda: _command("check", path, "--baseline", other, "--fail-if", "peak:+5%", "--format", "json"))
    _told(told, lambda: _command("diff", path, other))
    _told(told, lambda: _command("diff", other, path, "--json"))
    _told(told, lambda: _command("report", other, path, "--format", "terminal"))
    _told(told, lambda: chrome_trace_bytes(trace))
    _told(told, lambda: csv_bytes(trace))
    _told(told, lambda: torch_snapshot_bytes(trace))
    if rng.randrange(_PAGES) == 0:
        _told(told, lambda: _page(path))
    if told:
        raise told[0]


def _told(told: list[Exception], do: Callable[[], object]) -> None:
    """Do something; an error that memscope explains is noted, any other is raised."""
    try:
        do()
    except _TOLD as error:
        told.append(error)


def _page(path: Path) -> None:
    from memscope.analysis.effects import Run
    from memscope.dashboards.page import render_page
    from memscope.trace import Trace

    trace = Trace.load(path)
    if trace.events:
        render_page([Run("file", trace)])


def _use_snapshot(path: Path, rng: Random) -> None:
    from memscope.exchange.torch_reader import import_snapshot

    trace = import_snapshot(path)
    if rng.randrange(4) == 0:
        from memscope.analysis.ledger import ledger
        from memscope.analysis.ran_out import ran_out
        from memscope.trace import damage_of

        assert not damage_of(trace), damage_of(trace)
        repr(trace), trace._repr_html_(), ran_out(trace)
        if trace.events:
            ledger(trace)


def _use_plan(path: Path, rng: Random) -> None:
    import torch

    from memscope.dashboards.plan_page import plan_card
    from memscope.strategies.ckpt.layer_plan import LayerPlan
    from memscope.testing import toy_workload

    plan = LayerPlan.load(path)
    with torch.device("meta"):
        list(map(str, plan.check(toy_workload().model, ["blocks.0", "blocks.1"])))
    plan.other_settings({"seq_len": 8})
    if rng.randrange(_PAGES) == 0:
        plan_card(plan.layers, path.name)


def _use_grid(path: Path, rng: Random) -> None:
    for kind in ("terminal", "json", "markdown", "csv"):
        _command("report", path, "--format", kind)
    if rng.randrange(_PAGES) == 0:
        from memscope.cli.report_files import files_by_kind
        from memscope.dashboards.grid_card import grid_card

        for one in files_by_kind([path]).grids:
            grid_card(one.grid, one.notes)


def _use_devices(path: Path, rng: Random) -> None:
    from memscope.simulation.devices.catalogue import load_devices

    for device in load_devices(path).values():
        repr(device), device.allocatable_bytes, device.flops_per_second("fp32"), hash(device)


def _use_words(path: Path, rng: Random) -> None:
    from memscope.allocator.settings import AllocatorSettings
    from memscope.analysis.check import TraceLimit, format_value
    from memscope.units import format_both, format_given, parse_budget

    text = path.read_bytes().decode("utf-8", "replace").strip()
    told = list[Exception]()
    _told(told, lambda: (format_given(size := parse_budget(text)), format_both(size)))
    _told(told, lambda: format_value((limit := TraceLimit.parse(text)).key, limit.added))
    _told(told, lambda: AllocatorSettings.parse(text))
    if told:
        raise told[0]


# Files that are shorter to make than to keep.


def _of_zeros(declared: int, name: str = "more") -> bytes:
    """A trace with an array of zeros, which unpacks to a thousand times its bytes."""
    file, head = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|i1", "fortran_order": False, "shape": (declared,)})
    with zipfile.ZipFile(CORPUS / "trace" / "simulated.npz") as kept, zipfile.ZipFile(file, "w", 8) as archive:
        for member in kept.namelist():
            if member != f"{name}.npy":
                archive.writestr(member, kept.read(member))
        archive.writestr(f"{name}.npy", head.getvalue() + bytes(2**24))
    return file.getvalue()


def _colliding_keys() -> bytes:
    keys = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(40_000))
    return b"\x80\x04}(" + keys + b"u."


def _endless_times() -> bytes:
    annotation = {"name": "x", "stage": "START", "device": 0, "time_us": float("inf")}
    return pickle.dumps({"segments": [], "device_traces": [[]], "external_annotations": [annotation]}, 4)


def _segment_twice() -> bytes:
    block = {"size": 2**21, "requested_size": 2**21, "state": "active_allocated", "frames": []}
    segment = {"device": 0, "address": 2**40, "total_size": 2**21, "blocks": [block]}
    return pickle.dumps({"segments": [segment, segment], "device_traces": [[]]}, 4)


FORMATS = {
    one.name: one
    for one in (
        Format("trace", ".npz", npz, _use_trace, {
            "zeros.npz": lambda: _of_zeros(2**24), "declared.npz": lambda: _of_zeros(2**33, "requested"),
        }),
        Format("snapshot", ".pickle", pickled, _use_snapshot, {
            "colliding.pickle": _colliding_keys, "infinite.pickle": _endless_times, "twice.pickle": _segment_twice,
        }),
        Format("plan", ".json", json_text, _use_plan, {"nested.json": lambda: b'{"layers":' + b"[" * 50_000}),
        Format("grid", ".json", json_text, _use_grid, {"nested.json": lambda: b'{"table2":' + b"[" * 50_000}),
        Format("devices", ".toml", words, _use_devices, {
            "nested.toml": lambda: b"x = " + b"[\n" * 50_000, "key.toml": lambda: b"[" + b"k" * 100_000 + b"]",
            "dotted.toml": lambda: b"a." * 50_000 + b"a = 1",
        }),
        Format("words", ".txt", words, _use_words, {"digits.txt": lambda: b"9" * 400 + b"GB"}),
    )
}  # fmt: skip
