"""The simulated plans of a search: memory against time, and those that a text of `-s` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memscope.advisor.advice import FrontPoint, PlanPeak
from memscope.advisor.layer_words import in_words
from memscope.advisor.planning import Found, device_bytes
from memscope.advisor.search import Search
from memscope.strategies import Plan

__all__ = ["points_of", "told_by_s"]


def points_of(search: Search, shown: Found, least: Found, peak: PlanPeak, *, more: bool) -> list[FrontPoint]:
    """The simulated plans, the one shown first.

    Times of plans of which only some micro-batches were run are scaled by what the plan shown took as a whole.
    """
    scale = shown.seen.seconds / shown.seconds
    points = [_point(least, scale)]
    if more and search.planning.knows(shown.strategies):
        points += [_point(found, scale) for found in search.planning.between(search.tried.references[shown.strategies])]
    for text, seen in search.tried.plain.items():
        points.append(_point(Found(text, None, seen, seen.seconds), scale))
    for text, reference in search.tried.references.items() if search.layers.may_recompute_all else ():
        points.append(_point(Found(text, reference.layers.checkpointed, reference.full, reference.full_seconds), scale))
    first = replace(_point(shown, scale), peak=peak)
    return [first, *(point for point in points if not point.is_same_plan(first))]


def told_by_s(points: Sequence[FrontPoint], search: Search, *, feasible: bool) -> tuple[tuple[str, FrontPoint], ...]:
    """Of the plans that fit, those that a text of `-s` says, by estimated step time; the first point is the plan shown.

    `ckpt:auto` finds the plan shown again; of other plans with options of their own for each layer, no text tells.
    """
    found: dict[str, FrontPoint] = {}
    budget = "100%" if search.budget_bytes == search.device.capacity_bytes else f"{search.budget_bytes}B"
    for index, point in enumerate(points):
        if point.peak.device > search.budget_bytes or (index == 0 and not feasible):
            continue
        if point.recomputed == "nothing":
            checkpoint = []
        elif point.recomputed.endswith(" full") and ", " not in point.recomputed:  # one range: every layer
            checkpoint = ["ckpt"]
        elif index == 0:
            checkpoint = [f"ckpt:auto,budget={budget}"]
        else:
            continue
        found.setdefault(",".join((*point.strategies, *checkpoint)), point)
    return tuple(sorted(found.items(), key=lambda item: item[1].step_seconds))


def _point(found: Found, scale: float) -> FrontPoint:
    trace = found.seen.trace
    peak = PlanPeak(trace.peak.allocated_bytes, int(trace.meta["peak_reserved"]), device_bytes(found.seen))
    layers = found.layers.layers if found.layers else {}
    seconds = found.seen.seconds if found.seen.is_whole else found.seconds * scale
    return FrontPoint(tuple(Plan.parse(found.strategies).specs), in_words(layers), peak, seconds)
