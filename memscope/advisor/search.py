"""Search for the cheapest plan that fits a budget: the strategies, and the layers to checkpoint.

Every combination of strategies is simulated; effects are never added up. A combination that fits needs no
checkpointing; for the others, the planner chooses the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memscope.advisor.advice import Certificate
from memscope.advisor.combinations import halfway, some_settings, with_one_more
from memscope.advisor.measure.layers import LayerList, layer_plan
from memscope.advisor.measure.options import spread
from memscope.advisor.measure.reference import Reference
from memscope.advisor.measure.runner import Asker, require
from memscope.advisor.planning import Found, Planning, device_bytes, fits
from memscope.advisor.tried import Tried
from memscope.allocator.settings import AllocatorSettings
from memscope.errors import MemscopeError
from memscope.simulation.devices.catalogue import Device
from memscope.strategies import Plan, Strategy

__all__ = ["Search"]

_MOST_COMBINATIONS = 12
"""Combinations that are simulated first, unless there are too many strategies to leave room for `_LEAST_COMBINED`."""
_LEAST_COMBINED = 3
"""Combinations of several strategies among them."""
_MOST_SETTINGS = 4
"""Settings of one strategy that are simulated before combinations of strategies."""
_MOST_LEAN = 6
"""Further combinations that are tried when none of the first fits."""
_MOST_REFINEMENTS = 6
_MOST_FULL = 6
_MOST_PLANNED = 3
_CLOSE = 1.1
"""Memory with every layer checkpointed over the budget, up to which other options are tried."""
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
    other_budgets: bool = True
    """Whether plans for other budgets will be asked for: they are simulated beside the first plan."""
    best: Found | None = None
    _settings: dict[str, list[Any]] = field(default_factory=dict)
    """The settings of each optional strategy, in the order of its candidates; the first are preferred."""
    _planned: set[str] = field(default_factory=set)
    """The combinations for which checkpoints were planned."""

    def __post_init__(self) -> None:
        self.planning = Planning(self.ask, self.layers, self.device, self.allocator, self.budget_bytes)
        self.tried = Tried(self.ask, self.layers, self.budget_bytes, self.budget_bytes - self.device.context_bytes)

    def run(self, plans: Sequence[Plan]) -> None:
        """Look for the cheapest plan among combinations; the first has no optional strategy.

        Some settings of each strategy alone are simulated first, then the most promising combinations of those, and
        then, for strategies with more settings, the settings next to those of the best plan.

        Raises:
            MemscopeError: when no combination can be run.
        """
        for strategy in (strategy for plan in plans for strategy in plan.strategies):
            known = self._settings.setdefault(strategy.name, [])
            if strategy.config not in known:
                known.append(strategy.config)
        base = plans[0]
        first = [base, *some_settings(base, plans, _MOST_SETTINGS)]
        self.tried.plain.update(self.tried.simulated(first))
        if not self.tried.plain:
            raise next(iter(self.tried.refused.values()))
        self.order_layers()
        others = [plan for plan in plans if len(plan.strategies) > len(base.strategies) + 1]
        others = [plan for plan in others if all(self.tried.is_known(strategy, base) for strategy in plan.strategies)]
        room = max(_LEAST_COMBINED, _MOST_COMBINATIONS - len(first))
        self._try(sorted(others, key=lambda plan: self.tried.promise(plan, base))[:room])
        if self.best is None:  # the combinations that seem to need the least memory
            untried = [
                plan for plan in others if str(plan) not in self.tried.plain and str(plan) not in self.tried.refused
            ]
            self._try(sorted(untried, key=lambda plan: self.tried.estimate(plan, base)[1])[:_MOST_LEAN])
        if self.best is None:
            self._take_leanest()
        self._refine(base, plans)

    def order_layers(self) -> None:
        """Put the layers into the order in which the first simulated combination calls them.

        If other layers are planned instead, the combinations are simulated again, to see their calls.

        Raises:
            UsageError: when no layers can be planned.
        """
        before = self.layers
        self._plan_for(before.in_call_order(next(iter(self.tried.plain.values())).trace))
        if before.instead and not self.layers.instead:
            self.tried.plain = self.tried.simulated([Plan.parse(text) for text in self.tried.plain])
            self.order_layers()

    def _plan_for(self, layers: LayerList) -> None:
        self.layers = self.planning.layers = self.tried.layers = layers

    def untried(self, plans: Sequence[Plan]) -> list[str]:
        """The combinations that may hold a cheaper plan than the best, or a plan at all where none was found.

        Those that were simulated without checkpoints end with `ckpt`.
        """
        texts = [text for text in map(str, plans) if not self._is_settled(text)]
        return [f"{text},ckpt".lstrip(",") if text in self.tried.plain else text for text in texts]

    def _is_settled(self, text: str) -> bool:
        """Whether nothing cheaper than the best plan can be expected of a combination; checkpoints only add time."""
        if text not in self.tried.plain:
            return text in self.tried.refused
        return (
            text in self._planned
            or not self._is_cheaper(text, self.tried.plain[text].seconds)
            or self.tried.outside(text) > self.tried.limit_bytes
        )

    def _try(self, plans: Sequence[Plan]) -> None:
        """Simulate more combinations, then look for the cheapest plan among all simulated ones."""
        plain, references = self.tried.plain, self.tried.references
        plain.update(self.tried.simulated(plans))
        by_cost = sorted(plain, key=lambda text: self._cost(text, plain[text].seconds))
        fitting = [text for text in by_cost if fits(plain[text])]
        for text in fitting:
            if not self._is_cheaper(text, plain[text].seconds) or self._take_plain(text):
                break
        cheaper = [text for text in by_cost if self._is_cheaper(text, plain[text].seconds)]
        worthwhile = self.tried.worthwhile([text for text in cheaper if text not in fitting])
        self._checkpoint(spread([text for text in worthwhile if text not in references], _MOST_FULL))
        known = [text for text in cheaper if text in references and fits(references[text].full)]
        close = [text for text in cheaper if text in references and text not in known and self._is_close(text)]
        planned = [text for text in self._first_of_kind([*known, *close]) if text not in self._planned][:_MOST_PLANNED]
        promises = {text: self.planning.promise(references[text]) for text in planned}
        for text in sorted(promises, key=lambda text: self._cost(text, promises[text])):
            self._planned.add(text)
            if self._is_cheaper(text, promises[text]):
                self._take(self.planning.within(references[text], look_ahead=self.other_budgets and self.best is None))
        for text in known:
            self._take_full(references[text])

    def _is_close(self, text: str) -> bool:
        """Whether other options may fit though a checkpoint around every layer does not."""
        return device_bytes(self.tried.references[text].full) <= _CLOSE * self.budget_bytes

    def _take_full(self, reference: Reference) -> None:
        """Take a combination with every layer checkpointed; one option for all layers fragments memory less."""
        if reference.layers.may_recompute_all and self._is_cheaper(reference.strategies, reference.full_seconds):
            found = Found(reference.strategies, reference.layers.checkpointed, reference.full, reference.full_seconds)
            self._take(self.planning.certified(reference, self.whole(found)))

    def _take_leanest(self) -> None:
        """Take the cheapest plan of the combination that needs the least memory, if checkpoints may make it fit."""
        open_ones = [text for text in self.tried.plain if self.tried.outside(text) <= self.tried.limit_bytes]
        if not open_ones:
            return
        reference = self._leanest(open_ones)
        self._planned.add(reference.strategies)
        self._take(self.planning.within(reference))
        if self.best is None:
            least = self.planning.least(reference)
            if fits(least.seen):
                self._take(self.planning.certified(reference, self.whole(least)))

    def _refine(self, base: Plan, plans: Sequence[Plan]) -> None:
        """Try what may improve the best plan: settings next to its own, and strategies that cost nothing."""
        by_text = {str(plan): plan for plan in plans}
        for _ in range(_MOST_REFINEMENTS):
            if self.best is None:
                return
            before, tried = self.best, self.tried.plain.keys() | self.tried.refused.keys()
            best = by_text[before.strategies]
            near = [plan for plan in halfway(best, plans, tried, _MOST_SETTINGS) if plan is not best]
            near += [plan for plan, more in with_one_more(best, plans) if self._is_free(more, base)]
            self._try([plan for plan in near if str(plan) not in tried])
            if self.best is before and not near:
                return

    def _is_free(self, strategy: Strategy, base: Plan) -> bool:
        """Whether a strategy alone needs neither more time nor more memory than `base`."""
        start, alone = self.tried.plain.get(str(base)), self.tried.alone(strategy, base)
        if start is None or alone is None:
            return False
        return alone.seconds <= start.seconds and device_bytes(alone) <= device_bytes(start)

    def least(self) -> Found:
        """The plan that needs the least memory of those simulated.

        Checkpoints are planned for the combination that needs the least with all layers checkpointed, or for the best
        one if both use the same strategies.
        """
        return self.planning.least(self._leanest(self.tried.plain))

    def _leanest(self, texts: Collection[str]) -> Reference:
        leanest = min(texts, key=lambda text: device_bytes(self.tried.plain[text]))
        self._checkpoint([leanest, min(texts, key=self.tried.outside)])
        by_need = sorted(
            (text for text in texts if text in self.tried.references),
            key=lambda text: device_bytes(self.tried.references[text].full),
        )
        known = self.best.strategies if self.best else ""
        return self.tried.references[
            known if known in by_need and self._kind(known) == self._kind(by_need[0]) else by_need[0]
        ]

    def whole(self, found: Found) -> Found:
        """A plan simulated with every micro-batch."""
        (answer,) = self.ask("the plan", [self.planning.probe(found.strategies, found.layers, whole=True)])
        return replace(found, seen=require(answer))

    def reference(self, text: str) -> Reference:
        """A combination with and without checkpointing."""
        self._checkpoint([text])
        return self.tried.references[text]

    def _checkpoint(self, texts: Sequence[str]) -> None:
        """Simulate combinations with every layer checkpointed; layers whose recomputation fails are left out."""
        failed = self.tried.checkpoint(texts)
        if failed:
            self._stop_recomputing(*failed[0])
            self._checkpoint([text for text, _ in failed])

    def _stop_recomputing(self, text: str, error: MemscopeError) -> None:
        """Find the layers whose recomputation fails with a combination, and leave it out.

        Raises:
            MemscopeError: the error itself, when each layer alone can be recomputed.
        """
        groups = self.layers.alike()
        plans = [
            layer_plan(self.layers.names, [("full" if name in group else "none", 1) for name in self.layers.names])
            for group in groups
        ]
        answers = self.ask("one layer checkpointed", [self.planning.probe(text, plan, whole=False) for plan in plans])
        failed = [
            (group, answer) for group, answer in zip(groups, answers, strict=True) if isinstance(answer, MemscopeError)
        ]
        if not failed:
            raise error
        for group, answer in failed:
            self._plan_for(self.layers.not_recomputing(group, str(answer).splitlines()[0]))

    def _take(self, found: Found | None) -> bool:
        if found and fits(found.seen) and self._is_cheaper(found.strategies, found.seconds):
            self.best = found
        return self.best is found and found is not None

    def _is_cheaper(self, text: str, seconds: float) -> bool:
        return self.best is None or self._cost(text, seconds) < self._cost(self.best.strategies, self.best.seconds)

    def _cost(self, text: str, seconds: float) -> float:
        """The cost by which combinations are compared: time, and a surcharge for each setting that is not preferred."""
        strategies = Plan.parse(text).strategies
        others: int = sum(not self.is_exact(s) and s.config != self._settings[s.name][0] for s in strategies)
        return seconds * _WORTH_IT**others

    def _take_plain(self, text: str) -> bool:
        """Take a combination without checkpointing, if it also fits with every micro-batch."""
        seconds = self.tried.plain[text].seconds
        found = Found(text, None, self.tried.plain[text], seconds, Certificate.of(seconds, seconds, seconds))
        return self._take(self.whole(found))

    def _first_of_kind(self, texts: Iterable[str]) -> list[str]:
        """The first combination of each kind, and those for which checkpoints were planned already."""
        kinds = {self._kind(text): text for text in self._planned}
        for text in texts:
            kinds.setdefault(self._kind(text), text)
        return list(kinds.values())

    def _kind(self, text: str) -> tuple[str, ...]:
        """The strategies of a combination; settings only of exact ones: settings of others serve the mathematics."""
        return tuple(s.spec if self.is_exact(s) else s.name for s in Plan.parse(text).strategies)
