"""The combinations of strategies that may be used, from what the strategies declare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product

from memscope.advisor.measure.options import spread
from memscope.errors import UsageError, nearest
from memscope.strategies import Plan, Strategy, available
from memscope.strategies.plugins import called
from memscope.workload.description import Workload

__all__ = [
    "CHECKPOINTING",
    "allowed_names",
    "combinations",
    "forbidden",
    "halfway",
    "left_out",
    "some_settings",
    "with_one_more",
]

CHECKPOINTING = "ckpt"
"""Planned layer by layer rather than searched."""


def allowed_names(allow: str | Collection[str]) -> list[str]:
    """The names in `allow`: a text such as `lora,bf16`, or several such texts.

    Raises:
        UsageError: for the first name of no strategy, with the nearest valid name.
    """
    texts = [allow] if isinstance(allow, str) else allow
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in names:
        if name not in available():
            raise UsageError(f'--allow {name}: there is no strategy "{name}": {nearest(name, available())}')
    return names


def combinations(workload: Workload, always: Plan, allowed: Collection[str]) -> list[Plan]:
    """Every combination of `always` with strategies that are allowed, or exact without taking anything else.

    Each strategy is left out, or used with one of its candidates for this workload. Combinations that conflict or
    do not apply are left out. `always` alone comes first, then `always` with one more strategy, and so on.
    """
    choices = [
        [None, *found]
        for kind in _others(always)
        if (found := _candidates(kind, workload, lambda s: s.name in allowed or _is_free(s, workload)))
    ]
    plans = []
    for picked in product(*choices):
        try:
            plans.append(Plan.of(*always.strategies, *(strategy for strategy in picked if strategy)))
        except UsageError:  # strategies that conflict
            continue
    return sorted(plans, key=lambda plan: len(plan.strategies))


def left_out(workload: Workload, always: Plan, allowed: Collection[str]) -> list[str]:
    """`always` with one more strategy that may be used, for each setting that takes too long to simulate."""
    texts = []
    for kind in _others(always):
        for strategy in map(kind, called(kind(), "left_out", workload)):
            if strategy.name in allowed or _is_free(strategy, workload):
                with contextlib.suppress(UsageError):  # it conflicts with a strategy of `always`
                    texts.append(str(Plan.of(*always.strategies, strategy)))
    return texts


def forbidden(workload: Workload, always: Plan, allowed: Collection[str]) -> dict[str, Plan]:
    """`always` with one more strategy that was not allowed, by the name of that strategy."""
    plans = {}
    for kind in _others(always):
        if kind.name not in allowed:
            asked = _candidates(kind, workload, lambda s: not _is_free(s, workload))
            for strategy in asked[:1]:
                try:
                    plans[kind.name] = Plan.of(*always.strategies, strategy)
                except UsageError:  # it conflicts with a strategy of `always`
                    continue
    return plans


def some_settings(base: Plan, plans: Sequence[Plan], most: int) -> list[Plan]:
    """`base` with one more strategy: at most `most` settings of each, evenly spread."""
    by_name: dict[str, list[Plan]] = {}
    for plan, more in with_one_more(base, plans):
        by_name.setdefault(more.name, []).append(plan)
    return [plan for one in by_name.values() for plan in spread(one, most)]


def with_one_more(some: Plan, plans: Sequence[Plan]) -> Iterator[tuple[Plan, Strategy]]:
    """The plans that have the strategies of `some` and one more, each with that one."""
    for plan in plans:
        more = [strategy for strategy in plan.strategies if strategy.spec not in some.specs]
        if len(more) == 1 and len(plan.strategies) == len(some.strategies) + 1:
            yield plan, more[0]


def halfway(some: Plan, plans: Sequence[Plan], tried: Collection[str], most: int) -> Iterator[Plan]:
    """`some` with another setting of one strategy that has more than `most`, halfway to the next ones in `tried`."""
    for name in (strategy.name for strategy in some.strategies):
        others = [strategy.spec for strategy in some.strategies if strategy.name != name]
        row = [plan for plan in plans if [s.spec for s in plan.strategies if s.name != name] == others]
        row = [plan for plan in row if len(plan.strategies) == len(some.strategies)]
        if len(row) <= most:
            continue
        here = row.index(some)
        known = [index for index, plan in enumerate(row) if str(plan) in tried]
        below = max((index for index in known if index < here), default=-1)
        above = min((index for index in known if index > here), default=len(row))
        yield from (row[(start + end) // 2] for start, end in ((below, here), (here, above)) if end - start > 1)


def _is_free(strategy: Strategy, workload: Workload) -> bool:
    """Whether a strategy may be used without being allowed: it is exact, and takes nothing but device memory."""
    return not strategy.takes_more and bool(called(strategy, "is_exact", workload))


def _others(always: Plan) -> list[type[Strategy]]:
    used = {CHECKPOINTING, *(strategy.name for strategy in always.strategies)}
    return [kind for name, kind in available().items() if name not in used]


def _candidates(kind: type[Strategy], workload: Workload, wanted: Callable[[Strategy], bool]) -> list[Strategy]:
    """The wanted candidates that apply; what is not wanted is not checked, which may import a library."""
    found = [kind(config) for config in called(kind(), "candidates", workload)]
    return [strategy for strategy in found if wanted(strategy) and not called(strategy, "check", workload)]
