"""QLoRA of several ranks beside full fine-tuning, for models of several sizes, on several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memscope.analysis.cost import last_step_seconds
from memscope.analysis.notes import notes_of
from memscope.runs.plans import RunSpec, run_all
from memscope.runs.processes import preload
from memscope.simulation.devices.catalogue import Device, get_device, load_devices
from memscope.strategies import Plan
from memscope.trace import Progress, Trace, no_progress
from memscope.workload.target import find_target, slow_imports

__all__ = ["FULL", "Adapter", "AdapterCell", "AdapterQuestion", "AdapterTable", "compare_adapters"]

FULL = "full"
"""The name of fine-tuning without an adapter."""


@dataclass(frozen=True)
class Adapter:
    """The size of QLoRA's updates."""

    rank: int
    alpha: int
    """Scales the update by alpha / rank: it changes no byte and no operation."""

    def __str__(self) -> str:
        return f"{self.rank}/{self.alpha}"


@dataclass(frozen=True)
class AdapterQuestion:
    """What to compare."""

    models: Sequence[str]
    """Names that `hf:` knows."""
    adapters: Sequence[Adapter]
    devices: Sequence[str]
    device_file: Path | None
    settings: Mapping[str, str]
    """Settings of `hf:` for every model."""
    strategies: str
    """Strategies beside QLoRA, and of full fine-tuning."""

    def plan(self, adapter: Adapter | None) -> str:
        """The strategies of one row; None: full fine-tuning.

        Raises:
            UsageError: the strategies cannot be read, or cannot be combined with QLoRA.
        """
        qlora = [] if adapter is None else [f"qlora:r={adapter.rank},alpha={adapter.alpha}"]
        return str(Plan.parse(",".join([*qlora, *([self.strategies] if self.strategies else [])])))


@dataclass(frozen=True)
class AdapterCell:
    """One model, trained in one way on one device."""

    model: str
    adapter: Adapter | None
    """None: full fine-tuning."""
    device: str
    trained: int
    """Trained parameters."""
    allocated_bytes: int
    """Peak allocated bytes; if it does not fit, with unlimited memory."""
    needed_bytes: int
    """Peak reserved bytes and the CUDA context, likewise."""
    fits: bool
    step_seconds: float | None
    """Estimated time of a step; None if it does not fit, or the device's rates are not known."""

    @property
    def method(self) -> str:
        """`QLoRA 16/16` or `full`."""
        return FULL if self.adapter is None else f"QLoRA {self.adapter}"


@dataclass(frozen=True)
class AdapterTable:
    """The answer: a cell for each model, method and device, in this order."""

    question: AdapterQuestion
    cells: tuple[AdapterCell, ...]
    notes: tuple[str, ...]
    """What a reader must know to believe the numbers, each once."""

    @property
    def largest_that_fits(self) -> AdapterCell | None:
        """The cell that fits and needs the most memory; None if none fits."""
        return max((cell for cell in self.cells if cell.fits), key=lambda cell: cell.needed_bytes, default=None)

    def document(self) -> dict[str, Any]:
        """The answer as JSON values."""
        return {
            "schema_version": 1,
            "study": "adapters",
            "settings": dict(self.question.settings),
            "strategies": self.question.strategies,
            "rows": [_row(cell) for cell in self.cells],
            "notes": list(self.notes),
        }


def _row(cell: AdapterCell) -> dict[str, Any]:
    return {
        "model": cell.model,
        "method": FULL if cell.adapter is None else "qlora",
        "r": None if cell.adapter is None else cell.adapter.rank,
        "alpha": None if cell.adapter is None else cell.adapter.alpha,
        "device": cell.device,
        "trained_parameters": cell.trained,
        "peak_allocated": cell.allocated_bytes,
        "needed_bytes": cell.needed_bytes,
        "fits": cell.fits,
        "estimated_step_seconds": cell.step_seconds,
    }


def compare_adapters(question: AdapterQuestion, progress: Progress = no_progress) -> AdapterTable:
    """Simulate every cell, in worker processes; cells that differ in alpha alone share a simulation.

    Raises:
        UsageError: a device, a model, a setting or a strategy cannot be used.
        MemscopeError: a simulation failed; the message names its cell.
    """
    added = load_devices(question.device_file) if question.device_file else None
    devices = [(name, get_device(name, added)) for name in question.devices]
    for model in question.models:
        find_target(f"hf:{model}").configure(None, question.settings)
    methods = [*question.adapters, None]
    asked = [
        (model, method, name, device) for model in question.models for method in methods for name, device in devices
    ]
    simulated = {_key(model, method, name): (model, method, name, device) for model, method, name, device in asked}
    preload(slow_imports("hf"))
    with TemporaryDirectory(prefix="memscope-") as folder:
        specs = [
            _spec(question, model, method, name, Path(folder) / f"{index}.npz")
            for index, (model, method, name, _) in enumerate(simulated.values())
        ]
        traces = _traces(specs, progress)
    notes = dict.fromkeys(note for trace in traces for note in notes_of(trace))
    known = {
        key: _cell(trace, model, method, name, device)
        for (key, (model, method, name, device)), trace in zip(simulated.items(), traces, strict=True)
    }
    cells = [replace(known[_key(model, method, name)], adapter=method) for model, method, name, _ in asked]
    return AdapterTable(question, tuple(cells), tuple(notes))


def _key(model: str, method: Adapter | None, device: str) -> tuple[str, int | None, str]:
    """Equal for cells that share a simulation."""
    return model, None if method is None else method.rank, device


def _spec(question: AdapterQuestion, model: str, method: Adapter | None, device: str, path: Path) -> RunSpec:
    plan = question.plan(method)
    return RunSpec(
        target=f"hf:{model}",
        preset=None,
        settings=question.settings,
        plan=plan,
        compared=(plan,),
        device=device,
        device_file=question.device_file,
        allocator=None,
        simulated=True,
        steps=2,
        path=path,
    )


def _traces(specs: Sequence[RunSpec], progress: Progress) -> list[Trace]:
    ended: set[int] = set()

    def report(index: int, done: int, total: int, state: object) -> None:
        if done == total:
            ended.add(index)
        progress(_name(specs[index]), len(ended), len(specs))

    outcome = run_all(specs, report)
    for index, error in outcome.failed.items():
        raise type(error)(f"{_name(specs[index])}: {error}") from error
    return [outcome.traced[index] or Trace.load(spec.path) for index, spec in enumerate(specs)]


def _name(spec: RunSpec) -> str:
    return f"{spec.target} {spec.plan} on {spec.device}"


def _cell(trace: Trace, model: str, method: Adapter | None, name: str, device: Device) -> AdapterCell:
    fits = trace.meta["out_of_memory"] is None
    return AdapterCell(
        model=model,
        adapter=method,
        device=name,
        trained=trace.meta["parameters"]["trainable"],
        allocated_bytes=trace.peak.allocated_bytes,
        needed_bytes=int(trace.meta["peak_reserved"]) + device.context_bytes,
        fits=fits,
        step_seconds=last_step_seconds(trace) if fits else None,
    )
