"""Compiled functions, run as eager code: PyTorch's compiler and a recorder cannot work at the same time.

Under a dispatch mode, the compiler leaves functions uncompiled without a word, or compiles the mode itself, up to a
crash. `torch.compiler.set_stance("force_eager")` avoids both.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["RAN_EAGERLY", "compiled_runs_eagerly"]

RAN_EAGERLY = (
    "The target uses torch.compile, but its compiled functions ran as eager code: memscope does not follow compiled "
    "programs yet. The figures are those of the program without torch.compile"
)
"""The note of a trace in which a compiled function was called."""


@contextlib.contextmanager
def compiled_runs_eagerly(on_call: Callable[[], None]) -> Iterator[None]:
    """Run functions that `torch.compile` returned, or will return, as eager code; `on_call()` is called before each.

    Source: each of them asks `_callback_from_stance` of torch/_dynamo/eval_frame.py what to do (2.6 to 2.13).
    """
    from torch._dynamo import eval_frame  # takes a second, and every optimizer imports it in its first step

    module: Any = eval_frame
    decide = module._callback_from_stance

    def noticed(callback: Any) -> Any:
        if callback not in (None, False):  # else a function that torch.compiler.disable returned
            on_call()
        return decide(callback)

    with torch.compiler.set_stance("force_eager"), _no_warning_of_hooks():
        module._callback_from_stance = noticed
        try:
            yield
        finally:
            module._callback_from_stance = decide


@contextlib.contextmanager
def _no_warning_of_hooks() -> Iterator[None]:
    """Ignore PyTorch's warning that global hooks, here the recorder's, see a compiled module and its original."""
    text = "Using `torch.compile(module)` when there are global hooks"
    warnings.filterwarnings("ignore", message=re.escape(text))
    ours = warnings.filters[0]
    try:
        yield
    finally:
        if ours in warnings.filters:
            warnings.filters.remove(ours)  # type: ignore[attr-defined]
