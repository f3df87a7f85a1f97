"""Replace `ckpt:auto,budget=40GB` in a plan by the cheapest checkpoint plan that fits."""

from __future__ import annotations

from pathlib import Path

from memscope.advisor.advise import budget_of
from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.reference import full_probe, none_probe
from memscope.advisor.measure.runner import Asker, Scene, require, side_by_side
from memscope.advisor.search import Search
from memscope.allocator.settings import AllocatorSettings
from memscope.errors import GateFailed, UsageError
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages.meta import on_meta
from memscope.strategies import Plan, Strategy
from memscope.strategies.ckpt import Checkpoint
from memscope.strategies.ckpt.layer_plan import LayerPlan, made_for
from memscope.trace import Progress
from memscope.units import format_bytes
from memscope.workload.building import build_workload

__all__ = ["resolve"]


def resolve(plan: Plan, scene: Scene, device: Device, path: Path, progress: Progress, *, overwrite: bool) -> Plan:
    """The plan with `ckpt:auto` replaced by a checkpoint plan for its budget, which is written to `path`.

    Raises:
        UsageError: when there is no budget, or the device's rates are not known.
        GateFailed: when no checkpoint plan fits.
    """
    (auto,) = (strategy for strategy in plan.strategies if _auto(strategy))
    others = Plan.of(*(strategy for strategy in plan.strategies if strategy is not auto))
    if not auto.config.budget:
        raise UsageError("ckpt:auto needs a budget to fit: write ckpt:auto,budget=40GB")
    if not device.peak_flops_per_second:
        raise UsageError(
            f'ckpt:auto compares plans by their time, and the rates of device "{device.name}" are not known: '
            "choose a specific GPU to simulate (see: memscope devices)"
        )
    budget_bytes = budget_of(auto.config.budget, device, named=True)
    with on_meta():
        workload = build_workload(scene.build)
    layers = LayerList.of(workload.model, auto.config.layer_list)
    text = str(others)
    with side_by_side(scene) as runner:
        ask = Asker(runner, progress)
        # Both at a time; the search below asks for them again, and for more only where the layers need it.
        none, _ = ask("checkpoints", [probe(text, layers, budget_bytes) for probe in (none_probe, full_probe)])
        settings = AllocatorSettings.asked(scene.allocator)
        search = Search(ask, layers, device, settings, budget_bytes, lambda strategy: True)
        search.tried.plain[text] = require(none)
        search.order_layers()
        reference, planning = search.reference(text), search.planning
        found = planning.within(reference)
        if found is None:
            least = planning.least(reference).seen.trace.meta
            raise GateFailed(
                f"no checkpoint plan makes {scene.target} with {text or 'no other strategy'} fit "
                f"{format_bytes(budget_bytes)}: the least that a simulated plan needs is "
                f"{format_bytes(least['peak_reserved'] + least['context'])}; memscope advise tries other strategies too"
            )
    assert found.layers is not None, "a plan of the planner has layers"
    origin = made_for(workload, found.layers.layers, others.specs, device.name)
    LayerPlan(found.layers.layers, origin).save(path, overwrite=overwrite)
    return Plan.of(*others.strategies, Checkpoint(Checkpoint.Config(plan=str(path))))


def _auto(strategy: Strategy) -> bool:
    return isinstance(strategy, Checkpoint) and strategy.config.auto
