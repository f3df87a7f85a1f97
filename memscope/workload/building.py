"""Build and validate a workload, and explain errors of the target's own code."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memscope.errors import MemscopeError, TargetError, UsageError, where
from memscope.workload.description import Workload

__all__ = ["build_workload", "target_error", "usable"]


def build_workload(source: Workload | Callable[[], Workload]) -> Workload:
    """Return the given workload, or the one that a target's `build` returns, after checking that it can run.

    Raises:
        TargetError: `build` fails, or returns something other than a workload with a model.
        UsageError: the batches are not a sequence.
    """
    if isinstance(source, Workload):
        return usable(source)
    try:
        built: object = source()
    except (MemscopeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise target_error("the target", error) from error
    return usable(built)


def usable(built: object) -> Workload:
    """Return what `build` returned, after checking that it is a workload that can run.

    Raises:
        TargetError: it is not a workload, or its model is not an `nn.Module`.
        UsageError: its batches are not a sequence.
    """
    if not isinstance(built, Workload):
        what = "None" if built is None else f"a {type(built).__name__}"
        raise TargetError(f"build returned {what}, not a Workload: end it with `return Workload(model=..., ...)`")
    if not isinstance(built.model, torch.nn.Module):
        raise TargetError(f'the model of "{built.name}" is a {type(built.model).__name__}: expected an nn.Module')
    if not (hasattr(built.batches, "__len__") and hasattr(built.batches, "__getitem__")):
        raise UsageError(
            f'the batches of "{built.name}" are a {type(built.batches).__name__}, not a sequence: '
            "give a list, for example [next(iter(loader))]"
        )
    return built


def target_error(name: str, error: BaseException) -> TargetError:
    """Wrap an error of the target's own code in a message that names the line of that code."""
    return TargetError(f'"{name}" failed: {type(error).__name__}: {_first_line(error)}{where(error)}')


def _first_line(error: BaseException) -> str:
    if isinstance(error, MemoryError) and not error.args:
        return "the host ran out of memory"
    return (str(error).strip().splitlines() or ["no message"])[0]
