"""A recorder whose trace is written to a file when it is left, also after an exception."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from memscope.command.output import require_writable
from memscope.errors import MemscopeError, excerpt
from memscope.hooks.recorder import Recorder
from memscope.trace.notes import add_note

__all__ = ["SavedRecorder"]


class SavedRecorder:
    """Records while it is entered, and then writes the trace.

    After an exception the trace ends where the exception did, and says so in a note. The exception is always passed on:
    if the trace cannot be made or written, the exception says that too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        output: str | os.PathLike[str],
        overwrite: bool,
        name: str,
    ) -> None:
        """Prepare to record; the arguments are those of `Recorder` and `Trace.save`, and the name of what is recorded.

        Raises:
            UsageError: the model is none, or the file exists, or cannot be written.
        """
        self._output, self._overwrite = Path(output), overwrite
        require_writable(self._output, overwrite=overwrite, option="output", force="overwrite=True")
        self._recorder = Recorder(model, optimizer, meta={"target": name})

    def __enter__(self) -> Recorder:
        return self._recorder.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, traceback)
        try:
            self._save(error)
        except MemscopeError as problem:
            if error is None:
                raise
            error.add_note(f"memscope could not write {self._output}: {problem}")

    def _save(self, error: BaseException | None) -> None:
        trace = self._recorder.trace()
        if error is not None and not _ends_well(error):
            meta: dict[str, Any] = dict(trace.meta)
            add_note(meta, f"The recording ended with {_described(error)}: what follows is not in the trace")
            trace = replace(trace, meta=meta)
        trace.save(self._output, overwrite=self._overwrite)


def _ends_well(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _described(error: BaseException) -> str:
    text = excerpt(str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
