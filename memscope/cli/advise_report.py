"""The text output of `memscope advise`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.advisor.advice import Advice, Binding, FrontPoint
from memscope.advisor.layer_words import in_words
from memscope.analysis.chosen import with_chosen
from memscope.cli.tables import print_table
from memscope.units import format_both, format_bytes, format_seconds

__all__ = ["print_advice"]


def print_advice(console: Console, advice: Advice, emitted: Sequence[str]) -> None:
    """Print the plan, its peak against the budget, its cost, and the other plans worth considering."""
    console.print(Text(f"{advice.target} on {advice.device}: budget {format_both(advice.budget_bytes)}", style="bold"))
    if advice.feasible:
        _print_plan(console, advice)
    else:
        _print_refusal(console, advice)
    print_table(console, _front(advice))
    console.print(Text(_basis(advice), style="dim"))
    for note in advice.notes:
        console.print(Text(f"Note: {note}"))
    for line in emitted:
        console.print(Text(line), soft_wrap=True)
    console.print()


def _print_plan(console: Console, advice: Advice) -> None:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("strategies", ", ".join(with_chosen(advice.strategies, advice.trace)) or "none needed")
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
    table.add_row("fit", Text(str(advice.fit), style="" if advice.fit.is_safe else "yellow"))
    table.add_row("step time (estimate)", format_seconds(advice.step_seconds))
    table.add_row("against no checkpointing", f"{advice.overhead_vs_none:+.1%}")
    if advice.overhead_vs_all is not None:
        table.add_row("against all layers", f"{advice.overhead_vs_all:+.1%}")
    table.add_row("peak", _event(advice.binding))
    table.add_row("proof", advice.proof)
    if advice.file:
        table.add_row("plan file", str(advice.file))
    print_table(console, table, "columns")


def _print_refusal(console: Console, advice: Advice) -> None:
    console.print(
        Text.assemble(
            ("No plan was found that fits. " if advice.untried else "Nothing fits. ", "bold red"),
            f"The least that a simulated plan needs is {format_both(advice.minimum_bytes)}, with "
            f"{', '.join(advice.strategies) or 'no strategy'}; checkpointed: {in_words(advice.layers)}.",
        )
    )
    console.print(Text(f"Its peak: {_event(advice.binding)}"))
    console.print(Text(f"Proof: {advice.proof}"))
    if advice.binding.helps:
        console.print(Text(f"With other strategies: {advice.binding.helps}"))


def _event(binding: Binding) -> str:
    largest = sorted(binding.by_category.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest)
    phase = binding.phase.replace("_", " ")
    return (
        f"{format_bytes(binding.allocated)} in step {binding.step}, {phase}, {binding.module}, "
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
    return [size, format_seconds(point.step_seconds), ", ".join(point.strategies) or "none", point.recomputed]


def _basis(advice: Advice) -> str:
    return (
        f"{advice.simulated} of {advice.combinations} combinations of strategies simulated; "
        f"the least that a simulated plan needs is {format_both(advice.minimum_bytes)}"
    )
