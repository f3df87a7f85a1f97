"""Known values during a simulation: of small tensors that no weight goes into, such as masks, positions and tables.

They decide which operators a target runs. transformers, for one, drops an attention mask that only has ones, and the
attention kernel without a mask is another one. The values are *shadows*: one real storage on the host for each storage
of fake tensors. Views of a tensor share its shadow as they share its memory; an operation in place writes into it.

Of a large tensor, only the number that fills it is known, as in `torch.ones(batch, seq)`, until something is written to
it. Values that rest on assumptions (`memscope.simulation.guesses`) carry them.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from memscope.simulation.assumptions import Assume, Origin
from memscope.simulation.guesses import Guess, drawn, guess, may_guess

__all__ = ["MOST_ELEMENTS", "Given", "KnownValues", "computing", "concerns_values", "written"]

aten = torch.ops.aten

MOST_ELEMENTS = 1 << 22
"""Elements of the largest tensor of integers or booleans with a value, at most 32 MiB.

The mask of a micro-batch of four million tokens has as many."""
_MOST_FLOATS = 1 << 16
"""Elements of the largest floating-point tensor with a value, such as a table of rotary embeddings' frequencies."""

_SHAPE_ONLY = {
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero_", "fill_", "copy_",
}  # fmt: skip
"""Operators that read the shape of their first argument, and not its values."""
_SAME_FOR_ONE = {aten.all.default, aten.any.default, aten.max.default, aten.min.default}
"""Operators that return for a tensor of equal elements what they return for one of them."""
_OVERWRITING = {"zero_", "fill_", "copy_"}
_FILLING: dict[str, str | float] = {
    "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "zero_": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0,
    "full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "fill_": "value",
}  # fmt: skip
"""Operator → the number that fills its result, or its argument with that number."""
_ELEMENTWISE = {"_to_copy", "clone", "copy_"}
"""Operators that compute each element of the result from one element of every argument, beside those tagged so."""
_RESULT_MAY_BE_KNOWN = {*_SHAPE_ONLY, *_FILLING}
"""Operators whose results may be known although an argument is not."""
_WRITTEN_UNSAID = {
    "aten.native_batch_norm.default": (3, 4),
    "aten.cudnn_batch_norm.default": (3, 4),
    "aten.miopen_batch_norm.default": (3, 4),
}
"""Operator → arguments, its running averages, that it changes although its schema does not say so.

Source: aten/src/ATen/native/native_functions.yaml (2.6 to 2.13)."""
_HOST = {"pin_memory": None}
"""Arguments that make no difference to values, and that a host without a GPU does not accept."""


class Given(NamedTuple):
    """An operator's arguments with values in place of fake tensors, and the assumptions that these rest on."""

    args: Any
    kwargs: dict[str, Any]
    origins: tuple[Origin, ...]


class _Kept(NamedTuple):
    """What is known of a storage: its shadow, or the one number that fills it."""

    storage: weakref.ref[torch.UntypedStorage]
    value: torch.UntypedStorage | float
    origins: tuple[Origin, ...]


class KnownValues:
    """The known values of fake tensors."""

    def __init__(self, policy: Assume) -> None:
        self._policy = policy
        self._kept: dict[int, _Kept] = {}
        self._draws = torch.Generator().manual_seed(0)

    def know(self, fake: Tensor, source: Tensor) -> None:
        """Give a fake tensor the value of another tensor of the same shape, if that is known and worth keeping."""
        if _is_small(fake):
            with computing():
                value = self.value_of(source)
                if value is not None:
                    self._keep(fake, value, self.origins_of(source))

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the values of an operator's results, or that memory it has written to now has other ones."""
        made = _tensors_in(out)
        if func is aten.view.dtype:
            self._reinterpreted(args[0], made)
        if made and (self._may_know(args) or func.overloadpacket.__name__ in _RESULT_MAY_BE_KNOWN):
            with computing():
                if self._compute(func, args, kwargs, made) or self._fill(func, args, kwargs, made):
                    return
        if made and not func._schema.is_mutable and not self._policy.refuse:
            self._guess(func, args, kwargs, made)
        self._forget(written(func, args, kwargs))

    def given(self, func: Any, args: Any, kwargs: Any) -> Given | None:
        """The operator's arguments with their values; None if one is not known, or too large to compute with."""
        leaves, spec = pytree.tree_flatten((args, {k: v for k, v in kwargs.items() if k not in _HOST}))
        name = func.overloadpacket.__name__
        origins: list[Origin] = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            value = self.value_of(leaf)
            if value is None and name in _SHAPE_ONLY and leaf is args[0]:
                value = torch.empty(leaf.size() if name in _OVERWRITING else (), dtype=leaf.dtype).expand(leaf.size())
            if value is not None and value.numel() > MOST_ELEMENTS and func in _SAME_FOR_ONE:
                value = value.as_strided((1,), (1,)) if self.fill_of(leaf) is not None else None
            if value is None or value.numel() > MOST_ELEMENTS:
                return None
            leaves[index] = value
            origins += self.origins_of(leaf)
        values, named = pytree.tree_unflatten(leaves, spec)
        return Given(values, named, tuple(dict.fromkeys(origins)))

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """The value of a tensor, which must not be changed; None if it is not known."""
        if type(tensor) is not FakeTensor:
            return tensor  # on the host
        if tensor.constant is not None:  # PyTorch's own record for a tensor of one element
            return tensor.constant
        shadow = self._shadow(tensor)
        if shadow is None:
            fill = self.fill_of(tensor)
            return None if fill is None else torch.full((), fill, dtype=tensor.dtype).expand(tensor.size())
        value = torch.empty(0, dtype=tensor.dtype)
        return value.set_(shadow, tensor.storage_offset(), tensor.size(), tensor.stride())

    def fill_of(self, tensor: Tensor) -> float | None:
        """The number that fills a fake tensor's storage; None if none is known."""
        if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
            return None
        kept = self._kept.get(tensor.untyped_storage()._cdata)
        return kept.value if kept is not None and isinstance(kept.value, float) and not tensor.is_complex() else None

    def origins_of(self, tensor: Tensor) -> tuple[Origin, ...]:
        """The assumptions on which the value of a tensor rests."""
        if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
            return ()
        kept = self._kept.get(tensor.untyped_storage()._cdata)
        return () if kept is None else kept.origins

    def _compute(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> bool:
        """Compute the values of the results; returns False where they or the values they follow from are not known."""
        if not all(map(_is_small, made)):
            return False
        mutable = func._schema.is_mutable
        shared = all(self._shadow(tensor) is not None for tensor in made)
        if shared and not mutable:  # a view
            return True
        if not _is_determined(func):
            values = drawn(func, args, kwargs, self._draws) if not self._policy.refuse else None
            if values is not None:
                self._keep(made[0], *values)
            return values is not None
        given = self.given(func, args, kwargs)
        if given is None:
            return False
        changed = list(written(func, args, kwargs))
        overwrites = func.overloadpacket.__name__ in _OVERWRITING and all(map(_is_whole, changed))
        if not overwrites and any(self._shadow(tensor) is None for tensor in changed):
            return False
        values = _computed(func, given)
        if values is None:
            return False
        origins = given.origins
        for fake, value in zip(made, _tensors_in(values), strict=True):
            if self._shadow(fake) is None:
                self._keep(fake, value, origins, is_all=not mutable)
            elif mutable and origins:
                self._rest_on(fake, origins)
        return True

    def _fill(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> bool:
        """Note the number that fills a result, if there is one and the result is all of its storage."""
        if len(made) != 1 or type(made[0]) is not FakeTensor or made[0].is_complex() or not _is_whole(made[0]):
            return False
        fill, origins = _fill_given(func, args, kwargs), ()
        if fill is None and (torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _ELEMENTWISE):
            fill, origins = self._elementwise(func, args, kwargs)
        if fill is not None:
            self._store(made[0], fill, origins)
        return fill is not None

    def _elementwise(self, func: Any, args: Any, kwargs: Any) -> tuple[float | None, Any]:
        """The number that fills a result whose arguments are filled with one number each."""
        leaves, spec = pytree.tree_flatten((args, {k: v for k, v in kwargs.items() if k not in _HOST}))
        origins: list[Origin] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                fill = self.fill_of(leaf)
                if fill is None:
                    return None, ()
                leaves[index] = torch.full((), fill, dtype=leaf.dtype)
                origins += self.origins_of(leaf)
        values, named = pytree.tree_unflatten(leaves, spec)
        value = _computed(func, Given(values, named, ()))
        return (None if value is None else float(value)), tuple(dict.fromkeys(origins))

    def _guess(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """Assume what cannot be known of the results."""
        if not may_guess(func, made):
            return
        with computing():
            found = guess(func, args, made, self._policy, self.value_of)
            if found is not None:
                self._assume(made[found.place], found)

    def _may_know(self, values: Iterable[Any]) -> bool:
        """Whether no tensor among some arguments is unknown."""
        for value in values:
            if type(value) is FakeTensor:
                is_dense = value.layout is torch.strided
                if value.constant is None and not (is_dense and value.untyped_storage()._cdata in self._kept):
                    return False
            elif isinstance(value, (list, tuple)) and not self._may_know(value):
                return False
        return True

    def _assume(self, tensor: Tensor, found: Guess) -> None:
        value, origin = found.value, found.origin
        if isinstance(value, Tensor):
            self._keep(tensor, value, (origin,))  # of no more elements than the values it was chosen from
        elif _is_whole(tensor):
            self._store(tensor, value, (origin,))

    def _reinterpreted(self, base: Tensor, made: list[Tensor]) -> None:
        """A fill says nothing about numbers of another type, nor do a shadow's about those that it is too small for."""
        if self.fill_of(base) is not None or not all(map(_is_small, made)):
            self._forget([base])

    def _shadow(self, tensor: Tensor) -> torch.UntypedStorage | None:
        storage = tensor.untyped_storage()
        kept = self._kept.get(storage._cdata)
        if kept is None or isinstance(kept.value, float) or kept.value.nbytes() != storage.nbytes():
            return None
        return kept.value

    def _keep(self, fake: Tensor, value: Tensor, origins: Sequence[Origin], *, is_all: bool = False) -> None:
        """Store a shadow. `is_all`: memory that the tensor does not show holds nothing, as behind a shrunk result."""
        kept = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype)
        size = fake.untyped_storage().nbytes()
        if is_all and kept.untyped_storage().nbytes() < size:
            kept = torch.empty(size // fake.itemsize, dtype=fake.dtype).as_strided(fake.size(), fake.stride())
        if kept.untyped_storage().nbytes() == size:  # else the tensor shows a part of its memory
            kept.copy_(value)
            self._store(fake, kept.untyped_storage(), origins)

    def _store(self, fake: Tensor, value: torch.UntypedStorage | float, origins: Sequence[Origin]) -> None:
        storage, forget = fake.untyped_storage(), self._kept.pop
        key = storage._cdata
        self._kept[key] = _Kept(weakref.ref(storage, lambda _: forget(key, None) and None), value, tuple(origins))

    def _rest_on(self, fake: Tensor, origins: Sequence[Origin]) -> None:
        key = fake.untyped_storage()._cdata
        kept = self._kept[key]
        self._kept[key] = kept._replace(origins=tuple(dict.fromkeys((*kept.origins, *origins))))

    def _forget(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors if self._kept else ():
            if tensor.layout is torch.strided:
                self._kept.pop(tensor.untyped_storage()._cdata, None)


def concerns_values(func: Any, out: Any) -> bool:
    """Whether an operator makes or changes tensors that may have values; a matter of dtypes and sizes only."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if func._schema.is_mutable or func is aten.view.dtype or func.overloadpacket.__name__ in _FILLING:
        return True
    if str(func) in _WRITTEN_UNSAID:
        return True
    return any(_is_small(tensor) or tensor.dtype is torch.bool for tensor in _tensors_in(out))


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operator changes in place."""
    for index, name in _written_arguments(func):
        yield from _tensors_in(args[index] if index < len(args) else kwargs.get(name))


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator changes in place."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    unsaid = _WRITTEN_UNSAID.get(str(func), ())
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if index in unsaid or (argument.alias_info is not None and argument.alias_info.is_write)
    )


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Compute on real tensors, without autograd and outside every mode."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
        yield


def _tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor is a fake one that is small enough to have values."""
    if type(tensor) is not FakeTensor or tensor.layout is not torch.strided or tensor.is_complex():
        return False
    return tensor.numel() <= (_MOST_FLOATS if tensor.is_floating_point() else MOST_ELEMENTS)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor shows every byte of its storage."""
    return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def _is_determined(func: Any) -> bool:
    """Whether the arguments determine the results: not those of random operators, nor memory without contents."""
    return torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in func.overloadpacket.__name__


def _fill_given(func: Any, args: Any, kwargs: Any) -> float | None:
    """The number that fills the result of an operator by its name or its arguments; None if there is none."""
    name = func.overloadpacket.__name__
    if name not in _FILLING or "out" in kwargs:
        return None
    number: Any = _FILLING[name]
    if isinstance(number, str):
        place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == number)
        number = args[place] if place < len(args) else kwargs.get(number)
    return float(number) if isinstance(number, (bool, int, float)) else None


def _computed(func: Any, given: Given) -> Any:
    """The result of an operator on real tensors; None if the host has no kernel for it, or it fails."""
    try:
        return func(*given.args, **given.kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):
        if func is aten.histc.default and not given.args[0].is_floating_point():  # a GPU has a kernel, the host has not
            return func(given.args[0].double(), *given.args[1:], **given.kwargs).to(given.args[0].dtype)
        return None
