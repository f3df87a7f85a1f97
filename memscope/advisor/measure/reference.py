"""The layers of a model, and the two steps that options are compared with: no layer and every layer checkpointed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from memscope.advisor.measure.options import child_options
from memscope.advisor.measure.probe import ChainSeen, LayerSeen, look, rounded
from memscope.advisor.measure.runner import Probe, Seen
from memscope.analysis.cost import module_seconds
from memscope.errors import UsageError
from memscope.strategies.ckpt import LayerPlan
from memscope.strategies.ckpt.layers import named_layers, planned_layers
from memscope.strategies.statistics import keeps_statistics
from memscope.trace import Trace

__all__ = [
    "LayerList", "Reference", "full_probe", "groups_of", "layer_plan", "none_probe", "outside_bytes",
    "uniform",
]  # fmt: skip


@dataclass(frozen=True)
class LayerList:
    """The layers of a model, in call order."""

    names: tuple[str, ...]
    children: tuple[tuple[str, ...], ...]
    """Options that the structure of each layer offers."""

    may_recompute: tuple[bool, ...]
    """Whether recomputing each layer keeps the mathematics, or may change it."""

    notes: tuple[str, ...] = ()
    """Sentences for the user."""

    @property
    def may_recompute_all(self) -> bool:
        """Whether every layer may be checkpointed as a whole."""
        return all(self.may_recompute)

    @classmethod
    def of(cls, model: nn.Module, name: str = "", *, exactly: bool = False) -> LayerList:
        """Find the modules of the list `name`, or else of the largest list of modules of one class.

        Each direct child with parameters is one layer of a model without such a list.

        Args:
            model: the model.
            name: name of the list, or empty.
            exactly: recompute no layer with batch norm, whose running statistics would be updated twice.

        Raises:
            UsageError: when the model has no list of that name, or fewer than two such children.
        """
        notes = []
        try:
            layers = named_layers(model, name)
        except UsageError:
            if name:
                raise
            own = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
            layers = planned_layers(model, own) if own else {}
            notes.append("the model has no list of repeated layers: each of its direct children is one layer")
            if len(layers) < 2:
                raise UsageError(
                    f"{type(model).__name__} has no repeated layers, and fewer than two direct children with "
                    "parameters: name a list of modules with --layer-list NAME"
                ) from None
        may = tuple(not (exactly and keeps_statistics(layer)) for layer in layers.values())
        if not all(may):
            notes.append(
                f"{may.count(False)} of {len(may)} layers have batch norm and are not recomputed, because that updates "
                "the running statistics twice: allow it with --allow ckpt"
            )
        return cls(tuple(layers), tuple(tuple(child_options(layer)) for layer in layers.values()), may, tuple(notes))


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


@dataclass(frozen=True)
class Reference:
    """The simulated step without checkpointing, and with every layer checkpointed as a whole."""

    strategies: str
    layers: LayerList
    none: Seen
    full: Seen

    @cached_property
    def steps(self) -> int:
        """Steps that a probe needs: two if the first micro-batch decides, where kernels first take their workspaces."""
        return 2 if 0 in self.deciding else 1

    @cached_property
    def deciding(self) -> list[int]:
        """Micro-batches, as run, that may hold the peak: the last one, and the first if it is larger."""
        sizes = [self.none.elements[index] for index in self.none.indices]
        last = len(sizes) - 1
        return [last] if last and sizes[last] >= sizes[0] else sorted({0, last})

    def look(self, seen: Seen, plan: LayerPlan, step: int) -> list[ChainSeen]:
        """The bytes of the layers in a probe, for each deciding micro-batch."""
        groups = groups_of(plan)
        pieces = [seen.indices.index(self.none.indices[piece]) for piece in self.deciding]
        return [look(seen.trace, groups, step=step, micro_batch=piece) for piece in pieces]

    def seconds(self, seen: Seen, names: Iterable[str], step: int) -> float:
        """Estimated time of layers in one step, over all micro-batches."""
        found = list(names)
        return seen.of_step(
            [
                sum(module_seconds(seen.trace, name, step=step, micro_batch=piece) for name in found)
                for piece in range(len(seen.indices))
            ]
        )

    @property
    def none_seconds(self) -> float:
        """Estimated time of a whole step without checkpointing."""
        return self.none.seconds

    @property
    def full_seconds(self) -> float:
        """Estimated time of a whole step with every layer checkpointed."""
        return self.full.seconds

    @cached_property
    def none_chains(self) -> list[ChainSeen]:
        """The layers without checkpointing, in each deciding micro-batch."""
        return self.look(self.none, uniform(self.layers.names, "none"), 1)

    @cached_property
    def full_chains(self) -> list[ChainSeen]:
        """The layers, each checkpointed as a whole, in each deciding micro-batch."""
        return self.look(self.full, uniform(self.layers.names, "full"), 1)

    def is_alike(self, other: Reference) -> bool:
        """Whether the layers take the same bytes with the strategies of another reference."""
        return self.deciding == other.deciding and all(
            _alike(one) == _alike(two)
            for mine, theirs in ((self.none_chains, other.none_chains), (self.full_chains, other.full_chains))
            for a, b in zip(mine, theirs, strict=True)
            for one, two in zip(a.layers, b.layers, strict=True)
        )

    @cached_property
    def classes(self) -> list[int]:
        """The class of each layer, as a number; layers of one class are alike."""
        known: dict[object, int] = {}
        return [
            known.setdefault(
                (self.layers.children[layer], tuple(_alike(chain.layers[layer]) for chain in self.none_chains)),
                len(known),
            )
            for layer in range(len(self.layers.names))
        ]


def outside_bytes(trace: Trace, groups: Sequence[Sequence[str]]) -> int:
    """Peak allocated bytes where options change nothing: before and after the layers, and in the optimizer."""
    allocated = replace(trace, size=rounded(trace)).allocated.copy()
    for step, micro_batch in {(row["step"], row["micro_batch"]) for row in trace.meta["calls"]}:
        first, last = look(trace, groups, step=step, micro_batch=micro_batch).span
        allocated[first:last] = 0
    return int(allocated.max(initial=0))


def _alike(seen: LayerSeen) -> tuple[object, ...]:
    return (
        seen.signature, seen.kept_bytes, seen.held_bytes, seen.input_bytes, seen.keeps_input, seen.forward_rise_bytes,
        seen.backward_rise_bytes,
    )  # fmt: skip


def none_probe(strategies: str, layers: LayerList, capacity_bytes: int) -> Probe:
    """The simulation of a step without checkpointing."""
    return Probe(strategies, calls_of=layers.names, whole=False, capacity_bytes=capacity_bytes)


def full_probe(strategies: str, layers: LayerList, capacity_bytes: int) -> Probe:
    """The simulation of a step with every layer checkpointed as a whole."""
    return replace(none_probe(strategies, layers, capacity_bytes), layers=uniform(layers.names, "full"))
