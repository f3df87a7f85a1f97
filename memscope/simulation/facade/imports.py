"""Imports during a simulation run as they would without one.

A library may ask for a GPU when it is imported, or make tensors that it keeps: it outlives the simulation, and must see
the machine as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memscope.simulation.facade.stand_in import replaced

__all__ = ["imports_see_the_machine"]


@contextlib.contextmanager
def imports_see_the_machine(
    *hidden: Callable[[], contextlib.AbstractContextManager[None]],
    given: Callable[[str, FrameType], Any] = lambda name, importer: None,
    imported: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Run the code of modules that are imported inside without the modes of the simulation, and within all of `hidden`.

    `given(name, importer)` is the module that the code `importer` gets for an import of its own; None: the installed
    one. It may refuse. `imported` is called after an import that is no part of another one.

    The interpreter calls this function of importlib for every module that is not loaded yet. Source:
    import_find_and_load in Python/import.c (3.11 to 3.14).
    """
    importer: Any = importlib._bootstrap
    find: Callable[..., Any] = importer._find_and_load
    is_importing = False

    def find_and_load(*args: Any) -> Any:
        nonlocal is_importing
        module = given(args[0], sys._getframe(1))
        if module is not None or is_importing:
            return module or find(*args)
        is_importing = True
        try:
            with contextlib.ExitStack() as scopes:
                for scope in hidden:
                    scopes.enter_context(scope())
                scopes.enter_context(_disable_current_modes())
                scopes.enter_context(torch._C.DisableTorchFunction())
                return find(*args)
        finally:
            is_importing = False
            imported()

    with replaced(importer, "_find_and_load", find_and_load):
        yield
