"""Tables of one run: where it ran out of memory, the peak of each phase, the peak of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from memscope.allocator.other_settings import helpful_settings
from memscope.analysis.effects import Run
from memscope.analysis.growth import StepPeak, about_steps, chosen_steps, has_steps_to_compare
from memscope.analysis.phases import about_phases, leaves_the_steps, phase_peaks
from memscope.analysis.ran_out import about_fragments, in_use
from memscope.cli.table_sections import TableSection
from memscope.units import format_bytes

__all__ = ["run_sections", "settings_notes"]

_TOP_IN_USE = 8


def run_sections(runs: Sequence[Run]) -> Iterator[TableSection]:
    """The tables that some of the runs have: each only where it tells more than the peak does.

    Of several runs, the last one is that to be explained if it does not fit.
    """
    for run in runs:
        if run is runs[-1] and run.trace.meta.get("out_of_memory"):
            notes = [Text(f"{run.label}: {text}", style="yellow") for text in about_fragments(run.trace)]
            yield TableSection([run], _in_use, notes, stacked="rows")
        if leaves_the_steps(run.trace):
            yield TableSection([run], _phases, [Text(f"{run.label}: {t}") for t in about_phases(run.trace)], "rows")
        if has_steps_to_compare(run.trace):
            notes = [Text(f"{run.label}: {text}", style="yellow") for text in about_steps(run.trace)]
            yield TableSection([run], _steps, notes, stacked="rows")


def settings_notes(runs: Sequence[Run]) -> Iterator[Text]:
    """The allocator setting that would help each run most, if one does."""
    for run in runs:
        for best in helpful_settings(run.trace)[:1]:
            setting = f"PYTORCH_CUDA_ALLOC_CONF={best.text}"
            if run.trace.meta.get("out_of_memory"):
                what = f"it would fit with {setting}, and reserve {format_bytes(best.reserved_bytes)}"
            else:
                saved = run.trace.meta["peak_reserved"] - best.reserved_bytes
                what = f"{setting} would reserve {format_bytes(saved)} less"
            yield Text(f"{run.label}: {what}: simulate it with --allocator {best.text}")


def _in_use(one: Sequence[Run]) -> Table:
    (run,) = one
    table = Table(title=Text(f"Alive when {run.label} ran out of memory"))
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("category", overflow="fold")
    table.add_column("module", overflow="fold")
    rows = in_use(run.trace)
    for (category, module), size_bytes in rows[:_TOP_IN_USE]:
        table.add_row(format_bytes(size_bytes), category.replace("_", " "), Text(module or "(no module)"))
    if rest := rows[_TOP_IN_USE:]:
        table.add_row(format_bytes(sum(size for _, size in rest)), "", f"{len(rest)} others")
    return table


def _phases(one: Sequence[Run]) -> Table:
    (run,) = one
    peaks = phase_peaks(run.trace)
    table = Table(title=Text(f"Peak by phase of {run.label}"))
    table.add_column("")
    table.add_column("allocated", justify="right", no_wrap=True)
    if has_reserved := bool(run.trace.reserved.size):
        table.add_column("reserved", justify="right", no_wrap=True)
    table.add_column("at")
    for peak in peaks:
        sizes = [peak.allocated_bytes, *([peak.reserved_bytes or 0] if has_reserved else [])]
        table.add_row(peak.phase.replace("_", " "), *map(format_bytes, sizes), peak.at)
    if len(models := run.trace.meta.get("models", {})) > 1:
        table.caption = "models: " + ", ".join(f"{name} is a {kind}" for name, kind in models.items())
    return table


def _steps(one: Sequence[Run]) -> Table:
    (run,) = one
    table = Table(title=Text(f"Peak by step of {run.label}"))
    headings = ["step", "allocated"]
    if has_reserved := bool(run.trace.reserved.size):
        headings += ["reserved", "not allocated at the peak"]
    for heading in headings:
        table.add_column(heading, justify="right")
    shown, total = chosen_steps(run.trace)
    for peak in shown:
        table.add_row(str(peak.step), *map(format_bytes, _sizes(peak, has_reserved)))
    if len(shown) < total:
        table.caption = f"{len(shown)} of {total:,} steps, the highest ones among them"
    return table


def _sizes(peak: StepPeak, has_reserved: bool) -> list[int]:
    beyond = [peak.reserved_bytes or 0, peak.unused_bytes or 0] if has_reserved else []
    return [peak.allocated_bytes, *beyond]
