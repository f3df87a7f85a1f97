"""The combinations of strategies that were simulated, and what they tell of those that were not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from memscope.advisor.measure.layers import LayerList
from memscope.advisor.measure.reference import Reference, full_probe, none_probe, outside_bytes
from memscope.advisor.measure.runner import Asker, Seen
from memscope.advisor.planning import device_bytes
from memscope.errors import MemscopeError, UsageError
from memscope.simulation.device_memory import SMALL_SEGMENT_BYTES
from memscope.strategies import Plan, Strategy

__all__ = ["Tried"]

_CHECKPOINTED = 1.2
"""Step time with checkpoints over that without, to order combinations: recomputing all forwards would give 1.33."""


@dataclass
class Tried:
    """Simulates combinations of strategies and keeps the results. Checkpoint plans are in `Planning`."""

    ask: Asker
    layers: LayerList
    budget_bytes: int
    limit_bytes: int
    """Bytes that the allocator may reserve."""
    plain: dict[str, Seen] = field(default_factory=dict)
    """The combinations without checkpointing, by their strategies."""
    references: dict[str, Reference] = field(default_factory=dict)
    """The combinations that were also simulated with every layer checkpointed."""
    refused: dict[str, MemscopeError] = field(default_factory=dict)
    """The errors of combinations that cannot be run."""

    def simulated(self, plans: Iterable[Plan]) -> dict[str, Seen]:
        """Each combination without checkpointing, by its text, except those that cannot be run."""
        texts = [str(plan) for plan in plans]
        answers = self.ask(
            "combinations of strategies", [none_probe(text, self.layers, self.budget_bytes) for text in texts]
        )
        found = {}
        for text, answer in zip(texts, answers, strict=True):
            if isinstance(answer, MemscopeError):
                self.refused[text] = answer
            else:
                found[text] = answer
        return found

    def checkpoint(self, texts: Sequence[str]) -> list[tuple[str, MemscopeError]]:
        """Simulate combinations with every layer checkpointed; returns those that fail, with their errors."""
        new = [text for text in dict.fromkeys(texts) if text not in self.references]
        probes = [full_probe(text, self.layers, self.budget_bytes) for text in new]
        failed = []
        for text, answer in zip(new, self.ask("every layer checkpointed", probes), strict=True):
            if isinstance(answer, MemscopeError):
                failed.append((text, answer))
            else:
                self.references[text] = Reference(text, self.layers, self.plain[text], answer)
        return failed

    def outside(self, text: str) -> int:
        """Peak bytes of a combination outside its layers: no checkpoint plan needs less."""
        return outside_bytes(self.plain[text].trace, [[name] for name in self.layers.names])

    def worthwhile(self, texts: Sequence[str]) -> list[str]:
        """The combinations, given in order of cost, for which checkpointing may give the cheapest plan.

        Left out are combinations that need more than the budget outside the layers, where checkpointing changes
        nothing, and combinations that a cheaper one equals in memory, both at the peak and outside the layers.
        """
        kept: list[tuple[str, tuple[int, int]]] = []
        for text in texts:
            needs = self.outside(text), self.plain[text].trace.peak.allocated_bytes
            if needs[0] <= self.limit_bytes and not any(_no_more(others, needs) for _, others in kept):
                kept.append((text, needs))
        return [text for text, _ in kept]

    def promise(self, plan: Plan, base: Plan) -> float:
        """The order in which to try combinations: by estimated time, longer for those that seem to need checkpoints."""
        seconds, size_bytes = self.estimate(plan, base)
        return seconds * (_CHECKPOINTED if size_bytes > self.budget_bytes else 1)

    def estimate(self, plan: Plan, base: Plan) -> tuple[float, int]:
        """Time and memory of a combination, estimated from its strategies alone: enough to order combinations."""
        start = self.plain.get(str(base)) or next(iter(self.plain.values()))
        seconds, size_bytes = start.seconds, device_bytes(start)
        for strategy in plan.strategies:
            alone = self.alone(strategy, base)
            if alone:
                seconds *= alone.seconds / start.seconds
                size_bytes += device_bytes(alone) - device_bytes(start)
        return seconds, size_bytes

    def is_known(self, strategy: Strategy, base: Plan) -> bool:
        """Whether every plan uses a strategy, or it was simulated alone, or cannot be because it requires others."""
        return strategy in base.strategies or bool(strategy.requires) or self.alone(strategy, base) is not None

    def alone(self, strategy: Strategy, base: Plan) -> Seen | None:
        """The simulation with this strategy alone; None if every plan uses it, or it requires others."""
        if strategy in base.strategies:
            return None
        try:
            return self.plain.get(str(Plan.of(*base.strategies, strategy)))
        except UsageError:
            return None


def _no_more(some: tuple[int, int], others: tuple[int, int]) -> bool:
    """Whether some peaks are no higher than others, up to a small segment of the allocator."""
    return all(a <= b + SMALL_SEGMENT_BYTES for a, b in zip(some, others, strict=True))
