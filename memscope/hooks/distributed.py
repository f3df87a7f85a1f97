"""Tell the tensors of `torch.distributed` that are not allocations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["shapes_of_dtensors_ignored"]

_METHOD = "_propagate_tensor_meta_non_cached"


@contextlib.contextmanager
def shapes_of_dtensors_ignored(ignored: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `ignored()` while a DTensor operator works out the shape of its global result on fake tensors.

    Under a simulation, those are fake tensors of the simulation's own mode, of the size of the whole tensor. Does
    nothing unless DTensor is loaded.

    Source: `ShardingPropagator` in torch/distributed/tensor/_sharding_prop.py, 2.13.
    """
    loaded = sys.modules.get("torch.distributed.tensor._sharding_prop")
    propagator: Any = getattr(loaded, "ShardingPropagator", None)
    infer: Any = getattr(propagator, _METHOD, None)
    if infer is None:
        yield
        return

    def inferred(*args: Any, **kwargs: Any) -> Any:
        with ignored():
            return infer(*args, **kwargs)

    setattr(propagator, _METHOD, inferred)
    try:
        yield
    finally:
        setattr(propagator, _METHOD, infer)
