"""Saving and loading in a simulated program: weights have no values, so nothing is written.

What a program saves, it may load again. Of files that exist, integers and small tensors are read, as data sets and
schedules need them; of large floating-point tensors, which are weights, the layout only.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.machine.moves import gpu_named
from memscope.simulation.machine.places import Places
from memscope.simulation.values import computing

__all__ = ["Saving"]

_LARGE = 65_536
"""Elements from which on a floating-point tensor in a file is taken for a weight."""


@dataclass(frozen=True)
class _Stored:
    """A tensor or a module as a file holds it: on the host, and where it was when it was saved."""

    value: Any
    was_on_gpu: bool


class Saving:
    """Context in which `torch.save` writes nothing, and `torch.load` reads layouts."""

    def __init__(self, places: Places, note: Callable[[str], None]) -> None:
        self._places, self._note = places, note
        self._saved: dict[Any, Any] = {}
        self._scopes = contextlib.ExitStack()

    def __enter__(self) -> Saving:
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(replaced(torch, "save", self._save))
            scopes.enter_context(replaced(torch.serialization, "save", self._save))
            load = self._loading(torch.load)
            scopes.enter_context(replaced(torch, "load", load))
            scopes.enter_context(replaced(torch.serialization, "load", load))
            self._scopes = scopes.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.__exit__(*exception)

    def _save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        self._note("nothing was saved: torch.save wrote no file")
        self._saved[_key(f)] = pytree.tree_map_only((Tensor, nn.Module), self._stored, obj)

    def _stored(self, value: Any) -> _Stored:
        places = self._places
        if isinstance(value, nn.Module):
            tensors = (*value.parameters(), *value.buffers())
            layouts = {id(tensor): self._layout(tensor) for tensor in tensors if isinstance(tensor, FakeTensor)}
            return _Stored(copy.deepcopy(value, layouts), any(map(places.is_on_gpu, tensors)))
        if isinstance(value, FakeTensor):
            return _Stored(self._layout(value), places.is_on_gpu(value))
        return _Stored(_copied(value), False)

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
            key = _key(f)
            stored = self._saved[key] if key in self._saved else self._read(load, f, args, kwargs)
            return pytree.tree_map_only(_Stored, lambda one: self._placed(one, map_location), stored)

        return loaded

    def _read(self, load: Callable[..., Any], f: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The contents of a file. Those of large tensors are mapped rather than read, where the file allows it."""
        on_gpu: set[int] = set()

        def locate(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            if gpu_named(location):
                on_gpu.add(storage.data_ptr())
            return storage

        mmap = isinstance(f, (str, os.PathLike)) and _is_zip(Path(f))
        with self._places.calling(False):
            found = load(f, locate, *args, **{**kwargs, "mmap": mmap})

        def stored(value: Any) -> _Stored:
            if isinstance(value, (nn.Module, FakeTensor)):  # weights, fake from birth on
                return _Stored(value, bool(on_gpu))
            was_on_gpu = value.layout is torch.strided and value.untyped_storage().data_ptr() in on_gpu
            is_weight = value.is_floating_point() and value.numel() >= _LARGE and value.layout is torch.strided
            return _Stored(self._layout(value) if is_weight else _copied(value), was_on_gpu)

        return pytree.tree_map_only((Tensor, nn.Module), stored, found)

    def _placed(self, stored: _Stored, map_location: Any) -> Any:
        """What a file holds, as a new object in its place."""
        value = stored.value
        on_gpu = _mapped(stored.was_on_gpu, map_location)
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to("cuda" if on_gpu else "cpu")
        if on_gpu:
            return value.to("cuda")
        return self._layout(value) if isinstance(value, FakeTensor) else _copied(value)

    def _layout(self, tensor: Tensor) -> Tensor:
        """A tensor of the same layout on the host, without values."""
        copied: Any = self._places.stand_in_for(tensor)
        self._places.hide(copied)
        return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _copied(tensor: Tensor) -> Tensor:
    """A copy of a real tensor, made as `torch.save` and `torch.load` do: by no operator of the program."""
    with computing():
        return tensor.clone()


class _Location:
    """A storage, for a function given as `map_location`: it knows no more than where it is."""

    def __init__(self, location: str) -> None:
        self.location = location

    def cuda(self, *args: Any, **kwargs: Any) -> _Location:
        """The storage on the GPU."""
        return _Location("cuda:0")

    def cpu(self) -> _Location:
        """The storage on the host."""
        return _Location("cpu")


def _mapped(was_on_gpu: bool, map_location: Any) -> bool:
    """Whether something that was on a device when it was saved is on the GPU when it is loaded.

    Source: `_get_restore_location` in torch/serialization.py (2.6 to 2.13).
    """
    location = "cuda:0" if was_on_gpu else "cpu"
    if map_location is None:
        return was_on_gpu
    if isinstance(map_location, dict):
        return bool(gpu_named(map_location.get(location, location)))
    if callable(map_location) and not isinstance(map_location, torch.device):
        found = map_location(_Location("cpu"), location)  # the storage is on the host when PyTorch asks
        return was_on_gpu if found is None else bool(gpu_named(found.location))
    return bool(gpu_named(map_location))


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _key(file: Any) -> Any:
    """What identifies a file: its absolute path, or the object if it has none."""
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", None)
    return str(Path(name).absolute()) if isinstance(name, (str, os.PathLike)) else file
