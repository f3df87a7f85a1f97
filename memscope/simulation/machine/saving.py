"""Saving and loading in a simulated program: weights have no values, so nothing is written.

What a program saves, it may load again. Of files that exist, only the layout of their tensors is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.machine.moves import gpu_named
from memscope.simulation.machine.places import Places

__all__ = ["Saving"]


class Saving:
    """Context in which `torch.save` writes nothing, and `torch.load` reads layouts."""

    def __init__(self, places: Places, note: Callable[[str], None]) -> None:
        self._places, self._note = places, note
        self._saved: dict[str, Any] = {}
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

    def skipped(self, what: str) -> None:
        """Note that something was not saved."""
        self._note(f"nothing was saved: {what} wrote no file")

    def _save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        self.skipped("torch.save")
        if isinstance(f, (str, os.PathLike)):
            self._saved[_key(f)] = pytree.tree_map_only(Tensor, self._on_host, obj)

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
            on_gpu = bool(gpu_named(map_location))
            if isinstance(f, (str, os.PathLike)) and _key(f) in self._saved:
                found = self._saved[_key(f)]
            else:
                with self._places.mode, self._places.calling(False):
                    found = load(f, "cpu", *args, **{**kwargs, "mmap": None})
            return pytree.tree_map_only(Tensor, lambda tensor: self._loaded(tensor, on_gpu), found)

        return loaded

    def _loaded(self, tensor: Tensor, on_gpu: bool) -> Any:
        return self._on_host(tensor).to("cuda") if on_gpu else self._on_host(tensor)

    def _on_host(self, tensor: Tensor) -> Tensor:
        """A tensor of the same layout on the host, without values."""
        copied: Any = self._places.stand_in_for(tensor)
        self._places.hide(copied)
        return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _key(file: Any) -> str:
    return str(Path(file).absolute())
