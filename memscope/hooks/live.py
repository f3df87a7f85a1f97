"""Report a recorder's memory during the run: a little work at the start of each phase, none in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memscope.hooks.held import HeldMemory
from memscope.hooks.live_state import Forecast, LiveState, MemoryKind, Tell
from memscope.hooks.recorder import Recorder
from memscope.trace import Phase

__all__ = ["LiveStates"]


class LiveStates:
    """Reports the state of a run of `run_step` whenever `moved` is called."""

    def __init__(self, recorder: Recorder, steps: Sequence[int], tell: Tell) -> None:
        """Prepare to report to `tell`; `steps` are the numbers of micro-batches of each step."""
        self._recorder, self._steps, self._tell = recorder, tuple(steps), tell
        self._held = HeldMemory(recorder.tracker.seen)
        self._peak_bytes = self._before_state_bytes = self._state_bytes = 0

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
        held = self._held.look()
        memory = held.now
        self._peak_bytes = max(self._peak_bytes, sum(held.at_peak.values()))
        if self._recorder.is_on_gpu:  # the allocator's count is exact, and includes more than tensors
            self._peak_bytes = torch.cuda.max_memory_allocated()
            unseen = torch.cuda.memory_allocated() - sum(memory.values())
            if unseen > 0:
                memory["unseen"] = unseen
        return memory
