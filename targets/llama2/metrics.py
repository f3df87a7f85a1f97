"""What is measured while a model is fine-tuned: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscope.errors import MemscopeError
from memscope.trace import write_whole

__all__ = ["Evaluated", "Metric", "Outcome", "Stepped", "metrics_written"]


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    step: int
    """From 1."""
    epoch: float
    """Share of the data seen, this step included; above 1 from the second epoch on."""
    loss: float
    """Mean cross-entropy over the target tokens of the step, before its update."""
    lr: float
    tokens: int
    """Tokens of its samples, without padding."""
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None = None
    """Most bytes the GPU's allocator had allocated since the run or its continuation began; None on a CPU."""
    grad_scale: float | None = None
    """What the gradient scaler multiplied the loss by; None without one."""
    skipped: bool | None = None
    """Whether the scaler left the update out because the scaled gradients had overflowed; None without a scaler."""


@dataclass(frozen=True)
class Evaluated:
    """Perplexity of the held-out samples after a number of steps."""

    step: int
    perplexity: float


Metric = Stepped | Evaluated


@dataclass(frozen=True)
class Outcome:
    """A whole run in numbers, over every time it was continued."""

    first_loss: float
    last_loss: float
    perplexity_before: float | None
    perplexity_after: float | None
    seconds: float
    """In steps; without evaluation, checkpoints and what stands between steps."""
    tokens_per_second: float
    peak_bytes: int | None
    skipped_steps: int

    @classmethod
    def read(cls, file: Path) -> Outcome:
        """The outcome from the metrics of a run that has done a step."""
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        perplexity = {line["step"] > 0: line["perplexity"] for line in lines if "perplexity" in line}
        seconds = sum(step["seconds"] for step in steps)
        return cls(
            first_loss=steps[0]["loss"],
            last_loss=steps[-1]["loss"],
            perplexity_before=perplexity.get(False),
            perplexity_after=perplexity.get(True),
            seconds=seconds,
            tokens_per_second=sum(step["tokens"] for step in steps) / seconds,
            peak_bytes=max((step["peak_bytes"] for step in steps if "peak_bytes" in step), default=None),
            skipped_steps=sum(step.get("skipped", False) for step in steps),
        )


@contextmanager
def metrics_written(
    file: Path, board: Path, done: int, say: Callable[[str], None]
) -> Iterator[Callable[[Metric], None]]:
    """Gives what writes a metric: a line of JSON in `file`, and scalars in the TensorBoard folder `board`.

    Args:
        file: what is in it from after step `done`, by a run that was killed, is removed first.
        board: made only where TensorBoard is installed.
        done: steps done before.
        say: told once when there is no TensorBoard.

    Raises:
        MemscopeError: when the file cannot be written.
    """
    write_whole(file, "".join(_kept(file, done)).encode())
    writer = _board(board, done, say)

    def write(metric: Metric) -> None:
        values = {name: value for name, value in dataclasses.asdict(metric).items() if value is not None}
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(values) + "\n")
        except OSError as error:
            raise MemscopeError(f"{file}: cannot be written ({error.strerror or error})") from error
        if writer:
            for name, value in values.items():
                if name != "step":
                    writer.add_scalar(name, value, metric.step)

    try:
        yield write
    finally:
        if writer:
            writer.close()


def _kept(file: Path, done: int) -> Iterator[str]:
    """Lines up to and with step `done`; the last line may have been cut off, and what was measured then comes again."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        metric = json.loads(line)
        if metric["step"] < done or (metric["step"] == done and "loss" in metric):
            yield line


def _board(folder: Path, done: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed: metrics go into metrics.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
