"""The peak of each step, read while a recording goes on."""

from types import SimpleNamespace

import torch
from torch import nn

from memscope import Recorder
from memscope.hooks.step_peaks import StepPeaks

WEIGHT_BYTES = 64 * 64 * 4


def test_the_peak_of_each_step_is_that_of_the_trace():
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    read = []
    with Recorder(model, optimizer) as recorder:
        peaks = StepPeaks(recorder, None)
        for rows in (8, 64, 16):
            model(torch.ones(rows, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            read.append(peaks.read())
    trace = recorder.trace()
    for step, figures in enumerate(read):
        peak = trace.peak_of(step)
        assert figures.pop("memory/peak_allocated") == peak.allocated_bytes == sum(figures.values())
        at_peak = {f"memory/{name}": size for name, size in trace.by("category", at=peak.event).items()}
        assert {name: size for name, size in figures.items() if size} == at_peak
    assert read[1]["memory/optimizer_state"] == 2 * WEIGHT_BYTES + 4  # two moments and the step counter
    assert read[2]["memory/parameter"] == read[2]["memory/gradient"] == WEIGHT_BYTES  # the peak is in the optimizer
    assert read[0].keys() <= read[1].keys() <= read[2].keys()


def test_memory_that_no_rule_has_named_yet_is_undecided():
    model, kept = nn.Linear(4, 4), []
    with Recorder(model) as recorder:
        peaks = StepPeaks(recorder, None)
        kept.append(torch.ones(1000))
        assert peaks.read()["memory/undecided"] == 4000
        kept.clear()
        assert peaks.read()["memory/peak_allocated"] == 4000 + 4 * 5 * 4  # alive when the reading began
        assert peaks.read()["memory/peak_allocated"] == 4 * 5 * 4


def test_an_allocator_adds_what_it_has_reserved_and_allocated_beyond_the_tensors(monkeypatch):
    model, resets = nn.Linear(4, 4), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1024)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    with Recorder(model) as recorder:
        pass
    device = torch.device("cuda:0")
    peaks = StepPeaks(SimpleNamespace(tracker=recorder.tracker, is_on_gpu=True), device)
    assert peaks.read() == {
        "memory/peak_allocated": 1024,
        "memory/peak_reserved": 2 << 20,
        "memory/parameter": 80,
        "memory/unseen": 1024 - 80,
    }
    assert resets == [device, device]  # when the reading begins, and after each
