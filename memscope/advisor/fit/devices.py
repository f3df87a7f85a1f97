"""Which devices of the catalogue hold a training step."""

from __future__ import annotations

from dataclasses import replace

from memscope.advisor.fit.fitting import DeviceFit, holds
from memscope.advisor.fit.question import Question
from memscope.advisor.measure.runner import Asker, Probe, Seen
from memscope.allocator.settings import AllocatorSettings
from memscope.allocator.traced import cache_emptied_in
from memscope.simulation.device_memory import on_device
from memscope.simulation.devices.catalogue import Device
from memscope.trace import Trace

__all__ = ["devices_that_hold", "same_kernels"]


def devices_that_hold(
    trace: Trace, question: Question, sizes: tuple[tuple[str, int], ...], asker: Asker
) -> tuple[tuple[DeviceFit, ...], list[str]]:
    """Which devices hold the step that was asked for, least memory first, and why some cannot run it.

    Kernels and their workspaces depend on the compute capability and the number of multiprocessors. Devices that agree
    in both make the same allocations: one of them is simulated, and its allocations are replayed with the memory of the
    others.

    Args:
        trace: the step, simulated on the device of the question.
        question: what was asked.
        sizes: the settings that make the size that was asked for.
        asker: runs the simulations.
    """
    groups: dict[tuple[object, ...], list[Device]] = {}
    for device in question.devices:
        if device.capacity_bytes is not None:
            groups.setdefault(_kernels(device), []).append(device)
    shown = _kernels(question.device)
    others = [group for kind, group in groups.items() if kind != shown]
    probes = [Probe(question.strategies, device=group[0], sizes=sizes) for group in others]
    answers = asker("other devices", probes)
    found = [_replayed(trace, device, question.allocator) for device in groups.get(shown, [])]
    reasons: dict[str, list[str]] = {}
    for group, answer in zip(others, answers, strict=True):
        for device in group:
            if isinstance(answer, Seen):
                found.append(_replayed(answer.trace, device, question.allocator))
            else:
                found.append(DeviceFit(device.name, device.capacity_bytes or 0, False, None, str(answer)))
                reasons.setdefault(str(answer), []).append(device.name)
    notes = [f"The step cannot be simulated on {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return tuple(sorted(found, key=lambda one: (one.capacity_bytes, one.name))), notes


def same_kernels(one: Device, other: Device) -> bool:
    """Whether two devices make the same allocations, so that those of one can be replayed on the other."""
    return _kernels(one) == _kernels(other)


def _kernels(device: Device) -> tuple[object, ...]:
    """What kernels depend on."""
    return device.kind, device.capability, device.multiprocessors


def _replayed(trace: Trace, device: Device, settings: AllocatorSettings) -> DeviceFit:
    """Whether a device holds the allocations of a trace from one with the same kernels."""
    placed = on_device(replace(trace, meta=dict(trace.meta)), device, settings, cache_emptied_in(trace))
    needed = int(placed.meta["peak_reserved"]) + device.context_bytes
    return DeviceFit(device.name, device.capacity_bytes or 0, holds(placed), needed)
