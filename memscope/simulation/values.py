"""Known values during a simulation: of small integer and boolean tensors, such as masks, positions and lengths.

They decide which operators a target runs. transformers, for one, drops an attention mask that only has ones, and the
attention kernel without a mask is another one. The values are *shadows*: one real storage on the host for each storage
of fake tensors. Views of a tensor share its shadow as they share its memory; an operation in place writes into it.

Of floating-point numbers, only those are known that fill a tensor, as in `torch.ones(batch, seq)`, until something is
written to it: many models make such masks. Nothing is computed from them but integers and booleans.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.simulation.untouched import Untouched

__all__ = ["UNKNOWN", "FollowedValues", "KnownValues", "concerns_values", "written"]

aten = torch.ops.aten

_MOST_ELEMENTS = 1 << 22
"""Elements of the largest tensor with a value: the mask of a micro-batch of four million tokens, at most 32 MiB."""

UNKNOWN: Any = object()
"""The answer of an operator that needs values which are not known."""

_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""Operators that read the shape of their first argument, and not its values."""
_FILLING: dict[str, float | None] = {
    "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0, "full": None,
    "full_like": None, "new_full": None,
}  # fmt: skip
"""Operator → the number that fills its result; None: its argument `fill_value`."""
_HOST = {"pin_memory": None}
"""Arguments that make no difference to values, and that a host without a GPU does not accept."""


class KnownValues:
    """The known values of fake tensors."""

    def __init__(self) -> None:
        # By storage: its shadow, or the one number that fills it.
        self._shadows: dict[int, tuple[weakref.ref[torch.UntypedStorage], torch.UntypedStorage | float]] = {}

    def know(self, fake: Tensor, source: Tensor) -> None:
        """Give a fake tensor the value of another tensor of the same shape, if that is known and worth keeping."""
        if _is_kept(fake):
            with _real():
                value = self._of(source)
                if value is not None:
                    self._keep(fake, value)

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator that returns no tensor, such as `tensor.item()`; `UNKNOWN` without its values."""
        if torch.Tag.data_dependent_output not in getattr(func, "tags", ()):  # a higher-order operator has none
            return UNKNOWN
        with _real():
            given = self._real_arguments(func, args, kwargs)
            return UNKNOWN if given is None else func(*given[0], **given[1])

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the values of an operator's results, or that memory it has written to now has other ones."""
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if func is aten.view.dtype and not all(map(_is_kept, made)):  # written to as floating-point numbers
            self._forget(args[:1])
        if made and all(map(_is_kept, made)):
            with _real():
                if self._compute(func, args, kwargs, made):
                    return
        fill = _fill(func, args, kwargs)
        if fill is not None and type(made[0]) is FakeTensor and made[0].layout is torch.strided:
            self._store(made[0], fill)
        self._forget(written(func, args, kwargs))

    def _compute(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> bool:
        """Compute the values of the results; returns False where they or the values they follow from are not known."""
        if not _is_determined(func):
            return False
        shared = all(self._shadow(tensor) is not None for tensor in made)
        if shared and not func._schema.is_mutable:  # a view
            return True
        given = self._real_arguments(func, args, kwargs)
        if given is None or any(self._shadow(t) is None for t in written(func, args, kwargs)):
            return False
        values = func(*given[0], **given[1])
        for fake, value in zip(made, pytree.tree_leaves(values), strict=True):
            if self._shadow(fake) is None:
                self._keep(fake, value)
        return True

    def _real_arguments(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The arguments with values in place of fake tensors; None if one of them is not known."""
        leaves, spec = pytree.tree_flatten((args, {k: v for k, v in kwargs.items() if k not in _HOST}))
        shape_only = func.overloadpacket.__name__ in _SHAPE_ONLY
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                value = self._of(leaf)
                if value is None and shape_only:
                    value = torch.empty((), dtype=leaf.dtype).expand(leaf.size())
                if value is None:
                    return None
                leaves[index] = value
        found: tuple[Any, Any] = pytree.tree_unflatten(leaves, spec)
        return found

    def _of(self, tensor: Tensor) -> Tensor | None:
        if type(tensor) is not FakeTensor:
            return tensor  # on the host
        if tensor.constant is not None:  # PyTorch's own record for a tensor of one element
            return tensor.constant
        shadow = self._shadow(tensor)
        if shadow is None:
            _, fill = self._shadows.get(tensor.untyped_storage()._cdata, (None, None))
            if not (isinstance(fill, float) and tensor.is_floating_point()):
                return None
            return torch.full((), fill, dtype=tensor.dtype).expand(tensor.size())
        value = torch.empty(0, dtype=tensor.dtype)
        return value.set_(shadow, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _shadow(self, tensor: Tensor) -> torch.UntypedStorage | None:
        storage = tensor.untyped_storage()
        _, shadow = self._shadows.get(storage._cdata, (None, None))
        return shadow if isinstance(shadow, torch.UntypedStorage) and shadow.nbytes() == storage.nbytes() else None

    def _keep(self, fake: Tensor, value: Tensor) -> None:
        kept = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype)
        if kept.untyped_storage().nbytes() == fake.untyped_storage().nbytes():  # else it shows a part of its memory
            kept.copy_(value)
            self._store(fake, kept.untyped_storage())

    def _store(self, fake: Tensor, value: torch.UntypedStorage | float) -> None:
        storage, forget = fake.untyped_storage(), self._shadows.pop
        key = storage._cdata
        self._shadows[key] = weakref.ref(storage, lambda _: forget(key, None) and None), value

    def _forget(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors if self._shadows else ():
            if tensor.layout is torch.strided:
                self._shadows.pop(tensor.untyped_storage()._cdata, None)


class FollowedValues(TorchDispatchMode):
    """Follows values where no recorder runs the operators: while a target builds its model."""

    def __init__(self, values: KnownValues, untouched: Untouched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values, self._untouched = values, untouched

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch directly: the wrapper that hides a mode from torch.compile costs more than the mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._untouched.keep_arguments((args, kwargs), written(func, args, kwargs))
        answer = self._values.answer(func, args, kwargs)
        if answer is not UNKNOWN:
            return answer
        out = func(*args, **kwargs)
        if concerns_values(func, out):
            self._values.follow(func, args, kwargs, out)
        return out


def concerns_values(func: Any, out: Any) -> bool:
    """Whether an operator makes or changes tensors that may have values; a matter of dtypes and sizes only."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if func._schema.is_mutable or func is aten.view.dtype or func.overloadpacket.__name__ in _FILLING:
        return True
    return any(_is_kept(leaf) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))


def _is_kept(tensor: Tensor) -> bool:
    """Whether a tensor is a small fake one of integers or booleans."""
    if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= _MOST_ELEMENTS


def _fill(func: Any, args: Any, kwargs: Any) -> float | None:
    """The number that fills the result of an operator; None if there is none."""
    name = func.overloadpacket.__name__
    if name not in _FILLING or "out" in kwargs:
        return None
    number = _FILLING[name]
    if number is None:
        place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "fill_value")
        number = args[place] if place < len(args) else kwargs.get("fill_value")
    return float(number) if isinstance(number, (bool, int, float)) else None


def _is_determined(func: Any) -> bool:
    """Whether the arguments determine the results: not those of random operators, nor memory without contents."""
    return torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in func.overloadpacket.__name__


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator changes in place."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def _real() -> Iterator[None]:
    """Compute on real tensors, without autograd and outside every mode."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
        yield
