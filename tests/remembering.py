"""Answers of the advisor's simulations, shared by tests that ask about the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memscope.advisor.measure.runner import Answer, Probe, Runner

__all__ = ["Remembering"]


@dataclass(frozen=True)
class Remembering:
    """Lets another runner simulate only what was not asked before."""

    runner: Runner
    known: dict[object, Answer] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.runner.width

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        new = [probe for probe in probes if probe.key not in self.known]
        self.known.update(zip([probe.key for probe in new], self.runner.run(new, done), strict=True))
        for _ in range(len(probes) - len(new)):
            done()
        return [self.known[probe.key] for probe in probes]
