"""The advisor's simulations, run one after the other or in parallel."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import step_seconds
from memscope.errors import MemscopeError
from memscope.runs.processes import Workers, cores, workers
from memscope.simulation.devices.catalogue import Device, get_device, load_devices
from memscope.trace import Phase, Progress, Trace

if TYPE_CHECKING:
    from memscope.simulation.assumptions import Assume
    from memscope.strategies.ckpt import LayerPlan
    from memscope.workload.description import Workload
    from memscope.workload.micro_batches import MicroBatch

__all__ = [
    "Answer", "Asker", "InProcess", "Probe", "Runner", "Scene", "Seen", "deciding_indices",
    "require", "side_by_side",
]  # fmt: skip


_ONCE: tuple[Phase, ...] = ("optimizer", "zero_grad", "outside")
"""Phases that run once a step, whatever the number of micro-batches."""


@dataclass(frozen=True)
class Probe:
    """One simulation."""

    strategies: str = ""
    """Plan to apply, without checkpointing."""
    layers: LayerPlan | None = None
    """The option of each layer; None: nothing is checkpointed."""
    calls_of: tuple[str, ...] = ()
    """Modules whose calls are recorded."""
    steps: int = 2
    whole: bool = True
    """Run every micro-batch of every step, as a user does, rather than in the last step those of `deciding_indices`."""
    capacity_bytes: int | None = None
    """Memory of the device; None: as the device has it."""
    device: Device | None = None
    """The device; None: that of the runner."""
    sizes: tuple[tuple[str, int], ...] = ()
    """Settings of the target and their values in this simulation; the others are as the runner has them."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal probes."""
        layers = tuple(self.layers.layers.items()) if self.layers else ()
        return (
            self.strategies, layers, self.calls_of, self.steps, self.whole, self.capacity_bytes, self.device,
            self.sizes,
        )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """The trace of a probe, and the micro-batches it stands for."""

    trace: Trace
    indices: tuple[int, ...]
    """The micro-batches of the last step that were run."""
    elements: tuple[int, ...]
    """Elements of the tensors of every micro-batch of the step."""
    _least: dict[AllocatorSettings, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def least_reserved(self, settings: AllocatorSettings) -> int:
        """The limit on reserved bytes that `memscope.simulation.device_memory.least_reserved` finds for the trace."""
        from memscope.simulation.device_memory import least_reserved

        if settings not in self._least:
            self._least[settings] = least_reserved(self.trace, settings)
        return self._least[settings]

    @property
    def is_whole(self) -> bool:
        """Whether every micro-batch of the step was run."""
        return len(self.indices) == len(self.elements)

    @cached_property
    def seconds(self) -> float:
        """Estimated time of the whole step; the micro-batches that were run stand for all of them."""
        pieces = [self._seconds(piece, once=False) for piece in range(len(self.indices))]
        return self._seconds(once=True) + self.of_step(pieces)

    def _seconds(self, micro_batch: int | None = None, *, once: bool) -> float:
        phases = step_seconds(self.trace, 1, micro_batch=micro_batch) or {}
        return sum(seconds for phase, seconds in phases.items() if (phase in _ONCE) == once)

    def of_step(self, seconds: Sequence[float]) -> float:
        """Time of all micro-batches, estimated from that of those that were run.

        The first stands for itself: the others also add to gradients. The time of the others is a line through the two
        that were run, between a constant and a time in proportion to their elements.
        """
        if self.is_whole:
            return sum(seconds)
        (first, later), (one, other) = seconds, (self.elements[index] for index in self.indices)
        steepest = later / other
        slope = min(max((later - first) / (other - one), 0.0), steepest) if other != one else steepest
        return first + sum(later + slope * (size - other) for size in self.elements[1:])


Answer = Seen | MemscopeError
"""An error is an answer too: a strategy may not apply to the workload, and the search continues."""


def require(answer: Answer) -> Seen:
    """The result of a probe.

    Raises:
        MemscopeError: when the answer is an error.
    """
    if isinstance(answer, MemscopeError):
        raise answer
    return answer


class Runner(Protocol):
    """Runs probes."""

    @property
    def width(self) -> int:
        """Probes that run at a time."""
        ...

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in order of the probes; `done` is called after each."""
        ...


@dataclass
class Asker:
    """Asks a runner, reports progress, and remembers answers."""

    runner: Runner
    progress: Progress
    """Called with the simulations done and those known to be needed."""
    done: int = 0
    known: dict[tuple[object, ...], Answer] = field(default_factory=dict)

    def __call__(self, what: str, probes: Sequence[Probe]) -> list[Answer]:
        """The answers to probes; `what` describes them for the progress."""
        new = {probe.key: probe for probe in probes if probe.key not in self.known}
        needed = self.done + len(new)
        self.progress(what, self.done, needed)

        def one_more() -> None:
            self.done += 1
            self.progress(what, self.done, needed)

        if new:
            self.known.update(zip(new, self.runner.run(list(new.values()), one_more), strict=True))
        return [self.known[probe.key] for probe in probes]


@dataclass(frozen=True)
class InProcess:
    """Runs probes one after the other, for any workload."""

    workload: Workload | Callable[..., Workload]
    """As for `memscope.simulate`; a function is given the `sizes` of a probe by name."""
    device: Device
    allocator: AllocatorSettings | None = None
    assume: str | Assume = ""
    """As for `memscope.simulate`."""
    width: ClassVar[int] = 1

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in order of the probes."""
        answers: list[Answer] = []
        for probe in probes:
            answers.append(_answer(self, probe))
            done()
        return answers


@dataclass(frozen=True)
class Scene:
    """The workload and device to advise on, as text that a new process can start from."""

    target: str
    preset: str | None
    settings: Mapping[str, str]
    device: str
    device_file: Path | None = None
    allocator: str | None = None
    """Settings of PyTorch's allocator, as in PYTORCH_CUDA_ALLOC_CONF; None: those of the environment."""
    timeout_seconds: float | None = None
    """Longest time of one simulation in a process of its own; None: no limit."""
    assume: str = ""
    """As for `memscope.simulate`."""

    def build(self, **sizes: int) -> Workload:
        """The target's workload, with the settings `sizes` changed."""
        from memscope.workload.target import find_target

        target = find_target(self.target)
        settings = {**self.settings, **{name: str(value) for name, value in sizes.items()}}
        return target.build(target.configure(self.preset, settings))

    def in_process(self) -> InProcess:
        """A runner in this process."""
        device = get_device(self.device, load_devices(self.device_file) if self.device_file else None)
        allocator = None if self.allocator is None else AllocatorSettings.parse(self.allocator)
        return InProcess(self.build, device, allocator, self.assume)


@contextlib.contextmanager
def side_by_side(scene: Scene) -> Iterator[Runner]:
    """A runner with one process per core; the processes end with the context."""
    with workers(cores(), _begin, scene, timeout_seconds=scene.timeout_seconds) as team:
        yield _Pool(team)


@dataclass(frozen=True)
class _Pool:
    team: Workers

    @property
    def width(self) -> int:
        return self.team.count

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for index, answer in self.team.answers(_in_child, [(probe,) for probe in probes]):
            answers[index] = answer
            done()
        return [answers[index] for index in range(len(probes))]


def deciding_indices(elements: Sequence[int]) -> list[int]:
    """Indices of the micro-batches that decide a step's peak, by the elements of their tensors.

    These are the first, the largest, and the largest of those after the first, which meet gradients.
    """
    later = _largest(elements, first=1) if len(elements) > 1 else 0
    return sorted({0, _largest(elements), later})


def _largest(elements: Sequence[int], first: int = 0) -> int:
    return max(range(first, len(elements)), key=lambda index: (elements[index], index))


def _elements(piece: MicroBatch) -> int:
    from memscope.workload.batch import tensors_in

    return sum(tensor.numel() for tensor in tensors_in(piece.data))


def _answer(runner: InProcess, probe: Probe) -> Answer:
    from memscope.simulation.simulate import Part, simulate
    from memscope.strategies import Plan
    from memscope.strategies.ckpt import Checkpoint
    from memscope.workload.description import Workload

    device, workload = probe.device or runner.device, runner.workload
    elements: list[int] = []
    indices: list[int] = []

    steps = iter(range(probe.steps))

    def chosen(pieces: list[MicroBatch]) -> list[MicroBatch]:
        elements[:] = [_elements(piece) for piece in pieces]
        if probe.whole:
            indices[:] = range(len(pieces))
            return pieces
        if next(steps) < probe.steps - 1:  # earlier steps only create the optimizer state
            return [pieces[_largest(elements)]]
        indices[:] = deciding_indices(elements)
        return [pieces[index] for index in indices]

    try:
        plan = Plan.parse(probe.strategies)
        if probe.layers is not None:
            plan = Plan.of(*plan.strategies, Checkpoint.of(probe.layers))
        trace = simulate(
            workload if isinstance(workload, Workload) else partial(workload, **dict(probe.sizes)),
            device=device if probe.capacity_bytes is None else replace(device, capacity_bytes=probe.capacity_bytes),
            strategies=plan,
            steps=probe.steps,
            allocator=runner.allocator,
            assume=runner.assume,
            part=Part(micro_batches=chosen, calls_of=probe.calls_of),
        )
    except MemscopeError as error:
        return error
    return Seen(trace, tuple(indices), tuple(elements))


_in_process: InProcess | None = None
"""Runs the probes of a worker process; set once in each."""


def _begin(scene: Scene) -> None:
    import torch

    global _in_process
    torch.set_num_threads(1)
    _in_process = scene.in_process()
    gc.freeze()  # these objects stay: the collector need not look at them again


def _in_child(probe: Probe) -> Answer:
    assert _in_process is not None, "_begin comes first"
    return _in_process.run([probe])[0]
