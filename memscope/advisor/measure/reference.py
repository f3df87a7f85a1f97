"""The two steps that options are compared with: no layer, and every layer checkpointed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from memscope.advisor.measure.layers import LayerList, groups_of, uniform
from memscope.advisor.measure.probe import ChainSeen, LayerSeen, look, rounded
from memscope.advisor.measure.runner import Probe, Seen
from memscope.analysis.cost import module_seconds
from memscope.strategies.ckpt import LayerPlan
from memscope.trace import Trace

__all__ = ["Reference", "full_probe", "none_probe", "outside_bytes"]


@dataclass(frozen=True)
class Reference:
    """The simulated step without checkpointing, and with every layer checkpointed as a whole that can be."""

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
        """The layers with `LayerList.checkpointed`, in each deciding micro-batch."""
        return self.look(self.full, self.layers.checkpointed, 1)

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
        """The class of each layer, as a number; layers of one class are alike, and of one list."""
        known: dict[object, int] = {}
        layers = self.layers
        return [
            known.setdefault(
                (
                    layers.lists[layer],
                    layers.can_recompute[layer],
                    layers.children[layer],
                    tuple(_alike(chain.layers[layer]) for chain in self.none_chains),
                ),
                len(known),
            )
            for layer in range(len(layers.names))
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
    """The simulation of a step with every layer checkpointed as a whole that can be."""
    return replace(none_probe(strategies, layers, capacity_bytes), layers=layers.checkpointed)
