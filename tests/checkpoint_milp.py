"""The best checkpoint plan as two mixed-integer linear programs, for HiGHS: a second opinion on the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy

from memscope.advisor.plan.planner import Chain, Choice

__all__ = ["Answer", "solve"]


@dataclass(frozen=True)
class Answer:
    """The result of HiGHS."""

    nanoseconds: float
    """Time of the fastest plan found; infinite if no plan exists."""
    peak_bytes: float
    """Smallest peak found among plans that take no longer."""
    is_proven: bool
    """Whether both values are proven minimal, or it is proven that no plan exists."""


def solve(chain: Chain, budget_bytes: int, *, seconds: float = 60.0, bytes_unit: int = 1, time_unit: int = 1) -> Answer:
    """Minimize the time within a budget, then the peak at that time, with no gap left.

    Args:
        chain: the layers.
        budget_bytes: upper bound on the peak.
        seconds: time limit of each of the two searches.
        bytes_unit: divisor of sizes, so that the solver's absolute tolerances suit them.
        time_unit: divisor of times.
    """
    solver = highspy.Highs()
    solver.silent()
    for name, value in (("mip_rel_gap", 0.0), ("mip_abs_gap", 1e-6), ("time_limit", seconds), ("threads", 1)):
        solver.setOptionValue(name, value)
    program = _Program(solver, chain, budget_bytes / bytes_unit, bytes_unit, time_unit)
    solver.minimize(program.time)
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return Answer(float("inf"), float("inf"), True)
    is_proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    time = solver.getInfo().objective_function_value
    solver.addConstr(program.time <= time + 1e-6)
    solver.minimize(program.peak)
    is_proven &= solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return Answer(time * time_unit, solver.getInfo().objective_function_value * bytes_unit, is_proven)


class _Program:
    """A 0/1 variable for each choice of each layer, and variables for the bytes kept and held before each layer."""

    def __init__(self, solver: Any, chain: Chain, budget: float, bytes_unit: int, time_unit: int) -> None:
        self.solver, self.chain, self.unit = solver, chain, bytes_unit
        self.peak = solver.addVariable(chain.fixed_bytes / bytes_unit, budget)
        self.taken = [[(choice, solver.addBinary()) for choice in choices] for choices in chain.choices]
        every = [pair for pairs in self.taken for pair in pairs]
        self.time = solver.qsum(choice.nanoseconds / time_unit * taken for choice, taken in every)
        for layer in range(len(self.taken)):
            covering = [x for start in range(layer + 1) for c, x in self.taken[start] if layer < start + c.length]
            solver.addConstr(solver.qsum(covering) == 1)
        kept = held = solver.expr()
        for layer in range(len(self.taken)):
            kept, held = self._layer(layer, kept, held)
        if not chain.head_saves_input:
            kept = kept + chain.boundary_bytes[-1] / bytes_unit * self._lent(len(self.taken))
        solver.addConstr(kept + held + chain.head_forward_bytes / bytes_unit <= self.peak)
        solver.addConstr(kept + chain.head_backward_bytes / bytes_unit <= self.peak)

    def _lent(self, layer: int) -> Any:
        """1 if a choice ends before this layer and saves its output."""
        earlier = [(start, *pair) for start in range(layer) for pair in self.taken[start]]
        return self.solver.qsum(x for start, c, x in earlier if start + c.length == layer and c.saves_output)

    def _sizes(self, pairs: list[tuple[Choice, Any]], name: str) -> Any:
        return self.solver.qsum(getattr(choice, name) / self.unit * taken for choice, taken in pairs)

    def _layer(self, layer: int, kept: Any, held: Any) -> tuple[Any, Any]:
        """Constrain the choice that begins here, if one does; what is kept and held after it."""
        solver, pairs = self.solver, self.taken[layer]
        boundary = self.chain.boundary_bytes[layer] / self.unit
        begins = solver.qsum(taken for _, taken in pairs)
        saves = solver.qsum(taken for choice, taken in pairs if choice.saves_input)
        is_kept, is_only_lent = solver.addVariable(0, 1), solver.addVariable(0, 1)
        solver.addConstr(is_kept >= saves)
        solver.addConstr(is_kept >= self._lent(layer))
        solver.addConstr(is_only_lent >= self._lent(layer) - saves)
        unless_begun = 2 * self.chain.most_bytes / self.unit * (1 - begins)
        forward, backward = self._sizes(pairs, "forward_bytes"), self._sizes(pairs, "backward_bytes")
        solver.addConstr(kept + held + forward <= self.peak + unless_begun)
        solver.addConstr(kept + backward + boundary * is_only_lent <= self.peak + unless_begun)
        kept_after, held_after = solver.addVariable(0), solver.addVariable(0)
        solver.addConstr(kept_after >= kept + self._sizes(pairs, "kept_bytes") + boundary * is_kept)
        solver.addConstr(held_after >= held + self._sizes(pairs, "held_bytes"))
        return kept_after, held_after
