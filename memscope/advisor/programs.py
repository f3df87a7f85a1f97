"""Find a plan that makes a program fit a budget, by running the program again for each plan that is tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

from memscope.advisor.advice import Advice, FrontPoint, PlanPeak, binding_of, unbeaten
from memscope.advisor.combinations import CHECKPOINTING
from memscope.advisor.layer_words import in_words
from memscope.allocator.settings import AllocatorSettings
from memscope.analysis.cost import step_seconds
from memscope.analysis.notes import notes_of
from memscope.errors import MemscopeError, UsageError
from memscope.program.request import Offer, Offers
from memscope.simulation.device_memory import least_reserved
from memscope.simulation.devices.catalogue import Device
from memscope.strategies import Plan, read_strategies
from memscope.trace import Trace
from memscope.units import format_bytes

__all__ = ["ProgramAdvisor", "RunProgram"]

RunProgram = Callable[[str], tuple[Trace, Offers | None]]
"""Simulates the program with a plan, on a device with the budget's memory.

A run without a trace raises a MemscopeError."""
_MOST_COMBINATIONS = 24
"""Each costs a run of the program, and more with checkpoints."""


@dataclass(frozen=True)
class _Ran:
    """A plan with which the program was run."""

    text: str
    """The strategies without checkpointing."""
    checkpointed: int
    """Number of layers, from the first on, that are checkpointed."""
    trace: Trace
    optimizers: int
    """Number of optimizers of the program."""

    @cached_property
    def seconds(self) -> float:
        """Estimated time of a step of every optimizer, without evaluation and generation."""
        last = self.trace.steps[-max(1, self.optimizers) :]
        phases = [each for step in last for each in (step_seconds(self.trace, step) or {}).items()]
        return sum(seconds for phase, seconds in phases if phase != "inference")

    @property
    def fits(self) -> bool:
        """Whether the run did not run out of memory."""
        return self.trace.meta["out_of_memory"] is None

    @property
    def device_bytes(self) -> int:
        """Peak reserved bytes and CUDA context."""
        return int(self.trace.meta["peak_reserved"] + self.trace.meta["context"])


@dataclass
class ProgramAdvisor:
    """The search.

    Every combination of strategies is run without checkpoints. Then, by time, those that are faster than the best plan
    so far and do not fit are run with checkpoints: with all layers, or with as many as would be faster than that plan,
    and if that fits, with as few as fit. These are the first layers, since the backward pass has released the
    activations of the last ones when it comes to recompute them; their number is found by bisection.
    """

    run: RunProgram
    name: str
    device: Device
    budget_bytes: int
    allocator: AllocatorSettings
    always: Plan
    """Strategies that every plan must use."""
    allowed: Collection[str]
    """Names of strategies that change the mathematics and may be used."""
    layer_list: str = ""
    _offers: Offers = field(default_factory=Offers, init=False)
    _runs: dict[tuple[str, int], _Ran] = field(default_factory=dict, init=False)
    _failed: dict[str, MemscopeError] = field(default_factory=dict, init=False)

    def advice(self) -> Advice:
        """Search, and return the cheapest plan that was found to fit, or why none was.

        Raises:
            MemscopeError: the program cannot be simulated, or the strategies that every plan must use do not suit it.
        """
        trace, offers = self.run(str(self.always))
        self._offers = offers or Offers()
        self._runs[str(self.always), 0] = _Ran(str(self.always), 0, trace, self._offers.optimizers)
        plans = list(self._combinations())
        tried = plans[:_MOST_COMBINATIONS]
        for plan in tried:
            self._ran(str(plan), 0)
        best = self._best()
        shown = best or min(self._runs.values(), key=lambda one: (one.device_bytes, one.seconds))
        full = self._ran(shown.text, len(self._layers)) if self._layers else None
        runs = list(self._runs.values())  # without those of strategies that are not allowed
        helps = "" if best else self._would_help()
        left = [*map(str, plans[_MOST_COMBINATIONS:]), *self._left_out()]
        every = len(tried) + len(left)
        found = self._advice(shown, full, runs, best is not None, helps)
        return dataclasses.replace(found, combinations=every, untried=tuple(left))

    @cached_property
    def _layers(self) -> tuple[str, ...]:
        """The layers that may be checkpointed; empty if none may."""
        may = any(self._may_use(offer) for offer in self._offers.strategies if _name(offer) == CHECKPOINTING)
        return self._offers.layers if may else ()

    def _may_use(self, offer: Offer) -> bool:
        return offer.is_exact or _name(offer) in self.allowed

    def _choices(self) -> dict[str, list[Offer]]:
        """By name of a strategy, without checkpointing, those settings that are tried: of an inexact one, the first."""
        found: dict[str, list[Offer]] = {}
        for offer in self._offers.strategies:
            known = found.setdefault(_name(offer), [])
            is_first = offer.is_exact or all(one.is_exact for one in known)
            if _name(offer) != CHECKPOINTING and self._may_use(offer) and is_first:
                known.append(offer)
        return found

    def _left_out(self) -> list[str]:
        """Strategies that may be used and were not tried."""
        tried = [offer for offers in self._choices().values() for offer in offers]
        left = [offer.spec for offer in self._offers.strategies if self._may_use(offer) and offer not in tried]
        return [spec for spec in left if not (self._layers and read_strategies(spec)[0].name == CHECKPOINTING)]

    def _combinations(self) -> Iterator[Plan]:
        """The plans without checkpointing, those with few strategies first."""
        choices = [[None, *offers] for offers in self._choices().values()]
        for picked in sorted(product(*choices), key=lambda offers: sum(map(bool, offers))):
            specs = [*self.always.specs, *(offer.spec for offer in picked if offer)]
            try:
                yield Plan.parse(",".join(specs))
            except UsageError:  # strategies that conflict
                continue

    def _best(self) -> _Ran | None:
        """The fastest plan that was found to fit."""
        best: _Ran | None = None
        for plain in sorted(self._runs.values(), key=lambda one: one.seconds):
            if best is not None and plain.seconds >= best.seconds:
                break
            found = plain if plain.fits else self._checkpointed(plain.text, self._most(plain, best))
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        return best

    def _most(self, plain: _Ran, best: _Ran | None) -> int:
        """The number of layers that a combination can checkpoint and be faster than the best plan so far.

        Recomputing a layer is assumed to add the same share to the step as in the first combination that was run so.
        """
        count = len(self._layers)
        if best is None:
            return count
        full = next(one for (_, checkpointed), one in self._runs.items() if checkpointed == count)
        without = self._runs[full.text, 0]
        share = (full.seconds / without.seconds - 1) / count
        return min(count, int((best.seconds / plain.seconds - 1) / share)) if share > 0 else count

    def _checkpointed(self, text: str, most: int) -> _Ran | None:
        """A combination with as few checkpointed layers as fit; None: `most` are too few, or none may be."""
        found = self._ran(text, most) if most else None
        if found is None or not found.fits:
            return None
        too_few = 0
        while found.checkpointed - too_few > 1:
            middle = self._ran(text, (too_few + found.checkpointed) // 2)
            if middle is None:
                break
            if middle.fits:
                found = middle
            else:
                too_few = middle.checkpointed
        return found

    def _ran(self, text: str, checkpointed: int) -> _Ran | None:
        """The run with a plan; None if it failed."""
        key, plan = (text, checkpointed), self._with_checkpoints(text, checkpointed)
        if key not in self._runs and plan not in self._failed:
            try:
                self._runs[key] = _Ran(*key, self.run(plan)[0], self._offers.optimizers)
            except MemscopeError as error:
                self._failed[plan] = error
        return self._runs.get(key)

    def _with_checkpoints(self, text: str, count: int) -> str:
        if not count:
            return text
        settings = [] if count == len(self._offers.layers) else [f"layers=0-{count - 1}" if count > 1 else "layers=0"]
        settings += [f"layer-list={self.layer_list}"] if self.layer_list else []
        return ",".join(filter(None, [text, f"{CHECKPOINTING}:{','.join(settings)}" if settings else CHECKPOINTING]))

    def _would_help(self) -> str:
        """The bytes needed with each strategy that was not allowed, with all layers checkpointed if they may be."""
        lines = []
        forbidden = [offer for offer in self._offers.strategies if not self._may_use(offer)]
        for name, offer in {_name(offer): offer for offer in reversed(forbidden)}.items():
            if name == CHECKPOINTING:
                ran = self._ran(str(self.always), len(self._offers.layers)) if self._offers.layers else None
            else:
                ran = self._ran(",".join([*self.always.specs, offer.spec]), len(self._layers))
            if ran is not None:
                fitting = "fits" if ran.fits else "does not fit either"
                lines.append(f"--allow {name}: {format_bytes(ran.device_bytes)}, {fitting}")
        return "; ".join(lines)

    def _advice(self, shown: _Ran, full: _Ran | None, runs: Sequence[_Ran], is_feasible: bool, helps: str) -> Advice:
        """The advice from the plan that is shown, the same with all layers checkpointed, and all runs."""
        plain = self._runs[shown.text, 0]
        reserved = least_reserved(shown.trace, self.allocator)
        peak = PlanPeak(shown.trace.peak.allocated_bytes, reserved, reserved + self.device.context_bytes)
        points = [self._point(one) for one in runs if one is not shown]
        front = unbeaten([dataclasses.replace(self._point(shown), peak=peak), *points])
        specs = Plan.parse(shown.text).specs
        return Advice(
            target=self.name,
            device=self.device.name,
            budget_bytes=self.budget_bytes,
            feasible=is_feasible,
            strategies=tuple(specs),
            layers=self._options(shown) if shown.checkpointed else {},
            peak=peak,
            step_seconds=shown.seconds,
            overhead_vs_none=shown.seconds / plain.seconds - 1,
            overhead_vs_all=shown.seconds / full.seconds - 1 if full else None,
            certificate=None,
            minimum_bytes=min(point.peak.device for point in front),
            binding=binding_of(shown.trace, helps),
            front=front,
            simulated=sum(not one.checkpointed for one in runs),
            combinations=0,
            notes=(self._searched(), *self._failures(), *notes_of(shown.trace)),
            made_for=self._made_for(specs),
            trace=shown.trace,
        )

    def _options(self, ran: _Ran) -> dict[str, str]:
        return {name: "full" if index < ran.checkpointed else "none" for index, name in enumerate(self._offers.layers)}

    def _point(self, ran: _Ran) -> FrontPoint:
        peak = PlanPeak(ran.trace.peak.allocated_bytes, int(ran.trace.meta["peak_reserved"]), ran.device_bytes)
        return FrontPoint(tuple(Plan.parse(ran.text).specs), in_words(self._options(ran)), peak, ran.seconds)

    def _made_for(self, specs: list[str]) -> dict[str, Any]:
        found = {"target": self.name, "settings": {}, "strategies": specs, "device": self.device.name}
        return found | ({"model": self._offers.model} if self._offers.model else {})

    def _searched(self) -> str:
        """What was searched, and what was not."""
        count = len(self._runs) + len(self._failed)
        searched = f"The program was run {count} times, once for each plan that was tried"
        if self._layers:
            return (
                f"{searched}. Where layers are checkpointed, these are the first ones, wholly, and as few as fit; "
                "their number was found by bisection. Other choices of layers, and parts of layers, were not tried"
            )
        if len(self._offers.layered) > 1:
            models = " and ".join(self._offers.layered)
            return f"{searched}. Checkpointing was not tried: more than one model has layers ({models})"
        if any(strategy.name == CHECKPOINTING for strategy in self.always.strategies):
            return searched
        return f"{searched}. Checkpointing was not tried: the program's model has no layers that may be checkpointed"

    def _failures(self) -> Iterator[str]:
        for plan, error in self._failed.items():
            yield f'with "{plan}" the program cannot be run: {str(error).splitlines()[0]}'


def _name(offer: Offer) -> str:
    return read_strategies(offer.spec)[0].name
