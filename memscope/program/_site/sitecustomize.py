"""Attaches memscope to the Python that starts here, as soon as it has imported torch.

`memscope profile … -- COMMAND` puts this folder in front of PYTHONPATH. This file uses nothing but the standard
library: the program's Python may be one without memscope, which is then reported.
"""

from __future__ import annotations

import _frozen_importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from _thread import get_ident
from typing import Any

_REQUEST = os.environ.get("MEMSCOPE_PROGRAM", "")
_HERE = os.path.dirname(os.path.abspath(__file__))


def _chain() -> None:
    """Run the `sitecustomize` that this file hides, if there is one."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _is_worker() -> bool:
    """Whether `multiprocessing` has started this Python (Lib/multiprocessing/spawn.py, `get_command_line`)."""
    words = sys.orig_argv
    return "--multiprocessing-fork" in words or any(word.startswith("from multiprocessing") for word in words)


def _wait_for_torch() -> None:
    """Attach when the outermost import that imports torch has returned.

    The interpreter calls this function of importlib for every module that is not loaded yet. Source:
    import_find_and_load in Python/import.c (3.11 to 3.14).
    """
    importer: Any = _frozen_importlib
    find = importer._find_and_load
    depths: dict[int, int] = {}  # by thread

    def find_and_load(*args: Any) -> Any:
        thread = get_ident()
        depths[thread] = depths.get(thread, 0) + 1
        try:
            found = find(*args)
        finally:
            depths[thread] -= 1
        if not depths[thread] and importer._find_and_load is find_and_load and _has_torch():
            importer._find_and_load = find
            _attach()
        return found

    importer._find_and_load = find_and_load


def _has_torch() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and not getattr(torch.__spec__, "_initializing", False)


def _attach() -> None:
    try:
        with open(_REQUEST, encoding="utf-8") as file:
            wanted = json.load(file)["version"]
    except OSError:  # the launcher has ended, and this process has outlived it
        return
    try:
        from memscope import __version__
    except Exception as error:
        _refuse(f"memscope cannot be imported there ({type(error).__name__}: {error})")
    if __version__ != wanted:
        _refuse(f"it has memscope {__version__}, but this is memscope {wanted}")
    try:
        from memscope.program.attached import attach
    except Exception as error:
        _refuse(f"memscope cannot be imported there ({type(error).__name__}: {error})")
    attach()


def _refuse(reason: str) -> None:
    """Leave word of why this Python cannot be watched, and end it."""
    name = os.path.join(os.path.dirname(_REQUEST), f"unattached-{os.getpid()}.json")
    with open(f"{name}.part", "w", encoding="utf-8") as file:
        json.dump({"python": sys.executable, "reason": reason}, file)
    os.replace(f"{name}.part", name)
    sys.stderr.write(f"memscope: {sys.executable}: {reason}\n")
    sys.stderr.flush()
    os._exit(1)


_chain()
if _REQUEST and not _is_worker():
    _wait_for_torch()
