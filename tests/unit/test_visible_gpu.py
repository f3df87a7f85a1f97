"""Ordinary training code for a GPU runs in a simulation of one; afterwards PyTorch is restored."""

import importlib
import sys
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trained import train

from memscope.errors import TargetError
from memscope.simulation.cuda.packaged import torch_version

GPU = torch.device("cuda", 0)


def same_as_plain(trace):
    """Whether a run made the same allocations as the plainest one."""
    plain = train()
    return (trace.requested.tolist(), trace.freed.tolist()) == (plain.requested.tolist(), plain.freed.tolist())


def test_tensors_report_the_gpu_as_their_device():
    def loss(model, x):
        for tensor in (x, model.weight, model(x)):
            assert tensor.is_cuda
            assert not tensor.is_cpu
            assert tensor.device == GPU
            assert tensor.device.type == "cuda"
            assert tensor.get_device() == 0
        return model(x).sum()

    train(loss)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.to(0), lambda x: x.to("cuda"), lambda x: x.to("cuda:0", non_blocking=True), lambda x: x.to(GPU),
        lambda x: x.to(device=0), lambda x: x.cuda(), lambda x: x.cuda(0), lambda x: x.to(x.device), lambda x: x.to(x),
        lambda x: x.pin_memory().cuda(non_blocking=True),
    ],
)  # fmt: skip
def test_moving_a_batch_to_the_gpu_copies_nothing_if_it_is_there(move):
    assert same_as_plain(train(lambda m, x: m(move(x)).sum()))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(0), lambda m: m.to("cuda"), lambda m: m.to(device=0), lambda m: m.to(GPU), lambda m: m.cuda(),
        lambda m: m.cuda(0), lambda m: m.to(torch.device(0)),
    ],
)  # fmt: skip
def test_a_model_is_moved_to_the_gpu(move):
    def model():
        moved = move(nn.Linear(8, 8))
        assert moved.weight.device == GPU
        return moved

    assert same_as_plain(train(model=model))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.ones(8, device="cuda"), lambda x: torch.ones(8, device=0), lambda x: x.new_ones(8),
        lambda x: torch.ones(8, device=x.device), lambda x: torch.zeros_like(x[0], device="cuda:0"),
        lambda x: torch.rand(8, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
        lambda x: torch.rand(8, device=x.device, generator=torch.Generator(device=x.device)),
    ],
)  # fmt: skip
def test_tensors_are_made_on_the_gpu(make):
    made_on = []

    def loss(model, x):
        made = make(x)
        made_on.append(made.device)
        return (model(x) + made).sum()

    train(loss, steps=2)
    assert made_on == [GPU, GPU]


def test_a_device_context_makes_tensors_on_the_gpu():
    made_on = []

    def loss(model, x):
        with torch.device("cuda"):
            made = torch.ones(8)
        made_on.append(made.device)
        with torch.cuda.device(0):
            return (model(x) + made).sum()

    train(loss, steps=2)
    assert made_on == [GPU, GPU]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_sees_the_gpu_when_it_runs_again(use_reentrant):
    runs = []

    def layer(x):
        runs.append(x.device)
        return torch.relu(x + torch.arange(8, device=x.device) + torch.ones(8, device="cuda"))

    def loss(model, x):
        return checkpoint(layer, model(x), use_reentrant=use_reentrant).sum()

    train(loss, steps=1)
    assert runs == [GPU, GPU]


def test_a_hook_of_the_backward_pass_sees_the_gpu():
    seen = []

    def loss(model, x):
        y = model(x)
        y.register_hook(lambda gradient: seen.append((gradient.device, torch.ones(1, device="cuda").is_cuda)))
        return y.sum()

    train(loss, steps=1)
    assert seen == [(GPU, True)]


def test_torch_cuda_answers_for_the_device_that_is_simulated():
    def loss(model, x):
        assert torch.cuda.is_available()
        assert (torch.cuda.device_count(), torch.cuda.current_device()) == (1, 0)
        assert torch.cuda.get_device_name() == "NVIDIA A100-SXM4-40GB"
        assert torch.cuda.get_device_capability(x.device) == (8, 0)
        properties = torch.cuda.get_device_properties(0)
        assert (properties.major, properties.multi_processor_count) == (8, 108)
        assert torch.cuda.is_bf16_supported()
        assert torch.accelerator.is_available()
        assert torch.accelerator.current_accelerator().type == "cuda"
        return model(x).sum()

    train(loss)


def test_pytorch_is_built_with_cuda_as_far_as_the_target_can_see():
    seen = set()
    before = torch.version.cuda, torch.backends.cudnn.version(), torch.backends.cuda.is_built()

    def loss(model, x):
        from torch.version import cuda

        assert torch.version.cuda == cuda
        assert torch.backends.cuda.is_built()
        assert torch.backends.cudnn.is_available()
        assert torch.cuda.is_tf32_supported()
        seen.add((cuda, torch.backends.cudnn.version(), len(torch.cuda.get_rng_state_all())))
        return model(x).sum()

    train(loss)
    assert (torch.version.cuda, torch.backends.cudnn.version(), torch.backends.cuda.is_built()) == before
    assert type(torch.version) is type(torch)
    if before[0] is None:  # requirements of the packages on PyPI: cuda-toolkit 13.0.2 with cuDNN 9.19.0 and 9.20.0
        expected = {(2, 11): ("13.0", 91900, 1), (2, 12): ("13.0", 92000, 1), (2, 13): ("13.0", 92000, 1)}
        assert seen == {expected.get(torch_version(), *seen)}


def test_calls_without_an_effect_in_a_simulation_do_nothing():
    def loss(model, x):
        torch.cuda.set_device(0)
        torch.cuda.manual_seed_all(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda.current_stream().wait_event(start)
        x.record_stream(torch.cuda.current_stream())
        return model(x).sum()

    assert same_as_plain(train(loss))


def test_another_stream_is_the_only_one_which_a_note_says():
    def loss(model, x):
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            y = model(x)
        other.record_event().synchronize()
        return y.sum()

    trace = train(loss)
    assert same_as_plain(trace)
    assert [note for note in trace.meta["notes"] if note.startswith("several CUDA streams are used")]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: torch.cuda.memory_summary(), "memory_summary"),
        (lambda: torch.cuda.memory_stats().get("segment.all.current"), r"memory_stats\(\)\[.segment.all.current.\]"),
        (lambda: torch.cuda.CUDAGraph(), "CUDAGraph"),
        (lambda: torch.cuda.get_arch_list(), "get_arch_list"),
        (lambda: torch.cuda.nccl.version(), "nccl.version"),
        (lambda: torch.cuda.Event().elapsed_time(torch.cuda.Event()), "Event.elapsed_time"),
    ],
)
def test_calls_without_an_answer_are_refused_with_the_calling_line(call, name):
    with pytest.raises(
        TargetError, match=rf"torch.cuda.{name} has no answer in a simulation: .*test_visible_gpu.py:\d+"
    ):
        train(lambda m, x: (call(), m(x).sum())[1])


@pytest.mark.parametrize("device", ["a100-40gb", "cpu"])
def test_a_library_that_is_imported_inside_sees_the_machine(tmp_path, monkeypatch, device):
    is_available, stream = torch.cuda.is_available(), torch.cuda.Stream
    name = f"imported_on_{device[:4]}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nis_available, stream = torch.cuda.is_available(), torch.cuda.Stream\ncuda = torch.version.cuda\n"
        "table = torch.arange(3.0) * 2\ntotal = table.sum().item()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def loss(model, x):
        imported = importlib.import_module(name)
        assert torch.cuda.is_available() is (device != "cpu" or is_available)
        return (model(x) * imported.total).sum()

    train(loss, device=device)
    imported = sys.modules[name]
    assert (imported.is_available, imported.stream, imported.cuda) == (is_available, stream, torch.version.cuda)
    assert type(imported.table) is Tensor
    assert imported.table.tolist() == [0.0, 2.0, 4.0]


def test_a_fake_kernel_of_the_target_may_name_the_device_of_its_input():
    library = torch.library.Library("memscope_device", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    fake = lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    torch.library.register_fake("memscope_device::twice", fake, lib=library)
    try:
        trace = train(lambda m, x: m(torch.ops.memscope_device.twice(x)).sum())
    finally:
        library._destroy()
    assert "memscope_device.twice.default" in trace.ops


def test_autocast_on_the_gpu_is_reported_as_enabled():
    def loss(model, x):
        assert torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled()
        assert torch.get_autocast_dtype(x.device.type) is torch.bfloat16
        with torch.autocast(x.device.type, enabled=False):
            assert not torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") is torch.float16  # CUDA's own default
        return model(x).sum()

    train(loss, strategies="amp:dtype=bf16")


def test_a_default_device_ends_with_the_simulation():
    def model():
        torch.set_default_device("cuda")
        return nn.Linear(8, 8)

    assert same_as_plain(train(model=model))
    assert torch.get_default_device() == torch.device("cpu")


def test_on_a_simulated_cpu_tensors_are_on_the_cpu():
    def loss(model, x):
        assert not x.is_cuda
        assert x.device.type == "cpu"
        return model(x).sum()

    train(loss, device="cpu")


@dataclass
class Batch:
    x: Tensor
    label: str = "kept"


@pytest.mark.parametrize("make", [lambda x: Batch(x), lambda x: UserDict(x=x)])
def test_a_batch_of_another_kind_is_input_on_the_gpu(make):
    def loss(model, batch):
        x = batch.x if isinstance(batch, Batch) else batch["x"]
        assert x.is_cuda
        return model(x).sum()

    trace = train(loss, batch=make(torch.ones(1024, 8)))
    assert trace.max_by_category(1)["input"] == 1024 * 8 * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_simulation_restores_everything(fails):
    def state():
        return {
            **{f"cuda.{name}": value for name, value in vars(torch.cuda).items()},
            **{f"memory.{name}": value for name, value in vars(torch.cuda.memory).items()},
            **{f"accelerator.{name}": value for name, value in vars(torch.accelerator).items()},
        }, (torch.Generator, nn.Module.to, torch.empty(0).device, torch.autograd._engine_run_backward)

    def loss(model, x):
        if fails:
            raise ValueError("stop")
        return model(x).sum()

    before = state()
    try:
        train(loss)
    except TargetError:
        assert fails
    assert state() == before
