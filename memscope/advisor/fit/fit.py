"""Whether a training step fits a device, how much larger it may be, and which devices hold it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memscope.advisor.advise import DEFAULT_DEVICE, AdviceRequest, advised
from memscope.advisor.combinations import allowed_names
from memscope.advisor.fit.devices import devices_that_hold
from memscope.advisor.fit.fitting import Evidence, Fitting, FittingChange, Largest, Size
from memscope.advisor.fit.names import SizeNames
from memscope.advisor.fit.question import Question
from memscope.advisor.fit.sizes import Boundary, told
from memscope.advisor.measure.runner import Asker, InProcess, Probe, Runner, Seen, require
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.notes import notes_of
from memscope.errors import GateFailed, MemscopeError, UsageError
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import Device, get_device
from memscope.strategies import Plan
from memscope.trace import PHASES, Progress, Trace
from memscope.workload.description import Workload

__all__ = ["answer", "fit"]

_LENGTH_UNIT = 64
"""Context lengths are searched in multiples of this: attention kernels work on tiles of 64 or 128 tokens."""
_MOST_SAMPLES, _MOST_TOKENS = 4096, 2**20
_MOST_CHANGES = 3


def fit(
    build: Callable[..., Workload],
    *,
    micro_batch: int,
    seq_len: int | None = None,
    device: str | Device | None = None,
    strategies: str | Plan = "",
    allow: str | Collection[str] = (),
    allocator: AllocatorSettings | None = None,
    progress: Progress | None = None,
    assume: str | Assume = "",
) -> Fitting:
    """Find out whether a training step fits a device, how much larger it may be, and which devices hold it.

    Every answer is simulated: the largest micro-batch that fits, and the next one, which runs out of memory.

    Args:
        build: builds the workload of a size: `build(micro_batch=4, seq_len=2048)`.
        micro_batch: samples of a micro-batch.
        seq_len: tokens of a sample; None: `build` takes no length.
        device: the device, or its name in `memscope devices`; None: `DEFAULT_DEVICE`.
        strategies: strategies to apply.
        allow: names of strategies that change the mathematics and may be proposed if the step does not fit, as for
            `advise`.
        allocator: settings of PyTorch's caching allocator; None: those of `PYTORCH_CUDA_ALLOC_CONF`.
        progress: called as `progress(activity, simulations done, simulations known to be needed)`.
        assume: what to take for values that cannot be known, as for `memscope.simulate`.

    Raises:
        UsageError: the device has no memory limit, or a size, the device, the strategies or `assume` cannot be used.
        TargetError: the target's code fails, or cannot be simulated.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Workload, fit
        >>> def build(micro_batch):
        ...     return Workload(
        ...         model=nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)),
        ...         batches=[torch.zeros(micro_batch * 2**13, 1024)],
        ...         loss=lambda model, x: model(x).square().mean(),
        ...         optimizer_factory=torch.optim.AdamW,
        ...     )
        >>> found = fit(build, micro_batch=1, device="t4:1GiB")
        >>> found.fits, found.micro_batch.next == found.micro_batch.value + 1
        (True, True)
        >>> [one.fits for one in found.evidence[-2:]]  # the largest that fits, and the next one
        [True, False]
    """
    for name, value in (("micro_batch", micro_batch), ("seq_len", seq_len)):
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name}={value!r}: expected a whole number from 1")
    text = device.name if isinstance(device, Device) else device or DEFAULT_DEVICE
    device = device if isinstance(device, Device) else get_device(text)
    settings = AllocatorSettings.asked(allocator)
    question = Question(
        names=SizeNames("micro_batch", "seq_len"),
        asked=Size(micro_batch, seq_len),
        device=device,
        strategies=str(strategies if isinstance(strategies, Plan) else Plan.parse(strategies)),
        allow=allow,
        allocator=settings,
        device_text=text,
    )
    policy = Assume.parse(assume) if isinstance(assume, str) else assume
    runner = InProcess(build, device, settings, policy)
    return answer(question, Asker(runner, progress or (lambda what, done, needed: None)), build)


def answer(question: Question, asker: Asker, build: Callable[..., Workload] | None) -> Fitting:
    """Answer a question with the simulations that `asker` runs.

    `build` builds the workload that was asked for; None: it is a program, for which no changes are searched.

    Raises:
        MemscopeError: as for `fit`.
    """
    device = question.device
    if device.capacity_bytes is None:
        raise UsageError(
            f'device "{device.name}" has no memory limit, so everything fits: choose a specific GPU (see: memscope '
            f"devices), or give it a memory, for example {device.name}:24GiB"
            if device.kind == "cuda"
            else f'device "{device.name}" is no GPU: choose one (see: memscope devices)'
        )
    allowed_names(question.allow)  # a wrong name is told before anything is simulated
    search = _Search(question, asker)
    trace = search.begin()
    if PHASES.index("backward") not in trace.mark_phase:
        raise UsageError(
            f'"{trace.meta["target"]}" is for inference: fit searches the sizes of a training step; to see whether one '
            "size of it fits, run memscope profile with --set"
        )
    fits_as_asked = search.evidence[search.asked]
    micro_batch = search.largest_micro_batch()
    seq_len = None if search.asked.seq_len is None else search.longest_context(trace.meta.get("positions"))
    unfilled = search.fill(micro_batch, seq_len) if question.grid else []
    devices, refused = devices_that_hold(trace, question, search.sizes(search.asked), asker)
    changes, notes = ((), []) if fits_as_asked.fits else _changes(question, search, asker, build)
    whole = all(one.is_whole for one in search.evidence.values())
    return Fitting(
        target=str(trace.meta["target"]),
        device=question.device_text or device.name,
        capacity_bytes=device.capacity_bytes,
        strategies=question.strategies,
        asked=fits_as_asked,
        micro_batch=micro_batch,
        seq_len=seq_len,
        evidence=tuple(sorted(search.evidence.values(), key=lambda one: (one.size.seq_len or 0, one.size.micro_batch))),
        devices=devices,
        changes=changes,
        notes=(*notes_of(trace), *([] if whole else [_DECIDING]), *unfilled, *refused, *notes),
        assumptions=tuple(trace.meta.get("assumptions", ())),
        settings=trace.meta.get("settings", {}),
    )


_DECIDING = (
    "The sizes that were asked for and found were simulated with every micro-batch of two steps, the others with those "
    "that decide the peak: the first, and the largest that meets gradients."
)


@dataclass
class _Search:
    """The simulations of one question, and what they showed."""

    question: Question
    asker: Asker
    asked: Size = field(init=False)
    evidence: dict[Size, Evidence] = field(default_factory=dict)

    def begin(self) -> Trace:
        """Simulate the size that was asked for, with every micro-batch."""
        question = self.question
        sizes = () if question.asked is None else self.sizes(question.asked)
        (seen,) = self.asker("as asked", [Probe(question.strategies, sizes=sizes)])
        trace = require(seen).trace
        self.asked = question.asked or question.names.read(trace.meta["settings"])
        self.evidence[self.asked] = Evidence.of(trace, self.asked, is_whole=True)
        return trace

    def sizes(self, size: Size) -> tuple[tuple[str, int], ...]:
        """The settings that make a size; none for the size that the target's settings say."""
        if self.question.asked is None and size == self.asked:
            return ()
        names = self.question.names
        length = [] if size.seq_len is None or names.seq_len is None else [(names.seq_len, size.seq_len)]
        return ((names.micro_batch, size.micro_batch), *length)

    def look(self, what: str, sizes: Sequence[Size], *, whole: bool) -> dict[Size, Evidence | MemscopeError]:
        """Simulate sizes on the device."""
        probes = [Probe(self.question.strategies, whole=whole, sizes=self.sizes(size)) for size in sizes]
        found: dict[Size, Evidence | MemscopeError] = {}
        for size, seen in zip(sizes, self.asker(what, probes), strict=True):
            if isinstance(seen, Seen):
                every = whole or len(seen.elements) == 1
                self.evidence[size] = found[size] = Evidence.of(seen.trace, size, is_whole=every)
            else:
                found[size] = seen
        return found

    def largest_micro_batch(self) -> Largest:
        """The largest micro-batch at the length that was asked for."""
        return self._boundary(
            "largest micro-batch", lambda value: replace(self.asked, micro_batch=value), self.asked.micro_batch, 1,
            max(_MOST_SAMPLES, self.asked.micro_batch), f"no micro-batch above {_MOST_SAMPLES:,} was tried",
        )  # fmt: skip

    def longest_context(self, positions: int | None) -> Largest:
        """The longest context at the micro-batch that was asked for; `positions` are the model's."""
        asked = self.asked.seq_len
        assert asked is not None, "only samples with a length can become longer"
        why = f"no context above {_MOST_TOKENS:,} tokens was tried"
        if positions is not None:
            why = f"the model has {positions:,} positions"
        most = max(_MOST_TOKENS if positions is None else positions, asked)
        unit = _LENGTH_UNIT if most >= _LENGTH_UNIT else 1
        return self._boundary(
            "longest context", lambda value: replace(self.asked, seq_len=value), asked, unit, most // unit * unit, why
        )

    def _boundary(
        self, what: str, size: Callable[[int], Size], asked: int, unit: int, most: int, why_most: str
    ) -> Largest:
        def ask(values: Sequence[int], whole: bool) -> Mapping[int, Evidence | MemscopeError]:
            found = self.look(what, [size(value) for value in values], whole=whole)
            return {value: found[size(value)] for value in values}

        allocatable = self.question.device.allocatable_bytes
        assert allocatable is not None, "checked in `answer`"
        return Boundary(ask, allocatable, unit, most, why_most, {asked: self.evidence[self.asked]}).found()

    def fill(self, micro_batch: Largest, seq_len: Largest | None) -> list[str]:
        """Simulate combinations of micro-batches and lengths; returns notes on those that have no result."""
        asked = self.asked
        most = max(micro_batch.value, asked.micro_batch)
        batches = sorted({1, asked.micro_batch, (1 + most) // 2, most})
        lengths: list[int | None] = [asked.seq_len]
        if asked.seq_len is not None and seq_len is not None:
            longest = max(seq_len.value, asked.seq_len)
            lengths = [*{max(1, asked.seq_len // 2), asked.seq_len, min(2 * asked.seq_len, longest)}]
        sizes = [Size(batch, length) for length in lengths for batch in batches]
        found = self.look("combinations", [size for size in sizes if size not in self.evidence], whole=False)
        return [f"{told(str(size), one)}." for size, one in found.items() if isinstance(one, MemscopeError)]


def _changes(
    question: Question, search: _Search, asker: Asker, build: Callable[..., Workload] | None
) -> tuple[tuple[FittingChange, ...], list[str]]:
    """The cheapest changes with which the step fits, and notes."""
    if build is None:
        return (), ["Changes that make a program fit are not searched here: try strategies with memscope profile -s."]
    sizes: dict[str, Any] = dict(search.sizes(search.asked))
    capacity = question.device.capacity_bytes
    assert capacity is not None, "checked in `answer`"
    try:
        request = AdviceRequest(
            capacity, question.device, Plan.parse(question.strategies), question.allow, "", question.allocator,
            other_budgets=False,
        )  # fmt: skip
        asker = Asker(_AtSize(asker.runner, tuple(sizes.items())), asker.progress)
        advice = advised(request, asker, lambda: build(**sizes))
    except (UsageError, GateFailed) as error:
        return (), [f"No change was searched that makes it fit: {error}."]
    found = [FittingChange(spec, point.peak.device, point.step_seconds) for spec, point in advice.fitting]
    if not found:
        hint = f"; {advice.binding.helps}" if advice.binding.helps else ""
        return (), [f"No change was found that makes it fit ({advice.proof}{hint})."]
    return tuple(found[:_MOST_CHANGES]), []


@dataclass(frozen=True)
class _AtSize:
    """A runner whose probes all have the same sizes."""

    runner: Runner
    sizes: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        return self.runner.width

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Any]:
        return self.runner.run([replace(probe, sizes=self.sizes) for probe in probes], done)
