"""A runner for `fit` whose simulations are runs of a program, each with other values of its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from memscope.advisor.fit.names import SizeNames
from memscope.advisor.measure.runner import Answer, Probe, Seen
from memscope.errors import MemscopeError
from memscope.program.command_line import CommandLine
from memscope.program.launch import launch
from memscope.program.request import Request
from memscope.program.sizes import SizeOptions

__all__ = ["NAMES", "ProgramRunner"]

NAMES = SizeNames("micro_batch", "seq_len")
"""The names under which probes give sizes to this runner."""


@dataclass
class ProgramRunner:
    """Runs a program once for each probe; of the first run, the output is shown."""

    program: CommandLine
    options: SizeOptions
    device: str
    device_file: Path | None = None
    allocator: str | None = None
    assume: str = ""
    timeout_seconds: float | None = None
    width: ClassVar[int] = 1
    _is_first: bool = field(default=True, init=False)

    def run(self, probes: Sequence[Probe], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answers, in order of the probes."""
        answers: list[Answer] = []
        for probe in probes:
            answers.append(self._answer(probe))
            done()
        return answers

    def _answer(self, probe: Probe) -> Answer:
        sizes = dict(probe.sizes)
        program = self.options.changed(self.program, sizes[NAMES.micro_batch], sizes.get(str(NAMES.seq_len)))
        with TemporaryDirectory() as name:
            folder = Path(name)
            log = None if self._is_first else folder / "output.log"
            request = Request(
                device=self.device,
                simulated=True,
                device_file=None if self.device_file is None else str(self.device_file.resolve()),
                allocator=self.allocator,
                assume=self.assume,
                steps=probe.steps,
                strategies=probe.strategies,
                folder=str(folder.resolve()),
                command=program.words,
            )
            end = launch(program, request, log=log, timeout_seconds=self.timeout_seconds)
        self._is_first = False
        if end.trace is not None:
            return Seen(end.trace, indices=(0,), elements=(1,))
        assert end.error is not None, "a program without a trace has an error"
        return end.error if log is None else _in_one_line(end.error)


def _in_one_line(error: MemscopeError) -> MemscopeError:
    """The error without the output of the program, which is gone."""
    return type(error)(str(error).partition("\n")[0])
