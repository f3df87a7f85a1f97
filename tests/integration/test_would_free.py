"""A run that does not fit: the savings reported for unused strategies, and whether they are true."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from memscope.errors import MemscopeError, UsageError
from memscope.runs import plans as runs
from memscope.runs.plans import RunSpec
from memscope.runs.would_free import would_free
from memscope.simulation.devices.catalogue import load_devices
from memscope.strategies import available
from memscope.trace import Trace

TOY = """
import dataclasses, torch
from torch import nn
from memscope import Workload


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 2048


def build(config):
    layers = [nn.Sequential(nn.Linear(config.width, config.width, bias=False), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(*layers)
    batch = torch.ones(32768, config.width)
    return Workload(model, [batch], lambda m, x: m(x).square().mean(), torch.optim.SGD, name="toy")
"""
# Weights: 4 x 2048^2 x 4 B = 64 MiB. The batch and each result: 32768 x 2048 x 4 B = 256 MiB. Two results per layer
# are kept, nine such tensors with the batch; with checkpoints one per layer, and both of the layer being recomputed.
GPU = """
[small]
vendor_name = "a GPU of 2.6 GiB"
capability = "8.0"
capacity_bytes = 2_791_309_312
multiprocessors = 108
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "gpu.toml").write_text(GPU)
    return ["profile", "toy.py", "--device", "small", "--device-file", "gpu.toml"]


def test_the_memory_that_a_strategy_would_free_is_what_a_run_with_it_saves(run, toy):
    code, out, err = run(*toy, "--json")
    assert code == 4, err
    (alone,) = json.loads(out)["runs"]
    freed = {one["strategy"]: one for one in alone["would_free"]}
    assert freed["ckpt"]["change"] < 0
    code, out, err = run(*toy, "-s", "ckpt", "--json")
    assert code == 0, "the last run fits, and only that counts"
    baseline, together = json.loads(out)["runs"]
    assert baseline["out_of_memory"] is not None
    assert baseline["would_free"] is together["would_free"] is None, "only the last run is advised on"
    assert freed["ckpt"]["peak"] == together["peak"]
    assert freed["ckpt"]["change"] == together["peak"]["allocated"] - alone["peak"]["allocated"]
    assert freed["ckpt"]["fit"]["fits"] is (together["out_of_memory"] is None) is True
    assert freed["ckpt"]["exact"] is True
    assert freed["amp"]["exact"] is False


def in_this_process(specs, labels):
    found = []
    for index, spec in enumerate(specs):
        try:
            runs._run(index, spec)
            found.append("")
        except MemscopeError as error:
            found.append(str(error))
    return found


@pytest.fixture
def spec(tmp_path, monkeypatch, toy):
    monkeypatch.setattr(runs, "tell", lambda message: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return RunSpec(
        target=str(tmp_path / "toy.py"),
        preset=None,
        settings={},
        plan="",
        compared=(),
        device="small",
        device_file=tmp_path / "gpu.toml",
        allocator=None,
        simulated=True,
        steps=2,
        path=tmp_path / "run.npz",
    )


def advised(spec, trace, try_all=in_this_process):
    return would_free(spec, trace, try_all, alone=lambda function, spec, timeout_seconds: function(spec))


def test_strategies_of_the_plan_and_those_it_conflicts_with_are_left_out(spec, monkeypatch):
    conflicting = type("Conflicting", (available()["ckpt"],), {"name": "other", "conflicts": frozenset({"ga"})})
    monkeypatch.setitem(available(), "other", conflicting)
    spec = dataclasses.replace(spec, plan="ga:steps=4")
    assert in_this_process([spec], [""]) == [""]
    tried = advised(spec, Trace.load(spec.path)).tried
    names = {one.strategy.name for one in tried}
    assert "ga" not in names
    assert "other" not in names
    assert "lora" in names
    assert [one.change_bytes for one in tried] == sorted(one.change_bytes for one in tried)


def test_a_strategy_that_cannot_be_simulated_is_named_and_the_others_are_reported(spec, monkeypatch):
    def refuse(self, workload):
        raise UsageError("no")

    assert in_this_process([spec], [""]) == [""]
    monkeypatch.setattr(available()["bf16"], "apply", refuse)
    advice = advised(spec, Trace.load(spec.path))
    assert advice.failed == {"bf16": "no"}
    assert "ckpt" in {one.strategy.name for one in advice.tried}


def test_a_measured_run_is_simulated_on_the_same_gpu_with_the_memory_it_had(spec, monkeypatch):
    monkeypatch.setenv("TORCH_CUBLAS_WORKSPACE_CACHE", "1")  # as before PyTorch 2.15
    assert in_this_process([spec], [""]) == [""]
    simulated = Trace.load(spec.path)
    limit = 2000 * 2**20
    measured = dataclasses.replace(simulated, meta={**simulated.meta, "out_of_memory": {"limit": limit}})
    gpu = SimpleNamespace(name='NVIDIA "X"', major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked = []

    def try_all(specs, labels):
        (device,) = load_devices(specs[0].device_file).values()
        asked.append((device.capability, device.allocatable_bytes, labels[0], specs[0].simulated))
        return in_this_process(specs, labels)

    advice = advised(dataclasses.replace(spec, simulated=False, device="cuda"), measured, try_all)
    assert asked == [((9, 0), limit, "baseline", True)]
    # On compute capability 9.0 a workspace of cuBLAS differs, so that the plan itself is simulated again.
    assert {one.before_bytes for one in advice.tried} != {simulated.peak.allocated_bytes}


def test_the_error_of_one_run_stands_beside_the_results_of_the_others(monkeypatch):
    ended = runs.Ended({0: None}, {1: UsageError("no")})
    monkeypatch.setattr(runs, "_carried_out", lambda specs, report, ends_the_others: ended)
    assert runs.try_all([None, None], None) == ["", "no"]
