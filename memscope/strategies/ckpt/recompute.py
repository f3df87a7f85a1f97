"""A forward function whose activations are computed again in the backward pass, through `torch.utils.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, noop_context_fn

from memscope.strategies.ckpt.caches import without_caches

__all__ = ["Arguments", "Recomputed", "flatten", "run_checkpointed"]

Contexts = Callable[[], tuple[Any, Any]]
"""Returns new context managers for the forward pass and for the recomputation."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Recomputed:
    """A layer's forward function, checkpointed as a whole; random state is preserved."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.forward = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward function."""
        return run_checkpointed(self.forward, without_caches(args, kwargs, self.layer))


def run_checkpointed(function: Callable[..., Any], arguments: Arguments, contexts: Contexts = noop_context_fn) -> Any:
    """`function(*args, **kwargs)`, called again when its backward needs the activations.

    Keyword arguments and tuples go to PyTorch one tensor at a time: it looks for devices whose random state it must
    preserve, and for tensors it must save, among positional arguments only (torch/utils/checkpoint.py of 2.13,
    `_checkpoint_without_reentrant_generator` and `_CheckpointFrame.save_inputs`).
    """
    leaves, rebuild = flatten(arguments)
    was_called = False
    failures: list[BaseException] = []

    def call(*leaves: Any) -> Any:
        nonlocal was_called
        is_recomputation, was_called = was_called, True
        args, kwargs = rebuild(leaves)
        try:
            return function(*args, **kwargs)
        except BaseException as failure:
            if is_recomputation:
                raise
            failures.append(failure)

    result = checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
    # Raised inside, it would leave the region's hooks and contexts on for as long as its traceback lives: the generator
    # that holds them is closed by `checkpoint` of 2.13, not by that of 2.11.
    if failures:
        raise failures.pop()
    return result


def flatten(arguments: Arguments) -> tuple[list[Any], Callable[[Any], Arguments]]:
    """The arguments one by one, including those in tuples, and a function that puts them together again.

    Lists, dictionaries and other containers stay whole: a function may change them in place.
    """
    args, kwargs = arguments
    leaves, spec = pytree.tree_flatten((args, tuple(kwargs.values())), is_leaf=lambda node: type(node) is not tuple)

    def rebuild(leaves: Any) -> Arguments:
        args, values = pytree.tree_unflatten(list(leaves), spec)
        return args, dict(zip(kwargs, values, strict=True))

    return leaves, rebuild
