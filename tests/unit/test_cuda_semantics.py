"""On tensors that stand for CUDA tensors, PyTorch behaves as on CUDA; afterwards it is as before."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.optim import adam as torch_adam
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from memscope import Workload, simulate
from memscope.errors import TargetError
from memscope.simulation.cuda import autocast
from memscope.simulation.cuda.semantics import cuda_semantics


class Operators(TorchDispatchMode):
    """Names of the operators that reach the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def run(body, capability=(8, 0)):
    """The result of `body` and the operators it ran, on fake tensors under CUDA's rules."""
    with FakeTensorMode(), cuda_semantics(capability), Operators() as operators:
        return body(), operators.names


def test_every_operator_that_cuda_autocast_treats_in_this_pytorch_has_its_policy():
    on_cuda = autocast.registered("AutocastCUDA")
    known = set(autocast.policies())
    assert on_cuda - known == set(), "a PyTorch newer than the table: add them with their policy"
    # `same` keeps the CPU's own kernel, which must exist.
    same = {name for name, policy in autocast.policies().items() if policy == "same"}
    assert same & on_cuda <= autocast.registered("AutocastCPU")


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda t: t @ t, torch.float16),
        (lambda t: F.linear(t, t), torch.float16),
        (lambda t: torch.einsum("ij,jk->ik", t, t), torch.float16),
        (lambda t: t.half().pow(2), torch.float32),
        (lambda t: torch.rsqrt(t.half()), torch.float32),
        (lambda t: t.half().softmax(-1), torch.float32),
        (lambda t: t.half().sum(), torch.float32),
        (lambda t: t.half().sum(dtype=torch.float16), torch.float16),
        (lambda t: F.layer_norm(t.half(), (4,)), torch.float32),
        (lambda t: t.half().norm(), torch.float32),
        (lambda t: F.mse_loss(t.half(), t.half()), torch.float32),
        (lambda t: torch.addcmul(t, t.half(), t.half()), torch.float32),
        (lambda t: torch.relu(t.half()), torch.float16),
        (lambda t: torch.cat([t.half(), t.half()]), torch.float16),
        (lambda t: t.double() @ t.double(), torch.float64),
    ],
)
def test_autocast_gives_the_dtype_that_cuda_gives(operation, expected):
    # Expected dtypes: "CUDA Op-Specific Behavior" in PyTorch's documentation of torch.amp.
    def body():
        with torch.autocast("cuda", dtype=torch.float16):
            return operation(torch.ones(4, 4)).dtype

    assert run(body)[0] is expected


def test_autocast_for_cuda_defaults_to_float16_as_on_cuda():
    def body():
        with torch.autocast("cuda"):
            return (torch.ones(4, 4) @ torch.ones(4, 4)).dtype

    assert run(body)[0] is torch.float16


def test_a_trained_weight_is_cast_once_in_a_forward_pass_and_a_frozen_one_at_every_use():
    def casts(trained):
        def body():
            weight = nn.Parameter(torch.ones(4, 4), requires_grad=trained)
            x = torch.ones(4, 4, dtype=torch.float16)
            with torch.autocast("cuda"):
                F.linear(F.linear(x, weight), weight)

        return run(body)[1].count("aten._to_copy")

    assert casts(trained=True) == 1
    assert casts(trained=False) == 2


WEIGHTS = {
    "trained": (lambda: nn.Parameter(torch.ones(4, 4)), 1),
    "frozen": (lambda: nn.Parameter(torch.ones(4, 4), requires_grad=False), 2),
    "computed": (lambda: nn.Parameter(torch.ones(4, 4)) * 2, 2),
    "a view": (lambda: nn.Parameter(torch.ones(2, 4, 4))[0], 2),
    "a view as a leaf": (lambda: torch.ones(2, 4, 4)[0].requires_grad_(), 2),
    "half": (lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.float16)), 0),
    "bfloat16": (lambda: nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)), 2),
}


@pytest.mark.parametrize(("make", "expected"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("is_cached", [True, False], ids=["cache", "no cache"])
def test_weights_of_einsum_are_cast_as_often_as_those_of_matmul(make, expected, is_cached):
    # matmul keeps PyTorch's own autocast kernel and cache on both devices; einsum, on a CPU, has none.
    def casts(product):
        def body():
            weight, x = make(), torch.ones(4, 4, dtype=torch.float16)
            with torch.autocast("cuda", cache_enabled=is_cached):
                product(product(x, weight), weight)

        return run(body)[1].count("aten._to_copy")

    expected = expected if is_cached or expected == 0 else 2
    assert casts(torch.matmul) == expected
    assert casts(lambda x, weight: torch.einsum("ij,jk->ik", x, weight)) == expected


def test_the_cast_weights_of_einsum_are_gone_when_autocast_ends():
    def body():
        weight, x = nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4, dtype=torch.float16)
        for _ in range(3):
            with torch.autocast("cuda"):
                torch.einsum("ij,jk->ik", x, weight)

    assert run(body)[1].count("aten._to_copy") == 3


def test_binary_cross_entropy_is_refused_under_autocast_as_on_cuda():
    def body():
        with torch.autocast("cuda"):
            F.binary_cross_entropy(torch.ones(2), torch.ones(2))

    with pytest.raises(RuntimeError, match="binary_cross_entropy_with_logits"):
        run(body)


def test_dropout_is_one_kernel_with_a_mask_of_one_byte_an_element():
    _, operators = run(lambda: F.dropout(torch.ones(100), 0.5, training=True))
    assert "aten.native_dropout" in operators
    assert "aten.bernoulli_" not in operators


@pytest.mark.parametrize(
    ("dtype", "capability", "mask", "expected"),
    [
        (torch.float16, (8, 0), False, "aten._scaled_dot_product_flash_attention"),
        (torch.bfloat16, (12, 0), False, "aten._scaled_dot_product_flash_attention"),
        (torch.float32, (8, 0), False, "aten._scaled_dot_product_efficient_attention"),
        (torch.float16, (7, 5), False, "aten._scaled_dot_product_efficient_attention"),
        (torch.float16, (8, 0), True, "aten._scaled_dot_product_efficient_attention"),
        (torch.bfloat16, (7, 0), False, "aten.bmm"),
        (torch.float64, (8, 0), False, "aten.bmm"),
    ],
)
def test_attention_uses_the_kernel_that_cuda_uses(dtype, capability, mask, expected):
    def body():
        query = torch.ones(2, 4, 32, 64, dtype=dtype, requires_grad=True)
        bias = torch.zeros(32, 32, dtype=dtype) if mask else None
        F.scaled_dot_product_attention(query, query, query, attn_mask=bias).sum().backward()
        return query.grad.shape

    shape, operators = run(body, capability)
    assert expected in operators
    assert shape == (2, 4, 32, 64)


def test_flash_attention_pads_heads_to_a_multiple_of_eight_and_cuts_the_result():
    def body():
        query = torch.ones(1, 2, 16, 60, dtype=torch.float16)
        return F.scaled_dot_product_attention(query, query, query).shape

    shape, operators = run(body)
    assert shape == (1, 2, 16, 60)
    assert operators.count("aten.constant_pad_nd") == 3


def optimizer_temporaries(**settings):
    def build():
        model = nn.Linear(256, 256, bias=False)
        return Workload(
            model,
            [torch.ones(1, 256)],
            lambda m, x: m(x).sum(),
            lambda p: torch.optim.AdamW(p, **settings),
            name="linear",
        )

    trace = simulate(build)
    in_optimizer = trace.by_category(at=trace.peak_of(1).event)
    return in_optimizer["temporary"], trace


@pytest.mark.usefixtures("kept_workspaces")
def test_adamw_updates_all_parameters_at_once_and_takes_a_temporary_as_large_as_they_are():
    temporary, trace = optimizer_temporaries()
    assert temporary == 256 * 256 * 4
    assert trace.peak.phase == "optimizer"


def test_step_counters_stay_on_the_host_unless_the_optimizer_is_fused():
    # Two moments of 256 KiB; a fused optimizer keeps its 4-byte counter in a block of 512 bytes on the device.
    assert optimizer_temporaries()[1].max_by_category(1)["optimizer_state"] == 2 * 256 * 256 * 4
    assert optimizer_temporaries(fused=True)[1].max_by_category(1)["optimizer_state"] == 2 * 256 * 256 * 4 + 512


@pytest.mark.parametrize(("name", "moments"), [("Adadelta", 2), ("RMSprop", 1), ("Rprop", 2), ("NAdam", 2)])
def test_step_counters_of_other_optimizers_stay_on_the_host_too(name, moments):
    # Adadelta, RMSprop and Rprop make them by torch.zeros(()) without a device. Source: torch/optim, 2.11 and 2.13.
    def build():
        return Workload(
            model=nn.Linear(256, 256, bias=False),
            batches=[torch.randn(8, 256)],
            loss=lambda model, x: model(x).mean(),
            optimizer_factory=getattr(torch.optim, name),
        )

    trace = simulate(build, device="a100-80gb")
    assert trace.max_by_category(1)["optimizer_state"] == moments * 256 * 256 * 4


@pytest.mark.usefixtures("kept_workspaces")
def test_a_capturable_optimizer_keeps_its_counters_and_corrections_on_the_device():
    # One parameter: the root of its second moment and two bias corrections, each of these in a block of 512 bytes.
    temporary, trace = optimizer_temporaries(capturable=True)
    assert temporary == 256 * 256 * 4 + 2 * 512
    assert trace.max_by_category(1)["optimizer_state"] == 2 * 256 * 256 * 4 + 512


@pytest.mark.parametrize(
    ("name", "tensors"),  # as large as the parameter, and single numbers
    [
        ("Adam", 2 + 1), ("NAdam", 2 + 2), ("RAdam", 2 + 1), ("Adamax", 2 + 1), ("RMSprop", 1 + 1),
        ("Adadelta", 2 + 1), ("ASGD", 1 + 3), ("Rprop", 2 + 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("foreach", [True, False])
def test_every_capturable_optimizer_has_all_its_state_on_the_device(name, tensors, foreach):
    def factory(parameters):
        return getattr(torch.optim, name)(parameters, capturable=True, foreach=foreach)

    model = nn.Linear(8, 8, bias=False)
    trace = simulate(Workload(model, [torch.ones(1, 8)], lambda m, x: m(x).sum(), factory))
    assert trace.max_by_category(1)["optimizer_state"] == tensors * 512  # 8 · 8 · 4 bytes fit into one block


def test_allocations_take_whole_blocks_of_512_bytes():
    _, trace = optimizer_temporaries()
    assert (trace.size % 512 == 0).all()
    assert (trace.size >= trace.requested).all()
    assert (trace.size - trace.requested < 512).all()


def behaviour():
    """The present values of everything that a simulation could leave changed."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        softmax = torch.ones(4, dtype=torch.bfloat16).softmax(-1).dtype
    attention = F.scaled_dot_product_attention(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8))
    with Operators() as operators:
        F.dropout(torch.ones(4), 0.5)
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    clip_grad_norm_(model.parameters(), 1.0)
    return (
        softmax,
        tuple(attention.shape),
        operators.names,
        torch.autocast.__init__,
        torch.clear_autocast_cache,
        torch.amp.GradScaler._maybe_opt_step,
        torch_optimizer._get_foreach_kernels_supported_devices,
        torch_optimizer._get_capturable_supported_devices,
        torch_adam._get_capturable_supported_devices,
        list(torch_optimizer._foreach_supported_types),
        list(_foreach_utils._foreach_supported_types),
        torch.UntypedStorage.resize_,
        nn.Module._apply,
        nn.Module.to,
        FakeTensor.device,
        torch.Generator,
        torch.set_default_device,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
        [vars(torch.cuda)[name] for name in ("is_available", "memory_allocated", "Event", "device", "empty_cache")],
        dict(vars(torch.accelerator)),
        torch.overrides._get_current_function_mode(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_leaks_from_a_simulation_into_what_runs_afterwards(fails):
    before = behaviour()

    def build():
        def loss(model, x):
            if fails:
                raise ValueError("stop")
            return model(x).softmax(-1).sum()

        return Workload(nn.Linear(4, 4), [torch.ones(2, 4)], loss, torch.optim.AdamW)

    try:
        simulate(build, strategies="amp")
    except TargetError:
        assert fails
    assert behaviour() == before
