"""The births and deaths of storages, and what is known about each.

What is followed is *storages*, not tensors: views and in-place results share a storage, a resize replaces its memory.
All references are weak, so following a storage does not prolong its lifetime.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memscope.hooks.allocations import UNKNOWN, Allocations, Birth
from memscope.hooks.host_memory import HostMemory
from memscope.hooks.moments import Moments
from memscope.hooks.parts import PLAIN, parts_of
from memscope.hooks.position import Position
from memscope.trace import CATEGORIES, PHASES, Category

__all__ = ["Lifetimes"]

_CODES = {category: code for code, category in enumerate(CATEGORIES)}
_PARAMETER = _CODES["parameter"]
_OUTSIDE = PHASES.index("outside")


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that remembers its storage's key, and its row on the host, after the storage is gone."""

    __slots__ = ("key", "row")
    key: int
    row: int
    """Index among the allocations on the host; -1: it is not one of them."""


class Lifetimes:
    """Follows storages from the first time they are seen until they die.

    Attributes:
        host: what is on the host because of the step on the device; None: that is not followed.
    """

    def __init__(self, seen: Allocations, position: Position, moments: Moments | None) -> None:
        """Follow nothing yet. `seen` receives the allocations; with `moments`, storages on a GPU alone are followed."""
        self._seen, self._position, self._moments = seen, position, moments
        if moments is not None:
            seen.on_category = self._tell_owner
        # By the storage's key: the index of its allocation, its size now, and the reference that reports its death.
        self._live: dict[int, tuple[int, int, _StorageRef]] = {}
        self._on_death = self._die
        self._hidden: dict[int, _StorageRef] = {}
        self.host: HostMemory | None = None
        self._unread: set[int] = set()
        # Of weights that have no memory yet: the storage, to know it from a later one at its address, and the module.
        self._empty: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._fake_mode: Any = None
        self._follows_real = True

    def begin(self, mode: FakeTensorMode | None = None, *, follows_real: bool = True) -> None:
        """Begin to follow. Of fake tensors, those of a mode stand for memory, as in a simulation.

        Args:
            mode: the mode; None: the active one.
            follows_real: whether real tensors take memory of the device; if not, they are on another one.
        """
        self._fake_mode, self._follows_real = mode or active_fake_mode(), follows_real

    def follow_host(self) -> None:
        """Follow tensors on the host, too, if they come from the device; called before `begin`."""
        self.host = HostMemory(self._position)
        self._seen.host = self.host.seen
        self.host.seen.mark(*self._seen.marks[-1][1:])

    def end(self) -> None:
        """Follow nothing any more."""
        self._live.clear()
        self._hidden.clear()

    # Storages as operators return them.

    def see(self, tensor: Tensor, op: int, category: int) -> None:
        """Look at a result of an operator: its storage is new, resized, or known."""
        if tensor.layout is not torch.strided or type(tensor) not in PLAIN:
            parts = parts_of(tensor)
            if len(parts) != 1 or parts[0] is not tensor:
                for part in parts:
                    self.see(part, op, category)
                return
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._live.get(key)
        if live is None:
            if key not in self._hidden:
                self._bear(tensor, storage, key, op, category)
        elif live[1] != storage.nbytes():
            self.resized(storage, op)

    def _bear(self, tensor: Tensor, storage: torch.UntypedStorage, key: int, op: int, category: int) -> None:
        size = storage.nbytes()
        if size == 0 or not self._has_memory(tensor):
            return
        ref = _StorageRef(storage, self._on_death)
        ref.key = key
        self._live[key] = (self.enter(size, op, category, storage), size, ref)
        if category == UNKNOWN and self._position.phase == _OUTSIDE and not self._position.is_recorded:
            self._unread.add(key)

    def _has_memory(self, tensor: Tensor) -> bool:
        """Whether a tensor takes memory that is followed: not one on the meta device, or of another's fake mode."""
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self._fake_mode and tensor.fake_device.type != "meta"
        if self._moments is not None:
            return tensor.is_cuda
        return self._follows_real and not tensor.is_meta

    def enter(self, size_bytes: int, op: int, category: int, storage: torch.UntypedStorage | None = None) -> int:
        """Record an allocation, of a storage or of a kernel's workspace; returns its index."""
        seen, here = self._seen, self._position
        index = len(seen.births)
        born = seen.clock
        seen.births.append(Birth(size_bytes, here.module, op, here.phase, here.step, here.micro_batch, born))
        seen.category.append(category)
        seen.freed.append(-1)
        if self._moments is not None and storage is not None:
            self._moments.born(storage.data_ptr())
            if category != UNKNOWN:
                self._tell_owner(index)
        seen.clock = born + 1
        if category == UNKNOWN and here.serves_backward:
            seen.pending.append(index)
        return index

    def _die(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        key = ref.key  # type: ignore[attr-defined]
        index, size, _ = self._live.pop(key)
        self._unread.discard(key)
        if size:  # otherwise a resize to nothing has freed it
            seen = self._seen
            seen.freed[index] = seen.clock
            seen.clock += 1

    def resized(self, storage: torch.UntypedStorage, op: int) -> None:
        """Record a resize, if the storage is followed: new memory is allocated before the old memory is freed.

        A weight stays its module's weight.
        """
        key = storage._cdata
        if key in self._live:
            old, _, ref = self._live[key]
            size = storage.nbytes()
            new = self.enter(size, op, self._seen.category[old], storage) if size else old
            if self._seen.category[new] == _PARAMETER:
                self._own(new, _PARAMETER, self._seen.births[old].module)
            self._live[key] = (new, size, ref)
            self._seen.free(old)
        elif key in self._empty and storage.nbytes():
            weight, module = self._empty.pop(key)
            if weight() is storage:
                ref = _StorageRef(storage, self._on_death)
                ref.key = key
                new = self.enter(storage.nbytes(), op, _PARAMETER, storage)
                self._own(new, _PARAMETER, module)
                self._live[key] = (new, storage.nbytes(), ref)

    def continue_as(self, old: Tensor, new: Tensor) -> None:
        """Follow the storage of another tensor in place of one: it has the same memory."""
        storage = new.untyped_storage()
        live = self._live.pop(old.untyped_storage()._cdata, None)
        if live is not None:
            ref = _StorageRef(storage, self._on_death)
            ref.key = storage._cdata
            self._live[ref.key] = live[0], live[1], ref

    # Knowledge about tensors.

    def own(self, tensor: Tensor, category: Category, *, module: int | None = None) -> None:
        """Set the category and module of a tensor's storages; a storage not seen before is born now.

        Raises:
            UsageError: the tensor wraps others that cannot be found.
        """
        code = _CODES[category]
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            self._unread.discard(key)
            if key in self._live:
                self._own(self._live[key][0], code, module)
            elif key in self._hidden:
                row = self._hidden[key].row
                if self.host is not None and row >= 0:
                    self.host.own(row, code, module)
            else:
                at_work, self._position.module = self._position.module, module or 0
                self._bear(part, storage, key, 0, code)
                self._position.module = at_work
                if code == _PARAMETER and not storage.nbytes():
                    self._empty[key] = weakref.ref(storage), module or 0

    def _own(self, index: int, category: int, module: int | None) -> None:
        birth = self._seen.births[index]
        owner = category, birth.module if module is None else module
        if owner != (self._seen.category[index], birth.module):
            self._seen.category[index] = category
            self._seen.births[index] = birth._replace(module=owner[1])
            self._tell_owner(index)

    def _tell_owner(self, index: int) -> None:
        if self._moments is not None:
            self._moments.owned(index, self._seen.category[index], self._seen.births[index].module)

    def own_inputs(self, values: Sequence[Any]) -> None:
        """Categorize as `input` what the forward pass or loss reads, if made outside them or before the recording."""
        live, unread = self._live, self._unread
        for value in values:
            if isinstance(value, Tensor):
                if value.layout is torch.strided:
                    key = value.untyped_storage()._cdata
                    if key not in live or key in unread:
                        self.own(value, "input")
            elif isinstance(value, (list, tuple)):
                self.own_inputs(value)

    def indices_of(self, tensor: Tensor) -> list[int]:
        """Indices of the allocations that hold a tensor now, as far as they are followed."""
        keys = (part.untyped_storage()._cdata for part in parts_of(tensor))
        return [self._live[key][0] for key in keys if key in self._live]

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether a plain tensor's storage is a weight."""
        live = self._live.get(tensor.untyped_storage()._cdata)
        return live is not None and self._seen.category[live[0]] == _PARAMETER

    def hide(self, tensor: Tensor) -> None:
        """Ignore a tensor that is on the host, unless its storage is already tracked."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live and key not in self._hidden:
            ref = _StorageRef(storage, self._forget)
            ref.key, ref.row = key, -1
            self._hidden[key] = ref

    def hide_result(
        self, tensor: Tensor, op: int, args: Sequence[Any], *, pinned: bool, followed: bool = False
    ) -> None:
        """Place an operator's result on the host.

        There it is followed if it is pinned, comes from the device, or if `followed`.
        """
        known = len(self._hidden)
        self.hide(tensor)
        size_bytes = tensor.untyped_storage().nbytes()
        if self.host is None or len(self._hidden) == known or not size_bytes:
            return
        sources = [leaf for arg in args for leaf in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        codes = [self._code_of(leaf) for leaf in sources if isinstance(leaf, Tensor)]
        if pinned or followed or any(code is not None for code in codes):
            category = codes[0] if len(codes) == 1 and codes[0] is not None else UNKNOWN
            row = self.host.enter(size_bytes, op, category, pinned=pinned)
            self._hidden[tensor.untyped_storage()._cdata].row = row

    def _code_of(self, tensor: Tensor) -> int | None:
        """The category of a tensor on the device, or of one that comes from there; None for others."""
        if tensor.layout is not torch.strided:
            return None
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            return self._seen.category[self._live[key][0]]
        row = self._hidden[key].row if key in self._hidden else -1
        return self.host.seen.category[row] if self.host is not None and row >= 0 else None

    def _forget(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        self._hidden.pop(ref.key, None)  # type: ignore[attr-defined]
        row: int = ref.row  # type: ignore[attr-defined]
        if self.host is not None and row >= 0:
            self.host.free(row)

    def copied(self, to: Tensor, source: Tensor) -> None:
        """Note a copy between host and device: what is on the host is a copy of what is on the device."""
        for one, other in ((to, source), (source, to)):
            category = self._code_of(other)
            if self.host is not None and self.comes_from_device(one) and category not in (None, UNKNOWN):
                row = self._hidden[one.untyped_storage()._cdata].row
                if self.host.seen.category[row] == UNKNOWN:
                    self.host.own(row, category, None)

    def comes_from_device(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the host because of the step on the device."""
        return self.is_hidden(tensor) and self._hidden[tensor.untyped_storage()._cdata].row >= 0

    def is_hidden(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the host."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._hidden
