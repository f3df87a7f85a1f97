"""A simulated program saves nothing, and loads what it saved and what others saved."""

import pytest
import torch
from program_runs import run_source
from torch import nn

from memscope.analysis.phases import phase_peaks


def test_a_checkpoint_is_loaded_where_it_was_or_is_mapped_to_and_no_file_is_written(tmp_path):
    path = tmp_path / "checkpoint.pt"
    ran = run_source(
        tmp_path,
        f"""
        import io
        path = {str(path)!r}
        model = nn.Linear(64, 64).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer)
        state = {{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}
        state |= {{"best": torch.tensor(0.5), "epoch": 3}}
        torch.save(state, path)
        for location, on_gpu in (
            (None, True), ("cpu", False), ("cuda", True), (torch.device("cuda", 0), True), ({{"cuda:0": "cpu"}}, False),
            (lambda storage, location: storage, False), (lambda storage, location: storage.cuda(), True),
            (lambda storage, location: None, True),
        ):
            found = torch.load(path, map_location=location)
            assert found["model"]["weight"].is_cuda is on_gpu, location
            assert found["model"]["weight"] is not model.weight
            assert found["epoch"] == 3 and found["best"].item() == 0.5
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
        assert other is not model and other.weight.is_cuda
        train(model, optimizer)
        """,
        steps=None,
    )
    assert not path.exists()
    assert ran.notes == ["nothing was saved: torch.save wrote no file"]


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_of_a_file_of_another_run_data_are_read_and_weights_are_not(tmp_path, is_zip):
    contents = {"weight": torch.full((512, 512), 3.0), "tokens": torch.arange(70_000), "scale": torch.tensor([0.25])}
    torch.save(contents, tmp_path / "file.pt", _use_new_zipfile_serialization=is_zip)
    ran = run_source(
        tmp_path,
        f"""
        found = torch.load({str(tmp_path / "file.pt")!r})
        assert found["tokens"][5].item() == 5 and found["scale"].item() == 0.25
        assert not found["weight"].is_cuda
        on_gpu = torch.load({str(tmp_path / "file.pt")!r}, map_location="cuda:0")
        assert on_gpu["weight"].is_cuda and on_gpu["tokens"].is_cuda
        print(found["weight"].mean().item())
        train(nn.Linear(64, 64).cuda())
        """,
    )
    assert ran.assumed == ["a floating-point number that the program reads"]


def test_a_whole_model_is_loaded_without_its_weights(tmp_path):
    torch.save(nn.Linear(64, 64), tmp_path / "model.pt")
    source = f"train(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False).cuda())"
    assert run_source(tmp_path, source).peak_of("parameter") == 64 * 64 * 4 + 512


def test_a_saved_model_holds_no_memory_of_the_gpu(tmp_path):
    ran = run_source(
        tmp_path,
        """
        import gc
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).cuda()
        torch.save(model, "model.pt")
        del model
        gc.collect()
        assert torch.cuda.memory_allocated() == 0, torch.cuda.memory_allocated()
        train(torch.load("model.pt", weights_only=False))
        """,
    )
    assert ran.peak_of("parameter") == 64 * 64 * 4 + 3 * 512


def test_resuming_evaluating_and_merging_count_with_their_peaks(tmp_path):
    width, rank, batch = 1024, 256, 512
    model = nn.Linear(width, width, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, width)).mean().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    ran = run_source(
        tmp_path,
        f"""
        model = nn.Linear({width}, {width}, bias=False).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        found = torch.load({str(tmp_path / "checkpoint.pt")!r}, map_location="cuda")
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        del found
        model(torch.ones(1, {width}, device="cuda")).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(torch.ones({batch}, {width}, device="cuda"))
            a, b = torch.ones({width}, {rank}, device="cuda"), torch.ones({rank}, {width}, device="cuda")
            torch.save({{name: value + a @ b for name, value in model.state_dict().items()}}, "merged.pt")
        """,
        steps=None,
    )
    peaks = {one.phase: one.allocated_bytes for one in phase_peaks(ran.trace)}
    weight, workspaces = 4 * width * width, ran.peak_of("workspace")
    assert workspaces <= 2 * 8_519_680
    assert peaks["setup"] == 3 * weight, "the weights, and those of the checkpoint with its momentum"
    assert 0 <= peaks["inference"] - (2 * weight + 2 * 4 * batch * width) <= workspaces, "the batch and its results"
    merging = 2 * weight + 2 * 4 * width * rank + 2 * weight  # two factors, their product and the sum
    assert 0 <= peaks["outside"] - merging <= workspaces
