"""The parameters of an optimizer after its model was changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["TrainedBefore"]


@dataclass(frozen=True)
class TrainedBefore:
    """The parameters of a model before it is changed."""

    parameters: dict[str, nn.Parameter]
    """All of them by name; one with several names has them all."""
    trained: frozenset[int]
    """Ids of those that the program trains."""

    @classmethod
    def of(cls, model: nn.Module, frozen: Collection[int]) -> TrainedBefore:
        """The parameters of a model as it is; `frozen`: ids of those that only the plan does not train."""
        found = dict(model.named_parameters(remove_duplicate=False))
        trained = (id(one) for one in found.values() if one.requires_grad or id(one) in frozen)
        return cls(found, frozenset(trained))

    @property
    def frozen_now(self) -> set[int]:
        """Ids of the parameters that are no longer trained."""
        every = self.parameters.values()
        return {id(one) for one in every if id(one) in self.trained and not one.requires_grad}

    def regrouped(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """An optimizer like one that was built before the model was changed, for the parameters that are trained now.

        Groups keep their options and their places, even if they are left empty. Parameters that no longer require a
        gradient leave their groups; one that another replaces gives its place to it; a new one joins the group of its
        module's other parameters, or else the first.
        """
        now = dict(model.named_parameters(remove_duplicate=False))
        old = {id(parameter): name for name, parameter in self.parameters.items()}
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in optimizer.param_groups]
        places: dict[str, int] = {}  # by name of a module
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = old.get(id(parameter))
                places.setdefault("" if name is None else name.rpartition(".")[0], index)
                kept = parameter if name is None else now.get(name, parameter)
                if kept.requires_grad or id(parameter) not in self.trained:
                    groups[index]["params"].append(kept)
        new = {id(one): (name, one) for name, one in now.items() if name not in self.parameters and id(one) not in old}
        for name, parameter in new.values():
            if parameter.requires_grad:
                groups[places.get(name.rpartition(".")[0], 0)]["params"].append(parameter)
        self._name(groups, now)
        like: Any = object.__new__(type(optimizer))
        vars(like).update(vars(optimizer))
        like.param_groups = groups
        return like  # type: ignore[no-any-return]

    @staticmethod
    def _name(groups: list[dict[str, Any]], now: dict[str, nn.Parameter]) -> None:
        """Name the parameters of groups that were built from named ones."""
        names = {id(parameter): name for name, parameter in now.items()}
        for group in groups:
            if "param_names" in group:
                group["param_names"] = [names.get(id(one), "") for one in group["params"]]
