"""Memory snapshots of real training steps with their real stacks, recorded on the CPU.

Stacks are gathered by the function that PyTorch's CUDA allocator uses (`CapturedTraceback::gather`), at the birth and
the end of every storage that an operator makes. Blocks and segments come from a replay of the allocator. Stacks of the
backward pass have no Python frames above it, as on a GPU, where it runs in a thread of its own.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from snapshots import entry, snapshot
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.allocator.replay import Replay, replay

__all__ = ["StackRecorder"]

_OURS = {"__torch_dispatch__", "_note", "<lambda>"}


class StackRecorder(TorchDispatchMode):
    """Follows storages while it is active; `snapshot` then returns the snapshot that CUDA would have written."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}
        self._sizes: list[int] = []
        self._events: list[int] = []  # allocation i at its birth, ~i at its end
        self._stacks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        index = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._note(index)
        self._alive[key] = weakref.ref(storage, lambda _: self._end(key, index))

    def _end(self, key: int, index: int) -> None:
        del self._alive[key]
        self._note(~index)

    def _note(self, event: int) -> None:
        self._events.append(event)
        self._stacks.append(torch._C._profiler.gather_traceback(True, True, False))

    def snapshot(self) -> dict[str, Any]:
        """The snapshot. Call it after leaving the recorder, while the storages are still alive."""
        stacks = [_as_on_a_gpu(frames) for frames in torch._C._profiler.symbolize_tracebacks(self._stacks)]
        run = self._replayed()
        entries = []
        changes = list(run.segment_events)
        for event, index in enumerate(self._events):
            while changes and changes[0].event == event:
                change = changes.pop(0)
                entries.append(entry(change.action, change.address, change.size_bytes))
            row = index if index >= 0 else ~index
            for action in ("alloc",) if index >= 0 else ("free_requested", "free_completed"):
                entries.append(entry(action, int(run.addresses[row]), self._sizes[row], *stacks[event], time_us=event))
        return snapshot(_segments(run, len(self._events) - 1), entries)

    def _replayed(self) -> Replay:
        born, freed = np.zeros(len(self._sizes), dtype=np.int64), np.full(len(self._sizes), -1, dtype=np.int64)
        for event, index in enumerate(self._events):
            if index >= 0:
                born[index] = event
            else:
                freed[~index] = event
        return replay(np.array(self._sizes, dtype=np.int64), born, freed)


def _as_on_a_gpu(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The frames without the recorder's own and without the callers of the autograd engine."""
    kept: list[dict[str, Any]] = []
    for frame in frames:
        name, filename = frame["name"], frame["filename"]
        if filename == __file__ and name in {*_OURS, "_follow", "_end"}:
            continue
        if filename.endswith(("torch/_dynamo/eval_frame.py", "torch/_compile.py")) and name in ("_fn", "inner"):
            continue  # frames that PyTorch adds around a dispatch mode
        if name == "_engine_run_backward":
            return kept
        kept.append(frame)
    return kept


def _segments(run: Replay, last: int) -> list[dict[str, Any]]:
    return [
        {
            "device": 0,
            "address": segment.address,
            "total_size": segment.size_bytes,
            "blocks": [
                {
                    "size": block.size_bytes,
                    "requested_size": block.requested_bytes,
                    "state": "active_allocated" if block.allocated else "inactive",
                    "frames": [],
                }
                for block in segment.blocks
            ],
        }
        for segment in run.snapshots([last])[last].segments
    ]
