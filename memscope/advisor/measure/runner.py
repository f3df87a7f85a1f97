"""Simulations that the advisor asks for, one after the other or side by side."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from memscope.errors import MemscopeError, TargetError
from memscope.processes import cores, interrupts_held, pool
from memscope.simulation.allocator import AllocatorSettings
from memscope.simulation.devices import Device, get_device, load_devices
from memscope.strategies.ckpt import LayerPlan
from memscope.trace import Trace

if TYPE_CHECKING:
    from memscope.workload import MicroBatch, Workload

__all__ = [
    "Answer", "Asker", "InProcess", "Probe", "Progress", "Runner", "Scene", "Seen", "require", "side_by_side",
    "telling",
]  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """One simulation."""

    strategies: str = ""
    """Plan to apply, without checkpointing."""
    layers: LayerPlan | None = None
    """Which layers to checkpoint, and how."""
    calls_of: tuple[str, ...] = ()
    """Modules whose calls are noted."""
    steps: int = 2
    whole: bool = True
    """Run every micro-batch of the last step; otherwise only the telling ones."""
    capacity_bytes: int | None = None
    """Memory of the device, where it is not to be the scene's."""

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""
        layers = tuple(self.layers.layers.items()) if self.layers else ()
        return self.strategies, layers, self.calls_of, self.steps, self.whole, self.capacity_bytes


@dataclass(frozen=True)
class Seen:
    """A probe's trace, and what its micro-batches stand for."""

    trace: Trace
    indices: tuple[int, ...]
    """Which of the last step's micro-batches were run."""
    elements: tuple[int, ...]
    """Elements of the tensors of each of them."""
    elements_of_step: int
    """The same of the whole step."""

    @property
    def scale(self) -> float:
        """How much more work the whole step is than the micro-batches that were run."""
        return self.elements_of_step / sum(self.elements)


Answer = Seen | MemscopeError
"""An error of a probe is an answer: a strategy may not apply to the workload, and the search goes on."""


def require(answer: Answer) -> Seen:
    """What a probe saw.

    Raises:
        MemscopeError: when it is an error.
    """
    if isinstance(answer, MemscopeError):
        raise answer
    return answer


class Runner(Protocol):
    """Carries out probes."""

    @property
    def width(self) -> int:
        """How many it carries out at a time."""
        ...

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in order of the probes; `done` is called after each."""
        ...


Progress = Callable[[str, int, int], None]
"""`progress(what is going on, simulations done, simulations known to be needed)`."""


@dataclass
class Asker:
    """Asks a runner, and tells how far it is. What was asked before is known."""

    runner: Runner
    progress: Progress
    done: int = 0
    known: dict[tuple[object, ...], Answer] = field(default_factory=dict)

    def __call__(self, what: str, probes: Sequence[Probe]) -> list[Answer]:
        """The answers to probes that are run for `what`."""
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
    """Probes one after the other, of any workload."""

    workload: Workload | Callable[[], Workload]
    """What is simulated, as `memscope.simulate` takes it."""
    device: Device
    allocator: AllocatorSettings | None = None
    width: ClassVar[int] = 1

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in order of the probes."""
        answers: list[Answer] = []
        for probe in probes:
            answers.append(_answer(self.workload, self.device, self.allocator, probe))
            done()
        return answers


@dataclass(frozen=True)
class Scene:
    """What is advised on, as text that a fresh process can start from."""

    target: str
    preset: str | None
    settings: Mapping[str, str]
    device: str
    device_file: Path | None = None
    allocator: str | None = None
    """Settings of PyTorch's allocator, as PYTORCH_CUDA_ALLOC_CONF has them; None: those of the environment."""

    def build(self) -> Workload:
        """The target's workload."""
        from memscope.target import find_target

        target = find_target(self.target)
        return target.build(target.configure(self.preset, self.settings))

    def in_process(self) -> InProcess:
        """A runner in this process."""
        device = get_device(self.device, load_devices(self.device_file) if self.device_file else None)
        return InProcess(
            self.build, device, None if self.allocator is None else AllocatorSettings.parse(self.allocator)
        )


@contextlib.contextmanager
def side_by_side(scene: Scene) -> Iterator[Runner]:
    """A runner with a process for every core; they end with the context."""
    width = cores()
    with pool(width, _begin, scene) as workers:
        yield _Pool(workers, width)


@dataclass(frozen=True)
class _Pool:
    workers: ProcessPoolExecutor
    width: int

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        with interrupts_held():
            futures: list[Future[Answer]] = [self.workers.submit(_in_child, probe) for probe in probes]
        try:
            for _ in as_completed(futures):
                done()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise TargetError(
                "a simulation ended without a word: its process was killed, most likely for want of host memory"
            ) from None


def telling(elements: Sequence[int]) -> list[int]:
    """Indices of the micro-batches that decide a step's peak, by the elements of their tensors.

    They are the first one, the largest, and the largest of those that meet the gradients of others.
    """
    later = _largest(elements, first=1) if len(elements) > 1 else 0
    return sorted({0, _largest(elements), later})


def _largest(elements: Sequence[int], first: int = 0) -> int:
    return max(range(first, len(elements)), key=lambda index: (elements[index], index))


def _elements(piece: MicroBatch) -> int:
    from memscope.batch import tensors_in

    return sum(tensor.numel() for tensor in tensors_in(piece.data))


def _answer(
    workload: Workload | Callable[[], Workload], device: Device, allocator: AllocatorSettings | None, probe: Probe
) -> Answer:
    from memscope.simulation.fake import simulate
    from memscope.strategies import Plan
    from memscope.strategies.ckpt import Checkpoint

    elements: list[int] = []
    indices: list[int] = []

    steps = iter(range(probe.steps))

    def chosen(pieces: list[MicroBatch]) -> list[MicroBatch]:
        elements[:] = [_elements(piece) for piece in pieces]
        if next(steps) < probe.steps - 1:  # a step before is there for the optimizer's state
            return [pieces[_largest(elements)]]
        indices[:] = range(len(pieces)) if probe.whole else telling(elements)
        return [pieces[index] for index in indices]

    try:
        plan = Plan.parse(probe.strategies)
        if probe.layers is not None:
            plan = Plan.of(*plan.strategies, Checkpoint.of(probe.layers))
        trace = simulate(
            workload,
            device=device if probe.capacity_bytes is None else replace(device, capacity_bytes=probe.capacity_bytes),
            strategies=plan,
            steps=probe.steps,
            allocator=allocator,
            micro_batches=chosen,
            calls_of=probe.calls_of,
        )
    except MemscopeError as error:
        return error
    return Seen(trace, tuple(indices), tuple(elements[index] for index in indices), sum(elements))


_in_process: InProcess | None = None
"""What a process of a pool works on; set once in each."""


def _begin(scene: Scene) -> None:
    import torch

    global _in_process
    torch.set_num_threads(1)
    _in_process = scene.in_process()
    gc.freeze()  # what is there now stays: no use in looking through it time and again


def _in_child(probe: Probe) -> Answer:
    assert _in_process is not None, "_begin comes first"
    return _in_process.run([probe])[0]
