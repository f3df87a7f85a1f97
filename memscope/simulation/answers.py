"""Answers to operators that read values.

Some return numbers; the results of others, such as `nonzero()` and indexing with a mask, have a size that depends on
values. What is neither known nor can be assumed is left to `FakeTensorMode`, which raises an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.simulation.assumptions import Assumptions, Origin
from memscope.simulation.cuda.kernel_results import ctc_loss
from memscope.simulation.guesses import ASSUMED_NUMBER
from memscope.simulation.refusal import NotSimulated
from memscope.simulation.untouched import Untouched
from memscope.simulation.values import MOST_ELEMENTS, Given, KnownValues, computing, concerns_values, written

__all__ = ["UNKNOWN", "Answers", "FollowedValues"]

aten = torch.ops.aten

UNKNOWN: Any = object()
"""The answer of an operator that needs values which are neither known nor assumed."""

_MASKS = (torch.bool, torch.uint8)


class Answers:
    """Answers operators that read values, from those known or assumed."""

    def __init__(self, values: KnownValues, assumptions: Assumptions, *, of_a_program: bool = False) -> None:
        """Answer from `values`.

        Args:
            values: the known values.
            assumptions: what may be assumed, and the list of what was.
            of_a_program: whether a whole program asks, which also counts and prints: then integers are assumed, too.
        """
        self._values, self._assumptions = values, assumptions
        self._of_a_program = of_a_program

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator that reads values; `UNKNOWN` for another one, or without its values."""
        tags = getattr(func, "tags", ())  # a higher-order operator has none
        if torch.Tag.data_dependent_output in tags:
            with computing():
                return self._number(func, args, kwargs)
        if torch.Tag.dynamic_output_shape in tags:
            if func is aten.index.Tensor:
                return self._indexed(*args)
            if func in (aten.nonzero.default, aten.masked_select.default):
                return self._selected(func, args)
            if func is aten._ctc_loss.Tensor:
                return self._ctc_loss(*args)
            return self._computed(func, args, kwargs)
        return UNKNOWN

    def array(self, tensor: Tensor) -> Any:
        """The NumPy array that `tensor.numpy()` returns.

        Raises:
            NotSimulated: the values are neither known nor assumed.
        """
        with computing():
            value = self._values.value_of(tensor)
            if value is not None:
                self._assumptions.rest_on(self._values.origins_of(tensor))
                return value.detach().clone().numpy()
            is_assumed = self._may_assume and (tensor.is_floating_point() or self._of_a_program)
            if not is_assumed or tensor.numel() > MOST_ELEMENTS:
                raise NotSimulated(
                    "tensor.numpy() needs the values of a tensor, which a simulation does not have: compute with "
                    "PyTorch instead, or record a real run: --device cpu"
                )
            self._assume("the numbers of tensor.numpy()", str(ASSUMED_NUMBER))
            return torch.full(tensor.size(), ASSUMED_NUMBER, dtype=tensor.dtype).numpy()

    @property
    def _may_assume(self) -> bool:
        return not self._assumptions.policy.refuse

    def _assume(self, what: str, value: str) -> None:
        self._assumptions.rest_on([Origin.here(what, value)])

    def _number(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = self._values.given(func, args, kwargs)
        if given is not None:
            self._assumptions.rest_on(given.origins)
            return func(*given.args, **given.kwargs)
        if func is aten._local_scalar_dense.default:
            is_float = args[0].is_floating_point()
            if _asked_by_scaling_optimizer():
                return 1.0 if is_float else 1
            if is_float and self._may_assume:
                self._assume("a floating-point number that the program reads", str(ASSUMED_NUMBER))
                return ASSUMED_NUMBER
            if self._of_a_program and self._may_assume:
                is_bool = args[0].dtype is torch.bool
                kind, value = ("a truth value", True) if is_bool else ("an integer", 1)
                self._assume(f"{kind} that the program reads", str(value))
                return value
        if func in (aten.equal.default, aten.allclose.default) and self._may_assume:
            self._assume("whether tensors are equal", "False")
            return False
        return UNKNOWN

    def _indexed(self, values: Tensor, indices: Any) -> Any:
        """Index with masks, as PyTorch does: each is replaced by the places of its true elements.

        Source: expandTensors in aten/src/ATen/native/IndexingUtils.h.
        """
        places: list[Tensor | None] = []
        for index in indices:
            if not isinstance(index, Tensor) or index.dtype not in _MASKS:
                places.append(index)
                continue
            count = self._count(index)
            if count is None:
                return UNKNOWN
            places += [torch.empty(count, dtype=torch.int64) for _ in range(index.ndim)]
        if len(places) == len(indices) and all(new is old for new, old in zip(places, indices, strict=True)):
            return UNKNOWN  # no mask: the shapes are those of the indices
        return aten.index.Tensor(values, places)

    def _selected(self, func: Any, args: Any) -> Any:
        mask = args[-1]
        count = self._count(mask.expand(torch.broadcast_shapes(*(one.shape for one in args))))
        if count is None:
            return UNKNOWN
        return torch.empty(count, mask.ndim, dtype=torch.int64) if len(args) == 1 else args[0].new_empty(count)

    def _count(self, mask: Tensor) -> int | None:
        """Number of elements that are not zero; None if that is neither known nor may be assumed."""
        fill = self._values.fill_of(mask)
        with computing():
            value = self._values.value_of(mask)
            if value is not None:
                self._assumptions.rest_on(self._values.origins_of(mask))
                return int(value.count_nonzero()) if fill is None else bool(fill) * mask.numel()
        if not self._may_assume:
            return None
        self._assume("the elements that are not zero", "all of them")
        return mask.numel()

    def _ctc_loss(self, log_probs: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor, *_: Any) -> Any:
        with computing():
            known = self._values.value_of(target_lengths)
            if known is None:
                return UNKNOWN
            self._assumptions.rest_on(self._values.origins_of(target_lengths))
            longest = int(known.max())
        return ctc_loss(log_probs, longest)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results as large as those of known values; their contents are followed like those of any operator."""
        with computing():
            given: Given | None = self._values.given(func, args, kwargs)
            if given is None:
                return UNKNOWN
            self._assumptions.rest_on(given.origins)
            found = func(*given.args, **given.kwargs)
        return pytree.tree_map_only(Tensor, _as_large, found)


def _as_large(real: Tensor) -> Tensor:
    """A tensor like a real one, whose storage may be larger than its elements: some kernels shrink their result."""
    elements = real.untyped_storage().nbytes() // real.itemsize
    return torch.empty(elements, dtype=real.dtype).as_strided(real.size(), real.stride())


class FollowedValues(TorchDispatchMode):
    """Follows values where no recorder runs the operators: while a target builds its model."""

    def __init__(self, values: KnownValues, answers: Answers, untouched: Untouched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values, self._answers, self._untouched = values, answers, untouched

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Dispatch directly: the wrapper that hides a mode from torch.compile costs more than the mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._untouched.keep_arguments((args, kwargs), written(func, args, kwargs))
        is_fake = active_fake_mode() or any(isinstance(x, FakeTensor) for x in pytree.tree_leaves((args, kwargs)))
        answer = self._answers(func, args, kwargs) if is_fake else UNKNOWN
        out = func(*args, **kwargs) if answer is UNKNOWN else answer
        if concerns_values(func, out):
            self._values.follow(func, args, kwargs, out)
        return out


_OPTIMIZERS = Path(torch.optim.__file__).parent
_ONLY_SCALE = {str(_OPTIMIZERS / name) for name in ("_adafactor.py", "asgd.py")}
"""Optimizers that only scale by the values they read, so that no memory depends on them.

The exception is ASGD's `mu != 1`, which is false before step `t0`, a million by default. Source: torch/optim, 2.11 and
2.13.
"""


def _asked_by_scaling_optimizer() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in _ONLY_SCALE:
            return True
        frame = frame.f_back
    return False
