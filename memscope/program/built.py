"""Learn of every optimizer that a program builds, as soon as its constructor has returned."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from memscope.simulation.facade.stand_in import replaced

__all__ = ["optimizers_followed"]

_BuiltCall = Callable[[Optimizer], None]


@contextlib.contextmanager
def optimizers_followed(built: _BuiltCall) -> Iterator[None]:
    """Call `built` for each optimizer that is constructed inside, be its class known already or defined later.

    A wrapper that is an optimizer in name only, such as accelerate's, has no parameter groups of its own and is left
    out.
    """
    with contextlib.ExitStack() as scopes:

        def follow(kind: Any) -> None:
            scopes.enter_context(replaced(kind, "__init__", _reporting(kind, kind.__init__, built)))

        def follow_new(kind: Any, /, **kwargs: Any) -> None:
            super(Optimizer, kind).__init_subclass__(**kwargs)
            follow(kind)

        for kind in _below(Optimizer):
            follow(kind)
        scopes.enter_context(replaced(Optimizer, "__init_subclass__", classmethod(follow_new)))
        yield


def _below(kind: Any) -> Iterator[Any]:
    """The classes derived from a class, each once, after a class that it is derived from."""
    found: dict[int, Any] = {}
    waiting = list(kind.__subclasses__())
    for one in waiting:  # grows during the loop
        if id(one) not in found:
            found[id(one)] = one
            waiting += one.__subclasses__()
    yield from found.values()


def _reporting(kind: Any, construct: Callable[..., None], built: _BuiltCall) -> Callable[..., None]:
    @functools.wraps(construct)  # callers read its signature
    def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        construct(optimizer, *args, **kwargs)
        if type(optimizer) is kind and "param_groups" in vars(optimizer):  # the outermost of its constructors
            built(optimizer)

    return init
