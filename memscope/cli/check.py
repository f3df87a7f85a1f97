"""`memscope check`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memscope.analysis.check import TraceLimit, Verdict, budget_verdict, check, format_value
from memscope.analysis.diff import Setting, changed_settings
from memscope.analysis.inferred import how_inferred
from memscope.analysis.notes import told_notes
from memscope.cli.next_command import print_next, report_words
from memscope.cli.tables import print_table
from memscope.cli.trace_files import load_run
from memscope.command.options import FILE, argument, option, with_options
from memscope.errors import GateFailed, UsageError
from memscope.trace import CATEGORIES, Trace
from memscope.units import parse_budget

__all__ = ["command"]


@dataclass(frozen=True)
class CheckOptions:
    """The options of `memscope check`."""

    file: Annotated[Path, argument(type=FILE)]
    budget: Annotated[str | None, option("--budget", metavar="SIZE", help="Memory of the device, such as 40GB.")]
    limits: Annotated[
        tuple[str, ...],
        option(
            "--fail-if",
            multiple=True,
            metavar="KEY:LIMIT",
            help="A limit, such as peak:40GB, or over the baseline peak:+5% or peak:+500MiB; repeatable. KEY: peak, "
            "reserved, device, host, a category such as activation, or step_time (2.5s, 800ms, +5%).",
        ),
    ]
    baseline: Annotated[
        Path | None, option("--baseline", type=FILE, metavar="FILE", help="Trace from which growth is counted.")
    ]
    kind: Annotated[
        str,
        option(
            "--format",
            type=click.Choice(["terminal", "github", "junit", "json"]),
            default="terminal",
            show_default=True,
            help="Format of the output: a table, annotations of GitHub Actions, JUnit XML, or JSON.",
        ),
    ]


@click.command("check")
@with_options(CheckOptions)
def command(options: CheckOptions) -> int:
    """Check the trace in FILE against limits. Exit code 3 if one is exceeded.

    The budget is compared with the memory that the driver counts for the process if the trace knows it, else with
    reserved or allocated memory. A measured run that ran out of memory fails whatever the limits are.
    """
    file, baseline = options.file, options.baseline
    budget_bytes = None if options.budget is None else parse_budget(options.budget)
    limits = [TraceLimit.parse(text) for text in options.limits]
    _require_use(budget_bytes, limits, baseline)
    trace = load_run(file).trace
    base = None if baseline is None else load_run(baseline).trace
    verdicts = [] if budget_bytes is None else [budget_verdict(trace, budget_bytes)]
    verdicts += check(trace, limits, base)
    found = _Checked(
        file=file,
        baseline=baseline,
        verdicts=verdicts,
        ended=_ended_early(trace),
        differs=() if base is None else tuple(s for s in changed_settings(base, trace) if s.name != "strategies"),
        inferred=_inferred(verdicts, [trace] if base is None else [trace, base]),
        notes=told_notes(trace),
    )
    if options.kind == "json":
        click.echo(json.dumps(_document(found), ensure_ascii=False, indent=2))
    elif options.kind == "junit":
        click.echo(_junit(file, verdicts, found.ended))
    elif options.kind == "github":
        for line in _github(file, verdicts, found.ended):
            click.echo(line)
    else:
        _print(Console(highlight=False), found)
    return 0 if found.ok else GateFailed.exit_code


@dataclass(frozen=True)
class _Checked:
    """A trace with its verdicts and the notes on them."""

    file: Path
    baseline: Path | None
    verdicts: Sequence[Verdict]
    ended: str
    differs: Sequence[Setting]
    inferred: str
    notes: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether the run was complete and every limit holds."""
        return not self.ended and all(verdict.holds for verdict in self.verdicts)


def _require_use(budget_bytes: int | None, limits: Sequence[TraceLimit], baseline: Path | None) -> None:
    relative = [limit for limit in limits if limit.relative]
    if budget_bytes is None and not limits:
        raise UsageError(
            "no limit is given: add --budget 40GB, --fail-if peak:40GB, or --baseline base.npz --fail-if peak:+5%"
        )
    if relative and baseline is None:
        raise UsageError(
            f"{relative[0].key}:{relative[0].text} is a growth over a baseline: name one with --baseline base.npz"
        )
    if baseline is not None and not relative:
        raise UsageError(f"no limit uses the baseline {baseline}: add a growth, for example --fail-if peak:+5%")


def _ended_early(trace: Trace) -> str:
    """A sentence on a measured run that ran out of memory, whose trace ends there; empty otherwise."""
    match trace.meta:
        case {"out_of_memory": {"step": step, "phase": phase}, "device": {"simulated": False}}:
            when = f"step {step}, {phase.replace('_', ' ')}"
            return f"the run ran out of memory in {when}: its trace ends there and shows too low a peak"
    return ""


def _inferred(verdicts: Sequence[Verdict], traces: Sequence[Trace]) -> str:
    """A sentence on limited categories whose sizes were inferred; empty otherwise."""
    limited = [verdict.key.replace("_", " ") for verdict in verdicts if verdict.key in CATEGORIES]
    how = next((told for trace in traces if (told := how_inferred(trace))), "")
    return f"{', '.join(limited)}: {how}." if limited and how else ""


def _sentence(verdict: Verdict) -> str:
    value, allowed = (format_value(verdict.key, size) for size in (verdict.value, verdict.allowed))
    word = "within" if verdict.holds else "above"
    base = "" if verdict.baseline is None else f"; baseline {format_value(verdict.key, verdict.baseline)}"
    fit = "" if verdict.fit is None else f"; {verdict.fit}"
    return f"{_name(verdict)} is {value}, {word} the limit of {allowed} ({verdict.limit}{base}){fit}"


def _name(verdict: Verdict) -> str:
    return verdict.key.replace("_", " ") + (" (estimate)" if verdict.estimate else "")


def _print(console: Console, found: _Checked) -> None:
    table = Table(title=f"Limits of {found.file.name}")
    table.add_column("", overflow="fold")
    for heading in ("limit", "baseline", "allowed", "value"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("result")
    for one in sorted(found.verdicts, key=lambda verdict: verdict.holds):
        base = "" if one.baseline is None else format_value(one.key, one.baseline)
        sizes = base, format_value(one.key, one.allowed), format_value(one.key, one.value)
        table.add_row(_name(one), one.limit, *sizes, Text("ok", "green") if one.holds else Text("FAILED", "bold red"))
    print_table(console, table)
    for one in found.verdicts:
        if one.fit is not None:
            style = "" if one.fit.is_safe else "yellow" if one.fit.fits else "bold red"
            console.print(Text(f"{one.limit}: {one.fit}", style=style))
    if found.ended:
        console.print(Text(f"FAILED: {found.ended}", style="bold red"))
    if found.inferred:
        console.print(Text(found.inferred, "yellow"))
    for note in found.notes:
        console.print(Text(note, "yellow"))
    for setting in found.differs:
        console.print(Text(f"Differs from the baseline: {setting.name}: {setting.before} → {setting.after}", "yellow"))
    if not found.ok and found.baseline is not None:
        print_next(console, ["memscope", "diff", found.baseline, found.file])
    elif not found.ok:
        print_next(console, report_words([found.file]))


def _document(found: _Checked) -> dict[str, Any]:
    """The JSON document: sizes in bytes, step_time in seconds."""
    return {
        "schema_version": 1,
        "trace": str(found.file),
        "baseline": None if found.baseline is None else str(found.baseline),
        "ok": found.ok,
        "ended_early": found.ended or None,
        "checks": [
            {
                "key": one.key,
                "limit": one.limit,
                "value": _number(one.value),
                "allowed": _number(one.allowed),
                "baseline": None if one.baseline is None else _number(one.baseline),
                "estimate": one.estimate,
                "ok": one.holds,
                "fit": None if one.fit is None else one.fit.document(),
            }
            for one in found.verdicts
        ],
        "inferred": found.inferred or None,
        "notes": list(found.notes),
        "differs_from_baseline": [{"name": s.name, "baseline": s.before, "trace": s.after} for s in found.differs],
    }


def _number(value: Any) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def _github(file: Path, verdicts: Sequence[Verdict], ended: str) -> list[str]:
    """Workflow commands: https://docs.github.com/actions/reference/workflow-commands-for-github-actions."""
    lines = [f"::error title=memscope::{_escaped(f'{file}: {ended}')}"] if ended else []
    for one in verdicts:
        command = "notice" if one.holds else "error"
        lines.append(f"::{command} title=memscope {one.key}::{_escaped(f'{file}: {_sentence(one)}')}")
    return lines


def _escaped(message: str) -> str:
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _junit(file: Path, verdicts: Sequence[Verdict], ended: str) -> str:
    results = [(f"{one.key} {one.limit}", "" if one.holds else _sentence(one)) for one in verdicts]
    results += [("the run is complete", ended)] if ended else []
    failed = sum(bool(message) for _, message in results)
    suite = ET.Element("testsuite", name="memscope", tests=str(len(results)), failures=str(failed), errors="0")
    for name, message in results:
        case = ET.SubElement(suite, "testcase", classname=str(file), name=name)
        if message:
            ET.SubElement(case, "failure", message=message)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True)
