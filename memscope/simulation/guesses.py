"""Values that a simulation assumes for the results of operators on unknown numbers.

An unknown floating-point number is taken as 1.0 where a single number is compared or tested: it is finite, and below
any bound that a training loop checks. An unknown mask selects everything. A choice among alternatives, such as a
router's choice of experts, takes each of them equally often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memscope.simulation.assumptions import Assume, Origin

__all__ = ["ASSUMED_NUMBER", "Guess", "drawn", "guess", "may_guess"]

ASSUMED_NUMBER = 1.0
"""Taken for a floating-point number that is not known, such as a loss."""

_CHOICES = {"topk", "argmax", "argmin", "max", "min", "multinomial"}
"""Operators that choose among the elements along a dimension, and return indices."""
_ORDERS = {"sort", "argsort", "msort"}
_TESTS = {"isnan", "isinf", "isposinf", "isneginf"}
_FINITE = "whether unknown numbers are finite"
_DRAWS = {"randint", "randperm"}


class Guess(NamedTuple):
    """What is assumed of a result.

    Attributes:
        place: position of the result among those of the operator.
        value: its values, or the number that fills it.
        origin: the assumption.
    """

    place: int
    value: Tensor | float
    origin: Origin


def may_guess(func: Any, made: Sequence[Tensor]) -> bool:
    """Whether `guess` may have something to say about the results of an operator; cheap."""
    return made[0].dtype is torch.bool or func.overloadpacket.__name__ in (_CHOICES | _ORDERS)


def guess(
    func: Any, args: Any, made: Sequence[Tensor], policy: Assume, value_of: Callable[[Tensor], Tensor | None]
) -> Guess | None:
    """What to assume of the results of an operator whose arguments are not all known; None: nothing can be assumed."""
    name = func.overloadpacket.__name__
    if name in _CHOICES or name in _ORDERS:
        return _chosen(name, func, args, made, policy)
    fresh = len(made) == 1 and made[0].dtype is torch.bool and func._schema.returns[0].alias_info is None
    if not fresh or "empty" in name:
        return None
    is_test = name in _TESTS or _compares_with_itself(args)
    tested = _tested(func, args, value_of) if is_test or made[0].ndim == 0 else None
    if tested is not None:
        what, value = (_FINITE, "they are") if is_test else (f"{_title(func)} of an unknown number", str(tested))
        return Guess(0, float(tested), Origin.here(what, value))
    return Guess(0, 1.0, Origin.here(f"the mask that {_title(func)} returns", "selects everything"))


def drawn(func: Any, args: Any, kwargs: Any, draws: torch.Generator) -> tuple[Tensor, tuple[Origin, ...]] | None:
    """Integers that a random operator may return; None for other operators."""
    if func.overloadpacket.__name__ not in _DRAWS:
        return None
    named = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory")}
    values = func.overloadpacket(*args, **named, generator=draws)
    return values, (Origin.here(f"the numbers that {_title(func)} draws", "a draw with seed 0"),)


def _chosen(name: str, func: Any, args: Any, made: Sequence[Tensor], policy: Assume) -> Guess | None:
    """Indices along a dimension: every alternative equally often, or always the first ones."""
    index = len(made) - 1
    if made[index].dtype is not torch.int64 or args[0].ndim == 0 or (name in ("max", "min") and index == 0):
        return None
    result, options = made[index], args[0]
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("dim") if "dim" in names else None
    dim = None if place is None else (args[place] if place < len(args) else func._schema.arguments[place].default_value)
    if dim is None and name != "multinomial":
        return Guess(index, 0.0, Origin.here(f"the index that {_title(func)} chooses", "0"))
    dim = -1 if dim is None else dim
    count = options.shape[dim]
    picked = result.shape[dim] if result.ndim == options.ndim else 1
    rows = result.numel() // max(picked, 1)
    if name in _ORDERS or policy.experts == "worst":
        one, value = torch.arange(picked).expand(rows, picked), f"always the first {picked} of {count}"
    else:
        one, value = torch.arange(rows * picked).remainder(max(count, 1)), f"each of {count} equally often"
    if name in _ORDERS:
        value = "already in order"
    if result.ndim == options.ndim:
        moved = [size for place, size in enumerate(result.shape) if place != dim % result.ndim]
        one = one.reshape(*moved, picked).movedim(-1, dim)
    return Guess(index, one.reshape(result.shape), Origin.here(f"the choices of {_title(func)}", value))


def _tested(func: Any, args: Any, value_of: Callable[[Tensor], Tensor | None]) -> bool | None:
    """What a test says about unknown numbers that are all 1.0; None if it says different things about some elements."""
    values = []
    same: dict[int, Tensor] = {}
    for argument in args:
        if isinstance(argument, Tensor):
            known = value_of(argument) if argument.numel() == 1 else None
            stand_in = known.reshape(()) if known is not None else same.get(id(argument))
            if stand_in is None:
                if not argument.is_floating_point():
                    return None
                stand_in = same[id(argument)] = torch.full((), ASSUMED_NUMBER, dtype=argument.dtype)
            argument = stand_in
        values.append(argument)
    try:
        return bool(func(*values))
    except (RuntimeError, IndexError, TypeError):
        return None


def _compares_with_itself(args: Any) -> bool:
    """Whether a comparison is that of a test for NaN, `x == x`, or for infinity, `abs(x) == inf`."""
    if len(args) != 2:
        return False
    return args[0] is args[1] or (isinstance(args[1], float) and math.isinf(args[1]))


def _title(func: Any) -> str:
    return f"torch.{func.overloadpacket.__name__.removesuffix('_').removeprefix('_')}"
