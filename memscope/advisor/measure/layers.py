"""The layers of a model that plans give options to, in call order, and those that are not recomputed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from memscope.advisor.measure.options import child_options
from memscope.errors import UsageError
from memscope.strategies.ckpt import LayerPlan
from memscope.strategies.ckpt.layers import list_of, named_layers, planned_layers
from memscope.strategies.statistics import keeps_statistics
from memscope.trace import PHASES, Trace

__all__ = ["LayerList", "groups_of", "layer_plan", "uniform"]

_LEAST_SHARE = 0.01
"""Lists that keep a smaller part of what all layers keep for the backward pass get no options."""
_CHILDREN = "each of the model's direct children is one layer"


@dataclass(frozen=True)
class LayerList:
    """The layers of a model, in call order."""

    names: tuple[str, ...]
    lists: tuple[str, ...]
    """The list of each layer; layers of a list get options together or not at all."""
    kinds: tuple[type[nn.Module], ...]
    children: tuple[tuple[str, ...], ...]
    """Options that the structure of each layer offers."""
    may_recompute: tuple[bool, ...]
    """Whether recomputing each layer keeps the mathematics, or may change it."""
    can_recompute: tuple[bool, ...]
    """Whether each layer can be recomputed; False where its recomputation has failed."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""
    is_named: bool = False
    """Whether the user named the lists."""
    instead: LayerList | None = None
    """The layers to plan if none of the lists can be planned."""

    @property
    def may_recompute_all(self) -> bool:
        """Whether `checkpointed` keeps the mathematics, or may change it."""
        return all(may for may, can in zip(self.may_recompute, self.can_recompute, strict=True) if can)

    @property
    def checkpointed(self) -> LayerPlan:
        """The plan in which every layer that can be recomputed is checkpointed as a whole."""
        return layer_plan(self.names, [("full" if can else "none", 1) for can in self.can_recompute])

    @classmethod
    def of(cls, model: nn.Module, name: str = "", *, exactly: bool = False) -> LayerList:
        """Find the modules of the lists in `name`, or else of all lists of repeated layers.

        Each direct child with parameters is one layer of a model without such a list.

        Args:
            model: the model.
            name: names of lists joined by +, or empty.
            exactly: recompute no layer with batch norm, whose running statistics would be updated twice.

        Raises:
            UsageError: when the model has no list of that name, or no such list and fewer than two such children.
        """
        try:
            layers = named_layers(model, name)
        except UsageError:
            if name:
                raise
            own = cls._of_children(model, exactly=exactly)
            if own is None:
                raise UsageError(
                    f"{type(model).__name__} has no repeated layers, and fewer than two direct children with "
                    "parameters: name a list of modules with --layer-list NAME"
                ) from None
            return replace(own, notes=(f"the model has no list of repeated layers: {_CHILDREN}", *own.notes))
        own = None if name else cls._of_children(model, exactly=exactly)
        return replace(cls._of_modules(model, layers, exactly=exactly), is_named=bool(name), instead=own)

    @classmethod
    def _of_children(cls, model: nn.Module, *, exactly: bool) -> LayerList | None:
        """The direct children with parameters; None if they are fewer than two."""
        names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        return None if len(names) < 2 else cls._of_modules(model, planned_layers(model, names), exactly=exactly)

    @classmethod
    def _of_modules(cls, model: nn.Module, layers: Mapping[str, nn.Module], *, exactly: bool) -> LayerList:
        may = tuple(not (exactly and keeps_statistics(layer)) for layer in layers.values())
        notes = []
        if not all(may):
            notes.append(
                f"{may.count(False)} of {len(may)} layers have batch norm and are not recomputed, because that updates "
                "the running statistics twice: allow it with --allow ckpt"
            )
        children = tuple(tuple(child_options(layer)) for layer in layers.values())
        lists = tuple(list_of(model, name) for name in layers)
        kinds = tuple(map(type, layers.values()))
        return cls(tuple(layers), lists, kinds, children, may, (True,) * len(may), tuple(notes))

    def in_call_order(self, trace: Trace) -> LayerList:
        """The same layers in the order in which they are called, without lists that cannot be planned.

        If none can be planned, the layers `instead`, whose calls are in no trace yet.

        Plans need layers that run once each, one after the other. Of several lists, those whose layers do not, and
        those that keep next to nothing, are left out with a note.

        Args:
            trace: a step without checkpoints, in which the calls of all layers were recorded (`calls_of`).

        Raises:
            UsageError: when no list is left, and there are no layers `instead`.
        """
        called = _calls(trace)
        list_of_layer = dict(zip(self.names, self.lists, strict=True))
        reasons = _unplannable(list_of_layer, called)
        if reasons.keys() >= set(self.lists):
            why = f"in one forward pass {next(iter(reasons.values()))}"
            if self.instead:
                note = f"{why}, so no list of layers can be planned: {_CHILDREN}"
                return replace(self.instead, notes=(note, *self.instead.notes))
            raise UsageError(
                f"the layers {self.names[0]} to {self.names[-1]} form no chain: {why}. Plans need layers that run once "
                "each, in order; name another list with --layer-list"
            )
        if not self.is_named:
            reasons |= _light(
                trace, list_of_layer, [row for row in called if list_of_layer[row["module"]] not in reasons]
            )
        order = [row["module"] for row in called if list_of_layer[row["module"]] not in reasons]
        if order == list(self.names):
            return self
        places = [self.names.index(name) for name in order]
        return replace(
            self,
            names=tuple(order),
            lists=tuple(self.lists[place] for place in places),
            kinds=tuple(self.kinds[place] for place in places),
            children=tuple(self.children[place] for place in places),
            may_recompute=tuple(self.may_recompute[place] for place in places),
            can_recompute=tuple(self.can_recompute[place] for place in places),
            notes=(*self.notes, *(f"{name} gets no options: {why}" for name, why in reasons.items())),
        )

    def alike(self) -> list[list[str]]:
        """The layers that can be recomputed, those of one class and of one list together."""
        groups: dict[object, list[str]] = defaultdict(list)
        for layer, name in enumerate(self.names):
            if self.can_recompute[layer]:
                groups[self.lists[layer], self.kinds[layer]].append(name)
        return list(groups.values())

    def not_recomputing(self, names: Iterable[str], why: str) -> LayerList:
        """The same layers, of which these are not recomputed, with a note that says why."""
        without = list(names)
        shown = without[0] if len(without) == 1 else f"{without[0]} and {len(without) - 1} more"
        return replace(
            self,
            can_recompute=tuple(
                can and name not in without for name, can in zip(self.names, self.can_recompute, strict=True)
            ),
            notes=(*self.notes, f"not recomputed, because that fails: {shown} ({why})"),
        )


def _calls(trace: Trace) -> list[dict[str, Any]]:
    """The calls of layers in one forward pass of the last step; none if the model only calls their `forward`."""
    rows = trace.meta.get("calls", [])
    if not rows:
        return []
    last = rows[-1]["step"], rows[-1]["micro_batch"]
    return [row for row in rows if (row["step"], row["micro_batch"]) == last]


def _unplannable(list_of_layer: Mapping[str, str], called: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Lists with layers that do not run once each, one after the other, and why."""
    counts = Counter(row["module"] for row in called)
    reasons: dict[str, str] = {}
    for name, its_list in list_of_layer.items():
        if counts[name] != 1:
            reasons.setdefault(its_list, f'"{name}" is called {counts[name]} times')
    outer: Mapping[str, Any] | None = None
    for row in called:
        its_list = list_of_layer[row["module"]]
        if its_list in reasons:
            continue
        if outer and row["began"] < outer["ended"]:
            reasons[its_list] = f'"{row["module"]}" is called inside "{outer["module"]}"'
        else:
            outer = row
    return reasons


def _light(trace: Trace, list_of_layer: Mapping[str, str], called: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Lists that keep next to nothing for the backward pass, of several."""
    here = (trace.mark_step == called[0]["step"]) & (trace.mark_micro_batch == called[0]["micro_batch"])
    turn = int(trace.mark_event[here & (trace.mark_phase == PHASES.index("backward"))][0])
    kept = (trace.born < turn) & ((trace.freed < 0) | (trace.freed >= turn))
    bytes_of: Counter[str] = Counter()
    for row in called:
        inside = kept & (trace.born >= row["began"]) & (trace.born < row["ended"])
        bytes_of[list_of_layer[row["module"]]] += int(np.sum(trace.size[inside]))
    total = bytes_of.total()
    return {
        name: f"its layers keep {size / total:.1%} of the activations that all layers keep"
        for name, size in bytes_of.items()
        if size < _LEAST_SHARE * total and name not in list_of_layer  # not a layer that is in no list
    }


def uniform(names: Sequence[str], option: str) -> LayerPlan:
    """The plan with the same option for every layer."""
    return layer_plan(names, [(option, 1)] * len(names))


def layer_plan(names: Sequence[str], options: Sequence[tuple[str, int]]) -> LayerPlan:
    """A plan from options in order, each with the number of layers that it covers."""
    layers: dict[str, str] = {}
    for option, length in options:
        head = names[len(layers)]
        layers[head] = option
        for _ in range(length - 1):
            layers[names[len(layers)]] = f"within:{head}"
    return LayerPlan(layers, {})


def groups_of(plan: LayerPlan) -> list[list[str]]:
    """The layers of a plan; the layers that one checkpoint covers form a group."""
    groups: list[list[str]] = []
    for name, option in plan.layers.items():
        if option.startswith("within:"):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
