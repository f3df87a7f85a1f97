"""Histories of PyTorch's allocator, written by hand, together with the actions of the host that cause them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memscope.allocator.settings import AllocatorSettings
from memscope.gpu.joined import Recording, joined
from memscope.hooks.allocations import Allocations, Birth
from memscope.hooks.moments import Moments
from memscope.trace import CATEGORIES, PHASES, Category, Phase, Trace

__all__ = ["BASE", "MIB", "Script", "block", "segment"]

MIB = 2**20
BASE = 0x7F00_0000_0000
"""Address of the first segment."""


def segment(*blocks: dict[str, Any], address: int = BASE, expandable: bool = False) -> dict[str, Any]:
    """A segment of a snapshot, filled with blocks."""
    return {
        "device": 0,
        "address": address,
        "total_size": sum(part["size"] for part in blocks),
        "stream": 0,
        "is_expandable": expandable,
        "blocks": list(blocks),
    }


def block(size: int, state: str = "active_allocated", requested: int | None = None) -> dict[str, Any]:
    """A block of a snapshot's segment."""
    return {"size": size, "requested_size": size if requested is None else requested, "state": state, "frames": []}


class Script:
    """Records a sequence of actions, which `trace` joins. Each action takes 10 microseconds."""

    def __init__(self, *, metadata: bool = True, before: list[dict[str, Any]] | None = None, conf: str = "") -> None:
        self._now = 1_700_000_000_000_000_000
        self._text: dict[str, str] = {}
        self.thread = "main"
        self.moments = Moments(clock=lambda: self._now)
        self.seen = Allocations()
        self.modules: list[str] = ["(model)"]
        self.ops = [""]
        self.entries: list[dict[str, Any]] = []
        self._before, self._settings, self._metadata = before or [], AllocatorSettings.parse(conf), metadata
        self._at: tuple[int, int, int] = (0, -1, 0)
        self.moments.name_with(self.ops, self.modules)
        self.phase("setup", -1)
        if metadata:
            self.moments.annotate_with(lambda text: self._text.__setitem__(self.thread, text), self._annotate)

    def phase(self, name: Phase, step: int, micro_batch: int = 0) -> None:
        self._now += 10_000
        self._at = (PHASES.index(name), step, micro_batch)
        self.moments.mark(0, *self._at)

    @contextmanager
    def op(self, name: str, module: str = "(model)") -> Iterator[None]:
        self._now += 10_000
        self.moments.begin(_index(self.ops, name), _index(self.modules, module), *self._at)
        yield
        self._now += 10_000
        self.moments.end()

    def storage(self, address: int, size: int, category: Category, op: str = "", module: str = "(model)") -> None:
        """Record that a storage is seen for the first time."""
        self.seen.births.append(Birth(size, _index(self.modules, module), _index(self.ops, op), *self._at, born=0))
        self.seen.category.append(CATEGORIES.index(category))
        self.moments.born(address)

    def _annotate(self, address: int, text: str) -> None:
        """As `annotateMemory` of PyTorch 2.15, tried with its compiled allocator: the size is that of the request."""
        sizes = {part["address"]: part["blocks"][0]["requested_size"] for part in self._before}
        size = {**sizes, **{one["addr"]: one["size"] for one in self.entries if one["action"] == "alloc"}}[address]
        self.entries.append({"action": "annotate", "addr": address, "size": size, "stream": 0, "user_metadata": text})
        self.entries[-1]["time_us"] = self._now // 1000

    def entry(self, action: str, address: int, size: int) -> None:
        self._now += 10_000
        key = "device_free" if action == "oom" else "addr"
        about = {"action": action, key: address, "size": size, "stream": 0, "time_us": self._now // 1000}
        if self._metadata:
            about["user_metadata"] = self._text.get(self.thread, "")
        self.entries.append(about)

    def alloc(self, address: int, size: int) -> int:
        self.entry("alloc", address, size)
        return address

    def free(self, address: int, size: int) -> None:
        self.entry("free_requested", address, size)
        self.entry("free_completed", address, size)

    def trace(
        self, *, ran_out: bool | None = False, after: list[dict[str, Any]] | None = None, limit: int | None = None
    ) -> Trace:
        history = Recording(self._before, self.entries, after or [], self._settings, 80 * 2**30, limit)
        meta = {"target": "t", "device": {"name": "cuda", "simulated": False}}
        return joined(history, self.moments, self.seen, modules=self.modules, ops=self.ops, meta=meta, ran_out=ran_out)


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
