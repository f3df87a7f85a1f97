"""Advice on the chain of equal layers; all tests of a process share its simulations."""

from __future__ import annotations

from functools import cache

from memscope import Plan, simulate
from memscope.advisor.advice import Advice
from memscope.advisor.advise import AdviceRequest, advised
from memscope.advisor.measure.runner import Asker, InProcess
from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.devices.catalogue import get_device
from tests.remembering import Remembering
from tests.small_chain import build

__all__ = ["CONTEXT", "DEVICE", "advice", "budgets", "plain_bytes"]

DEVICE = get_device("a100-40gb")
CONTEXT = DEVICE.context_bytes
_RUNNER = Remembering(InProcess(build, DEVICE))


@cache
def advice(budget_bytes: int, allow: tuple[str, ...] = (), strategies: str = "optim:fused,ga:steps=1") -> Advice:
    request = AdviceRequest(
        budget_bytes=budget_bytes + CONTEXT,
        device=DEVICE,
        strategies=Plan.parse(strategies),
        allow=allow,
        layer_list="",
        allocator=AllocatorSettings(),
    )
    return advised(request, Asker(_RUNNER, lambda what, done, needed: None), build)


@cache
def plain_bytes() -> int:
    """What the allocator reserves without checkpointing."""
    trace = simulate(build, device=DEVICE, strategies="optim:fused,ga:steps=1")
    return int(trace.meta["peak_reserved"])


@cache
def budgets() -> list[int]:
    """Of what the allocator reserves, largest first."""
    return [plain_bytes() - saved * 2**20 for saved in (4, 12, 20)]
