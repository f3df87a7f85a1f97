"""Functions with the parameters of another package's: callers pass them by position, by name, or ask for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["with_parameters"]


def with_parameters(
    name: str, required: tuple[str, ...], optional: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any]
) -> Callable[..., Any]:
    """A function that calls `run` with its arguments by name.

    Args:
        name: its name.
        required: parameters without a default value.
        optional: parameters with one.
        run: is given all of them.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            *(inspect.Parameter(parameter, kind) for parameter in required),
            *(inspect.Parameter(parameter, kind, default=value) for parameter, value in optional.items()),
        ]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return run(given.arguments)

    function.__name__ = function.__qualname__ = name
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function
