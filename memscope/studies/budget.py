"""What a budget of time buys on a device: iterations, tokens and loss, for models and batches of several sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from memscope.analysis.cost import last_step_seconds, operator_costs
from memscope.errors import UsageError
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.simulate import simulate
from memscope.trace import Trace
from memscope.workload.target import find_target

__all__ = ["TOKENS_PER_PARAMETER", "BudgetQuestion", "Optimum", "Spent", "TimeBudget", "spend"]

TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter of a compute-optimal model: Hoffmann et al., *Training Compute-Optimal Large Language
Models* (Chinchilla), arXiv 2203.15556, table 3: 8.0 billion tokens for 400 million parameters."""

_FLOPS = 6
"""Floating-point operations per parameter and token of a training step: the same paper, appendix F."""


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Loss that the same paper expects, in nats per token of its text: equation 10 of appendix D.3."""
    return float(1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28)


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model for a number of floating-point operations."""

    flops: float

    @property
    def parameters(self) -> float:
        """Its parameters."""
        return math.sqrt(self.flops / (_FLOPS * TOKENS_PER_PARAMETER))

    @property
    def tokens(self) -> float:
        """Its training tokens."""
        return TOKENS_PER_PARAMETER * self.parameters


@dataclass(frozen=True)
class BudgetQuestion:
    """What to spend, and on what."""

    target: str
    preset: str | None
    settings: dict[str, str]
    vary: str
    """The setting that changes the size of the model, such as n_layers."""
    sizes: Sequence[str]
    """Its values."""
    batches: Sequence[int]
    """Values of `micro_batch`."""
    strategies: str
    device: Device
    seconds: float
    """The budget."""

    def require_rates(self) -> None:
        """Refuse a device on which no time can be estimated.

        Raises:
            UsageError: the device's rates are unknown.
        """
        device = self.device
        if device.memory_bytes_per_second is None or device.flops_per_second("fp32") is None:
            raise UsageError(
                f'a time budget needs the rates of a device, and those of "{device.name}" are not known: choose a '
                "specific GPU, such as --device a100-40gb (see: memscope devices), or give bandwidth_bytes_per_second "
                "and peak_flops_per_second in the file of --device-file"
            )


@dataclass(frozen=True)
class Spent:
    """What the budget buys for one model and one batch."""

    size: str
    """The value of the setting that varies."""
    parameters: int
    micro_batch: int
    needed_bytes: int
    fits: bool
    step_seconds: float
    iterations: int
    """Optimizer steps within the budget."""
    tokens: int
    """Tokens of these steps."""
    mfu: float
    """Floating-point operations of forward and backward pass, as a share of what the device could do at its 16-bit peak
    in the same time (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B, which leaves recomputation out, too)."""

    @property
    def flops(self) -> float:
        """Floating-point operations of training by the rule of the scaling laws, 6 · parameters · tokens."""
        return float(_FLOPS * self.parameters * self.tokens)

    @property
    def loss(self) -> float:
        """Loss that Chinchilla's law expects, for comparisons within the table; infinite without a step."""
        return chinchilla_loss(self.parameters, self.tokens) if self.tokens else math.inf


@dataclass(frozen=True)
class TimeBudget:
    """The answer: what the budget buys in each case."""

    question: BudgetQuestion
    rows: tuple[Spent, ...]

    @property
    def best(self) -> Spent | None:
        """The row with the smallest expected loss among those that fit; None if none fits."""
        return min((row for row in self.rows if row.fits and row.tokens), key=lambda row: row.loss, default=None)

    @property
    def at_peak(self) -> Optimum:
        """The compute-optimal model of a device that works at its 16-bit peak for the whole budget: a bound."""
        return Optimum(_peak(self.question.device) * self.question.seconds)

    def document(self) -> dict[str, Any]:
        """The answer as JSON values."""
        asked, best = self.question, self.best
        return {
            "schema_version": 1,
            "study": "budget",
            "target": asked.target,
            "preset": asked.preset,
            "settings": asked.settings,
            "strategies": asked.strategies,
            "device": asked.device.name,
            "budget_seconds": asked.seconds,
            "vary": asked.vary,
            "rows": [_row(row) for row in self.rows],
            "best": None if best is None else {**_row(best), "optimum": _optimum(Optimum(best.flops))},
            "optimum_at_peak": _optimum(self.at_peak),
        }


def _row(row: Spent) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    values["estimated_step_seconds"] = values.pop("step_seconds")
    return {**values, "flops": row.flops, "expected_loss": row.loss if row.tokens else None}


def _optimum(found: Optimum) -> dict[str, int]:
    return {"parameters": round(found.parameters), "tokens": round(found.tokens)}


def spend(question: BudgetQuestion, progress: Callable[[str, int, int], None] = lambda *_: None) -> TimeBudget:
    """Simulate every size and batch, and work out what the budget buys.

    Raises:
        UsageError: the device has no rates; a size or batch cannot be set; or samples have no fixed length (`seq_len`).
    """
    question.require_rates()
    target = find_target(question.target)
    cases = [(size, batch) for size in question.sizes for batch in question.batches]
    words = [question.settings | {question.vary: size, "micro_batch": str(batch)} for size, batch in cases]
    configs = [target.configure(question.preset, settings) for settings in words]  # before anything is simulated
    rows = []
    for index, ((size, batch), config) in enumerate(zip(cases, configs, strict=True)):
        progress(f"{question.vary}={size} micro_batch={batch}", index, len(cases))
        trace = simulate(partial(target.build, config), strategies=question.strategies, device=question.device)
        rows.append(_spent(question, size, batch, trace))
    return TimeBudget(question, tuple(rows))


def _spent(question: BudgetQuestion, size: str, batch: int, trace: Trace) -> Spent:
    length, samples = trace.meta["settings"].get("seq_len"), trace.meta["samples_per_step"]
    if not length or not samples:
        raise UsageError(
            f'study budget counts tokens, and the samples of "{question.target}" have no fixed length: '
            "give one with --set seq_len=…"
        )
    seconds = last_step_seconds(trace)
    assert seconds, "the device has rates"
    iterations = int(question.seconds / seconds)
    step = trace.steps[-1]
    phases = [operator_costs(trace, step=step, phase=phase) for phase in ("forward", "loss", "backward")]
    flops = sum(cost.flops for costs in phases for cost in costs.values())
    return Spent(
        size=size,
        parameters=trace.meta["parameters"]["total"],
        micro_batch=batch,
        needed_bytes=int(trace.meta["peak_reserved"]) + question.device.context_bytes,
        fits=trace.meta["out_of_memory"] is None,
        step_seconds=seconds,
        iterations=iterations,
        tokens=iterations * samples * length,
        mfu=flops / seconds / _peak(question.device),
    )


def _peak(device: Device) -> float:
    rates = device.peak_flops_per_second
    rate = rates.get("bf16") or rates.get("fp16") or device.flops_per_second("fp32")
    assert rate is not None, "require_rates says so"
    return rate
