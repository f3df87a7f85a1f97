"""The advisor as a whole, on a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from memscope import Plan, simulate
from memscope.advisor.advice import Certificate, FrontPoint, PlanPeak, unbeaten
from memscope.advisor.advise import advise
from memscope.advisor.measure.probe import rounded
from memscope.advisor.measure.runner import Seen, deciding_indices
from memscope.allocator.replay import replay
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import last_step_seconds
from memscope.errors import UsageError
from tests.small_advice import CONTEXT, DEVICE, advice, budgets, plain_bytes
from tests.small_chain import LAYERS, build

pytestmark = pytest.mark.usefixtures("kept_workspaces")


def test_a_step_that_fits_needs_nothing() -> None:
    found = advice(plain_bytes())
    assert found.feasible
    assert not found.layers
    assert found.overhead_vs_none == 0


@pytest.mark.parametrize("index", range(3))
def test_the_plan_from_python_holds_its_promise_when_it_is_simulated(index: int) -> None:
    budget = budgets()[index]
    found = advice(budget)
    assert found.plan is not None
    small = dataclasses.replace(DEVICE, capacity_bytes=budget + CONTEXT)
    trace = simulate(build, device=small, strategies=found.plan)
    assert trace.meta["out_of_memory"] is None
    assert trace.peak.allocated_bytes == found.peak.allocated
    assert last_step_seconds(trace) == pytest.approx(found.step_seconds, rel=1e-9)


def test_a_plan_can_be_saved_and_applied(tmp_path: Path) -> None:
    saved = advice(budgets()[0]).save(tmp_path / "plan.json")
    assert str(saved.plan).endswith(f"ckpt:plan={tmp_path / 'plan.json'},optim:fused,ga:steps=1")
    workload = build()
    Plan.parse(str(saved.plan)).apply(workload)
    with pytest.raises(UsageError, match="exists already"):
        advice(budgets()[0]).save(tmp_path / "plan.json")
    assert advice(plain_bytes()).save(tmp_path / "none.json").plan is not None  # nothing is checkpointed
    assert not (tmp_path / "none.json").exists()


def test_where_nothing_fits_there_is_no_plan(tmp_path: Path) -> None:
    found = advice(2**20)
    assert found.plan is None
    assert found.document()["plan"] is None
    with pytest.raises(UsageError, match="nothing to save: no plan was found that fits"):
        found.save(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("strategies", "saved_bytes"),
    [("optim:fused,ga:steps=4", 0), ("optim:fused,ga:steps=4", 4 * 2**20)],
)
def test_the_step_time_is_that_of_the_plan_with_all_its_micro_batches(strategies: str, saved_bytes: int) -> None:
    plain = simulate(build, device=DEVICE, strategies=strategies)
    budget = int(plain.meta["peak_reserved"]) - saved_bytes + CONTEXT
    found = advise(build, budget=budget, device=DEVICE, strategies=strategies)
    assert found.plan is not None
    assert found.trace is not None
    trace = simulate(build, device=DEVICE, strategies=found.plan)
    assert last_step_seconds(trace) == pytest.approx(found.step_seconds, rel=1e-9)
    assert len(trace) == len(found.trace)  # the first step too, which decides how memory is fragmented


def test_the_time_of_a_step_follows_the_micro_batches_that_were_run() -> None:
    def seen(*elements: int) -> Seen:
        trace = advice(budgets()[0]).trace
        assert trace is not None
        return Seen(trace, tuple(deciding_indices(elements)), elements)

    assert seen(4, 4, 4).of_step([1.0, 1.5]) == 1.0 + 1.5 + 1.5  # the others also add to gradients
    assert seen(2, 4, 6).of_step([1.0, 2.0]) == 1.0 + 1.5 + 2.0  # on the line through both
    assert seen(2, 4, 8).of_step([1.0, 8.0]) == 1.0 + 4.0 + 8.0  # at most in proportion
    assert seen(2, 4, 8).of_step([2.0, 1.0]) == 2.0 + 1.0 + 1.0  # at least a constant
    assert seen(2, 4).of_step([1.0, 2.0]) == 3.0


@pytest.mark.parametrize("index", range(3))
def test_less_memory_costs_time_but_less_than_checkpointing_everything(index: int) -> None:
    found = advice(budgets()[index])
    assert found.overhead_vs_none > 0
    assert found.overhead_vs_all < 0


def test_a_smaller_budget_never_gives_a_larger_peak() -> None:
    peaks = [advice(budget).peak.allocated for budget in budgets()]
    assert peaks == sorted(peaks, reverse=True)


def test_the_certificate_bounds_the_plan_from_below() -> None:
    certificate = advice(budgets()[1]).certificate
    assert certificate is not None
    assert certificate.search_gap == 0  # the layers are alike
    assert 0 <= certificate.gap < 1
    seconds = advice(budgets()[1]).step_seconds
    assert certificate.lower_bound_seconds == pytest.approx(seconds * (1 - certificate.gap))


def test_what_the_search_leaves_open_and_what_fragmentation_adds_are_told_apart() -> None:
    # Of a step of 10 s: the fastest plan whose allocated bytes fit takes 9 s, and none takes less than 8 s.
    certificate = Certificate.of(10.0, 9.0, 8.0)
    assert certificate.document() == pytest.approx(
        {"lower_bound_seconds": 8.0, "search_gap": 0.1, "fragmentation_gap": 0.1, "gap": 0.2}
    )
    peak = PlanPeak(allocated=3 * 2**30, reserved=4 * 2**30, device=5 * 2**30)
    told = dataclasses.replace(advice(budgets()[0]), certificate=certificate, peak=peak).proof
    told = told.partition(". Of ")[0]
    assert told.startswith("within 10.00% for allocated bytes: ")
    assert told.endswith(
        "takes less than 8.00 s (estimate); fragmentation, 1.00 GiB reserved beyond allocated, adds 10.00%"
    )
    exact = dataclasses.replace(advice(budgets()[0]), certificate=Certificate.of(8.0, 8.0, 8.0), peak=peak).proof
    assert exact.startswith("exact for allocated bytes: ")
    assert "adds nothing. Of " in exact


def test_too_small_a_budget_is_refused_with_the_smallest_that_will_do() -> None:
    found = advice(2**20)
    assert not found.feasible
    assert found.certificate is None
    assert found.minimum_bytes == found.peak.device
    enough = advise(build, budget=found.minimum_bytes, device=DEVICE, strategies="optim:fused,ga:steps=1")
    assert enough.feasible


def test_the_smallest_reservation_is_enough_and_less_is_not() -> None:
    found = advice(budgets()[0])
    assert found.trace is not None
    trace, settings = found.trace, AllocatorSettings()

    def runs_within(capacity: int) -> bool:
        return replay(trace.requested, trace.born, trace.freed, settings=settings, capacity_bytes=capacity).oom is None

    assert runs_within(found.peak.reserved)
    assert not runs_within(found.peak.reserved - 2 * 2**20)
    assert found.peak.reserved >= int(dataclasses.replace(trace, size=rounded(trace)).allocated.max())


def test_the_binding_event_is_the_peak_of_the_plan() -> None:
    found = advice(2**20)
    assert found.trace is not None
    assert found.binding.allocated == found.trace.peak.allocated_bytes == sum(found.binding.by_category.values())


def test_no_point_of_the_front_is_beaten_by_another() -> None:
    front = advice(budgets()[1]).front
    assert len(front) >= 3
    sizes, times = [point.peak.device for point in front], [point.step_seconds for point in front]
    assert sizes == sorted(set(sizes))
    assert times == sorted(set(times), reverse=True)


def test_the_front_has_no_rows_that_another_beats_as_they_are_printed() -> None:
    def point(gib: float, seconds: float) -> FrontPoint:
        size = round(gib * 2**30)
        return FrontPoint((), "", PlanPeak(size, size, size), seconds)

    points = [point(26.01, 2.0), point(26.02, 1.9), point(27.0, 1.899), point(28.0, 1.5), point(29.0, 1.6)]
    # As printed: 26.0 GiB 2.00 s, 26.0 GiB 1.90 s, 27.0 GiB 1.90 s, 28.0 GiB 1.50 s, 29.0 GiB 1.60 s.
    assert unbeaten(points) == (points[1], points[3])


def test_the_document_has_the_promised_keys() -> None:
    document = advice(budgets()[0]).document()
    assert document["schema_version"] == 1
    keys = ["budget", "feasible", "plan", "peak", "fit", "time", "certificate", "minimum_budget", "binding", "front"]
    assert set(keys) <= set(document)
    assert (document["fit"]["needed"], document["fit"]["available"]) == (document["peak"]["device"], document["budget"])
    assert set(document["plan"]) == {"strategies", "layers", "file"}
    assert list(document["plan"]["layers"]) == [f"layers.{i}" for i in range(LAYERS)]
    assert all(isinstance(size, int) for size in document["peak"].values())


def test_a_plan_taken_for_want_of_a_better_one_is_not_called_the_best() -> None:
    """The bound belongs to the budget, not to the plan: a faster plan whose allocated bytes fit keeps the gap open."""
    found = advice(advice(2**20).minimum_bytes - CONTEXT)
    assert found.certificate is not None
    assert found.certificate.lower_bound_seconds <= found.step_seconds
    assert found.certificate.lower_bound_seconds <= advice(budgets()[2]).step_seconds


@pytest.mark.parametrize(
    ("elements", "indices"),
    [([5], [0]), ([5, 5, 5], [0, 2]), ([9, 5, 7], [0, 2]), ([1, 9, 7], [0, 1]), ([9, 9, 1], [0, 1])],
)
def test_the_deciding_micro_batches_are_the_first_the_largest_and_the_largest_after_the_first(
    elements: Sequence[int], indices: list[int]
) -> None:
    assert deciding_indices(elements) == indices
