"""A cache of operators on fake tensors: each combination of operator and shapes is computed once.

A transformer runs the same few hundred operators on the same shapes over and over. `FakeTensorMode` computes each of
them again, and its own cache still takes most of a simulation's time. This cache keeps, by operator, dtypes, sizes and
strides, the layout of every result, the argument whose storage it shares, and the cost of the call; it builds results
directly from that. Unusual calls (known constants, sparse layouts, shapes that depend on data) go to `FakeTensorMode`
every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memscope.hooks.work import Work
from memscope.simulation.answers import UNKNOWN, Answers
from memscope.simulation.devices.roofline import tf32_allowed
from memscope.simulation.signature import describe_call
from memscope.simulation.untouched import Untouched
from memscope.simulation.values import KnownValues, concerns_values, written

__all__ = ["RememberedOperators"]

_CPU = torch.device("cpu")
_DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Result(NamedTuple):
    """How to build one output. `same_as` and `view_of` are indices into the flattened tensor arguments; -1: neither."""

    same_as: int
    view_of: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_conj: bool


class _Known(NamedTuple):
    """A call that was computed before."""

    recipe: Any
    """How to build its result; `_UNUSUAL`: it must be computed again."""
    work: Work
    follows: bool
    """Whether known values go into it or come out of it."""
    tf32: tuple[bool, bool] | None
    """What was allowed when its work was computed; None: the work does not depend on it."""


WorkOf = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Work]


class RememberedOperators:
    """Calls operators on fake tensors, and remembers their results.

    `remembered(func, args, kwargs)` returns the result of `func(*args, **kwargs)` and the call's work.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        values: KnownValues,
        answers: Answers,
        untouched: Untouched,
        work_of: WorkOf,
        results: Mapping[Any, Callable[..., Any]],
    ) -> None:
        """Start with an empty cache.

        Args:
            mode: the mode of the fake tensors.
            values: the known values, which the operators change.
            answers: answers operators that read values.
            untouched: is told of every real tensor that an operator is given.
            work_of: `work_of(func, args, kwargs, out)` returns the work of a call.
            results: operator → the function to call in its place.
        """
        self._known: dict[Any, _Known] = {}
        self._values, self._answers, self._untouched = values, answers, untouched
        self._mode, self._work_of, self._results = mode, work_of, results
        with mode:
            self._attributes = dict(vars(torch.empty(0)))

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """Return the result of `func(*args, **kwargs)` and its work, computed or remembered."""
        tensors: list[FakeTensor] = []
        parts: list[Any] = [func, torch.get_default_dtype()]  # the dtype of a quotient of integers, say
        with torch._C.DisableTorchFunction():  # else every access to a size or stride would go through the modes
            described = (
                not torch.is_inference_mode_enabled()  # tensors built in it, views too, would be inference tensors
                and describe_call(args, kwargs, parts, tensors)
                and tensors
            )
            key = tuple(parts) if described else None
            known = self._known.get(key) if described else None
            if known is not None and known.work.flops and known.tf32 != tf32_allowed():
                known = None  # the program has changed how long its products take
            if known is not None and known.recipe is not _UNUSUAL:
                out = self._rebuilt(known.recipe, tensors)
                if known.follows:
                    self._values.follow(func, args, kwargs, out)
                return out, known.work
        if not described:
            self._untouched.keep_arguments((args, kwargs), written(func, args, kwargs))
        before = [_layout(t) for t in tensors]
        with self._mode:  # it is not on in a program, whose tensors on the host are real
            answer = self._answers(func, args, kwargs)
            out = self._results.get(func, func)(*args, **kwargs) if answer is UNKNOWN else answer
        work = known.work if known else self._work_of(func, args, kwargs, out)
        follows = known.follows if known else concerns_values(func, out)
        if follows:
            self._values.follow(func, args, kwargs, out)
        if described and known is None:
            unchanged = [_layout(t) for t in tensors] == before
            recipe = _recipe(func, out, tensors) if unchanged else _UNUSUAL
            self._known[key] = _Known(recipe, work, follows, tf32_allowed() if work.flops else None)
        return out, work

    def _rebuilt(self, recipe: Any, tensors: list[FakeTensor]) -> Any:
        if type(recipe) is _Result:
            return self._build(recipe, tensors)
        if recipe is None:
            return None
        kind, items = recipe
        return kind(self._build(item, tensors) if type(item) is _Result else item for item in items)

    def _build(self, result: _Result, tensors: list[FakeTensor]) -> Tensor:
        if result.same_as >= 0:
            return tensors[result.same_as]
        with torch._C._DisableTorchDispatch():
            if result.view_of < 0:
                data = torch.empty_strided(result.size, result.stride, dtype=result.dtype, device="meta")
            else:
                data = torch.empty(0, dtype=result.dtype, device="meta")
                data.set_(tensors[result.view_of].untyped_storage(), result.offset, result.size, result.stride)
            if result.is_conj:
                torch._C._set_conj(data, True)
            # FakeTensor's constructor without its argument checks, which take a third of a simulation's time.
            fake = Tensor._make_subclass(FakeTensor, data, False, dispatch_device=True, device_for_backend_keys=_CPU)
            torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self._attributes)
        return fake


_UNUSUAL = object()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes()


def _recipe(func: Any, out: Any, tensors: list[FakeTensor]) -> Any:
    if func.namespace == "prim" or not _DEPENDS_ON_DATA.isdisjoint(func.tags):
        return _UNUSUAL
    if out is None:
        return None
    if isinstance(out, Tensor):
        return _result(out, tensors) or _UNUSUAL
    if type(out) in (list, tuple) and all(isinstance(item, (Tensor, int, type(None))) for item in out):
        items = [_result(item, tensors) or _UNUSUAL if isinstance(item, Tensor) else item for item in out]
        return _UNUSUAL if any(item is _UNUSUAL for item in items) else (type(out), items)
    return _UNUSUAL


def _result(out: Tensor, tensors: list[FakeTensor]) -> _Result | None:
    """How to build `out`; None where no recipe can describe it."""
    if type(out) is not FakeTensor or out.layout is not torch.strided or out.device != _CPU:
        return None
    if out.constant is not None or out.is_neg():
        return None
    same = next((i for i, t in enumerate(tensors) if t is out), -1)
    storage = out.untyped_storage()
    view_of = next((i for i, t in enumerate(tensors) if t.untyped_storage()._cdata == storage._cdata), -1)
    fresh_size = 1 + sum((n - 1) * s for n, s in zip(out.size(), out.stride(), strict=True)) if out.numel() else 0
    if view_of < 0 and (out.storage_offset() or storage.nbytes() != fresh_size * out.element_size()):
        return None
    return _Result(same, view_of, out.dtype, out.size(), out.stride(), int(out.storage_offset()), out.is_conj())
