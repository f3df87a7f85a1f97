"""Tensors that a program moves to the host take no memory of the simulated GPU until they are moved back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from memscope import Trace, simulate
from memscope.analysis.cost import last_step_seconds
from memscope.errors import TargetError
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.devices.timeline import LAUNCH_SECONDS
from memscope.trace import CATEGORIES, PHASES
from memscope.workload.description import Workload

ROWS, DIM = 32, 64
U = ROWS * DIM * 4
"""Bytes of a batch in float32."""


def kept_bytes(move: Callable[[Tensor], Tensor | None], device: str = "gpu") -> int:
    """Bytes allocated at the end of a step that keeps the result of `move` for an activation."""
    kept: list[Tensor | None] = []

    def build() -> Workload:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            y = model(x)
            kept.append(move(y.detach()))
            return y.square().mean()

        return Workload(nn.Linear(DIM, DIM, bias=False), [torch.randn(ROWS, DIM)], loss, torch.optim.SGD)

    trace = simulate(build, device=device, steps=1)
    return int(trace.requested[trace.freed < 0].sum())


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "to the host": (lambda y: y.cpu(), 0),
    "to the host by name": (lambda y: y.to("cpu"), 0),
    "to the host, converted": (lambda y: y.to(device="cpu", dtype=torch.float64), 0),
    "to where another one is": (lambda y: y.to(y[0].cpu()), 0),
    "a part of it": (lambda y: y[:3].cpu(), 0),
    "twice": (lambda y: y.cpu().cpu(), 0),
    "converted there": (lambda y: y.cpu().to(torch.float64), 0),
    "what is computed there": (lambda y: torch.zeros_like(y.cpu()).exp(), 0),
    "into pinned memory": (lambda y: torch.empty_like(y, device="cpu", pin_memory=True).copy_(y), 0),
    "and back": (lambda y: y.cpu().to(y.device), U),
    "and back by name": (lambda y: y.cpu().cuda(), U),
    "and back by another name": (lambda y: y.to("cpu").to("cuda:0"), U),
    "and back, converted": (lambda y: y.cpu().to(y.device, torch.float64), 2 * U),
    "a part of it back": (lambda y: y.cpu()[: ROWS // 2].to(y.device), U // 2),
    "to where it is": (lambda y: y.to(y.device), U),  # the activation itself is kept
}


@pytest.mark.parametrize(("move", "expected"), MOVES.values(), ids=MOVES)
def test_a_kept_tensor_takes_device_memory_unless_it_is_on_the_host(
    move: Callable[[Tensor], Tensor], expected: int
) -> None:
    assert kept_bytes(move) - kept_bytes(lambda y: None) == expected


@pytest.mark.parametrize(
    ("move", "requested", "blocks"),
    [
        (lambda y: y[:3].cpu(), [3 * DIM * 4], [3 * DIM * 4]),
        (lambda y: y[:3].to("cpu", non_blocking=True), [3 * DIM * 4], [1024]),  # pinned, in powers of two
        (lambda y: torch.empty(100, dtype=torch.uint8, pin_memory=True), [100], [128]),
        (lambda y: y.cpu().double(), [U, 2 * U], [U, 2 * U]),
        (lambda y: y.cpu().to(y.device), [U], [U]),
        (lambda y: torch.tensor(1.0), [], []),  # made on the host, and no copy
    ],
)
def test_what_is_on_the_host_is_followed_there(
    move: Callable[[Tensor], Tensor], requested: list[int], blocks: list[int]
) -> None:
    def build() -> Workload:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            y = model(x)
            kept.append(move(y.detach()))
            return y.square().mean()

        return Workload(nn.Linear(DIM, DIM, bias=False), [torch.randn(ROWS, DIM)], loss, torch.optim.SGD)

    kept: list[Tensor] = []
    host = simulate(build, device="gpu", steps=1).host
    assert host is not None
    assert (host.requested.tolist(), host.size.tolist()) == (requested, blocks)
    assert not len(host) or int(host.reserved.max()) == sum(blocks)


class Scale(nn.Module):
    """Multiplies by a weight, which takes no workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_product_on_the_host_takes_no_workspace_of_the_gpu() -> None:
    def workspace(of: Callable[[Tensor], Tensor]) -> int:
        def loss(model: nn.Module, x: Tensor) -> Tensor:
            y = model(x)
            of(y.detach())
            return y.sum()

        trace = simulate(lambda: Workload(Scale(), [torch.randn(ROWS, DIM)], loss, torch.optim.SGD), device="gpu")
        return trace.max_by_category()["workspace"]

    assert workspace(lambda y: y @ y.t()) > workspace(lambda y: y)
    assert workspace(lambda y: y.cpu() @ y.cpu().t()) == workspace(lambda y: y)


def test_on_the_cpu_nothing_is_copied() -> None:
    assert kept_bytes(lambda y: y.cpu(), "cpu") - kept_bytes(lambda y: None, "cpu") == U


def test_the_methods_are_put_back() -> None:
    kept_bytes(lambda y: y.cpu())
    with pytest.raises(TargetError):
        kept_bytes(lambda y: 1 / 0)
    assert not {"cpu", "cuda", "to"} & vars(Tensor).keys()


class Saved(nn.Module):
    """A layer with PyTorch's own offloading."""

    def __init__(self, pin_memory: bool) -> None:
        super().__init__()
        self.linear, self.pin_memory = nn.Linear(DIM, DIM, bias=False), pin_memory

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu(self.pin_memory):
            return torch.sin(self.linear(x))


def copies_back(trace: Trace) -> list[int]:
    made = (trace.phase == PHASES.index("backward")) & (trace.op == trace.ops.index("aten._to_copy.default"))
    assert bool((trace.freed[made] >= 0).all())
    return sorted(trace.requested[made].tolist())


@pytest.mark.parametrize("pin_memory", [False, True])
def test_pytorchs_own_offloading_is_seen(pin_memory: bool) -> None:
    def build() -> Workload:
        model = nn.Sequential(Saved(pin_memory), Saved(pin_memory))
        return Workload(model, [torch.randn(ROWS, DIM)], lambda model, x: model(x).sum(), torch.optim.SGD)

    trace = simulate(build, device="gpu", steps=1)
    # Linear layers and sines save their inputs, the second layer also its weight (the batch needs no gradient).
    assert copies_back(trace) == sorted([U, U, U, U, DIM * DIM * 4])
    backward = trace.mark_event[[PHASES[phase] for phase in trace.mark_phase].index("backward")]
    alive = (trace.born < backward) & ((trace.freed < 0) | (trace.freed >= backward))
    assert trace.requested[alive & (trace.category == CATEGORIES.index("activation"))].tolist() == [4]  # the loss
    assert trace.host is not None
    assert sorted(trace.host.requested.tolist()) == sorted([U, U, U, U, DIM * DIM * 4])
    assert bool((trace.host.freed >= 0).all())


@pytest.mark.parametrize(("trips", "move"), [(1, lambda y: y.cpu()), (2, lambda y: y.cpu().to(y.device))])
def test_a_copy_takes_the_time_of_the_link_in_either_direction(trips: int, move: Callable[[Tensor], Tensor]) -> None:
    device = get_device("rtx4090")
    size_bytes, rate = 65536 * DIM * 4, device.host_bytes_per_second

    def seconds(move: Callable[[Tensor], Tensor | None]) -> float:
        def build() -> Workload:
            def loss(model: nn.Module, x: Tensor) -> Tensor:
                y = model(x)
                move(y.detach())
                return y.square().mean()

            return Workload(nn.Linear(DIM, DIM, bias=False), [torch.randn(65536, DIM)], loss, torch.optim.SGD)

        return last_step_seconds(simulate(build, device=device)) or 0.0

    assert rate is not None
    copies = trips * size_bytes / rate
    # After a copy to the host, the device waits for the launch of what follows.
    assert seconds(move) - seconds(lambda y: None) == pytest.approx(copies + LAUNCH_SECONDS, rel=1e-6)
