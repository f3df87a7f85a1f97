"""What `fit` answers, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memscope.advisor.advice import PlanPeak
from memscope.analysis.fit import Fit
from memscope.trace import Trace

__all__ = ["DeviceFit", "Evidence", "Fitting", "FittingChange", "Largest", "Size", "holds"]

SCHEMA_VERSION = 1
_ABOVE_ALL = 1.6
"""Lines of devices are drawn up to so many times the largest need."""
_MOST_LINES = 30


def holds(trace: Trace) -> bool:
    """Whether the device of a simulated trace holds the run: every answer of `fit` is decided here."""
    return trace.meta["out_of_memory"] is None


@dataclass(frozen=True)
class Size:
    """What a micro-batch holds."""

    micro_batch: int
    seq_len: int | None
    """Tokens a sample; None: the target's samples have lengths of their own."""

    def __str__(self) -> str:
        length = "" if self.seq_len is None else f" of {self.seq_len:,} tokens"
        return f"micro-batch {self.micro_batch:,}{length}"


@dataclass(frozen=True)
class Evidence:
    """One simulation on the device."""

    size: Size
    peak: PlanPeak
    """Of the run; of one that does not fit, as if the device had enough memory."""
    fits: bool
    is_whole: bool
    """Whether every micro-batch was run, rather than those that decide the peak."""

    @classmethod
    def of(cls, trace: Trace, size: Size, *, is_whole: bool) -> Evidence:
        """From the trace of a simulation on the device."""
        reserved, context = int(trace.meta["peak_reserved"]), int(trace.meta["context"])
        peak = PlanPeak(trace.peak.allocated_bytes, reserved, reserved + context)
        return cls(size, peak, holds(trace), is_whole)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "micro_batch": self.size.micro_batch,
            "seq_len": self.size.seq_len,
            "device_bytes": self.peak.device,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Largest:
    """The largest value of a size at which the step fits, while the other sizes stay."""

    value: int
    """0: not even the smallest fits."""
    unit: int
    """Values are multiples of this."""
    next: int | None
    """The value that was simulated and runs out of memory; None: the values end at `value`."""
    bound: str = ""
    """Why no larger value was tried; empty where `next` runs out."""

    def __str__(self) -> str:
        end = f"{self.next:,} runs out of memory" if self.next is not None else self.bound
        unit = f", in multiples of {self.unit}" if self.unit > 1 else ""
        return f"{self.value:,} ({end}{unit})" if self.value else f"none: {end}"


@dataclass(frozen=True)
class DeviceFit:
    """Whether a device of the catalogue holds the step."""

    name: str
    capacity_bytes: int
    fits: bool
    device_bytes: int | None
    """Bytes that the device must hold; None: the step cannot be simulated there."""
    reason: str = ""
    """Why not."""

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.name, "fits": self.fits, "device_bytes": self.device_bytes}


@dataclass(frozen=True)
class FittingChange:
    """Strategies with which the step fits."""

    strategies: str
    """As `-s` takes them."""
    device_bytes: int
    step_seconds: float
    """An estimate."""

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Fitting:
    """Whether a training step fits a device, how much larger it may be, which devices hold it, and what would help."""

    target: str
    device: str
    capacity_bytes: int
    strategies: str
    asked: Evidence
    """The step as it was asked for."""
    micro_batch: Largest
    """The largest micro-batch at the length asked for."""
    seq_len: Largest | None
    """The longest context at the micro-batch asked for; None: the target's samples have lengths of their own."""
    evidence: tuple[Evidence, ...]
    """Every simulation on the device, smaller sizes first."""
    devices: tuple[DeviceFit, ...]
    """The devices of the catalogue, least memory first."""
    changes: tuple[FittingChange, ...] = ()
    """If the step does not fit: at most three changes found with which it does, the fastest first (estimates)."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    assumptions: tuple[Any, ...] = ()
    """What the simulation assumed about values that it does not have."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The target's settings."""

    @property
    def fits(self) -> bool:
        """Whether the step that was asked for fits the device."""
        return self.asked.fits

    @property
    def margin(self) -> Fit:
        """How safely it fits: the room left on the device against the error known of predictions."""
        return Fit.of(self.peak.reserved, self.peak.device, self.capacity_bytes)

    @property
    def peak(self) -> PlanPeak:
        """Peak of the step that was asked for."""
        return self.asked.peak

    @property
    def lines(self) -> list[DeviceFit]:
        """Devices whose memory is a line among the simulated sizes: the one asked for, then others, least memory first.

        Others lie apart from each other, and not far above the largest need.
        """
        most = _ABOVE_ALL * max(one.peak.device for one in self.evidence)
        drawn = [DeviceFit(self.device, self.capacity_bytes, self.fits, self.peak.device)]
        for one in self.devices:
            apart = all(abs(one.capacity_bytes - line.capacity_bytes) > most / _MOST_LINES for line in drawn)
            if apart and one.capacity_bytes <= most and one.name != self.device:
                drawn.append(one)
        return drawn

    @property
    def smallest_device(self) -> DeviceFit | None:
        """The device with the least memory that holds the step; None: no listed device does."""
        return next((device for device in self.devices if device.fits), None)

    def document(self) -> dict[str, Any]:
        """As one JSON document with integer bytes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "device": self.device,
            "fits": self.fits,
            "fit": self.margin.document(),
            "peak": self.peak.document(),
            "largest": {
                "micro_batch": self.micro_batch.value,
                "seq_len": None if self.seq_len is None else self.seq_len.value,
            },
            "evidence": [one.document() for one in self.evidence],
            "devices": [device.document() for device in self.devices],
            "changes": [change.document() for change in self.changes],
            "assumptions": list(self.assumptions),
            "notes": list(self.notes),
        }
