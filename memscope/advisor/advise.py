"""Find the strategies, and the layers to checkpoint, that make a step fit a budget at the least cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from memscope.advisor.advice import Advice, PlanPeak, binding_of, unbeaten
from memscope.advisor.combinations import CHECKPOINTING, allowed_names, combinations, forbidden, left_out
from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.reference import full_probe
from memscope.advisor.measure.runner import Asker, InProcess, Seen
from memscope.advisor.planning import device_bytes
from memscope.advisor.points import points_of, told_by_s
from memscope.advisor.search import Search
from memscope.allocator.other_settings import WORTH_SAYING, other_settings
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.notes import notes_of
from memscope.errors import UsageError
from memscope.interrupts import interrupt_taken
from memscope.simulation.assumptions import Assume
from memscope.simulation.devices.catalogue import Device, get_device
from memscope.simulation.packages.meta import on_meta
from memscope.strategies import Plan
from memscope.strategies.ckpt.layer_plan import made_for
from memscope.strategies.plugins import called
from memscope.trace import Progress, Trace
from memscope.units import format_bytes, parse_budget
from memscope.workload.building import build_workload
from memscope.workload.description import Workload

__all__ = ["DEFAULT_DEVICE", "AdviceRequest", "advise", "advised", "budget_of", "require_rates"]

DEFAULT_DEVICE = "a100-80gb"
"""The device whose kernels and rates are assumed by default."""


def budget_of(text: str, device: Device, *, named: bool) -> int:
    """Bytes of a budget such as `40GB`, `37.3GiB`, or `90%` of a device that was named.

    Raises:
        UsageError: when the text is no positive size, or a percentage outside 0 to 100 or of a device not named.
    """
    words = text.strip()
    if not words.endswith("%"):
        return parse_budget(words)
    if not named or device.capacity_bytes is None:
        raise UsageError(f'budget "{text}" is a share of a device: name one, for example --device a100-40gb')
    try:
        share = float(words[:-1])
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise UsageError(f'budget "{text}": expected a share above 0% and up to 100%, for example 90%')
    return int(device.capacity_bytes * share / 100)


def require_rates(device: Device) -> None:
    """Refuse a device on which plans cannot be compared by their time.

    Raises:
        UsageError: its rates are not known.
    """
    if not device.peak_flops_per_second:
        raise UsageError(
            f'the rates of device "{device.name}" are not known, and plans are compared by their time: '
            "choose a specific GPU (see: memscope devices)"
        )


@dataclass(frozen=True)
class AdviceRequest:
    """What an advice is asked for."""

    budget_bytes: int
    """Memory of the device, CUDA context included."""
    device: Device
    strategies: Plan
    """Strategies that every plan must use."""
    allow: str | Collection[str]
    layer_list: str
    allocator: AllocatorSettings
    other_budgets: bool = True
    """Whether to plan for other budgets too: the smallest that is feasible, and those between it and the largest."""


def advise(
    workload: Workload | Callable[[], Workload],
    *,
    budget: int | str,
    device: str | Device | None = None,
    strategies: str | Plan = "",
    allow: str | Collection[str] = (),
    layer_list: str = "",
    allocator: AllocatorSettings | None = None,
    progress: Progress | None = None,
    assume: str | Assume = "",
) -> Advice:
    """Find the plan that makes a training step fit a budget at the least estimated time.

    Args:
        workload: the workload to train, or a function that builds it.
        budget: memory of the device, CUDA context included, in bytes or as text such as `40GB` or `90%`.
        device: the device whose kernels and rates are assumed, or its name in `memscope devices`; None:
            `DEFAULT_DEVICE`.
        strategies: strategies that every plan must use.
        allow: names of strategies that change the mathematics and may be used, as a collection or as text such as
            `lora,bf16`; all exact strategies may be used.
        layer_list: names of the lists of modules that are the layers, joined by +; empty: all lists of repeated layers.
        allocator: settings of PyTorch's caching allocator; None: those of `PYTORCH_CUDA_ALLOC_CONF`.
        progress: called as `progress(activity, simulations done, simulations known to be needed)`.
        assume: what to take for values that cannot be known, as for `memscope.simulate`.

    Raises:
        UsageError: when budget, device, strategies or `assume` cannot be used, or the model's layers form no chain.
        TargetError: when the target's code fails, or cannot be simulated.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memscope import Workload, advise
        >>> def build():
        ...     return Workload(
        ...         model=nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(2)]),
        ...         batches=[torch.randn(1, 256)],
        ...         loss=lambda model, x: model(x).square().mean(),
        ...         optimizer_factory=torch.optim.AdamW,
        ...     )
        >>> advice = advise(build, budget="600MB", device="a100-40gb")
        >>> advice.feasible, advice.peak.device <= 600_000_000
        (True, True)
        >>> advice.layers  # it fits without checkpointing
        {}
        >>> workload = build()
        >>> advice.plan.apply(workload)  # `advice.plan` is None where nothing fits
    """
    named = device is not None
    device = device if isinstance(device, Device) else get_device(device or DEFAULT_DEVICE)
    settings = AllocatorSettings.asked(allocator)
    policy = Assume.parse(assume) if isinstance(assume, str) else assume
    request = AdviceRequest(
        budget_bytes=budget_of(budget, device, named=named) if isinstance(budget, str) else budget,
        device=device,
        strategies=Plan.parse(strategies) if isinstance(strategies, str) else strategies,
        allow=allow,
        layer_list=layer_list,
        allocator=settings,
    )
    runner = InProcess(workload, device, settings, policy)
    return advised(request, Asker(runner, progress or (lambda what, done, needed: None)), workload)


def advised(request: AdviceRequest, asker: Asker, workload: Workload | Callable[[], Workload]) -> Advice:
    """The advice on a workload, with the simulations that `asker` runs.

    Raises:
        MemscopeError: as for `advise`.
    """
    device = request.device
    if request.budget_bytes <= 0:
        raise UsageError(f"a budget of {request.budget_bytes} bytes: expected a positive size, for example 40GB")
    require_rates(device)
    allowed = allowed_names(request.allow)
    always = request.strategies
    if isinstance(workload, Workload):
        built = workload
    else:
        with on_meta():
            built = build_workload(workload)
    if built.optimizer_factory is None:
        raise UsageError(
            f'"{built.name}" is for inference: advice is on training; to see whether it fits, or to try a '
            "strategy, run memscope profile"
        )
    always.check(built)
    chain = LayerList.of(built.model, request.layer_list, exactly=CHECKPOINTING not in allowed)
    search = Search(
        asker,
        chain,
        device,
        request.allocator,
        request.budget_bytes,
        lambda strategy: bool(called(strategy, "is_exact", built)),
        other_budgets=request.other_budgets,
    )
    plans = combinations(built, always, allowed)
    notes = []
    interrupted = False
    try:
        search.run(plans)
    except KeyboardInterrupt:
        if search.best is None:
            raise
        interrupt_taken()
        interrupted = True
        notes.append("interrupted: this is the best plan found so far; a better one, and a smaller budget, may exist")
    helps = {} if search.best else forbidden(built, always, allowed)
    advice = _advice(search, plans, built, helps, more=request.other_budgets and not interrupted)
    beyond = left_out(built, always, allowed)
    return dataclasses.replace(
        advice,
        combinations=advice.combinations + len(beyond),
        untried=(*advice.untried, *beyond),
        notes=(*search.layers.notes, *notes, *advice.notes),
    )


def _advice(search: Search, plans: Sequence[Plan], built: Workload, helps: Mapping[str, Plan], *, more: bool) -> Advice:
    """The advice from what a search has found.

    Args:
        search: the search.
        plans: the combinations of strategies.
        built: the workload.
        helps: plans with strategies that were not allowed.
        more: also simulate plans for other budgets.
    """
    device, settings = search.device, search.allocator
    least = search.best if search.best and not more else search.least()
    found = search.best
    shown = found or search.whole(least)
    reference = search.reference(shown.strategies)
    layers = dict(shown.layers.layers) if shown.layers else {}
    peak = _peak(shown.seen, device, settings)
    seconds = shown.seen.seconds
    scale = seconds / shown.seconds
    points = points_of(search, shown, least, peak, more=more)
    front = unbeaten(points)
    smallest = peak.device
    if found and shown is not least:
        smallest = min(_peak(least.seen, device, settings).device, *(point.peak.device for point in front))
    return Advice(
        target=built.name,
        device=device.name,
        budget_bytes=search.budget_bytes,
        feasible=found is not None,
        strategies=tuple(Plan.parse(reference.strategies).specs),
        layers=layers if set(layers.values()) - {"none"} else {},
        peak=peak,
        step_seconds=seconds,
        overhead_vs_none=shown.seconds / reference.none_seconds - 1,
        overhead_vs_all=shown.seconds / reference.full_seconds - 1,
        certificate=found.certificate.scaled(scale) if found and found.certificate else None,
        minimum_bytes=smallest,
        binding=binding_of(shown.seen.trace, "" if found else _would_help(search, helps)),
        front=front,
        simulated=len(search.tried.plain),
        combinations=len(plans),
        untried=tuple(search.untried(plans)),
        notes=(*notes_of(shown.seen.trace), *search.planning.refused, *_scattered(shown.seen.trace, peak, settings)),
        made_for=made_for(built, search.layers.names, Plan.parse(reference.strategies).specs, device.name),
        trace=shown.seen.trace,
        fitting=told_by_s(points, search, feasible=found is not None),
    )


def _peak(seen: Seen, device: Device, settings: AllocatorSettings) -> PlanPeak:
    reserved = seen.least_reserved(settings)
    return PlanPeak(seen.trace.peak.allocated_bytes, reserved, reserved + device.context_bytes)


def _scattered(trace: Trace, peak: PlanPeak, settings: AllocatorSettings) -> list[str]:
    """A note on the bytes that another setting of the allocator would save, if they are worth it."""
    if peak.reserved - peak.allocated < WORTH_SAYING * peak.reserved:
        return []
    for best in other_settings(trace, settings, round((1 - WORTH_SAYING) * peak.reserved))[:1]:
        saved = format_bytes(peak.reserved - best.reserved_bytes)
        return [
            f"PYTORCH_CUDA_ALLOC_CONF={best.text} would save at least {saved} of fragmentation: "
            f"simulate it with --allocator {best.text}"
        ]
    return []


def _would_help(search: Search, plans: Mapping[str, Plan]) -> str:
    """The bytes needed with each strategy that was not allowed, and whether it fits."""
    found = search.tried.simulated(plans.values())
    large = [text for text, seen in found.items() if device_bytes(seen) > search.budget_bytes]
    may = search.layers.may_recompute_all
    probes = [full_probe(text, search.layers, search.budget_bytes) for text in large if may]
    full = dict(zip(large if may else (), search.ask("every layer checkpointed", probes), strict=True))
    lines = []
    for name, text in ((name, str(plan)) for name, plan in plans.items() if str(plan) in found):
        answers = [seen for seen in (found[text], full.get(text)) if isinstance(seen, Seen)]
        needed = min(map(device_bytes, answers))
        fitting = "fits" if needed <= search.budget_bytes else "does not fit either"
        lines.append(f"--allow {name}: {format_bytes(needed)}, {fitting}")
    return "; ".join(lines)
