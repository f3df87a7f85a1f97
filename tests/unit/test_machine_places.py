"""A simulated program: what is on the host, what is on the GPU, and what may not meet."""

import pytest
from program_runs import run_source

LINEAR = 64 * 64 * 4 + 512
"""Bytes of an nn.Linear(64, 64) on a GPU, whose allocator rounds the 256 bytes of the bias to 512."""


@pytest.mark.parametrize(
    ("model", "batch", "device"),
    [
        ("nn.Linear(64, 64).cuda()", "torch.randn(8, 64)", "a100-80gb"),
        ("nn.Linear(64, 64)", "torch.randn(8, 64).cuda()", "a100-80gb"),
        ("nn.Embedding(64, 64).cuda()", "torch.arange(8)", "a100-80gb"),
        ("nn.Sequential(nn.Linear(64, 64).cuda(), nn.Linear(64, 64))", "torch.randn(8, 64).cuda()", "a100-80gb"),
    ],
    ids=["batch", "model", "indices", "layer"],
)
def test_a_program_that_forgets_to_move_a_tensor_fails_as_on_a_gpu(tmp_path, model, batch, device):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        run_source(tmp_path, f"train({model}, batch=lambda: {batch})", device=device)


def test_what_a_gpu_takes_from_the_host_is_no_mistake(tmp_path):
    ran = run_source(
        tmp_path,
        """
        def batch():
            x = torch.randn(8, 64).cuda()[torch.randperm(8)]
            x[torch.arange(3)] = 0.0
            x = torch.where(x > 0, x, torch.tensor(0.0)) * torch.tensor(2.0)
            on_host = torch.zeros(8, 64)
            on_host.copy_(x)
            on_host[:4] = x[:4]
            x.copy_(on_host, non_blocking=True)
            return x.masked_fill(torch.ones(8, 64, device="cuda").bool(), torch.tensor(1.0))

        train(nn.Linear(64, 64).cuda(), batch=batch)
        """,
    )
    assert ran.trace.steps == (0, 1)


def test_results_of_weights_on_the_host_stay_there(tmp_path):
    ran = run_source(
        tmp_path,
        """
        model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64))
        with torch.no_grad():
            out = model(torch.randn(8, 64))
        assert not any(part.is_cuda for part in (out, *out.max(1), *out.split(4), *torch.topk(out, 3)))
        kept = torch.cuda.memory_allocated()
        assert kept == 0, kept
        train(model.cuda())
        """,
    )
    assert ran.peak_of("parameter") == LINEAR + 2 * 512


def test_a_large_pinned_buffer_takes_no_memory_of_the_host_and_a_small_one_is_real(tmp_path):
    run_source(
        tmp_path,
        """
        buffer = torch.empty(400_000_000_000, dtype=torch.uint8, pin_memory=True)
        assert not buffer.is_cuda and buffer[:5].cuda().is_cuda
        small = torch.tensor([[3, 1], [2, 4]], pin_memory=True)
        assert small.pin_memory().sum().item() == 10
        train(nn.Linear(64, 64).cuda())
        """,
    )


def test_a_lazy_module_gets_its_sizes_on_the_host(tmp_path):
    ran = run_source(
        tmp_path,
        """
        model = nn.Sequential(nn.LazyLinear(64), nn.LazyBatchNorm1d())
        model(torch.randn(2, 64))
        train(model.cuda())
        """,
    )
    assert ran.trace.steps == (0, 1)
    assert ran.peak_of("parameter") == LINEAR + 2 * 512


def test_a_lazy_module_on_the_gpu_is_refused(tmp_path):
    with pytest.raises(Exception, match="call the model once on the host before"):
        run_source(tmp_path, "train(nn.LazyLinear(64).cuda())")


def test_training_in_a_thread_is_refused_and_work_on_the_host_is_not(tmp_path):
    source = """
        from concurrent.futures import ThreadPoolExecutor
        model = nn.Linear(64, 64)
        with ThreadPoolExecutor() as pool:
            assert pool.submit(lambda: torch.arange(4).sum().item()).result() == 6
            pool.submit(train, model, None, lambda: torch.randn(8, 64)).result()
    """
    with pytest.raises(Exception, match="follows the main thread only: train there"):
        run_source(tmp_path, source)
    with pytest.raises(Exception, match="sees the operators of the main thread only"):
        run_source(tmp_path, source, device="cpu", simulated=False)
