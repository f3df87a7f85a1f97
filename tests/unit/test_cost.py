"""The estimate of step time: the cost of one operator, by hand, and the estimate in a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from memscope import Trace, Workload, simulate
from memscope.analysis.cost import Cost, module_seconds, operator_costs, step_seconds
from memscope.errors import UsageError
from memscope.hooks.work import flops_of
from memscope.simulation.devices.catalogue import Device, get_device
from memscope.simulation.devices.cost import transfer_seconds
from memscope.simulation.devices.products import product_seconds
from memscope.simulation.devices.roofline import GAP_SECONDS, KERNEL_SECONDS, Roofline
from memscope.simulation.devices.timeline import BACKWARD_LAUNCH_SECONDS, LAUNCH_SECONDS
from memscope.simulation.devices.traffic import moved_bytes
from memscope.testing import toy_workload
from memscope.trace import Phase

aten = torch.ops.aten
FP32, TF32, BF16, BANDWIDTH = 1e11, 8e11, 16e11, 1e10
"""Rates of a fictitious device, so slow that launches do not hide them. It has one multiprocessor, which any number of
whole tiles fills."""


def device(**changes: Any) -> Device:
    figures: dict[str, Any] = {
        "name": "slow", "vendor_name": "A slow GPU", "kind": "cuda", "capability": (8, 0), "capacity_bytes": 2**40,
        "multiprocessors": 1, "bandwidth_bytes_per_second": BANDWIDTH,
        "peak_flops_per_second": {"fp32": FP32, "tf32": TF32, "bf16": BF16}, "context_bytes": 0, "sources": {},
    }  # fmt: skip
    return Device(**(figures | changes))


def simulated(model: nn.Module, x: Tensor, on: Device | str = "", **changes: Any) -> Trace:
    """One step of `sum(model(x))`."""
    workload = Workload(
        model=model, batches=[x], loss=lambda m, data: m(data).sum(), optimizer_factory=torch.optim.AdamW, name="mine",
        **changes,
    )  # fmt: skip
    return simulate(workload, device=on or device(), steps=1)


def forward(trace: Trace) -> dict[tuple[str, str], Cost]:
    return operator_costs(trace, step=0, phase="forward")


# One operator.


def test_a_linear_layer_takes_as_long_as_its_arithmetic() -> None:
    # 2 · 64 · 256 · 512 operations; input, weight and result are moved once: (64·256 + 512·256 + 64·512) · 4 bytes
    flops, moved = 16_777_216, 720_896
    found = forward(simulated(nn.Linear(256, 512, bias=False), torch.ones(64, 256)))
    seconds = LAUNCH_SECONDS + flops / FP32 + GAP_SECONDS  # the device waits for the first launch
    assert found == {("(model)", "aten.mm.default"): Cost(1, flops, moved, pytest.approx(seconds, abs=1e-9))}
    assert flops / FP32 > moved / BANDWIDTH > LAUNCH_SECONDS


def test_its_backward_is_one_product_for_the_weight_and_one_for_the_input() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 512, bias=False))
    trace = simulated(model, torch.ones(64, 256))
    products = {
        module: cost.calls
        for (module, op), cost in operator_costs(trace, step=0, phase="backward").items()
        if op == "aten.mm.default"
    }
    assert products == {"0": 1, "1": 2}, "the batch needs no gradient"


def test_an_elementwise_operation_takes_as_long_as_its_memory_traffic() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight + x

    found = forward(simulated(Doubled(1024, 1024, bias=False), torch.ones(1024, 1024)))
    moved = 3 * 4 * 1024 * 1024
    seconds = LAUNCH_SECONDS + moved / BANDWIDTH + GAP_SECONDS
    assert found["(model)", "aten.add.Tensor"] == Cost(1, 0, moved, pytest.approx(seconds, abs=1e-9))


class Chain(nn.Linear):
    """A product, and operations after it."""

    def __init__(self, width: int, *operations: Callable[[Tensor], object]) -> None:
        super().__init__(width, width, bias=False)
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for operation in self.operations:
            found = operation(y)
            y = found if isinstance(found, Tensor) else y
        return y


def test_tiny_operations_take_as_long_as_their_launches() -> None:
    found = forward(simulated(Chain(2, torch.neg, torch.exp), torch.ones(2, 2)))
    first, *others = [cost.seconds for cost in found.values()]
    assert first == pytest.approx(LAUNCH_SECONDS + KERNEL_SECONDS + GAP_SECONDS, abs=1e-9)
    assert others == pytest.approx([LAUNCH_SECONDS] * 2, abs=1e-9), "the kernel before has long ended"


def test_launches_are_hidden_while_the_device_is_busy() -> None:
    trace = simulated(Chain(256, torch.neg, torch.exp), torch.ones(1, 256), on=device(bandwidth_bytes_per_second=1e9))
    found = {op: cost.seconds for (_, op), cost in forward(trace).items()}
    assert found["aten.neg.default"] == pytest.approx(KERNEL_SECONDS + GAP_SECONDS, abs=1e-9)
    backward = operator_costs(trace, step=0, phase="backward")
    assert backward["(model)", "aten.mul.Tensor"].seconds == pytest.approx(KERNEL_SECONDS + GAP_SECONDS, abs=1e-9)


def test_the_host_waits_where_a_value_is_read() -> None:
    trace = simulated(
        Chain(256, lambda y: y.sum().item(), torch.neg, torch.exp),
        torch.ones(1, 256),
        on=device(bandwidth_bytes_per_second=1e9),
    )
    found = {op: cost.seconds for (_, op), cost in forward(trace).items()}
    tiny = LAUNCH_SECONDS + KERNEL_SECONDS + GAP_SECONDS
    assert found["aten.neg.default"] == pytest.approx(tiny, abs=1e-9), "the device had nothing left to do"


def test_the_engine_launches_faster_than_python() -> None:
    trace = simulated(Chain(2, torch.exp, torch.neg, torch.neg), torch.ones(2, 2))
    backward = operator_costs(trace, step=0, phase="backward")
    cost = backward["(model)", "aten.neg.default"]
    assert (cost.calls, cost.seconds) == (2, pytest.approx(2 * BACKWARD_LAUNCH_SECONDS, abs=1e-8))


def test_a_product_costs_whole_tiles_in_whole_waves() -> None:
    rates = dict(flops_per_second=1e12, bytes_per_second=1e15, multiprocessors=4)
    of_tile = 2 * 64 * 64 * 64 / (1e12 / 4)
    assert product_seconds((1, 128, 128, 64), **rates) == pytest.approx(of_tile), "four tiles on four multiprocessors"
    assert product_seconds((1, 100, 80, 64), **rates) == pytest.approx(of_tile), "the tiles are as large"
    # 5 tiles: two waves; or in 4 parts of 16 of the inner size: 20 pieces, five waves of a quarter of the time
    assert product_seconds((5, 64, 64, 64), **rates) == pytest.approx(5 / 4 * of_tile, rel=1e-3)
    assert product_seconds((5, 64, 64, 64), **rates | {"bytes_per_second": 1.0}) == pytest.approx(2 * of_tile), (
        "partial sums cost more than they save"
    )


def test_views_metadata_and_mere_allocations_cost_nothing() -> None:
    class Viewed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x.detach().t_().unsqueeze_(0)
            assert x.is_same_size(x)
            torch.empty_like(x)
            return super().forward(x.view(4, -1).t().transpose(0, 1).expand(4, -1)[:, :16].unflatten(1, (2, 8)))

    assert {op for _, op in forward(simulated(Viewed(8, 8, bias=False), torch.ones(8, 8)))} == {"aten.mm.default"}


X, Y = torch.ones(10, 10), torch.ones(10, 10)
HALF = torch.ones(10, 10, dtype=torch.bfloat16)
TABLE, FEW = torch.ones(1000, 10), torch.tensor([1, 2, 3])
LOGITS, TARGETS = torch.ones(3, 1000), torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("func", "args", "expected"),
    [
        (aten.add.Tensor, (X, Y), 3 * 400),
        (aten.add.Tensor, (X, torch.ones(10)), 2 * 400 + 40),
        (aten.add.Tensor, (X, torch.ones(1).expand(10, 10)), 2 * 400 + 4),
        (aten._to_copy.default, (HALF,), 2 * 200),
        (aten.add_.Tensor, (X, Y), 3 * 400),
        (aten.mul_.Tensor, (X, 2.0), 2 * 400),
        (aten.copy_.default, (X, HALF), 400 + 200),
        (aten.zero_.default, (X,), 400),
        (aten.zeros_like.default, (X,), 400),
        (aten.new_zeros.default, (X, [5]), 20),
        (aten.ones.default, ([10],), 40),
        (aten.cat.default, ([X, Y],), 4 * 400),
        (aten.view.default, (X, [100]), 0),
        (aten._unsafe_view.default, (X, [100]), 0),
        (aten.empty.memory_format, ([10],), 0),
        (aten._foreach_mul_.Scalar, ([X, torch.ones(5)], 2.0), 2 * (400 + 20)),
        (aten._foreach_addcdiv_.Scalar, ([X], [Y], [Y + 1]), 4 * 400),
        (aten._foreach_norm.Scalar, ([X, Y],), 2 * 400 + 2 * 4),
        (aten.embedding.default, (TABLE, FEW), 3 * 8 + 2 * 3 * 40),
        (aten.index_select.default, (TABLE, 0, FEW), 3 * 8 + 2 * 3 * 40),
        (aten.nll_loss_forward.default, (LOGITS, TARGETS, None, 1, -100), 3 * 4 + 3 * 8 + 4 + 4),
        (aten.index_add_.default, (TABLE, 0, FEW, torch.ones(3, 10)), 3 * 8 + 3 * 120),
        (aten.nll_loss_backward.default, (X.sum(), LOGITS, TARGETS, None, 1, -100, X.sum()), 4 + 3 * 8 + 4 + 12_000),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else None,
)
def test_bytes_moved(func: Any, args: tuple[Any, ...], expected: int) -> None:
    assert moved_bytes(func, args, {}, func(*args)) == expected


@pytest.mark.parametrize(("scaled", "times"), [(False, 7), (True, 8)])
def test_fused_adamw_reads_four_tensors_and_writes_three_and_gradients_only_if_scaled(scaled: bool, times: int) -> None:
    parameter, gradient, first, second = (torch.ones(100) for _ in range(4))
    lists = [[parameter], [gradient], [first], [second], [], [torch.tensor(1.0)]]
    options: dict[str, Any] = dict(
        lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.1, eps=0.1, amsgrad=False, maximize=False
    )
    scaler = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)} if scaled else {}
    options |= scaler
    aten._fused_adamw_.default(*lists, **options)
    scalars = 4 * (1 + len(scaler))
    assert moved_bytes(aten._fused_adamw_.default, tuple(lists), options, None) == times * 400 + scalars


def test_an_8_bit_optimizer_reads_gradients_and_code_books_and_changes_the_rest() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameter, gradient = torch.ones(4096), torch.ones(4096)
    state, scale, book = torch.zeros(4096, dtype=torch.uint8), torch.zeros(16), torch.ones(256)
    tensors = ("lion", gradient, parameter, state, None, 0.9, 0.9, 0.0, 0.0, 1e-8, 1, 0.1, book, None, scale, None)
    update = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default
    moved = 4 * 4096 + 2 * 4 * 4096 + 2 * 4096 + 2 * 4 * 16 + 4 * 256
    assert moved_bytes(update, (*tensors, 0.0, 1.0, False), {}, None) == moved


# What is multiplied.

MATRIX = torch.ones(512, 512)
PRODUCT = 2 * 512**3


def seconds_of(func: Any, *args: Any, on: Device | None = None) -> float:
    return Roofline(on or device())(func, args, {}, func(*args)).seconds - GAP_SECONDS


@pytest.fixture
def _fp32_as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_fp32_as_it_was")
def test_fp32_products_use_tensor_cores_only_if_pytorch_allows_it() -> None:
    assert seconds_of(aten.mm.default, MATRIX, MATRIX) == PRODUCT / FP32
    torch.set_float32_matmul_precision("high")
    assert seconds_of(aten.mm.default, MATRIX, MATRIX) == PRODUCT / TF32


def test_16_bit_products_use_tensor_cores() -> None:
    half = MATRIX.bfloat16()
    assert seconds_of(aten.mm.default, half, half, on=device(bandwidth_bytes_per_second=1e13)) == PRODUCT / BF16


def test_convolutions_use_tf32_unless_it_is_switched_off() -> None:
    call = aten.convolution.default, torch.ones(8, 64, 32, 32), torch.ones(64, 64, 3, 3), None, [1, 1], [1, 1], [1, 1]
    flops = 2 * 8 * 64 * 32 * 32 * 64 * 9
    arguments = (*call, False, [0, 0], 1)
    assert seconds_of(*arguments) == flops / TF32
    with torch.backends.cudnn.flags(allow_tf32=False, fp32_precision="ieee"):
        assert seconds_of(*arguments) == flops / FP32


def test_products_take_as_long_as_is_allowed_in_the_step_that_makes_them() -> None:
    steps: list[int] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = len(steps) == 1
        steps.append(len(steps))
        return model(x).sum()

    workload = Workload(nn.Linear(512, 512, bias=False), [torch.ones(4096, 512)], loss, torch.optim.SGD, name="mine")
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        trace = simulate(workload, device=device(), steps=3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    took = [operator_costs(trace, step=step, phase="forward") for step in range(3)]
    flops = 2 * 4096 * 512 * 512
    found = [sum(cost.seconds for (_, op), cost in costs.items() if "mm" in op) for costs in took]
    # The first kernel of a step waits for its launch.
    each = [flops / rate + LAUNCH_SECONDS + GAP_SECONDS for rate in (FP32, TF32, FP32)]
    assert found == pytest.approx(each, rel=1e-4)  # kept in ns


def test_memory_efficient_attention_multiplies_fp32_in_three_tf32_products() -> None:
    query = torch.ones(1, 1, 1024, 64, device="meta")
    flops = 2 * 2 * 1024 * 1024 * 64
    args = (query, query, query, None, False)
    assert seconds_of(aten._scaled_dot_product_efficient_attention.default, *args) == pytest.approx(3 * flops / TF32)


def test_measured_rates_of_a_device_override_its_peak_rates() -> None:
    on = device(measured_flops_per_second={"fp32": 5e11}, measured_bandwidth_bytes_per_second=5e10)
    assert seconds_of(aten.mm.default, MATRIX, MATRIX, on=on) == PRODUCT / 5e11
    assert seconds_of(aten.neg.default, MATRIX, on=on) == 2 * 4 * 512 * 512 / 5e10


def test_a_dtype_without_a_rate_is_estimated_as_fp32_and_named() -> None:
    trace = simulated(nn.Linear(256, 512, bias=False, dtype=torch.float64), torch.ones(64, 256, dtype=torch.float64))
    assert trace.meta["cost"]["assumed"] == ["float64 products take as long as fp32 products"]
    seconds = LAUNCH_SECONDS + 2 * 64 * 256 * 512 / FP32 + GAP_SECONDS
    assert sum(cost.seconds for cost in forward(trace).values()) == pytest.approx(seconds, abs=1e-9)


# A step.


def test_phases_modules_and_operators_have_the_same_sum() -> None:
    trace = simulate(toy_workload, device="a100-40gb")
    by_phase = step_seconds(trace, 1)
    assert by_phase is not None
    assert list(by_phase) == ["forward", "loss", "backward", "optimizer"]
    assert sum(by_phase.values()) == pytest.approx(sum(cost.seconds for cost in operator_costs(trace, step=1).values()))
    blocks = sum(module_seconds(trace, f"blocks.{i}", step=1, phase="forward") for i in (0, 1))
    assert module_seconds(trace, "blocks", step=1, phase="forward") == pytest.approx(blocks)
    assert 0 < blocks < by_phase["forward"]


def test_each_micro_batch_has_its_own_cost() -> None:
    trace = simulate(toy_workload, device="a100-40gb", strategies="ga:steps=2")
    parts = [operator_costs(trace, step=1, micro_batch=i, phase="forward") for i in (0, 1)]
    whole = operator_costs(trace, step=1, phase="forward")
    assert {key: cost.calls for key, cost in whole.items()} == {
        key: sum(part[key].calls for part in parts if key in part) for key in whole
    }
    assert all(parts)


def by_operator(trace: Trace, phase: Phase) -> dict[str, tuple[int, float]]:
    """Calls and seconds in the layers of the toy model."""
    found: dict[str, tuple[int, float]] = {}
    for (module, op), cost in operator_costs(trace, step=1, phase=phase).items():
        if module.startswith("blocks."):
            calls, seconds = found.get(op, (0, 0.0))
            found[op] = calls + cost.calls, round(seconds + cost.seconds, 9)
    return found


def test_checkpointing_adds_exactly_a_second_forward_of_the_layers() -> None:
    plain = simulate(toy_workload, device="a100-40gb")
    with set_checkpoint_early_stop(False):
        trace = simulate(toy_workload, device="a100-40gb", strategies="ckpt")
    assert by_operator(trace, "recompute") == by_operator(trace, "forward") == by_operator(plain, "forward")
    assert by_operator(trace, "backward") == by_operator(plain, "backward")


def test_recomputation_stops_at_the_last_tensor_needed() -> None:
    trace = simulate(toy_workload, device="a100-40gb", strategies="ckpt")
    done, again = by_operator(trace, "forward"), by_operator(trace, "recompute")
    # recomputation stops before the product in `down` and the residual sum: one less of each in each of 2 layers
    assert {op: done[op][0] - again[op][0] for op in done if done[op][0] != again[op][0]} == {
        "aten.addmm.default": 2,
        "aten.add.Tensor": 2,
    }


def test_the_estimate_survives_a_trace_file(tmp_path: Path) -> None:
    trace = simulate(toy_workload, device="a100-40gb")
    assert step_seconds(Trace.load(trace.save(tmp_path / "toy.npz")), 1) == step_seconds(trace, 1)


def test_a_trace_with_an_estimate_is_read_without_torch() -> None:
    code = "import sys, memscope.analysis.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_without_rates_there_is_no_estimate_but_operations_are_counted(name: str) -> None:
    trace = simulated(nn.Linear(256, 512, bias=False), torch.ones(64, 256), on=name)
    assert trace.meta["flops"] == [2 * 2 * 64 * 256 * 512]
    assert step_seconds(trace, 0) is None
    ask: Callable[[], object]
    for ask in (lambda: operator_costs(trace, step=0), lambda: module_seconds(trace, "blocks", step=0)):
        with pytest.raises(UsageError, match=f'"{name}" are not known.*--device a100-40gb'):
            ask()


# The host.


def test_a_copy_to_the_host_takes_as_long_as_the_link() -> None:
    assert transfer_seconds(device(host_bytes_per_second=25e9), 10**9) == 0.04
    assert 32e9 > 1e9 / transfer_seconds(get_device("a100-40gb"), 10**9) > 16e9, "PCIe 4.0 x16, and more than 3.0"
    with pytest.raises(UsageError, match='the copy speed between "gpu" and the host is unknown'):
        transfer_seconds(get_device("gpu"), 1)


@pytest.mark.skipif(not hasattr(aten.addmm, "dtype"), reason="this PyTorch has no product with a dtype of its own")
def test_a_product_that_is_given_the_dtype_of_its_result_has_the_flops_of_any_other():
    added, left, right = (torch.ones(size, dtype=torch.bfloat16) for size in ((4, 2), (4, 8), (8, 2)))
    given = added, left, right, torch.float32
    assert flops_of(aten.addmm.dtype, given, {}, torch.ones(4, 2)) == 2 * 4 * 8 * 2
