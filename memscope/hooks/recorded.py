"""A decorator that records a function which trains."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from memscope.errors import UsageError, nearest
from memscope.hooks.saved import SavedRecorder

__all__ = ["recorded"]

P = ParamSpec("P")
R = TypeVar("R")


def recorded(
    output: str | os.PathLike[str], *, model: str | None = None, overwrite: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Record each call of the decorated function with a `Recorder`, and write the trace when the call ends.

    The trace is also written when the function raises, as when it runs out of memory: it then ends there, and says so
    in a note. The model is the argument that is an `nn.Module` with parameters. If one argument is an optimizer, state
    that it has before the call is known too.

    Args:
        output: the trace file.
        model: where the model is, if not exactly one argument is such a module: the name of an argument, or of
            something that it holds, such as `self.model`.
        overwrite: whether the file may exist.

    Raises:
        UsageError: when decorating: this is no function that trains before it returns, as a coroutine or a generator is
            not. When called: the model is not found, or the file exists or cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from memscope import Trace, recorded
        >>> file = Path(tempfile.mkdtemp()) / "train.trace.npz"
        >>> @recorded(file)
        ... def train(model, steps):
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     for _ in range(steps):
        ...         model(torch.randn(8, 1024)).mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> train(torch.nn.Linear(1024, 1024, bias=False), steps=2)
        >>> Trace.load(file).by("category", at="peak")["optimizer_state"]  # two moments of the weight, a step counter
        8388612
    """
    if callable(output):
        raise UsageError(
            f'recorded takes the trace file to write, but was given {_name(output)}: write @recorded("train.trace.npz")'
        )

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _require_plain(function)
        name, signature = _name(function), inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            given = _arguments(signature.bind(*args, **kwargs))
            found = _model(given, name) if model is None else _at(given, model, name)
            optimizers = [value for value in given.values() if isinstance(value, torch.optim.Optimizer)]
            optimizer = optimizers[0] if len(optimizers) == 1 else None
            with SavedRecorder(found, optimizer, output=output, overwrite=overwrite, name=name):
                return function(*args, **kwargs)

        return run

    return decorate


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _require_plain(function: Callable[..., object]) -> None:
    """Refuse what does not train while it is called."""
    if not callable(function):
        raise UsageError(f"recorded decorates a function, but got a {type(function).__name__}")
    if inspect.isclass(function):
        raise UsageError(
            f"recorded decorates a function, but {_name(function)} is a class: decorate its method that trains"
        )
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    kinds = {
        "a coroutine": inspect.iscoroutinefunction,
        "an asynchronous generator": inspect.isasyncgenfunction,
        "a generator": inspect.isgeneratorfunction,
    }
    for kind, matches in kinds.items():
        if matches(inner):
            raise UsageError(
                f"{_name(function)} is {kind}: its body runs after the call that would be recorded. "
                "Record inside it: with memscope.Recorder(model, optimizer) around the loop"
            )


def _arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; those of `*args` by name and number."""
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}[{index}]": item for index, item in enumerate(value)}
        else:
            found[name] = value
    return found


def _model(given: dict[str, Any], function: str) -> nn.Module:
    """The only module with parameters among the arguments: a loss function may be a module too."""
    modules = {name: value for name, value in given.items() if isinstance(value, nn.Module) and [*value.parameters()]}
    if len({id(module) for module in modules.values()}) == 1:
        return next(iter(modules.values()))
    if modules:
        raise UsageError(
            f"{function} was called with several modules ({', '.join(modules)}): "
            f'name the one to record, as in recorded(..., model="{next(iter(modules))}")'
        )
    raise UsageError(
        f"{function} was called without an nn.Module that has parameters: pass the model as an argument, "
        'say which argument holds it, as in recorded(..., model="self.model"), '
        "or use memscope.Recorder(model) where the function has made it"
    )


def _at(given: dict[str, Any], path: str, function: str) -> nn.Module:
    """The module at a dotted path that begins with an argument."""
    first, *rest = path.split(".")
    if first not in given:
        raise UsageError(
            f'recorded(..., model="{path}"): {function} has no argument "{first}": {nearest(first, given)}'
        )
    value = given[first]
    for part in rest:
        if not hasattr(value, part):
            raise UsageError(f'recorded(..., model="{path}"): a {type(value).__name__} has no attribute "{part}"')
        value = getattr(value, part)
    if not isinstance(value, nn.Module):
        raise UsageError(
            f'recorded(..., model="{path}"): expected an nn.Module there, but it is a {type(value).__name__}'
        )
    return value
