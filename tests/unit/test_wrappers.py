"""A wrapper subclass counts as the tensors that it holds: shards, quantized weights, and wrappers of wrappers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from wrappers import Opaque, Pair, Quantized

from memscope import Recorder, Workload, record, simulate
from memscope.errors import UsageError
from memscope.testing.conformance import _allocations

N = 128  # weights are [128, 128]; rows of scales fill blocks of 512 bytes
FLOAT = N * N * 4

RUNS = {
    "recorded": record,
    "simulated": lambda build: simulate(build, device="cpu"),
    "simulated copy": lambda build: simulate(build(), device="cpu"),
    "simulated on a GPU": simulate,
}


def workload(model, batch=None, loss=lambda m, x: m(x).square().mean()):
    return Workload(model, [torch.ones(4, N) if batch is None else batch], loss, torch.optim.AdamW, name="mine")


def quantized():
    return Quantized(torch.ones(N, N, dtype=torch.int8), torch.ones(N, 1))


def pair():
    return Pair(torch.ones(N, N), torch.ones(N, N))


def linear(weight, *, trained):
    layer = nn.Linear(N, N, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    return layer


@pytest.mark.parametrize("run", RUNS)
def test_a_quantized_weight_has_the_bytes_of_its_numbers_and_scales(run):
    def build():
        return workload(nn.Sequential(linear(quantized(), trained=False), nn.Linear(N, N, bias=False)))

    largest = RUNS[run](build).max_by_category()
    assert largest["parameter"] == (N * N + N * 4) + FLOAT  # int8, a float32 scale a row; and the plain layer
    assert largest["gradient"] == FLOAT
    # dequantized: float32 of the int8 numbers, which is a copy of a weight
    assert largest["weight_copy"] == FLOAT


@pytest.mark.parametrize("run", RUNS)
def test_gradient_state_and_activations_of_a_wrapper_are_those_of_its_parts(run):
    def build():
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(pair())
                self.register_buffer("shift", pair())
                self.constant = pair()

            def forward(self, x):
                return ((self.weight * x).exp() + self.shift + self.constant).sum()

        def loss(model, x):
            total = model(x)
            return total if type(total) is torch.Tensor else total.mean()

        return Workload(Net(), [torch.ones(N, N)], loss, torch.optim.AdamW, name="mine")

    trace = RUNS[run](build)
    largest = trace.max_by_category(1)
    assert largest["parameter"] == 2 * FLOAT
    assert largest["buffer"] == 4 * FLOAT
    assert largest["gradient"] == 2 * FLOAT
    counters = 0 if run == "simulated on a GPU" else 4  # AdamW's counter of steps is on the host there
    assert largest["optimizer_state"] == 2 * (2 * FLOAT) + counters
    exponentials = trace.op == trace.ops.index("aten.exp.default")
    assert trace.requested[exponentials].tolist() == [FLOAT] * 4  # two tensors, in each of two steps


@pytest.mark.parametrize("run", RUNS)
def test_a_wrapper_in_a_batch_is_input_as_large_as_its_parts(run):
    def build():
        return workload(
            nn.Linear(N, N, bias=False), batch=pair(), loss=lambda m, x: m((x.one + x.two).sum(0)).square().mean()
        )

    assert RUNS[run](build).max_by_category()["input"] == 2 * FLOAT


def test_a_wrapper_of_wrappers_is_taken_apart_too():
    nested = Pair(pair(), pair())
    with Recorder(linear(nested, trained=False)) as recorder:
        pass
    assert recorder.trace().max_by_category()["parameter"] == 4 * FLOAT


@pytest.mark.parametrize("place", ["weight", "batch"])
@pytest.mark.parametrize("run", RUNS)
def test_a_wrapper_that_cannot_be_taken_apart_is_refused_by_name(run, place):
    def build():
        opaque = Opaque(torch.ones(N, N), torch.ones(N, N))
        if place == "weight":
            return workload(linear(opaque, trained=True))
        return workload(nn.Linear(N, N), batch=opaque, loss=lambda m, x: m(x.one).sum())

    with pytest.raises(
        UsageError, match=r"\[128, 128\] of class wrappers\.Opaque cannot be counted.*__tensor_flatten__"
    ):
        RUNS[run](build)


@pytest.mark.parametrize(
    "model",
    [lambda: nn.Sequential(linear(quantized(), trained=False), nn.Linear(N, N)), lambda: linear(pair(), trained=False)],
    ids=["quantized", "pair"],
)
def test_a_simulation_of_wrappers_equals_the_run(model):
    def build():
        def loss(m, x):
            y = m(x)
            return (y.one + y.two if isinstance(y, Pair) else y).square().mean() + scale.square()

        scale = nn.Parameter(torch.ones(()))
        whole = nn.Module()
        whole.inner, whole.scale = model(), scale
        return Workload(whole, [torch.ones(4, N)], lambda m, x: loss(m.inner, x), torch.optim.AdamW, name="mine")

    assert _allocations(simulate(build, device="cpu")) == _allocations(record(build))


def test_in_a_simulated_gpu_a_wrapper_is_on_the_gpu_for_a_target():
    def build():
        def loss(model, x):
            assert (model.weight.device.type, model.weight.is_cuda, model.weight.is_cpu) == ("cuda", True, False)
            return model(x.to(model.weight.device)).square().mean() * model.scale

        model = linear(quantized(), trained=False)
        model.scale = nn.Parameter(torch.ones(()))
        return workload(model, loss=loss)

    assert simulate(build).max_by_category()["input"] == 4 * N * 4


@pytest.fixture(scope="module")
def mesh():
    """Four ranks, of which this process is the first; the others are imagined."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def layers(n):
    return nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, n, bias=False))


def sharded_by_fsdp(mesh, n=N):
    from torch.distributed.fsdp import fully_shard

    return workload(fully_shard(layers(n), mesh=mesh), batch=torch.ones(4, n))


def sharded_by_hand(mesh, n=N):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = layers(n)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))

    def loss(m, x):
        return m(distribute_tensor(x, mesh, [Replicate()])).to_local().square().mean()

    return workload(model, batch=torch.ones(4, n), loss=loss)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shard", [sharded_by_fsdp, sharded_by_hand])
def test_a_shard_of_four_has_a_quarter_of_weights_gradients_and_state(shard, run, mesh):
    if run == "simulated copy" and shard is sharded_by_fsdp:
        pytest.skip("FSDP's hooks cannot be copied")
    largest = RUNS[run](lambda: shard(mesh)).max_by_category(1)
    assert largest["parameter"] == 2 * FLOAT // 4
    assert largest["gradient"] == 2 * FLOAT // 4
    counters = 0 if run == "simulated on a GPU" else 2 * 4
    assert largest["optimizer_state"] == 2 * (2 * FLOAT // 4) + counters


@pytest.mark.parametrize("shard", [sharded_by_fsdp, sharded_by_hand])
def test_a_simulation_of_shards_equals_the_run(shard, mesh):
    def rows(trace):  # a recorded run clones the batch, a simulation makes it
        return [row for row in _allocations(trace) if row[4] != "input"]

    def build():
        return shard(mesh, n=36)  # of no other test: DTensor works out the shapes of an operator once

    assert rows(simulate(build, device="cpu")) == rows(record(build))
