"""Run a program inside the test's own process: simulated, or recorded on the CPU.

A Python of its own, as `memscope profile -- python train.py` starts, costs seconds for its imports.
"""

from __future__ import annotations

import contextlib
import gc
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from memscope.allocator.settings import AllocatorSettings
from memscope.program.applied_plan import AppliedPlan
from memscope.program.recorder import ProgramRecorder
from memscope.program.stop import Enough, StepLimits
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.machine.machine import SimulatedMachine
from memscope.strategies import Plan
from memscope.trace import Trace

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Ran:
    """What a program has left: its trace and its exit code (None: it was stopped, or ended)."""

    trace: Trace
    code: object

    @property
    def notes(self) -> list[str]:
        """The notes of the trace."""
        return self.trace.meta.get("notes", [])

    @property
    def assumed(self) -> list[str]:
        """What was assumed."""
        return [row["what"] for row in self.trace.meta["assumptions"]]

    def peak_of(self, category: str) -> int:
        """Bytes of a category at the peak."""
        return self.trace.by("category", at="peak")[category]


def run_program(path, *argv, device="a100-80gb", simulated=True, steps=2, assume="", plan="") -> Ran:
    """Run a program until it has made `steps` steps; `plan` is applied where it builds its optimizer."""
    gc.collect()  # models and optimizers of other tests are none of this program's
    machine = SimulatedMachine(get_device(device), AllocatorSettings(), Assume.parse(assume)) if simulated else None
    code = None

    def stop():
        raise Enough

    recorder = ProgramRecorder(
        limits=StepLimits(steps),
        before_step=lambda done: None,
        stop=stop,
        meta={"device": {"name": device, "simulated": simulated}, "strategies": Plan.parse(plan).specs},
        execute=machine.execute if machine else None,
        kernels=machine.kernels if machine else None,
        fake_mode=machine.mode if machine else None,
    )
    if machine:
        machine.follow(recorder.tracker)
    path = Path(path)
    try:
        with (
            mock.patch.object(sys, "argv", [str(path), *map(str, argv)]),
            mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
            machine or contextlib.nullcontext(),
            AppliedPlan(Plan.parse(plan), recorder.model_changed) if plan else contextlib.nullcontext(),
            recorder,
        ):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except Enough:
                pass
            except SystemExit as end:
                code = end.code
    finally:
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")  # a program may allow TF32
        torch.backends.cudnn.allow_tf32 = True
        _forget_accelerators()
    trace = recorder.trace()
    return Ran(machine.finished(trace, recorder.work) if machine else trace, code)


def run_source(folder, source, *argv, **options) -> Ran:
    """Run a program given as text; it has `torch`, `nn`, and `train(model)`, which makes three steps with AdamW."""
    path = Path(folder) / "train.py"
    path.write_text(_BEGINNING + textwrap.dedent(source))
    return run_program(path, *argv, **options)


_BEGINNING = """
import torch
from torch import nn


def train(model, optimizer=None, batch=lambda: torch.randn(8, 64).cuda()):
    optimizer = optimizer or torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(batch()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


"""


def _forget_accelerators() -> None:
    """Let the next program choose a device: accelerate keeps its own for the life of the process."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
