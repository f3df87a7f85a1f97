"""Building a model outside a simulation, to look at its modules and to check plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.facade.imports import imports_see_the_machine
from memscope.simulation.packages.visible import VisiblePackages

__all__ = ["on_meta"]


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make tensors on the meta device, and let transformers find the packages that a simulation would have.

    Whether the run itself has them is told by the run.
    """
    packages = VisiblePackages(get_device("gpu"), lambda note: None, gpu_is_seen=False)
    with packages, imports_see_the_machine(packages.hidden, given=packages.given), torch.device("meta"):
        yield
