"""For a program that does not fit: the memory that each strategy that it can take would free.

The program is run again for each of them, simulated together with the plan of the run that does not fit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from memscope.errors import UsageError
from memscope.program.command_line import CommandLine
from memscope.program.launch import ProgramEnd, launch
from memscope.program.request import Offer, Request
from memscope.runs.would_free import OWN_GPU, Remedies, describe_own_gpu, remedies
from memscope.strategies import Plan, Strategy
from memscope.trace import Progress, Trace
from memscope.units import format_seconds

__all__ = ["would_help"]

_MOST_SECONDS = 180.0


def would_help(
    program: CommandLine,
    request: Request,
    end: ProgramEnd,
    moved: Progress,
    *,
    timeout_seconds: float | None = None,
    most_seconds: float = _MOST_SECONDS,
) -> Remedies:
    """Run a program that did not fit again with each strategy that it can take, those that are exact first.

    Args:
        program: the program.
        request: what was asked of the run; of a simulated one, offers too.
        end: the end of the run, with a trace that has `meta["out_of_memory"]`. A measured run is also simulated as it
            was, on a GPU of the same kind with the memory that was available to it.
        moved: is told how far the runs are.
        timeout_seconds: longest time of each run; None: no limit.
        most_seconds: longest time of all runs; strategies for which it does not suffice are named.
    """
    assert end.trace is not None, "a run that does not fit has a trace"
    runs = _Launches(program, timeout_seconds, time.monotonic() + most_seconds)
    plan, before, offers = Plan.parse(request.strategies), end.trace, end.offers
    with TemporaryDirectory(prefix="memscope-remedies-") as name:
        folder = Path(name)
        if not request.simulated:
            moved("what would help: the program as it is", 0, 1)
            file = folder / "device.toml"
            describe_own_gpu(before, file)
            request = replace(request, simulated=True, device=OWN_GPU, device_file=str(file), asks=True)
            first = runs(request, folder / "first")
            if first.trace is None:
                return Remedies(failed={"the program as it is": _reason(first)})
            before, offers = first.trace, first.offers
        added = list(_added(plan, offers.strategies if offers else ()))
        failed: dict[str, str] = {}
        found: list[tuple[Strategy, bool, Trace]] = []
        for index, (strategy, is_exact) in enumerate(added):
            moved(f"what would help: {strategy.spec}", index, len(added))
            if runs.is_over:
                failed[strategy.spec] = f"those before it took {format_seconds(most_seconds)}"
                continue
            text = str(Plan.of(*plan.strategies, strategy))
            one = runs(replace(request, strategies=text, asks=False), folder / str(index))
            if one.trace is None:
                failed[strategy.spec] = _reason(one)
            else:
                found.append((strategy, is_exact, one.trace))
    return remedies(found, before, failed)


class _Launches:
    """Runs the program with its output in a file, until the time for all runs is over."""

    def __init__(self, program: CommandLine, timeout_seconds: float | None, deadline: float) -> None:
        self._program, self._timeout, self._deadline = program, timeout_seconds, deadline

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return time.monotonic() >= self._deadline

    def __call__(self, request: Request, scratch: Path) -> ProgramEnd:
        scratch.mkdir()
        left = max(0.0, self._deadline - time.monotonic())
        limit = left if self._timeout is None else min(left, self._timeout)
        request = replace(request, folder=str(scratch.resolve()))
        return launch(self._program, request, log=scratch / "log", timeout_seconds=limit)


def _added(plan: Plan, offers: Iterable[Offer]) -> Iterator[tuple[Strategy, bool]]:
    """Strategies to add to a plan, each with one setting, the default if it is offered; and whether they are exact."""
    strategies = [(Plan.parse(offer.spec).strategies[0], offer.is_exact) for offer in offers]
    strategies.sort(key=lambda each: (not each[1], each[0].config != type(each[0]).Config()))
    known = {strategy.name for strategy in plan.strategies}
    for strategy, is_exact in strategies:
        if strategy.name in known:
            continue
        try:
            Plan.of(*plan.strategies, strategy)
        except UsageError:  # they cannot be combined
            continue
        known.add(strategy.name)
        yield strategy, is_exact


def _reason(end: ProgramEnd) -> str:
    return str(end.error).splitlines()[0]  # what follows is the end of a log that is removed
