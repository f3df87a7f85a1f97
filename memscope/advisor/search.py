"""Search for the cheapest plan that fits a budget: the strategies, and the layers to checkpoint.

Every combination of strategies is simulated; effects are never added up. A combination that fits needs no
checkpointing; for the others, the planner chooses the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memscope.advisor.advice import Certificate
from memscope.advisor.measure.reference import LayerList, Reference, full_probe, none_probe, outside_bytes, seconds_of
from memscope.advisor.measure.runner import Asker, Probe, Seen, require
from memscope.advisor.planning import Found, Planning, device_bytes, fits
from memscope.allocator.settings import AllocatorSettings
from memscope.errors import MemscopeError
from memscope.simulation.device_memory import SMALL_SEGMENT_BYTES
from memscope.simulation.devices.catalogue import Device
from memscope.strategies import Plan, Strategy

__all__ = ["Search"]

_MOST_COMBINATIONS = 12
_MOST_LEAN = 6
"""Further combinations that are tried when none of the first fits."""
_MOST_FULL = 6
_MOST_PLANNED = 3
_WORTH_IT = 1.01
"""Extra step time that is accepted for the preferred settings of a strategy that changes the mathematics."""


@dataclass
class Search:
    """One search; it keeps what it has found if it is interrupted."""

    ask: Asker
    layers: LayerList
    device: Device
    allocator: AllocatorSettings
    budget_bytes: int
    is_exact: Callable[[Strategy], bool]
    """Whether a strategy is exact for the workload."""
    plain: dict[str, Seen] = field(default_factory=dict)
    """The simulated combinations without checkpointing, by their strategies."""
    references: dict[str, Reference] = field(default_factory=dict)
    """The combinations that were also simulated with every layer checkpointed."""
    refused: dict[str, MemscopeError] = field(default_factory=dict)
    """The errors of combinations that cannot be run."""
    best: Found | None = None
    _preferred: dict[str, Any] = field(default_factory=dict)
    """The preferred settings of each strategy: the first of its candidates."""

    def __post_init__(self) -> None:
        self.planning = Planning(self.ask, self.device, self.allocator, self.budget_bytes)

    def run(self, plans: Sequence[Plan]) -> None:
        """Look for the cheapest plan among combinations; the first has no optional strategy.

        Raises:
            MemscopeError: when no combination can be run.
        """
        for strategy in (strategy for plan in plans for strategy in plan.strategies):
            self._preferred.setdefault(strategy.name, strategy.config)
        base, single = plans[0], [plan for plan in plans if len(plan.strategies) <= len(plans[0].strategies) + 1]
        self.plain.update(self.simulated(single))
        if not self.plain:
            raise next(iter(self.refused.values()))
        others = [plan for plan in plans if plan not in single]
        room = max(0, _MOST_COMBINATIONS - len(single))
        self._try(sorted(others, key=lambda plan: self._promise(plan, base))[:room])
        if self.best is None:  # before nothing fits: the combinations that seem to need the least memory
            untried = [plan for plan in others if str(plan) not in self.plain and str(plan) not in self.refused]
            self._try(sorted(untried, key=lambda plan: self._estimate(plan, base)[1])[:_MOST_LEAN])

    def _try(self, plans: Sequence[Plan]) -> None:
        """Simulate more combinations, then look for the cheapest plan among all simulated ones."""
        self.plain.update(self.simulated(plans))
        by_cost = sorted(self.plain, key=lambda text: self._cost(text, seconds_of(self.plain[text])))
        fitting = [text for text in by_cost if fits(self.plain[text])]
        for text in fitting:
            if self._take_plain(text):
                break
        cheaper = [text for text in by_cost if self._is_cheaper(text, seconds_of(self.plain[text]))]
        self._checkpoint(self._worthwhile([text for text in cheaper if text not in fitting])[:_MOST_FULL])
        planned = _first_of_kind(text for text in self.references if fits(self.references[text].full))[:_MOST_PLANNED]
        promises = {text: self.planning.promise(self.references[text]) for text in planned}
        for text in sorted(promises, key=lambda text: self._cost(text, promises[text])):
            if self._is_cheaper(text, promises[text]):
                self._take(self.planning.within(self.references[text], look_ahead=self.best is None))

    def least(self) -> Found:
        """The plan that needs the least memory; it becomes the best plan if no other plan fits.

        Checkpoints are planned for the combination that needs the least with all layers checkpointed, or for the best
        one if both use the same strategies.
        """
        leanest = min(self.plain, key=lambda text: device_bytes(self.plain[text]))
        self._checkpoint([leanest, min(self.plain, key=self._outside)])
        by_need = sorted(self.references, key=lambda text: device_bytes(self.references[text].full))
        known = self.best.strategies if self.best else ""
        text = known if known in by_need and _kind(known) == _kind(by_need[0]) else by_need[0]
        reference = self.references[text]
        if self.best is None:
            self._take(self.planning.within(reference))
        least = self.planning.least(reference)
        if self.best is None and fits(least.seen):
            self._take(self.planning.whole(reference, least))
        return least

    def reference(self, text: str) -> Reference:
        """A combination with and without checkpointing."""
        self._checkpoint([text])
        return self.references[text]

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

    def _worthwhile(self, texts: Sequence[str]) -> list[str]:
        """The combinations, given in order of cost, for which checkpointing may give the cheapest plan.

        Left out are combinations that need more than the budget outside the layers, where checkpointing changes
        nothing, and combinations that a cheaper one equals in memory, both at the peak and outside the layers.
        """
        limit = self.budget_bytes - self.device.context_bytes
        kept: list[tuple[str, tuple[int, int]]] = []
        for text in texts:
            needs = self._outside(text), self.plain[text].trace.peak.allocated_bytes
            if needs[0] <= limit and not any(_no_more(others, needs) for _, others in kept):
                kept.append((text, needs))
        return [text for text, _ in kept]

    def _outside(self, text: str) -> int:
        """Peak bytes of a combination outside its layers: no checkpoint plan needs less."""
        return outside_bytes(self.plain[text].trace, [[name] for name in self.layers.names])

    def _checkpoint(self, texts: Sequence[str]) -> None:
        """Simulate combinations with every layer checkpointed."""
        new = [text for text in dict.fromkeys(texts) if text not in self.references]
        probes = [full_probe(text, self.layers, self.budget_bytes) for text in new]
        for text, answer in zip(new, self.ask("every layer checkpointed", probes), strict=True):
            self.references[text] = Reference(text, self.layers, self.plain[text], require(answer))

    def _promise(self, plan: Plan, base: Plan) -> tuple[bool, float]:
        """The order in which to try combinations: those that seem to fit first, then by estimated time."""
        seconds, size_bytes = self._estimate(plan, base)
        return size_bytes > self.budget_bytes, seconds

    def _estimate(self, plan: Plan, base: Plan) -> tuple[float, int]:
        """Time and memory of a combination, estimated from its strategies alone: enough to order combinations."""
        start = self.plain.get(str(base)) or next(iter(self.plain.values()))
        seconds, size_bytes = seconds_of(start), device_bytes(start)
        for strategy in plan.strategies:
            alone = self._alone(strategy, base)
            if alone:
                seconds *= seconds_of(alone) / seconds_of(start)
                size_bytes += device_bytes(alone) - device_bytes(start)
        return seconds, size_bytes

    def _alone(self, strategy: Strategy, base: Plan) -> Seen | None:
        """The simulation with this strategy alone; None if every plan uses it."""
        return None if strategy in base.strategies else self.plain.get(str(Plan.of(*base.strategies, strategy)))

    def _take(self, found: Found | None) -> bool:
        if found and fits(found.seen) and self._is_cheaper(found.strategies, found.seconds):
            self.best = found
        return self.best is found and found is not None

    def _is_cheaper(self, text: str, seconds: float) -> bool:
        return self.best is None or self._cost(text, seconds) < self._cost(self.best.strategies, self.best.seconds)

    def _cost(self, text: str, seconds: float) -> float:
        """The cost by which combinations are compared: time, and a surcharge for each setting that is not preferred."""
        strategies = Plan.parse(text).strategies
        others: int = sum(not self.is_exact(s) and s.config != self._preferred[s.name] for s in strategies)
        return seconds * _WORTH_IT**others

    def _take_plain(self, text: str) -> bool:
        """Take a combination without checkpointing, if it also fits with every micro-batch."""
        probe = Probe(text, calls_of=self.layers.names, capacity_bytes=self.budget_bytes)
        (answer,) = self.ask("the plan", [probe])
        seconds = seconds_of(self.plain[text])
        return self._take(Found(text, None, require(answer), seconds, Certificate.of(seconds, seconds, seconds)))


def _first_of_kind(texts: Iterable[str]) -> list[str]:
    """The first combination of each set of strategies, whatever their settings."""
    kinds: dict[tuple[str, ...], str] = {}
    for text in texts:
        kinds.setdefault(_kind(text), text)
    return list(kinds.values())


def _kind(text: str) -> tuple[str, ...]:
    return tuple(strategy.name for strategy in Plan.parse(text).strategies)


def _no_more(some: tuple[int, int], others: tuple[int, int]) -> bool:
    """Whether some peaks are no higher than others, up to a small segment of the allocator."""
    return all(a <= b + SMALL_SEGMENT_BYTES for a, b in zip(some, others, strict=True))
