"""Where a run does not fit: what each strategy that is not in its plan would free.

Each is simulated together with the plan. What strategies free does not add up: checkpointing frees activations, which
LoRA or a lower precision may have made small already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan, Strategy, available
from memscope.strategies.plugins import called
from memscope.trace import Trace

if TYPE_CHECKING:
    from memscope.runs.plans import RunSpec
    from memscope.workload.description import Workload
    from memscope.workload.target import Target

__all__ = ["Remedies", "WouldFree", "would_free"]

TryAll = Callable[[Sequence["RunSpec"], Sequence[str]], list[str]]
"""Carries out runs, shown under their labels: what each failed with, empty where it did not (`runs.try_all`)."""
_OWN_GPU = "this-gpu"


@dataclass(frozen=True)
class WouldFree:
    """One strategy, added to a plan that does not fit."""

    strategy: Strategy
    trace: Trace
    """The plan with the strategy, simulated."""
    before_bytes: int
    """Allocated at the peak without it, simulated."""

    @property
    def change_bytes(self) -> int:
        """What it adds to the allocated peak; negative: it frees as much."""
        return self.trace.peak.allocated_bytes - self.before_bytes

    @property
    def fits(self) -> bool:
        """Whether the plan runs with it."""
        return not self.trace.meta.get("out_of_memory")


@dataclass(frozen=True)
class Remedies:
    """What is known about the strategies that are not in a plan."""

    tried: tuple[WouldFree, ...] = ()
    """Those that can be applied, what frees most first."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why others could not be simulated, by strategy."""


def would_free(target: Target, config: Any, spec: RunSpec, trace: Trace, try_all: TryAll) -> Remedies:
    """Simulate the plan of a run that did not fit with each installed strategy that it lacks and that can be applied.

    Args:
        target: what was run.
        config: with which settings.
        spec: the run.
        trace: what came out of it, with `meta["out_of_memory"]`. Where it is measured, the plan itself is simulated,
            too, on a GPU of the same kind with as much memory as the run could have.
        try_all: carries out the simulations.
    """
    plan = Plan.parse(spec.plan)
    added, failed = _additions(target, config, plan)
    plans = [Plan.of(*plan.strategies, strategy) for strategy in added]
    if not plans:
        return Remedies(failed=failed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        if spec.simulated:
            before: Trace | str = trace
            found = _simulated(plans, spec, folder, try_all)
        else:
            before, *found = _simulated([plan, *plans], _on_own_gpu(spec, trace, folder), folder, try_all)
    if isinstance(before, str):
        return Remedies(failed={"the plan as it is": before})
    tried = []
    for strategy, one in zip(added, found, strict=True):
        if isinstance(one, str):
            failed[strategy.spec] = one
        else:
            tried.append(WouldFree(strategy, one, before.peak.allocated_bytes))
    return Remedies(tuple(sorted(tried, key=lambda one: one.change_bytes)), failed)


def _additions(target: Target, config: Any, plan: Plan) -> tuple[list[Strategy], dict[str, str]]:
    """Strategies to add, and why others cannot even be asked."""
    import torch

    used = {strategy.name for strategy in plan.strategies}
    added, failed = [], {}
    with torch.device("meta"):
        try:
            workload = target.build(config)
        except (Exception, SystemExit) as error:  # it ran, so that it can only be unable to live on the meta device
            return [], {"strategies": f"the model cannot be built without memory to check them on it: {error}"}
        for name, kind in sorted(available().items()):
            if name in used:
                continue
            try:
                strategy = _to_try(kind, workload, plan)
            except MemscopeError as error:
                failed[name] = str(error)
                continue
            if strategy is not None:
                added.append(strategy)
    return added, failed


def _to_try(kind: type[Strategy], workload: Workload, plan: Plan) -> Strategy | None:
    """A strategy with its default settings, or with the first of its candidates where those are no candidate."""
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
    """The trace of each plan, or what kept it from being simulated."""
    specs = [replace(spec, plan=str(plan), path=folder / f"{index}.npz") for index, plan in enumerate(plans)]
    errors = try_all(specs, [str(plan) or "baseline" for plan in plans])
    return [error or Trace.load(one.path) for one, error in zip(specs, errors, strict=True)]


def _on_own_gpu(spec: RunSpec, trace: Trace, folder: Path) -> RunSpec:
    """The same run, simulated on a GPU such as PyTorch's current one, with the memory that was there for the run."""
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    file = folder / "device.toml"
    file.write_text(
        f"[{_OWN_GPU}]\n"
        f"vendor_name = {json.dumps(gpu.name)}\n"
        f'capability = "{gpu.major}.{gpu.minor}"\n'
        f"capacity_bytes = {trace.meta['out_of_memory']['limit']}\n"
        f"multiprocessors = {gpu.multi_processor_count}\n"
    )
    return replace(spec, simulated=True, device=_OWN_GPU, device_file=file)
