"""Metrics of a fine-tuning run: JSON lines, and TensorBoard if it is installed."""

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
    """Epochs done, this step included, as a fraction: above 1 in the second epoch."""
    loss: float
    """Mean cross-entropy over the target tokens of the step, before its update."""
    lr: float
    tokens: int
    """Tokens of its samples, without padding."""
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None = None
    """Peak allocated bytes on the GPU since the run was started or resumed; None on a CPU."""
    grad_scale: float | None = None
    """Factor by which the gradient scaler multiplied the loss; None without a scaler."""
    skipped: bool | None = None
    """Whether the scaler skipped the update because scaled gradients overflowed; None without a scaler."""


@dataclass(frozen=True)
class Evaluated:
    """Quality on the held-out samples after a number of steps."""

    step: int
    perplexity: float
    token_accuracy: float | None = None
    """Share of tokens to which the model gives the largest probability; None where it is not measured."""


Metric = Stepped | Evaluated


@dataclass(frozen=True)
class Outcome:
    """Summary of a whole run, including every time it was resumed."""

    first_loss: float
    last_loss: float
    perplexity_before: float | None
    perplexity_after: float | None
    token_accuracy: float | None
    """Of the last evaluation."""
    seconds: float
    """Time spent in steps, without evaluation, checkpoints and anything else between steps."""
    tokens_per_second: float
    peak_bytes: int | None
    skipped_steps: int

    @classmethod
    def read(cls, file: Path) -> Outcome:
        """Read the outcome from the metrics of a run that has done at least one step."""
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        perplexity = {line["step"] > 0: line["perplexity"] for line in lines if "perplexity" in line}
        accuracy = [line["token_accuracy"] for line in lines if "token_accuracy" in line]
        seconds = sum(step["seconds"] for step in steps)
        return cls(
            first_loss=steps[0]["loss"],
            last_loss=steps[-1]["loss"],
            perplexity_before=perplexity.get(False),
            perplexity_after=perplexity.get(True),
            token_accuracy=accuracy[-1] if accuracy else None,
            seconds=seconds,
            tokens_per_second=sum(step["tokens"] for step in steps) / seconds,
            peak_bytes=max((step["peak_bytes"] for step in steps if "peak_bytes" in step), default=None),
            skipped_steps=sum(step.get("skipped", False) for step in steps),
        )


@contextmanager
def metrics_written(
    file: Path, board: Path, done: int, say: Callable[[str], None]
) -> Iterator[Callable[[Metric], None]]:
    """Give a function that writes a metric: a line of JSON in `file`, and scalars in the TensorBoard folder `board`.

    Args:
        file: the metrics file. Lines after step `done`, from a run that was killed, are removed first.
        board: created only if TensorBoard is installed.
        done: steps done before.
        say: called once with a message if TensorBoard is not installed.

    Raises:
        MemscopeError: the file cannot be written.
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
    """Lines up to step `done`. The last line may be cut off; an evaluation after step `done` is measured again."""
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
