"""The advisor as a whole, on a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope import Strategy, Workload, fit, simulate
from memscope.advisor.advice import Advice, Certificate, FrontPoint, PlanPeak, unbeaten
from memscope.advisor.advise import advise, budget_of
from memscope.advisor.combinations import allowed_names
from memscope.advisor.emit import TOOLS, emit
from memscope.advisor.layer_words import in_words
from memscope.advisor.measure.probe import rounded
from memscope.advisor.measure.runner import Seen, deciding_indices
from memscope.allocator.replay import replay
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import last_step_seconds
from memscope.errors import TargetError, UsageError
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies import Plan, Stage
from memscope.strategies import plan as plan_module
from memscope.strategies.ckpt import LayerPlan
from memscope.testing.toy import toy_workload
from tests.small_chain import LAYERS, ROWS, WIDTH, build

DEVICE = get_device("a100-40gb")
CONTEXT = DEVICE.context_bytes
pytestmark = pytest.mark.usefixtures("kept_workspaces")


@cache
def advice(budget_bytes: int, allow: tuple[str, ...] = (), strategies: str = "adamw:fused,ga:steps=1") -> Advice:
    return advise(build, budget=budget_bytes + CONTEXT, device=DEVICE, strategies=strategies, allow=allow)


@cache
def plain_bytes() -> int:
    """What the allocator reserves without checkpointing."""
    trace = simulate(build, device=DEVICE, strategies="adamw:fused,ga:steps=1")
    return int(trace.meta["peak_reserved"])


@cache
def budgets() -> list[int]:
    """Of what the allocator reserves, largest first."""
    return [plain_bytes() - saved * 2**20 for saved in (4, 12, 20)]


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
    assert str(saved.plan).endswith(f"ckpt:plan={tmp_path / 'plan.json'},adamw:fused,ga:steps=1")
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
    [("adamw:fused,ga:steps=4", 0), ("adamw:fused,ga:steps=4", 4 * 2**20)],
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
    enough = advise(build, budget=found.minimum_bytes, device=DEVICE, strategies="adamw:fused,ga:steps=1")
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


@pytest.mark.parametrize("allow", ["bf16", " bf16 ,amp", ["bf16,amp"], ("bf16",)])
def test_names_may_be_one_text_or_several(allow: str | Sequence[str]) -> None:
    assert allowed_names(allow)[0] == "bf16"
    assert set(allowed_names(allow)) <= {"bf16", "amp"}


def test_what_changes_the_mathematics_is_used_only_when_allowed() -> None:
    refused, allowed = advice(budgets()[2]), advice(budgets()[2], ("bf16",))
    assert not any(spec.startswith(("bf16", "amp", "lora")) for spec in refused.strategies)
    assert "bf16" in allowed.strategies


def test_where_nothing_fits_it_is_said_what_would_help() -> None:
    helps = advice(2**20).binding.helps
    assert "--allow bf16: " in helps
    assert "--allow amp: " in helps


def test_a_plugin_takes_part_through_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Strategy):
        """Train on half of each batch."""

        name, stage, exact, changes = "half", Stage.STEP, False, "the data"

        @dataclass(frozen=True)
        class Config:
            """Nothing to set."""

        def apply(self, workload: Workload) -> None:
            whole = workload.split
            workload.split = lambda batch, parts: whole(batch[: len(batch) // 2], parts)

    from memscope import strategies
    from memscope.advisor import combinations

    everything: Callable[[], dict[str, Any]] = lambda: {**available, "half": Half}  # noqa: E731
    available = dict(strategies.available())
    monkeypatch.setattr(plan_module, "available", everything)
    monkeypatch.setattr(combinations, "available", everything)
    found = advise(
        build, budget=budgets()[2] + CONTEXT, device=DEVICE, strategies="adamw:fused,ga:steps=1", allow=["half"]
    )
    assert "half" in found.strategies


def test_the_document_has_the_promised_keys() -> None:
    document = advice(budgets()[0]).document()
    assert document["schema_version"] == 1
    keys = ["budget", "feasible", "plan", "peak", "fit", "time", "certificate", "minimum_budget", "binding", "front"]
    assert set(keys) <= set(document)
    assert (document["fit"]["needed"], document["fit"]["available"]) == (document["peak"]["device"], document["budget"])
    assert set(document["plan"]) == {"strategies", "layers", "file"}
    assert list(document["plan"]["layers"]) == [f"layers.{i}" for i in range(LAYERS)]
    assert all(isinstance(size, int) for size in document["peak"].values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0GB", "zero bytes"),
        ("-4GB", "is not a size"),
        ("many", "is not a size"),
        ("40XB", 'unknown unit "XB"'),
        ("0%", "above 0%"),
        ("120%", "up to 100%"),
        ("x%", "up to 100%"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        budget_of(text, DEVICE, named=True)


def test_a_share_needs_a_device() -> None:
    assert DEVICE.capacity_bytes is not None
    assert budget_of("50%", DEVICE, named=True) == DEVICE.capacity_bytes // 2
    with pytest.raises(UsageError, match="share of a device"):
        budget_of("50%", DEVICE, named=False)


def test_an_unknown_strategy_in_allow_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'--allow loro: there is no strategy "loro": did you mean "lora"'):
        advise(build, budget="40GB", device=DEVICE, allow=["loro"])


def test_what_may_be_assumed_is_said_from_python_too() -> None:
    def build_reading_its_loss() -> Workload:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            value = model(x).square().mean()
            return value if value.item() >= 0 else -value

        return Workload(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.ones(2, 4)], loss, torch.optim.AdamW)

    with pytest.raises(TargetError, match="item"):
        advise(build_reading_its_loss, budget="30GB", device=DEVICE, assume="refuse")
    with pytest.raises(UsageError, match='did you mean "refuse"'):
        advise(build_reading_its_loss, budget="30GB", device=DEVICE, assume="refuze")
    with pytest.raises(TargetError, match="item"):
        fit(lambda micro_batch: build_reading_its_loss(), micro_batch=1, device=DEVICE, assume="refuse")


def test_a_device_without_rates_is_refused() -> None:
    with pytest.raises(UsageError, match='rates of device "gpu" are not known'):
        advise(build, budget="40GB", device="gpu")


def test_a_model_without_repeated_layers_is_taken_apart_into_its_modules() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]

    def mixed() -> Workload:
        return Workload(Mixed(), [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).sum(), torch.optim.SGD, name="mixed")

    found = advise(mixed, budget="1GB", device=DEVICE)
    assert found.feasible
    assert any("no list of repeated layers" in note for note in found.notes)


def test_a_model_that_is_one_sequence_of_different_modules_gets_a_plan_that_can_be_applied(tmp_path: Path) -> None:
    def sequence() -> Workload:
        model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        return Workload(model, [torch.ones(ROWS, WIDTH)], lambda m, x: m(x).sum(), torch.optim.SGD, name="sequence")

    needed = int(simulate(sequence, device=DEVICE).meta["peak_reserved"]) + CONTEXT
    found = advise(sequence, budget=needed - 2 * 2**20, device=DEVICE, strategies="ga:steps=1")
    assert list(found.layers) == ["0", "1", "2"]
    file = LayerPlan(found.layers, found.made_for).save(tmp_path / "plan.json")
    assert simulate(sequence, device=DEVICE, strategies=f"ckpt:plan={file}").peak.allocated_bytes > 0


def test_a_target_that_fails_is_told_in_words() -> None:
    def broken() -> Workload:
        raise RuntimeError("the data is gone")

    with pytest.raises(TargetError, match=r"failed: RuntimeError: the data is gone \(at .*test_advisor\.py"):
        advise(broken, budget="1GB", device=DEVICE)


def test_a_plan_taken_for_want_of_a_better_one_is_not_called_the_best() -> None:
    """The bound belongs to the budget, not to the plan: a faster plan whose allocated bytes fit keeps the gap open."""
    found = advice(advice(2**20).minimum_bytes - CONTEXT)
    assert found.certificate is not None
    assert found.certificate.lower_bound_seconds <= found.step_seconds
    assert found.certificate.lower_bound_seconds <= advice(budgets()[2]).step_seconds


def test_a_workload_of_the_user_is_left_as_it_is() -> None:
    workload = toy_workload()
    before = [parameter.clone() for parameter in workload.model.parameters()]
    found = advise(workload, budget="2GB", device=DEVICE, strategies="adamw:fused,ga:steps=1")
    assert found.feasible
    after = list(workload.model.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("elements", "indices"),
    [([5], [0]), ([5, 5, 5], [0, 2]), ([9, 5, 7], [0, 2]), ([1, 9, 7], [0, 1]), ([9, 9, 1], [0, 1])],
)
def test_the_deciding_micro_batches_are_the_first_the_largest_and_the_largest_after_the_first(
    elements: Sequence[int], indices: list[int]
) -> None:
    assert deciding_indices(elements) == indices


def test_alike_neighbours_are_told_as_a_range() -> None:
    layers = {
        "l.0": "none",
        "l.1": "full",
        "l.2": "full",
        "l.3": "full:2",
        "l.4": "within:l.3",
        "l.5": "save:a.b/aten.mm",
    }
    assert in_words(layers) == "l.0 none, l.1-2 full, l.3-4 full 2, l.5 save b"
    assert in_words(dict.fromkeys(layers, "none")) == "nothing"
    two_lists = dict.fromkeys(["encoder.0", "encoder.1", "decoder.0", "decoder.1"], "full")
    assert in_words(two_lists) == "encoder.0-1 full, decoder.0-1 full"


@pytest.fixture
def lora_everywhere() -> Advice:
    found = advice(plain_bytes())
    assert found.trace is not None
    chosen = {"lora": {"targets": "wq+wv"}}  # as recorded by a run with lora:targets=auto
    return dataclasses.replace(
        found,
        trace=dataclasses.replace(found.trace, meta={**found.trace.meta, "chosen": chosen}),
        strategies=("lora:r=8", "amp:dtype=bf16", "adamw:fused"),
        layers={f"layers.{i}": "full" for i in range(LAYERS)},
    )


@pytest.mark.parametrize(
    ("tool", "lines"),
    [
        ("hf", ["bf16=True,", 'optim="adamw_torch_fused",']),
        ("axolotl", ["adapter: lora", "lora_r: 8", "gradient_checkpointing: true"]),
        ("torchtune", ["enable_activation_checkpointing: True"]),
        ("peft", ['target_modules=["q_proj", "v_proj"],']),
    ],
)
def test_other_tools_are_told_what_they_have_words_for(tool: str, lines: list[str], lora_everywhere: Advice) -> None:
    assert set(lines) <= set(emit(lora_everywhere, tool))


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_are_told_what_they_cannot_say(tool: str, lora_everywhere: Advice) -> None:
    some = {**lora_everywhere.layers, "layers.0": "none"}
    lines = emit(dataclasses.replace(lora_everywhere, layers=some), tool)
    assert any(line.startswith("# not expressible: checkpointing of layers.0 none") for line in lines)
