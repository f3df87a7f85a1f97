"""Report a recorder's memory during the run: a little work at the start of each phase, none in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memscope.hooks.allocations import UNKNOWN
from memscope.hooks.live_state import Forecast, LiveState, MemoryKind, Tell
from memscope.hooks.recorder import Recorder
from memscope.trace import CATEGORIES, Phase

__all__ = ["LiveStates"]


class LiveStates:
    """Reports the state of a run of `run_step` whenever `moved` is called.

    Each call looks only at the allocations that were alive at the previous call, and at those made since.
    """

    def __init__(self, recorder: Recorder, steps: Sequence[int], tell: Tell) -> None:
        """Prepare to report to `tell`; `steps` are the numbers of micro-batches of each step."""
        self._recorder, self._steps, self._tell = recorder, tuple(steps), tell
        self._alive: list[int] = []
        self._next_birth = self._clock = 0
        self._held_bytes = self._peak_bytes = 0
        self._before_state_bytes = 0
        self._state_bytes = 0

    def moved(self, phase: Phase, micro_batch: int, done: int) -> None:
        """Report the state: when a phase has begun, and at the end of the run, with all micro-batches `done`."""
        step = self._recorder.tracker.position.step
        memory = self._memory()
        if step == 0:
            state = memory.get("optimizer_state", 0)
            if phase == "optimizer":
                self._before_state_bytes, self._state_bytes = self._peak_bytes, state
            elif phase == "zero_grad":
                self._state_bytes = state - self._state_bytes
        finished = done == sum(self._steps)
        forecast: Forecast = "seen" if step >= 2 or (step == 1 and finished) else "estimate" if step == 1 else "so far"
        estimate = self._before_state_bytes + self._state_bytes if forecast == "estimate" else 0
        self._tell(
            LiveState(
                memory=memory,
                peak_bytes=self._peak_bytes,
                forecast=forecast,
                forecast_bytes=max(estimate, self._peak_bytes),
                step=step,
                phase=phase,
                micro_batch=micro_batch,
                done=done,
                total=sum(self._steps),
                micro_batches=self._steps[step],
            )
        )

    def _memory(self) -> dict[MemoryKind, int]:
        """Bytes of each kind now. Updates the peak."""
        seen, clock = self._recorder.tracker.seen, self._recorder.tracker.seen.clock
        births = range(self._next_birth, len(seen.births))
        known = [*self._alive, *births]
        change = np.zeros(clock - self._clock, dtype=np.int64)
        for index in births:
            change[seen.births[index].born - self._clock] += seen.births[index].size_bytes
        memory: dict[MemoryKind, int] = {}
        self._alive = []
        for index in known:
            size, freed, category = seen.births[index].size_bytes, seen.freed[index], seen.category[index]
            if freed >= 0:
                change[freed - self._clock] -= size
                continue
            self._alive.append(index)
            kind: MemoryKind = "undecided" if category == UNKNOWN else CATEGORIES[category]
            memory[kind] = memory.get(kind, 0) + size
        held = self._held_bytes + np.cumsum(change)
        self._peak_bytes = max(self._peak_bytes, int(held.max(initial=0)))
        self._next_birth, self._clock, self._held_bytes = len(seen.births), clock, sum(memory.values())
        if self._recorder.is_on_gpu:  # the allocator's count is exact, and includes more than tensors
            self._peak_bytes = torch.cuda.max_memory_allocated()
            unseen = torch.cuda.memory_allocated() - self._held_bytes
            if unseen > 0:
                memory["unseen"] = unseen
        return memory
