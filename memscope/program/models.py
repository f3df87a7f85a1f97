"""Find the model to which a module or a parameter belongs, in a program that tells nobody what its model is."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["model_of", "trained_model"]


def model_of(module: nn.Module) -> nn.Module:
    """The smallest module alive that holds a module, and all parameters of the optimizers that train a part of it.

    A training loop may call parts of its model only, as a LightningModule does in its `training_step`. Without an
    optimizer, or if its parameters belong to no one module, this is the module itself.
    """
    alive = gc.get_objects()
    own = {id(parameter) for parameter in module.parameters()}
    wanted = set(own)
    for optimizer in (one for one in alive if issubclass(type(one), torch.optim.Optimizer)):
        given = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
        wanted |= given if given & own else set()
    holding = list(_holding([module], wanted, alive))
    return min(holding, key=lambda each: each[0])[1] if holding else module


def trained_model(parameters: Iterable[Tensor]) -> nn.Module | None:
    """The smallest module alive that holds some parameters and can be called; None if there is none.

    Of modules with the same parameters it is the innermost whose class is not of PyTorch, such as `nn.Sequential`; and
    of those inside transformers' models with a head that is tied to the embedding, the one with the head.
    """
    alive = gc.get_objects()
    wanted = {id(parameter) for parameter in parameters}
    modules = (one for one in alive if issubclass(type(one), nn.Module))
    owners = [one for one in modules if not wanted.isdisjoint(map(id, vars(one).get("_parameters", {}).values()))]
    holding = [each for each in _holding(owners, wanted, alive) if type(each[1]).forward is not nn.Module.forward]
    return min(holding, key=lambda each: (each[0], *_rank(each[1])))[1] if holding else None


def _rank(model: Any) -> tuple[bool, bool]:
    """Which of several modules with the same parameters is the model: the lowest."""
    head = getattr(model, "get_output_embeddings", None)
    try:
        has_head = callable(head) and head() is not None
    except (AttributeError, NotImplementedError):
        has_head = False
    return type(model).__module__.startswith("torch."), not has_head


def _holding(start: Sequence[nn.Module], wanted: set[int], alive: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Those of some modules, and of the modules around them, that hold all wanted parameters, from the inside out.

    Each comes with its number of parameters.
    """
    parents: dict[int, list[nn.Module]] = {}
    for one in alive:
        if issubclass(type(one), nn.Module):
            for child in vars(one).get("_modules", {}).values():
                parents.setdefault(id(child), []).append(one)
    known, above = set(map(id, start)), list(start)
    for one in above:  # grows during the loop
        found = {id(parameter) for parameter in one.parameters()}
        if wanted <= found:
            yield len(found), one
        new = [parent for parent in parents.get(id(one), ()) if id(parent) not in known]
        known.update(map(id, new))
        above += new
