"""What fits: the search for the boundary on known curves, and the answers against simulations of their own."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from memscope import Workload, fit, simulate
from memscope.advisor.advice import PlanPeak
from memscope.advisor.fit.fit import answer
from memscope.advisor.fit.fitting import DeviceFit, Evidence, Fitting, Largest, Size
from memscope.advisor.fit.names import SizeNames, size_names
from memscope.advisor.fit.question import Question
from memscope.advisor.fit.sizes import Boundary, told
from memscope.advisor.measure.runner import Asker, InProcess, Scene
from memscope.allocator.settings import AllocatorSettings
from memscope.cli.fit_report import print_fit
from memscope.errors import MemscopeError, TargetError, UsageError
from memscope.runs.worker import RunLost
from memscope.simulation.devices.catalogue import get_device

LIMIT = 1_000_000
Curve = Callable[[int], float]


class Simulations:
    """Stands in for simulations: memory by value, with a refusal above `most` and other figures for whole runs."""

    def __init__(self, memory: Curve, whole: Curve | None = None, most: int = 10**9) -> None:
        self.memory, self.whole, self.most = memory, whole or memory, most
        self.asked: list[int] = []

    def __call__(self, values: Sequence[int], whole: bool) -> Mapping[int, Evidence | MemscopeError]:
        self.asked += values
        return {value: self.one(value, whole) for value in values}

    def one(self, value: int, whole: bool = False) -> Evidence | MemscopeError:
        if value > self.most:
            return UsageError(f"at most {self.most}")
        size = int((self.whole if whole else self.memory)(value))
        return Evidence(
            Size(value, None), PlanPeak(size, size, size), size <= LIMIT, whole or self.whole is self.memory
        )


def largest(curve: Simulations, start: int, unit: int = 1, most: int = 4096) -> Largest:
    known = curve.one(start)
    assert isinstance(known, Evidence)
    return Boundary(curve, LIMIT, unit, most, "enough", {start: known}).found()


@pytest.mark.parametrize(
    ("memory", "start", "unit", "expected"),
    [
        (lambda n: 100_000 + 9_000 * n, 1, 1, 100),  # 1,000,000
        (lambda n: 100_000 + 9_000 * n, 4000, 1, 100),  # from above
        (lambda n: 999_000 + n, 7, 1, 1000),
        (lambda n: 300_000 * n, 2, 1, 3),
        (lambda n: 200_000 + n * n, 100, 64, 832),  # 892,224; at 896, 1,002,816
        (lambda n: 200_000 + n * n, 1000, 64, 832),
        (lambda n: 50_000 * (n // 7), 3, 1, 146),  # steps, as of blocks: 20 of them fit, up to 20 * 7 + 6
    ],
)
def test_the_largest_size_fits_and_its_neighbour_does_not(memory: Curve, start: int, unit: int, expected: int) -> None:
    simulations = Simulations(memory)
    assert largest(simulations, start, unit) == Largest(expected, unit, expected + unit)
    assert len(simulations.asked) == len(set(simulations.asked)) <= 24


def test_a_linear_need_takes_three_rounds_at_most() -> None:
    simulations = Simulations(lambda n: 5_000 + 99_000 * n)
    assert largest(simulations, 1) == Largest(10, 1, 11)
    assert len(simulations.asked) <= 6


def test_nothing_fits_where_the_smallest_does_not() -> None:
    assert largest(Simulations(lambda n: 2_000_000 * n), 4) == Largest(0, 1, 1)


def test_the_search_ends_at_the_most_and_says_why() -> None:
    assert largest(Simulations(lambda n: 10.0), 2, unit=64, most=512) == Largest(512, 64, None, "enough")


def test_a_target_that_refuses_a_size_bounds_it() -> None:
    found = largest(Simulations(lambda n: 10.0, most=48), 2)
    assert found == Largest(48, 1, None, "the target refuses 49: at most 48")


def test_a_lost_simulation_is_no_refusal_of_the_target() -> None:
    class Lost(Simulations):
        def one(self, value: int, whole: bool = False) -> Evidence | MemscopeError:
            return RunLost("the target took longer than 5.0 s") if value > 48 else super().one(value, whole)

    found = largest(Lost(lambda n: 10.0), 2)
    assert found == Largest(48, 1, None, "49 has no result, so it may fit: the target took longer than 5.0 s")
    assert told("49", TargetError("no kernel")) == "49 cannot be simulated: no kernel"


@pytest.mark.parametrize("columns", [60, 100])
def test_a_table_has_the_memory_of_every_size_that_was_simulated(columns: int) -> None:
    sizes = {Size(1, 512): 1, Size(4, 512): 3, Size(4, 1024): 5}
    evidence = [
        Evidence(size, PlanPeak(gib * 2**30, gib * 2**30, gib * 2**30), gib < 4, True) for size, gib in sizes.items()
    ]
    found = Fitting(
        target="mine", device="small:4GiB", capacity_bytes=4 * 2**30, strategies="", asked=evidence[2],
        micro_batch=Largest(0, 1, 4), seq_len=Largest(512, 512, 1024), evidence=tuple(evidence),
        devices=tuple(DeviceFit(f"of-{gib}", gib * 2**30, False, None) for gib in (2, 4, 6, 9)),
    )  # fmt: skip
    text = io.StringIO()
    print_fit(Console(file=text, width=columns), found)
    lines = [" ".join(line.split()) for line in text.getvalue().replace("│", " ").splitlines()]
    assert max(map(len, text.getvalue().splitlines())) <= columns
    if columns == 100:
        assert {"512 1.00 GiB 3.00 GiB", "1,024 5.00 GiB ×"} <= set(lines)
        # That of 4 GiB is the memory asked for; 9 GiB are more than 1.6 times the largest need.
        assert [line for line in lines if line.startswith("of-") and "GiB" not in line] == [
            "of-2 512 tokens none", "of-6 512 tokens 1,024 tokens",
        ]  # fmt: skip
    else:  # a block for each length
        start = lines.index("512")
        assert lines[start : start + 5] == [
            "512", "micro-batch 1 1.00 GiB", "micro-batch 4 3.00 GiB", "1,024", "micro-batch 4 5.00 GiB ×",
        ]  # fmt: skip


def test_without_a_length_the_line_of_a_device_stands_where_its_memory_ends() -> None:
    sizes = {Size(1, None): 1, Size(4, None): 3}
    evidence = [Evidence(size, PlanPeak(*[gib * 2**30] * 3), True, True) for size, gib in sizes.items()]
    found = Fitting(
        target="mine", device="small:4GiB", capacity_bytes=4 * 2**30, strategies="", asked=evidence[0],
        micro_batch=Largest(4, 1, None), seq_len=None, evidence=tuple(evidence),
        devices=(DeviceFit("of-2", 2 * 2**30, True, 2**30),),
    )  # fmt: skip
    text = io.StringIO()
    print_fit(Console(file=text, width=100), found)
    lines = [" ".join(line.split()) for line in text.getvalue().replace("│", " ").splitlines()]
    rows = ["1 1.00 GiB yes", "of-2 2.00 GiB memory of the device", "4 3.00 GiB yes"]
    start = lines.index(rows[0])
    assert lines[start : start + 3] == rows


def test_a_size_that_fits_only_without_some_micro_batches_is_not_the_largest() -> None:
    assert largest(Simulations(lambda n: 90_000 * n, lambda n: 110_000 * n), 1) == Largest(9, 1, 10)


def test_settings_are_found_by_their_usual_names() -> None:
    assert size_names(["lr", "batch_size", "block_size"], "mine.py") == SizeNames("batch_size", "block_size")
    assert size_names(["seq_len", "micro_batch", "batch_size"], "llama2") == SizeNames("micro_batch", "seq_len")
    with pytest.raises(UsageError, match=r"expected a field of its Config named micro_batch .*; it has lr, width"):
        size_names(["lr", "width"], "mine.py")
    with pytest.raises(UsageError, match=r"setting batch_size is None.*--set batch_size=1"):
        SizeNames("batch_size", None).read({"batch_size": None})


def build(micro_batch: int) -> Workload:
    return Workload(
        model=nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)),
        batches=[torch.zeros(2 * micro_batch * 512, 512)],
        loss=lambda model, x: model(x).square().mean(),
        optimizer_factory=torch.optim.AdamW,
        name="two layers",
    )


def question(device: str, micro_batch: int, others: Sequence[str] = ()) -> Question:
    return Question(
        names=SizeNames("micro_batch", "seq_len"),
        asked=Size(micro_batch, None),
        device=get_device(device),
        strategies="ga:steps=2",
        allow=(),
        allocator=AllocatorSettings(),
        devices=[get_device(name) for name in others],
    )


def answered(asked: Question) -> Fitting:
    runner = InProcess(build, asked.device, asked.allocator)
    return answer(asked, Asker(runner, lambda what, done, needed: None), build)


def test_evidence_and_devices_equal_simulations_of_their_own() -> None:
    others = ["a100-40gb", "a100-80gb", "t4", "h100-80gb"]
    found = answered(question("a100-40gb:800MiB", 4, others))
    assert found.fits
    assert found.micro_batch.next == found.micro_batch.value + 1
    device = replace(get_device("a100-40gb"), capacity_bytes=800 * 2**20)
    for value, fits in ((found.micro_batch.value, True), (found.micro_batch.next, False)):
        alone = simulate(lambda value=value: build(value), device=device, strategies="ga:steps=2")
        assert (alone.meta["out_of_memory"] is None) == fits
        told = next(one for one in found.evidence if one.size.micro_batch == value)
        assert (told.fits, told.peak.device) == (fits, alone.meta["peak_reserved"] + device.context_bytes)
    assert [one.name for one in found.devices] == ["t4", "a100-40gb", "h100-80gb", "a100-80gb"]  # least memory first
    for one in found.devices:
        alone = simulate(lambda: build(4), device=one.name, strategies="ga:steps=2")
        assert one.device_bytes == alone.meta["peak_reserved"] + get_device(one.name).context_bytes
    assert found.smallest_device is not None
    assert found.smallest_device.name == "t4"


def test_a_step_that_fits_at_no_size_says_so_and_names_devices() -> None:
    found = answered(question("t4:170MiB", 8, ["t4"]))  # 141 MiB of context; parameters and AdamW take 32 MiB
    assert (found.fits, found.micro_batch, found.changes) == (False, Largest(0, 1, 1), ())
    assert found.seq_len is None
    assert any("No change" in note for note in found.notes)
    assert [one.fits for one in found.devices] == [True]


def test_the_context_ends_at_the_models_positions() -> None:
    scene = Scene("targets/llama2", "debug", {"seq_len": "128", "accumulation": "1", "n_layers": "1"}, "t4:320MiB")
    asked = replace(question("t4:320MiB", 1), asked=None, strategies="")
    found = answer(asked, Asker(scene.in_process(), lambda what, done, needed: None), scene.build)
    assert found.asked.size == Size(1, 128)
    assert found.seq_len == Largest(512, 64, None, "the model has 512 positions")
    assert found.document()["largest"]["seq_len"] == 512


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_device_without_a_limit_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="choose"):
        fit(build, micro_batch=1, device=name)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_size_that_is_no_count_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="expected a whole number from 1"):
        fit(build, micro_batch=value)  # type: ignore[arg-type]
