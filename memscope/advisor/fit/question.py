"""What `fit` is asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from memscope.advisor.fit.fitting import Size
from memscope.advisor.fit.names import SizeNames
from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.devices.catalogue import Device, all_devices

__all__ = ["Question"]


@dataclass(frozen=True)
class Question:
    """What `fit` is asked."""

    names: SizeNames
    asked: Size | None
    """None: the sizes that the target's settings say."""
    device: Device
    strategies: str
    allow: str | Collection[str]
    allocator: AllocatorSettings
    devices: Sequence[Device] = field(default_factory=all_devices)
    """Those to compare."""
    device_text: str = ""
    """The device as the user wrote it, such as `t4:300MiB`; empty: its name."""
    grid: bool = False
    """Also simulate combinations of micro-batches and lengths, for a picture."""
