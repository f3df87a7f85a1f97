"""Find the model to which a module belongs, in a program that tells nobody what its model is."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

__all__ = ["model_of"]


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
    parents: dict[int, list[nn.Module]] = {}
    for one in alive:
        if issubclass(type(one), nn.Module):
            for child in vars(one).get("_modules", {}).values():
                parents.setdefault(id(child), []).append(one)
    holding: list[tuple[int, Any]] = []
    known, above = {id(module)}, [module]
    for one in above:  # grows during the loop
        found = {id(parameter) for parameter in one.parameters()}
        if wanted <= found:
            holding.append((len(found), one))
        new = [parent for parent in parents.get(id(one), ()) if id(parent) not in known]
        known.update(map(id, new))
        above += new
    return min(holding, key=lambda each: each[0])[1] if holding else module
