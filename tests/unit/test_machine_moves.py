"""A simulated program: how it moves models and tensors, and what it asks torch.cuda for."""

import pytest
from program_runs import run_source

LINEAR = 64 * 64 * 4 + 512
"""Bytes of an nn.Linear(64, 64) on a GPU, whose allocator rounds the 256 bytes of the bias to 512."""


@pytest.mark.parametrize(
    "move",
    ["model.cuda()", "model.to(0)", "model.to(device='cuda:0')", "model.half().to('cuda', torch.float32)"],
)
def test_an_optimizer_built_before_the_model_moves_trains_it(tmp_path, move):
    source = f"""
        model = nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        weight = model.weight
        {move}
        assert model.weight is weight and weight.is_cuda
        train(model, optimizer)
    """
    assert run_source(tmp_path, source).peak_of("optimizer_state") == 2 * LINEAR


def test_gradients_move_with_their_weights(tmp_path):
    source = """
        model = nn.Linear(64, 64)
        model(torch.randn(8, 64)).mean().backward()
        model.cuda().half()
        assert model.weight.grad.is_cuda and model.weight.grad.dtype is torch.half
        train(model, batch=lambda: torch.randn(8, 64).cuda().half())
    """
    assert run_source(tmp_path, source).trace.steps == (0, 1)


@pytest.mark.parametrize(
    "source",
    [
        """
        torch.set_default_device("cuda")
        assert torch.get_default_device() == torch.device("cuda:0")
        assert torch.zeros(3).is_cuda and not torch.zeros(3, device="cpu").is_cuda
        train(nn.Linear(64, 64), batch=lambda: torch.randn(8, 64))
        torch.set_default_device(None)
        assert not torch.zeros(3).is_cuda
        """,
        """
        with torch.device("cuda"):
            model = nn.Linear(64, 64)
        assert not torch.zeros(3).is_cuda
        train(model)
        """,
        """
        to, cuda = torch.Tensor.to, torch.Tensor.cuda
        torch.Tensor.to = lambda tensor, *args, **kwargs: to(tensor, *args, **kwargs)
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: cuda(tensor, *args, **kwargs)
        try:
            train(nn.Linear(64, 64).to("cuda"))
        finally:
            torch.Tensor.to, torch.Tensor.cuda = to, cuda
        """,
        "train(nn.DataParallel(nn.Linear(64, 64)).cuda())",
    ],
    ids=["default device", "with torch.device", "patched methods", "DataParallel"],
)
def test_a_model_trains_on_the_gpu_however_it_came_there(tmp_path, source):
    ran = run_source(tmp_path, source)
    assert ran.peak_of("parameter") == LINEAR
    assert ran.peak_of("optimizer_state") == 2 * LINEAR


def test_streams_and_events_are_answered_and_noted(tmp_path):
    ran = run_source(
        tmp_path,
        """
        copies = torch.cuda.Stream()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def batch():
            before.record()
            with torch.cuda.stream(copies):
                x = torch.randn(8, 64).pin_memory().cuda(non_blocking=True)
            torch.cuda.current_stream().wait_stream(copies)
            after.record()
            torch.cuda.synchronize()
            assert before.elapsed_time(after) > 0
            return x

        assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
        train(nn.Linear(64, 64).cuda(), batch=batch)
        """,
    )
    assert [note for note in ran.notes if "several CUDA streams" in note]
    assert ran.assumed == ["the time between two events"]


def test_torchscript_runs_as_python(tmp_path):
    source = "train(torch.jit.script(nn.Linear(64, 64)).cuda())"
    ran = run_source(tmp_path, source)
    assert ran.peak_of("optimizer_state") == 2 * LINEAR
    assert [note for note in ran.notes if "TorchScript" in note]


def test_a_scripted_module_is_recorded(tmp_path):
    source = "train(torch.jit.script(nn.Linear(64, 64)), batch=lambda: torch.randn(8, 64))"
    assert run_source(tmp_path, source, device="cpu", simulated=False).peak_of("parameter") == 64 * 65 * 4


def test_averages_of_weights_take_memory(tmp_path):
    source = """
        import copy
        from torch.optim.swa_utils import AveragedModel
        model = nn.Linear(64, 64).cuda()
        first = torch.cuda.memory_allocated()
        copied = copy.deepcopy(model)
        averaged = AveragedModel(model)
        assert torch.cuda.memory_allocated() == 3 * first
        train(model)
        averaged.update_parameters(model)
        vector = nn.utils.parameters_to_vector(model.parameters())
        assert vector.is_cuda and vector.numel() == 64 * 65
    """
    assert run_source(tmp_path, source, steps=None).trace.steps == (0, 1, 2)
