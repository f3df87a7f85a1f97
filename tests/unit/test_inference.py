"""Inference as a workload: phases, memory, strategies, and generation by `targets/llama2`."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from llamas import SMALL
from torch import Tensor, nn
from traces import TraceBuilder

from memscope import Workload, fit, record, simulate
from memscope.advisor.advise import advise
from memscope.analysis.cost import last_step_seconds, total_seconds
from memscope.analysis.phases import about_phases, call_peaks, phase_peaks
from memscope.dashboards.course import calls_figure
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.plugins import available
from memscope.targets.llama2.target import Config, build
from memscope.testing import toy_workload
from memscope.trace import Trace
from memscope.workload.step import Training


class TwoLayers(nn.Module):
    """Keeps what it saw of the run it was in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((torch.is_inference_mode_enabled(), self.training))
        return self.second(self.dropout(torch.relu(self.first(x))))  # type: ignore[no-any-return]


def two_layers(batches: int = 1) -> Workload:
    """Two products of 8 samples of 64 float32 numbers; the result is no loss."""
    data = [torch.ones(8, 64) for _ in range(batches)]
    return Workload(model=TwoLayers(), batches=data, loss=lambda m, x: m(x), optimizer_factory=None)


# The step.


@pytest.mark.parametrize("run", [record, lambda build: simulate(build, device="cpu")], ids=["record", "simulate"])
def test_inference_has_neither_gradients_nor_optimizer_and_frees_each_result(run: object) -> None:
    trace: Trace = run(two_layers)  # type: ignore[operator]
    sizes = trace.max_by_category()
    assert {category for category, size in sizes.items() if size} == {"parameter", "input", "temporary"}
    assert {one.phase for one in phase_peaks(trace)} <= {"setup", "inference", "outside"}
    a_sample = 8 * 64 * 4
    assert trace.steps == (0, 1)
    assert trace.peak.phase == "inference"
    assert trace.peak.allocated_bytes == 2 * 64 * 64 * 4 + 3 * a_sample  # weights; input, argument and result


def test_the_model_runs_in_inference_mode_and_without_dropout() -> None:
    workload = two_layers()
    before = [parameter.clone() for parameter in workload.model.parameters()]
    record(workload, steps=1)
    assert workload.model.seen == [(True, False)]
    assert all(torch.equal(a, b) for a, b in zip(before, workload.model.parameters(), strict=True))


def test_the_time_of_a_step_is_that_of_inference() -> None:
    seconds = last_step_seconds(simulate(two_layers, device="a100-40gb"))
    assert seconds is not None
    assert seconds >= 3 * 24e-6  # two products and a relu, each launched from Python
    assert total_seconds({"forward": 1.0, "backward": 2.0, "inference": 4.0}) == 3.0  # an evaluation between steps


def test_a_workload_for_inference_cannot_be_trained_or_advised() -> None:
    with pytest.raises(UsageError, match="cannot be trained: it is for inference"):
        Training.start(two_layers(), "cpu", lambda data: data)
    with pytest.raises(UsageError, match="is for inference: advice is on training"):
        advise(two_layers, budget="1GB", device="a100-40gb")
    with pytest.raises(UsageError, match="is for inference: fit searches the sizes of a training step"):
        fit(lambda micro_batch: two_layers(), micro_batch=1, device="a100-40gb")


# Strategies.


def toy_inference() -> Workload:
    return dataclasses.replace(toy_workload(), optimizer_factory=None)


@pytest.mark.parametrize("name", [name for name, kind in available().items() if kind.trains])
def test_a_strategy_of_training_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match="and inference has none: leave it out"):
        Plan((available()[name](),)).check(toy_inference())


@pytest.mark.parametrize("spec", ["amp:dtype=bf16", "amp", "bf16", "lora:targets=wq+wv", "pack"])
def test_other_strategies_run_in_inference(spec: str) -> None:
    sizes = simulate(toy_inference, device="a100-40gb", strategies=spec, steps=1).max_by_category()
    assert sizes["gradient"] == sizes["optimizer_state"] == sizes["activation"] == 0


# Generation.

GENERATE = dataclasses.replace(
    SMALL, mode="generate", dtype="bf16", attention="sdpa", seq_len=16, new_tokens=6, samples=2
)
KEYS_OF_A_TOKEN = 2 * 2 * 2 * 8 * 2
"""Keys and values · layers · their heads · size of a head · bytes of bf16."""


def generated(**changes: object) -> Trace:
    return simulate(lambda: build(dataclasses.replace(GENERATE, **changes)), device="cpu", steps=1)


def test_the_cache_holds_the_keys_and_values_of_every_token_that_was_passed() -> None:
    trace = generated(micro_batch=2)
    (inference,) = (one for one in phase_peaks(trace) if one.phase == "inference")
    # The last call begins with the prompt and 4 of 6 new tokens: it passes the fifth, and the sixth is never passed.
    assert inference.kept["layers.*.attention"] == 2 * KEYS_OF_A_TOKEN * (16 + 4)
    calls = call_peaks(trace)
    assert len(calls) == 6
    steps = [b.held_bytes - a.held_bytes for a, b in itertools.pairwise(calls[1:])]
    assert steps == [2 * KEYS_OF_A_TOKEN] * 4
    assert any("each adds 256 B on average" in one for one in about_phases(trace))


def test_without_a_cache_nothing_is_kept_and_a_call_grows_with_the_sequence() -> None:
    trace = generated(cache=False)
    (inference,) = (one for one in phase_peaks(trace) if one.phase == "inference")
    calls = call_peaks(trace)
    assert "layers.*.attention" not in inference.kept
    assert len(calls) == 6
    assert calls[-1].held_bytes - calls[1].held_bytes == 4 * 8  # the ids of four more tokens, int64
    assert not any("each adds" in one for one in about_phases(trace))
    assert calls[0].allocated_bytes < calls[-1].allocated_bytes


def test_beam_search_holds_the_keys_of_every_beam() -> None:
    (inference,) = (one for one in phase_peaks(generated(beams=3)) if one.phase == "inference")
    assert inference.kept["layers.*.attention"] == 3 * KEYS_OF_A_TOKEN * (16 + 4)


def test_simulated_generation_equals_a_real_one() -> None:
    simulated, real = generated(), record(lambda: build(GENERATE), steps=1)
    assert [one.held_bytes for one in call_peaks(simulated)] == [one.held_bytes for one in call_peaks(real)]
    assert simulated.peak.allocated_bytes == real.peak.allocated_bytes


def test_settings_of_generation_are_checked() -> None:
    with pytest.raises(UsageError, match="beams=2: only mode=generate uses it"):
        Config(beams=2)
    with pytest.raises(UsageError, match=r'mode="generat": did you mean "generate"'):
        Config(mode="generat")
    with pytest.raises(UsageError, match="choose new_tokens=496 or fewer, or --set max_seq_len=516"):
        build(dataclasses.replace(GENERATE, new_tokens=500))


def test_the_figure_has_a_point_for_each_call() -> None:
    trace = TraceBuilder()
    trace.phase("outside")
    trace.new("parameter", 100)
    for call in range(3):
        trace.phase("inference", 0)
        trace.new("temporary", 10 * (call + 1))
        trace.phase("outside", 0)
        trace.free(trace.new("temporary", 1))
    calls = call_peaks(trace.trace())
    assert [(one.held_bytes, one.allocated_bytes) for one in calls] == [(100, 110), (110, 130), (130, 160)]
    figure = calls_figure(calls)
    assert [list(curve.x) for curve in figure.data] == [[1, 2, 3]] * 2
    assert [[1024 * y for y in curve.y] for curve in figure.data] == [[110, 130, 160], [100, 110, 130]]  # KiB
