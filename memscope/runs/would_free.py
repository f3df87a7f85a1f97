"""For a run that does not fit: the memory that each strategy outside its plan would free.

Each strategy is simulated together with the plan. The savings of several strategies do not add up: checkpointing frees
activations, which LoRA or a lower precision may already have made small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from memscope.analysis.fit import Fit, fit_of
from memscope.errors import MemscopeError, UsageError
from memscope.runs.processes import alone
from memscope.strategies import Plan, Strategy, available, read_strategies
from memscope.strategies.plugins import called
from memscope.trace import Trace

if TYPE_CHECKING:
    from memscope.runs.plans import RunSpec
    from memscope.workload.description import Workload

__all__ = ["OWN_GPU", "Remedies", "WouldFree", "describe_own_gpu", "remedies", "would_free"]

TryAll = Callable[[Sequence["RunSpec"], Sequence[str]], list[str]]
"""Runs specs, shown under their labels, and returns each error message, empty if none (see `runs.plans.try_all`)."""
Alone = Callable[..., Any]
"""Calls a function with arguments in a process that the target may break (see `runs.processes.alone`)."""
OWN_GPU = "this-gpu"
"""Name of the device that `describe_own_gpu` describes."""


@dataclass(frozen=True)
class WouldFree:
    """The effect of one strategy added to a plan that does not fit."""

    strategy: Strategy
    trace: Trace
    """Simulated trace of the plan with the strategy."""
    before_bytes: int
    """Simulated peak allocated bytes without the strategy."""
    is_exact: bool
    """Whether the strategy is exact for the workload (`Strategy.is_exact`)."""

    @property
    def change_bytes(self) -> int:
        """Change of the allocated peak; negative if the strategy frees memory."""
        return self.trace.peak.allocated_bytes - self.before_bytes

    @property
    def fit(self) -> Fit:
        """How safely the plan fits with the strategy."""
        found = fit_of(self.trace)
        assert found is not None, "a run that does not fit has a device with limited memory"
        return found


@dataclass(frozen=True)
class Remedies:
    """Results for the strategies outside a plan."""

    tried: tuple[WouldFree, ...] = ()
    """The strategies that can be applied, largest saving first."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reasons why other strategies could not be simulated, by strategy."""

    @property
    def best(self) -> WouldFree | None:
        """The largest saving that makes the run fit; an exact strategy that takes device memory alone goes first."""
        fitting = [one for one in self.tried if one.fit.fits]
        return min(fitting, key=lambda one: not one.is_exact or bool(one.strategy.takes_more), default=None)


def would_free(spec: RunSpec, trace: Trace, try_all: TryAll, alone: Alone = alone) -> Remedies:
    """Simulate the plan of a run that did not fit with each further installed strategy that can be applied.

    Args:
        spec: the run.
        trace: the trace of the run, with `meta["out_of_memory"]`. The plan of a measured run is also simulated, on
            a GPU of the same kind with the memory that was available to the run.
        try_all: runs the simulations.
        alone: calls the function that builds the target to find out what can be applied.
    """
    plan = Plan.parse(spec.plan)
    texts, failed = alone(_additions, spec, timeout_seconds=spec.timeout_seconds)
    added = [(read_strategies(text)[0], is_exact) for text, is_exact in texts]
    plans = [Plan.of(*plan.strategies, strategy) for strategy, _ in added]
    if not plans:
        return Remedies(failed=failed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        if spec.simulated:
            before: Trace | str = trace
            found = _simulated(plans, spec, folder, try_all)
        else:
            file = folder / "device.toml"
            describe_own_gpu(trace, file)
            on_own_gpu = replace(spec, simulated=True, device=OWN_GPU, device_file=file)
            before, *found = _simulated([plan, *plans], on_own_gpu, folder, try_all)
    if isinstance(before, str):
        return Remedies(failed={**failed, "the plan as it is": before})
    failed |= {strategy.spec: one for (strategy, _), one in zip(added, found, strict=True) if isinstance(one, str)}
    tried = [(*each, one) for each, one in zip(added, found, strict=True) if isinstance(one, Trace)]
    return remedies(tried, before, failed)


def remedies(tried: Iterable[tuple[Strategy, bool, Trace]], before: Trace, failed: dict[str, str]) -> Remedies:
    """The remedies for a run that does not fit, largest saving first.

    Args:
        tried: strategies, each with whether it is exact, and its trace.
        before: the simulated trace of the run without them.
        failed: see `Remedies.failed`.
    """
    freed = [WouldFree(strategy, one, before.peak.allocated_bytes, is_exact) for strategy, is_exact, one in tried]
    return Remedies(tuple(sorted(freed, key=lambda one: one.change_bytes)), failed)


def _additions(spec: RunSpec) -> tuple[list[tuple[str, bool]], dict[str, str]]:
    """Strategies to add to the plan of a run, each with whether it is exact, and why others cannot be queried."""
    from memscope.simulation.packages.meta import on_meta
    from memscope.workload.target import find_target

    plan = Plan.parse(spec.plan)
    target = find_target(spec.target)
    config = target.configure(spec.preset, spec.settings)
    used = {strategy.name for strategy in plan.strategies}
    added: list[tuple[str, bool]] = []
    failed: dict[str, str] = {}
    with on_meta():
        try:
            workload = target.build(config)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the target ran, so only the meta device can be the cause
            return [], {"strategies": f"they cannot be checked on the meta device: {error}"}
        for name, kind in sorted(available().items()):
            if name in used:
                continue
            try:
                strategy = _to_try(kind, workload, plan)
                is_exact = strategy is not None and called(strategy, "is_exact", workload)
            except MemscopeError as error:
                failed[name] = str(error)
                continue
            if strategy is not None:
                added.append((strategy.spec, is_exact))
    return added, failed


def _to_try(kind: type[Strategy], workload: Workload, plan: Plan) -> Strategy | None:
    """The strategy with the first candidate that can be applied, default settings first; None if none can."""
    offered = list(called(kind(), "candidates", workload))
    for config in sorted(offered, key=lambda config: config != kind.Config()):
        strategy = kind(config)
        try:
            Plan.of(*plan.strategies, strategy)
        except UsageError:  # they cannot be combined
            continue
        if not called(strategy, "check", workload):
            return strategy
    return None


def _simulated(plans: Sequence[Plan], spec: RunSpec, folder: Path, try_all: TryAll) -> list[Trace | str]:
    """The trace of each plan, or the message of the error that prevented its simulation."""
    specs = [replace(spec, plan=str(plan), path=folder / f"{index}.npz") for index, plan in enumerate(plans)]
    errors = try_all(specs, [str(plan) or "baseline" for plan in plans])
    return [error or Trace.load(one.path) for one, error in zip(specs, errors, strict=True)]


def describe_own_gpu(trace: Trace, file: Path) -> None:
    """Describe a GPU like PyTorch's current one, with the memory that was available to a run, in a file of devices."""
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    file.write_text(
        f"[{OWN_GPU}]\n"
        f"vendor_name = {json.dumps(gpu.name)}\n"
        f'capability = "{gpu.major}.{gpu.minor}"\n'
        f"capacity_bytes = {trace.meta['out_of_memory']['limit']}\n"
        f"multiprocessors = {gpu.multi_processor_count}\n"
    )
