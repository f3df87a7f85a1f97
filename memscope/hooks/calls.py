"""Record calls of selected modules: start, end, and the allocations of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memscope.hooks.storages import StorageTracker

__all__ = ["ModuleCalls"]


class ModuleCalls:
    """Records every call of the named modules while it is entered; removes its hooks on leaving.

    Attributes:
        rows: one JSON object per call, in order of their start: `module` (name), `step`, `micro_batch`, `began` and
            `ended` (events), `given` and `gave` (indices of the allocations of its inputs and outputs, without
            repetition).
    """

    def __init__(self, model: nn.Module, names: Collection[str], tracker: StorageTracker) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._watched = [(name, modules[name]) for name in names]
        self._tracker = tracker
        self._open: list[dict[str, Any]] = []
        self._hooks: list[Any] = []
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> ModuleCalls:
        for name, module in self._watched:
            self._hooks.append(module.register_forward_pre_hook(self._begins(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._ends, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._open.clear()

    def _begins(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        tracker = self._tracker

        def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
            here = tracker.position
            row = {
                "module": name,
                "step": here.step,
                "micro_batch": here.micro_batch,
                "began": tracker.seen.clock,
                "ended": -1,
                "given": self._allocations((args, kwargs)),
                "gave": [],
            }
            self._open.append(row)
            self.rows.append(row)

        return begins

    def _ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        row = self._open.pop()
        row["ended"], row["gave"] = self._tracker.seen.clock, self._allocations(output)

    def _allocations(self, tensors: Any) -> list[int]:
        leaves = (leaf for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, Tensor))
        return list(dict.fromkeys(index for leaf in leaves for index in self._tracker.lifetimes.indices_of(leaf)))
