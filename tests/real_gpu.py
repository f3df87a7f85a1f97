"""The GPU of this machine, for the tests in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from memscope.simulation.devices.catalogue import all_devices

__all__ = ["nearest_device"]


def nearest_device() -> str:
    """The name of a device to simulate that has the compute capability of this GPU."""
    capability = torch.cuda.get_device_capability()
    fitting = [d.name for d in all_devices() if d.kind == "cuda" and d.capability == capability and d.capacity_bytes]
    if not fitting:
        pytest.skip(f"no device of compute capability {capability} can be simulated")
    return fitting[-1]
