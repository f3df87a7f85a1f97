"""Offloading activations, frozen weights and the optimizer: what is left on the device, and what the host holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from memscope import Trace, simulate
from memscope.allocator.pinned import PinnedMemory
from memscope.analysis.cost import last_step_seconds
from memscope.analysis.effects import Run, compare
from memscope.analysis.host import host_bytes, host_peak
from memscope.errors import UsageError
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.devices.timeline import LAUNCH_SECONDS
from memscope.strategies import Plan
from memscope.strategies.offload import activations, strategy
from memscope.strategies.offload.parameters import LayersOnHost
from memscope.trace import CATEGORIES, PHASES
from memscope.workload.description import Workload

ROWS, DIM, LAYERS = 33, 64, 3
U, WEIGHT = ROWS * DIM * 4, DIM * DIM * 4
SAVED = 2 * (LAYERS - 1) + 1
"""Layers save the inputs of sine and adapter. The first one's sine needs no gradient, and its input is the batch, which
stays. The loss saves the last output."""
BLOCK = 16384
"""The power of two that holds U = 8,448 bytes."""


class Layer(nn.Module):
    """A frozen weight, an adapter whose weight is trained, and a bias that is too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(DIM, DIM, bias=False).requires_grad_(False)
        self.adapter = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight(x).sin() + self.adapter(x)


def build(rows: int = ROWS) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer() for _ in range(LAYERS)])
    return Workload(model, [torch.randn(rows, DIM)], lambda model, x: model(x).square().mean(), torch.optim.AdamW)


def traced(plan: str, device: str = "gpu") -> Trace:
    return simulate(build, device=device, strategies=plan)


def kept(trace: Trace, category: str) -> list[int]:
    """Bytes requested of a category that are alive when the last backward pass begins."""
    first = trace.mark_event[(trace.mark_phase == PHASES.index("backward")) & (trace.mark_step == 1)][0]
    alive = (trace.born < first) & ((trace.freed < 0) | (trace.freed >= first))
    return sorted(trace.requested[alive & (trace.category == CATEGORIES.index(category))].tolist())


def test_pinned_blocks_are_powers_of_two_that_are_used_again() -> None:
    pinned = PinnedMemory()
    assert [pinned.allocate(size) for size in (1, 4, 5, 4096)] == [1, 4, 8, 4096]
    pinned.free(8)
    assert (pinned.allocate(7), pinned.reserved_bytes) == (8, 1 + 4 + 8 + 4096)
    assert (pinned.allocate(6), pinned.reserved_bytes) == (8, 1 + 4 + 8 + 8 + 4096)


def test_activations_of_model_and_loss_wait_on_the_host() -> None:
    trace = traced("offload:activations")
    assert kept(trace, "activation") == [4]  # the loss; the batch stays, too, as an input
    peak, saved = host_peak(trace), SAVED
    assert peak is not None
    assert (peak.requested_bytes, peak.allocated_bytes, peak.by_category) == (
        saved * U, saved * BLOCK, {"activation": saved * BLOCK},
    )  # fmt: skip
    assert trace.host is not None
    assert bool((trace.host.freed >= 0).all())
    assert peak.reserved_bytes == saved * BLOCK  # the second step takes the blocks of the first


def test_activations_that_come_back_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_on_host", torch.clone)  # here, a copy stands for one on another device
    usual, moved = build(), build()
    Plan.parse("offload:activations").apply(moved)
    for one in (usual, moved):
        one.loss(one.model, one.batches[0]).backward()
    for one, other in zip(usual.model.parameters(), moved.model.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, other.grad)


def test_on_the_cpu_offloading_changes_no_byte_and_has_no_host() -> None:
    usual = traced("", "cpu")
    for plan in ("offload:activations", "offload:parameters"):
        trace = traced(plan, "cpu")
        assert trace.requested.tolist() == usual.requested.tolist()
        assert host_peak(trace) is None


def test_the_copies_take_the_time_of_the_link() -> None:
    device, rows = get_device("rtx4090"), 65536
    plain, moved = (
        last_step_seconds(simulate(lambda: build(rows), device=device, strategies=plan)) for plan in ("", "offload")
    )
    saved = SAVED * rows * DIM * 4
    assert plain is not None
    assert moved is not None
    assert device.host_bytes_per_second is not None
    transfers = 2 * saved / device.host_bytes_per_second
    # The host waits for a copy to it, and the device for the launch after that.
    assert transfers <= moved - plain <= transfers + 2 * SAVED * LAUNCH_SECONDS


def test_frozen_weights_are_on_the_device_one_layer_at_a_time() -> None:
    usual, trace = traced(""), traced("offload:parameters")
    trained = LAYERS * (WEIGHT + 512)  # the adapters: a bias of 256 bytes takes a block of 512
    assert usual.max_by_category(1)["parameter"] == trained + LAYERS * WEIGHT
    assert trace.max_by_category(1)["parameter"] == trained + WEIGHT
    peak = host_peak(trace)
    assert peak is not None
    assert peak.by_category == {"parameter": LAYERS * WEIGHT}
    owners = trace.category == CATEGORIES.index("parameter")
    assert {trace.modules[code] for code in trace.module[owners]} == {
        f"{i}.{name}" for i in range(LAYERS) for name in ("weight", "adapter")
    }


def test_frozen_weights_that_come_and_go_leave_loss_and_gradients_as_they_are() -> None:
    usual, moved = build(), build()
    LayersOnHost(moved.model)  # type: ignore[arg-type]
    frozen = [weight for weight in moved.model.parameters() if not weight.requires_grad]
    for _ in range(2):
        losses = [one.loss(one.model, one.batches[0]) for one in (usual, moved)]
        assert {weight.untyped_storage().nbytes() for weight in frozen} == {0}
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert {weight.untyped_storage().nbytes() for weight in frozen} == {0}
    for one, other in zip(usual.model.parameters(), moved.model.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, other.grad)


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao")


@pytest.mark.usefixtures("torchao")
def test_torchaos_optimizer_updates_copies_on_the_host() -> None:
    usual, trace, freeing = (traced(p) for p in ("", "offload:optimizer", "offload:optimizer,free-gradients=true"))
    # Weights of 4,096 elements move; biases stay, with two moments in blocks of 512 bytes and one step counter each.
    assert usual.max_by_category(1)["optimizer_state"] == LAYERS * 2 * (WEIGHT + 512)
    assert trace.max_by_category(1)["optimizer_state"] == LAYERS * 3 * 512
    for one in (trace, freeing):
        peak = host_peak(one)
        assert peak is not None
        weights = LAYERS * WEIGHT
        assert peak.by_category == {"parameter": weights, "gradient": weights, "optimizer_state": 2 * weights}
    assert trace.max_by_category(1)["gradient"] == LAYERS * (WEIGHT + 512)
    assert freeing.max_by_category(1)["gradient"] <= WEIGHT + LAYERS * 512
    assert [note for note in trace.meta["notes"] if note.startswith("several CUDA streams")]


@pytest.mark.usefixtures("torchao")
def test_time_of_the_hosts_processor_is_left_out_and_said_to_be() -> None:
    trace = traced("offload:optimizer", "rtx4090")
    assert [note for note in trace.meta["notes"] if "leaves out what the host's processor computes" in note]


def test_the_host_is_a_row_of_table_1_if_a_run_has_some() -> None:
    usual, moved, other = traced(""), traced("offload"), traced("backward-step")
    table = compare(usual, [Run("offload", moved), Run("backward-step", other)])
    assert table.rows[-1] == "host"
    assert [column["host"].after for column in table.columns] == [SAVED * BLOCK, 0]
    assert "host" not in compare(usual, [Run("backward-step", other)]).rows


def test_what_stays_on_the_host_counts_in_steps_that_move_nothing() -> None:
    trace = traced("offload:parameters")
    assert [host_bytes(trace, step) for step in (0, 1)] == [LAYERS * WEIGHT] * 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("offload:optimizer,amp", "cannot be combined"),
        ("offload:optimizer,free-gradients=true,ga", "cannot be combined"),
        ("offload:free-gradients", "free-gradients goes with optimizer"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan.parse(plan)


def test_a_missing_torchao_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "is_installed", lambda: False)
    with pytest.raises(UsageError, match=r"torchao is not installed: pip install .torch-memscope\[torchao\]."):
        Plan.parse("offload:optimizer").apply(build())


def test_workloads_that_cannot_be_offloaded_are_refused() -> None:
    clipped, trained, flat = build(), build(), build()
    clipped.plan = replace(clipped.plan, clip_grad_norm=1.0)
    trained.model.requires_grad_(True)
    flat.model = nn.Linear(DIM, DIM)
    for plan, workload, message in (
        ("offload:optimizer", clipped, "before they are clipped or unscaled"),
        ("offload:parameters", trained, "every weight of the layers is trained"),
        ("offload:parameters", flat, "no list of repeated layers"),
    ):
        with pytest.raises(UsageError, match=message):
            Plan.parse(plan).apply(workload)
