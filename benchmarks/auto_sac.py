"""The part of PyTorch's Auto-SAC that chooses checkpoints, without its dependencies.

`torch.distributed._tools.sac_ilp` of PyTorch 2.13 needs pulp, and its estimator pwlf. The program below has the same
variables and constraints, for layers in a row. It is better off than the original: its trade-off curve is exact (the
original fits two straight pieces to an upper bound), and its solver leaves no gap (the original's may leave 5 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import highspy
import numpy as np
from planner_layers import UNIT, Op, greedy_order, keeping, saved_bytes

from memscope.advisor.plan.planner import Chain, Choice

__all__ = ["auto_sac"]

_MIB = 2**20


def auto_sac(chain: Chain, layers: Sequence[Sequence[Op]], budget_bytes: int) -> list[Choice]:
    """Which part of each layer's memory to discard (`sac_milp`), then which results that leaves room for.

    The second step is `get_optimal_checkpointing_policy_per_module`: a knapsack for each layer on its own.
    """
    parts = _discarded_parts(chain, layers, budget_bytes)
    return [
        chain.choice(layer, "none", 1) if part is None else _policy(layer, len(layers), operators, part)
        for layer, (operators, part) in enumerate(zip(layers, parts, strict=True))
    ]


def _discarded_parts(chain: Chain, layers: Sequence[Sequence[Op]], budget_bytes: int) -> list[float | None]:
    solver = highspy.Highs()
    solver.silent()
    budget = budget_bytes / _MIB
    kept: Any = solver.expr()
    times, variables = [], []
    for layer, operators in enumerate(layers):
        every = sum(operator.size_bytes for operator in operators) / _MIB  # ACM: all results
        saved = saved_bytes(operators) / _MIB  # IA: what autograd saves
        is_checkpointed, part = solver.addBinary(), solver.addVariable(0, 1)
        time = solver.addVariable(0)
        solver.addConstr(part <= is_checkpointed)
        solver.addConstr(every * part >= (every - saved) * is_checkpointed)
        none = chain.choice(layer, "none", 1)
        solver.addConstr(kept + none.backward_bytes / _MIB <= budget)
        kept = kept + UNIT / _MIB + saved - every * part + (every - saved) * is_checkpointed
        for slope, intercept in _tradeoff(operators):
            solver.addConstr(time >= slope * part + intercept - 1e6 * (1 - is_checkpointed))
        times.append(time)
        variables.append((is_checkpointed, part))
    solver.addConstr(kept + chain.head_backward_bytes / _MIB <= budget)
    solver.minimize(solver.qsum(times))
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return [solver.val(part) if solver.val(is_checkpointed) > 0.5 else None for is_checkpointed, part in variables]


def _tradeoff(operators: Sequence[Op]) -> list[tuple[float, float]]:
    """Slopes and intercepts of microseconds computed again, over the part of the memory that is discarded."""
    order = greedy_order(operators)
    size = np.cumsum([0, *(operator.size_bytes for operator in order)]) / sum(o.size_bytes for o in operators)
    time = np.cumsum([0, *(operator.nanoseconds for operator in order)]) / 1000
    corners = pairwise(zip(size, time, strict=True))
    slopes = [((y1 - y0) / (x1 - x0), x0, y0) for (x0, y0), (x1, y1) in corners]
    return [(slope, y0 - slope * x0) for slope, x0, y0 in slopes]


def _policy(layer: int, layers: int, operators: Sequence[Op], part: float) -> Choice:
    """The results to keep that save the most time in the rest of the layer's memory; all subsets are tried."""
    sizes = np.array([operator.size_bytes for operator in operators])
    times = np.array([operator.nanoseconds for operator in operators])
    subsets = np.arange(2 ** len(operators))[:, None] >> np.arange(len(operators)) & 1
    fits = subsets @ sizes <= np.ceil((1 - part) * sizes.sum())
    best = subsets[np.argmax(np.where(fits, subsets @ times, -1))]
    kept = [operator for operator, is_kept in zip(operators, best, strict=True) if is_kept]
    return keeping("sac", kept, operators, layer, layers)
