"""The bytes of each layer of a model, read from a trace in which some layers are checkpointed.

A micro-batch passes the layers forwards, then backwards. An allocation that is alive when the backward pass begins
belongs to the layer in whose forward it was born. A layer's output is an exception: it is the next layer's input, and
called a *boundary*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from memscope.errors import UsageError
from memscope.trace import PHASES, Bools, Ints, Trace

__all__ = ["ChainSeen", "LayerSeen", "look", "rounded"]

_ROUNDING_BYTES = (
    512  # kMinBlockSize of PyTorch's c10/cuda/CUDACachingAllocator.h (c10/core/AllocatorConfig.h from 2.9)
)
_FORWARD, _BACKWARD = PHASES.index("forward"), PHASES.index("backward")


@dataclass(frozen=True)
class LayerSeen:
    """The bytes of one layer, or of a segment of several, in one micro-batch."""

    kept_bytes: int
    """Alive from its forward to the beginning of the backward pass, without the boundaries."""
    held_bytes: int
    """Also alive until the forward pass of the micro-batch ends: weights that autocast has cast."""
    forward_base_bytes: int
    """Allocated when its forward begins, including its input, less the bytes that earlier layers keep and hold."""
    forward_rise_bytes: int
    """Largest increase while its forward runs."""
    backward_base_bytes: int
    """Allocated when its backward begins, less the bytes and boundaries that this and earlier layers keep."""
    backward_rise_bytes: int
    """Largest increase from its first backward event to that of the layer before it, including the bytes it kept."""
    input_bytes: int
    """Size of its input."""
    keeps_input: bool
    """Its input is alive when the backward pass begins: this layer or the one before keeps it."""
    signature: tuple[tuple[int, ...], ...]
    """Sizes and operators of its forward; layers with the same signature are alike."""


@dataclass(frozen=True)
class ChainSeen:
    """The bytes of all layers, and outside them, in one micro-batch."""

    layers: tuple[LayerSeen, ...]
    output_bytes: int
    """Size of the last layer's output."""
    head_keeps_input: bool
    head_forward_bytes: int
    """Peak from the last layer's forward to the end of the forward pass, less the bytes that layers keep and hold."""
    head_backward_bytes: int
    """Peak from the end of the forward pass to the last layer's backward, less the bytes that layers keep."""
    span: tuple[int, int]
    """Events at which the first layer's forward begins and its backward ends. Nothing outside depends on options."""


def rounded(trace: Trace) -> Ints:
    """Bytes of each allocation, as the allocator rounds requests. Unlike block sizes, they do not depend on order."""
    return np.maximum(-(-trace.requested // _ROUNDING_BYTES), 1) * _ROUNDING_BYTES


def look(trace: Trace, groups: Sequence[Sequence[str]], *, step: int, micro_batch: int) -> ChainSeen:
    """Read the bytes of the layers in one micro-batch of a trace.

    Args:
        trace: a simulation that recorded the calls of all layers (`calls_of`).
        groups: module names of the layers, in order; a segment is one group.
        step: optimizer step.
        micro_batch: micro-batch of that step, as it was run.

    Raises:
        UsageError: when the layers are not a chain.
    """
    return _Reader(trace, groups, step, micro_batch).chain()


def _calls_in_order(
    trace: Trace, groups: Sequence[Sequence[str]], step: int, micro_batch: int
) -> dict[str, dict[str, Any]]:
    """The call of each layer in a micro-batch.

    Raises:
        UsageError: when the layers are not a chain: called once each, one after the other.
    """
    expected = [name for names in groups for name in names]
    of_layers = [row for row in trace.meta["calls"] if row["module"] in expected]
    rows = [row for row in of_layers if row["step"] == step and row["micro_batch"] == micro_batch]
    called = [row["module"] for row in rows]
    if called != expected:
        odd = next((name for name in expected if called.count(name) != 1), None)
        what = f'"{odd}" is called {called.count(odd)} times' if odd else "they are called in another order"
        raise UsageError(
            f"the layers {expected[0]} to {expected[-1]} form no chain: in one forward pass {what}. Plans need layers "
            "that run once each, in order; name another list with --layer-list"
        )
    return {row["module"]: row for row in rows}


class _Reader:
    """One micro-batch of a trace, cut at the events where a layer begins."""

    def __init__(self, trace: Trace, groups: Sequence[Sequence[str]], step: int, micro_batch: int) -> None:
        self.trace, self.count = trace, len(groups)
        self.size = rounded(trace)
        never = np.iinfo(np.int64).max
        self.freed = np.where(trace.freed < 0, never, trace.freed)
        calls = _calls_in_order(trace, groups, step, micro_batch)
        self.began = [calls[names[0]]["began"] for names in groups]
        self.ended = calls[groups[-1][-1]]["ended"]
        self.turn, self.end = self._backward_range(step, micro_batch)
        self.is_kept = self.alive_before(self.turn)
        self.boundaries = self._boundaries(
            [calls[names[0]]["given"] for names in groups], calls[groups[-1][-1]]["gave"]
        )
        self.group_of_module = self._group_of_module(groups)
        self.forward_of = self._forward_of()
        self.backward_began = self._backward_starts()

    @cached_property
    def allocated(self) -> Ints:
        """Bytes after each event, of rounded sizes."""
        change = np.zeros(self.trace.events, dtype=np.int64)
        change[self.trace.born] += self.size
        died = self.trace.freed >= 0
        change[self.trace.freed[died]] -= self.size[died]
        return np.cumsum(change)

    def alive_before(self, event: int) -> Bools:
        return (self.trace.born < event) & (self.freed >= event)

    def before(self, event: int) -> int:
        return int(self.allocated[event - 1]) if event else 0

    def most(self, first: int, last: int) -> int:
        """Peak allocated bytes from just before event `first` to just before event `last`."""
        return max(self.before(first), int(self.allocated[first:last].max(initial=0)))

    def total(self, chosen: Bools) -> int:
        return int(self.size[chosen].sum())

    def _backward_range(self, step: int, micro_batch: int) -> tuple[int, int]:
        trace = self.trace
        here = (trace.mark_step == step) & (trace.mark_micro_batch == micro_batch)
        first = int(np.flatnonzero(here & (trace.mark_phase == _BACKWARD))[0])
        in_pass = np.isin(trace.mark_phase, [_BACKWARD, PHASES.index("recompute")]) & here
        after = next((i for i in range(first, trace.mark_event.size) if not in_pass[i]), trace.mark_event.size)
        return int(trace.mark_event[first]), int(trace.mark_event[after]) if after < len(in_pass) else trace.events

    def _boundaries(self, given: list[list[int]], gave: list[int]) -> list[list[int]]:
        """Allocations of each layer's input, and of the last output; arguments of several layers are excluded."""
        times = Counter(index for found in given for index in found)
        shared = {index for index, count in times.items() if count > 1}
        return [[index for index in found if index not in shared] for found in [*given, gave]]

    def _group_of_module(self, groups: Sequence[Sequence[str]]) -> Ints:
        of_name = {name: index for index, names in enumerate(groups) for name in names}
        found = []
        for name in self.trace.modules:
            while name and name not in of_name:
                name = name.rpartition(".")[0]
            found.append(of_name.get(name, -1))
        return np.array(found, dtype=np.int64)

    def _forward_of(self) -> Ints:
        """The layer in whose forward each allocation was born, or -1."""
        index = np.searchsorted(np.array([*self.began, self.ended]), self.trace.born, side="right") - 1
        return np.where(index < self.count, index, -1)

    def _backward_starts(self) -> list[int]:
        """First event of each layer's backward, in order of the layers, after the end of the first layer's backward."""
        trace = self.trace
        in_pass = (trace.born >= self.turn) & (trace.born < self.end)
        group = np.where(in_pass, self.group_of_module[trace.module], -1)
        starts, least = [self.end] * self.count, self.turn
        for layer in reversed(range(self.count)):
            born = trace.born[(group == layer) & (trace.born >= least)]
            least = starts[layer] = int(born[0]) if born.size else least
        last = trace.born[group == 0].max(initial=starts[0])
        others = trace.born[in_pass & (group < 0) & (trace.born > last)]
        return [int(others[0]) if others.size else self.end, *starts]

    def chain(self) -> ChainSeen:
        outputs = np.zeros(len(self.trace), dtype=bool)
        outputs[[index for boundary in self.boundaries for index in boundary]] = True
        is_own = (self.forward_of >= 0) & ~outputs
        until_end = self.alive_before(self.ended) & ~self.is_kept
        layers, kept_before, held_before = [], 0, 0
        for layer in range(self.count):
            mine = is_own & (self.forward_of == layer)
            kept, held = self.total(mine & self.is_kept), self.total(mine & until_end)
            layers.append(self._layer(layer, kept, held, kept_before, held_before))
            kept_before += kept + (self.boundary_bytes(layer) if self._is_kept(layer) else 0)
            held_before += held
        return ChainSeen(
            layers=tuple(layers),
            output_bytes=self.boundary_bytes(self.count),
            head_keeps_input=self._is_kept(self.count),
            head_forward_bytes=self.most(self.ended, self.turn) - kept_before - held_before,
            head_backward_bytes=self.most(self.turn, self.backward_began[self.count]) - kept_before,
            span=(self.began[0], self.backward_began[0]),
        )

    def _layer(self, layer: int, kept: int, held: int, kept_before: int, held_before: int) -> LayerSeen:
        forward = self.began[layer]
        forward_end = self.began[layer + 1] if layer + 1 < self.count else self.ended
        backward, backward_end = self.backward_began[layer + 1], self.backward_began[layer]
        own = (self.forward_of == layer) & self.alive_before(backward)
        own[self.boundaries[layer]] |= self.is_kept[self.boundaries[layer]]
        base = self.before(backward) - kept_before - self.total(own)
        mine = self.forward_of == layer
        return LayerSeen(
            kept_bytes=kept,
            held_bytes=held,
            forward_base_bytes=self.before(forward) - kept_before - held_before,
            forward_rise_bytes=self.most(forward, forward_end) - self.before(forward),
            backward_base_bytes=base,
            backward_rise_bytes=self.most(backward, backward_end) - kept_before - base,
            input_bytes=self.boundary_bytes(layer),
            keeps_input=self._is_kept(layer),
            signature=tuple(map(tuple, np.stack([self.size[mine], self.trace.op[mine]], axis=1).tolist())),
        )

    def boundary_bytes(self, layer: int) -> int:
        return int(self.size[self.boundaries[layer]].sum())

    def _is_kept(self, layer: int) -> bool:
        return bool(self.is_kept[self.boundaries[layer]].any())
