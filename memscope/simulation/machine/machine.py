"""A machine with a simulated GPU, for a program that memscope does not build: it runs as on that machine.

`simulate` builds a workload and runs its steps; here, the program does both. It sees the GPU from the beginning, and
everything that it puts there is followed. See `places` for what is real and what is fake.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from memscope.allocator.settings import AllocatorSettings
from memscope.hooks.kernels import Kernels
from memscope.hooks.storages import StorageTracker
from memscope.hooks.work import Execute, WorkDone
from memscope.simulation.answers import Answers
from memscope.simulation.assumptions import Assume, Assumptions
from memscope.simulation.autograd_engine import PlainAutograd
from memscope.simulation.cuda.kernel_results import results
from memscope.simulation.cuda.semantics import cuda_semantics, fake_tensors_use_foreach
from memscope.simulation.device_memory import KernelWorkspaces, on_device
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.devices.cost import cost_table
from memscope.simulation.devices.roofline import Roofline
from memscope.simulation.devices.timeline import Timeline
from memscope.simulation.facade.imports import imports_see_the_machine
from memscope.simulation.facade.visible_gpu import VisibleGpu
from memscope.simulation.fake_tensors import StandIns, fake_tensors_train
from memscope.simulation.host import Link
from memscope.simulation.machine.distributed import one_process
from memscope.simulation.machine.libraries import ChangedLibraries, merged
from memscope.simulation.machine.loaders import loaders_stay_here
from memscope.simulation.machine.mixed import refuse_mixed
from memscope.simulation.machine.moves import ProgramCalls
from memscope.simulation.machine.places import PlacedKernels, PlacedOperators, Places
from memscope.simulation.machine.pretrained import pretrained_without_weights
from memscope.simulation.machine.saving import Saving
from memscope.simulation.machine.scripts import scripts_run_as_python
from memscope.simulation.machine.side_effects import without_side_effects
from memscope.simulation.machine.streams import events_of_a_program
from memscope.simulation.machine.threads import threads_stay_on_the_host
from memscope.simulation.machine.visible import tensors_of_a_program
from memscope.simulation.machine.weights import weights_are_fake
from memscope.simulation.packages.bitsandbytes import BitsandbytesKernels
from memscope.simulation.packages.paged import paged_state
from memscope.simulation.packages.visible import VisiblePackages
from memscope.simulation.remember import RememberedOperators
from memscope.simulation.untouched import Untouched
from memscope.simulation.values import KnownValues
from memscope.simulation.written_views import WrittenViews
from memscope.trace import Trace
from memscope.trace.notes import add_note

__all__ = ["SimulatedMachine"]


class SimulatedMachine:
    """Context in which a program sees a GPU that is not there.

    Attributes:
        execute: runs operators; for the recorder.
        kernels: the workspaces of kernels; for the recorder.
        notes: texts for the trace.
    """

    def __init__(self, device: Device, settings: AllocatorSettings, assume: Assume) -> None:
        self._device, self._settings = device, settings
        self._mode = mode = StandIns(allow_non_fake_inputs=True)
        self._on_gpu = device.kind == "cuda"
        self._places = Places(mode, has_gpu=self._on_gpu)
        self._assumptions = Assumptions(assume)
        values = KnownValues(assume)
        self._answers = Answers(values, self._assumptions, of_a_program=True)
        self._roofline = Roofline(device)
        self._workspaces = KernelWorkspaces(device)
        operators = RememberedOperators(
            mode, values, self._answers, _NothingToRestore(), self._roofline, results(on_gpu=self._on_gpu)
        )
        link = Link(operators, device)
        placed = PlacedOperators(
            self._places, WrittenViews(link), values, self._assumptions, check=partial(refuse_mixed, self._places)
        )
        self._timeline = Timeline(placed, waits_after_step=False)
        self.execute: Execute = PlainAutograd(self._timeline) if self._on_gpu else self._timeline
        self.kernels: Kernels | None = PlacedKernels(self._places, self._workspaces) if self._on_gpu else None
        self._calls = ProgramCalls(self._places, link)
        events = events_of_a_program(self._assumptions)
        self._gpu = VisibleGpu(device, settings, partial(tensors_of_a_program, self._places, self._calls), events)
        self.notes = self._gpu.notes
        self._scopes = contextlib.ExitStack()

    @property
    def mode(self) -> StandIns:
        """The mode of the fake tensors that stand for memory of the GPU."""
        return self._mode

    def follow(self, tracker: StorageTracker) -> None:
        """Use a recorder's tracker from now on; called before it is entered."""
        self._places.tracker = self._timeline.tracker = tracker
        self._gpu.memory.seen = tracker.seen

    def __enter__(self) -> SimulatedMachine:
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(fake_tensors_use_foreach())
            scopes.enter_context(fake_tensors_train(self._answers))
            if self._on_gpu:
                scopes.enter_context(cuda_semantics(self._device.capability))
                scopes.enter_context(self._gpu)
            else:
                scopes.enter_context(tensors_of_a_program(self._places, self._calls, lambda: None))
            scopes.enter_context(weights_are_fake(self._places))
            scopes.enter_context(loaders_stay_here(self._note))
            scopes.enter_context(scripts_run_as_python(self._note))
            scopes.enter_context(threads_stay_on_the_host())
            scopes.enter_context(Saving(self._places, self._note))
            changes = merged(
                without_side_effects(self._note),
                pretrained_without_weights(self._places, self._note),
                one_process(self._places, self._note),
                paged_state(self._places.on_host) if self._on_gpu else {},
            )
            libraries = scopes.enter_context(ChangedLibraries(changes))
            quantized = scopes.enter_context(BitsandbytesKernels(self._device, self._assumptions))

            def imported() -> None:
                libraries.look()
                quantized.look()

            if self._on_gpu:
                packages = scopes.enter_context(VisiblePackages(self._device, self._note))
                hidden, given = (self._gpu.hidden, packages.hidden), packages.given
                scopes.enter_context(imports_see_the_machine(*hidden, given=given, imported=imported))
            else:
                scopes.enter_context(imports_see_the_machine(imported=imported))
            self._scopes = scopes.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.__exit__(*exception)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def finished(self, trace: Trace, work: WorkDone) -> Trace:
        """The trace with everything that the simulation adds: block sizes, reserved memory, cost and assumptions."""
        meta = {**trace.meta, "assumptions": self._assumptions.rows()}
        for note in self.notes:
            add_note(meta, note)
        if not self._on_gpu:
            return dataclasses.replace(trace, meta=meta)
        meta["cost"] = cost_table(work, self._roofline.assumed) if self._roofline.is_known else None
        meta["estimated_workspaces"] = sorted(self._workspaces.estimated)
        trace = dataclasses.replace(trace, meta=meta)
        return on_device(trace, self._device, self._settings, self._gpu.memory.cache_emptied)


class _NothingToRestore(Untouched):
    """A program's tensors on the host are its own: it may write to them."""

    def keep_arguments(self, values: Any, written: Iterable[Tensor]) -> None:
        """Keep nothing."""
