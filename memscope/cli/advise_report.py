"""The text output of `memscope advise`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.advisor.advice import Advice, Binding, FrontPoint, in_words
from memscope.units import format_bytes, format_gb

__all__ = ["print_advice"]


def print_advice(console: Console, advice: Advice, profiled: str, emitted: Sequence[str], html: Path | None) -> None:
    """Print the plan, its peak against the budget, its cost, and the other plans worth considering.

    `profiled`: the arguments of `memscope profile` for the same workload on the same device.
    """
    console.print(Text(f"{advice.target} on {advice.device}: budget {_both(advice.budget_bytes)}", style="bold"))
    if advice.feasible:
        _print_plan(console, advice)
    else:
        _print_refusal(console, advice)
    console.print(_front(advice))
    console.print(Text(_basis(advice), style="dim"))
    for note in advice.notes:
        console.print(Text(f"Note: {note}"))
    for line in emitted:
        console.print(Text(line), soft_wrap=True)
    console.print()
    if html:
        console.print(f"Page: {html}")
    console.print(f"Next: {_next(advice, profiled)}", soft_wrap=True)


def _print_plan(console: Console, advice: Advice) -> None:
    table = Table(show_header=False)
    table.add_row("strategies", ", ".join(advice.strategies) or "none needed")
    table.add_row("checkpointing", in_words(advice.layers))
    peak = advice.peak
    room = advice.budget_bytes - peak.device
    table.add_row(
        "needs",
        f"{format_bytes(peak.device)} of {format_bytes(advice.budget_bytes)}: "
        f"allocated {format_bytes(peak.allocated)}, reserved {format_bytes(peak.reserved)}, "
        f"CUDA context {format_bytes(peak.device - peak.reserved)} (estimate); "
        f"{format_bytes(room)} left",
    )
    table.add_row("step time (estimate)", f"{advice.step_seconds:.3g} s")
    table.add_row("against no checkpointing", f"{advice.overhead_vs_none:+.1%}")
    table.add_row("against all layers", f"{advice.overhead_vs_all:+.1%}")
    table.add_row("peak", _event(advice.binding))
    table.add_row("optimality", advice.optimality)
    if advice.file:
        table.add_row("plan file", str(advice.file))
    console.print(table)


def _print_refusal(console: Console, advice: Advice) -> None:
    console.print(
        Text.assemble(
            ("Nothing fits. ", "bold red"),
            f"The smallest feasible budget is {_both(advice.minimum_bytes)}, with "
            f"{', '.join(advice.strategies) or 'no strategy'}; checkpointed: {in_words(advice.layers)}.",
        )
    )
    console.print(Text(f"Its peak: {_event(advice.binding)}"))
    if advice.binding.helps:
        console.print(Text(f"With other strategies: {advice.binding.helps}"))


def _event(binding: Binding) -> str:
    largest = sorted(binding.by_category.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest)
    return (
        f"{format_bytes(binding.allocated)} in step {binding.step}, {binding.phase}, {binding.module}, "
        f"{binding.op or 'gradients'} ({parts})"
    )


def _front(advice: Advice) -> Table:
    table = Table(title="Memory against time: simulated plans that no other plan beats")
    for heading, justify in (("device must hold", "right"), ("step (estimate)", "right")):
        table.add_column(heading, justify="right" if justify == "right" else "left", no_wrap=True)
    table.add_column("strategies")
    table.add_column("checkpointed")
    for point in advice.front:
        table.add_row(*_front_row(point, advice))
    return table


def _front_row(point: FrontPoint, advice: Advice) -> list[str | Text]:
    fits = point.peak.device <= advice.budget_bytes
    size = Text(format_bytes(point.peak.device), style="green" if fits else "")
    return [size, f"{point.step_seconds:.3g} s", ", ".join(point.strategies) or "none", point.recomputed]


def _basis(advice: Advice) -> str:
    return (
        f"{advice.simulated} of {advice.combinations} combinations of strategies simulated; "
        f"the smallest feasible budget is {_both(advice.minimum_bytes)}"
    )


def _next(advice: Advice, profiled: str) -> str:
    if not advice.feasible:
        return "allow one of the strategies above, or raise the budget"
    words = f' -s "{advice.plan}"' if advice.plan else ""
    return f"memscope profile {profiled}{words}"


def _both(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({format_gb(size_bytes)})"
