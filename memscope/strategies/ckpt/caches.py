"""KV caches among a layer's arguments: a layer that runs twice must not add its keys and values twice.

A checkpointed layer is given no cache, as by transformers' own `GradientCheckpointingLayer`
(transformers/modeling_layers.py of 5.23). In training nothing reads what a layer adds, so losses and gradients stay the
same. Not so with a cache that holds something before the layer runs, as in prefix tuning: it is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from memscope.errors import UsageError

__all__ = ["without_caches"]


def without_caches(args: Any, kwargs: Any, layer: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer that is checkpointed, with None in place of transformers' caches.

    Raises:
        UsageError: a cache holds keys and values for this layer already.
    """
    if getattr(layer, "_can_checkpoint_with_cache", False):  # it only reads the cache
        return args, kwargs
    return tuple(_without(value, layer) for value in args), {
        key: _without(value, layer) for key, value in kwargs.items()
    }


def _without(value: Any, layer: object) -> Any:
    if not _is_cache(type(value)):
        return value
    if _holds_something(value, layer):
        raise UsageError(
            f"a {type(layer).__name__} is checkpointed, but its KV cache holds keys and values before it runs, as in "
            "prefix tuning: computed again, it would add to them twice. Leave the layer out, or train without a cache"
        )
    return None


def _is_cache(kind: type) -> bool:
    # By name: transformers is no requirement, and takes seconds to import.
    return any((base.__module__, base.__name__) == ("transformers.cache_utils", "Cache") for base in kind.__mro__)


def _holds_something(cache: Any, layer: object) -> bool:
    modules = layer.modules() if isinstance(layer, nn.Module) else ()
    index = next((i for module in modules if isinstance(i := getattr(module, "layer_idx", None), int)), None)
    try:
        return index is not None and cache.get_seq_length(index) > 0
    except ValueError:  # a layer without attention, whose cache has no length
        return False
