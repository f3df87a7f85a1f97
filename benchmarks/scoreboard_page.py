"""The page docs/scoreboard.md, from the published measurements and the remembered results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scoreboard_cases import ATTEMPTS, Group, PublishedCase

__all__ = ["page"]

MIB = 2**20
MEASURES = {
    "allocated": "Allocated memory (`torch.cuda.max_memory_allocated`)",
    "reserved": "Reserved memory (`torch.cuda.max_memory_reserved`)",
    "device": "Memory of the driver (`nvidia-smi`), the CUDA context included",
}
_INTRODUCTION = """\
<!-- Written by `make scoreboard` from benchmarks/scoreboard/: do not edit. -->

# Scoreboard

Peaks of memory that others measured on their GPUs and published, and what memscope predicts for them without a GPU, on
the PyTorch named below and with the releases of Hugging Face's libraries that the source names. `make scoreboard` makes
those environments, runs every command, and writes this page.

- **First try** is the command that follows from what the publication says: model, lengths, precision, method.
- **After reading** is the command after the program's code was read; each section says what that changed. No constant
  of memscope is fitted.
"""


def page(groups: Sequence[Group], results: Mapping[str, Any]) -> str:
    """The page, as Markdown."""
    parts = [_INTRODUCTION, _summary(groups, results)]
    for group in groups:
        parts += list(_section(group, results))
    return "\n".join(parts)


def _summary(groups: Sequence[Group], results: Mapping[str, Any]) -> str:
    cases = [case for group in groups for case in group.cases]
    lines = ["| measured | published | predicted | first try: median, largest | after reading: median, largest |"]
    lines.append("|---|---:|---:|---:|---:|")
    for measure, title in MEASURES.items():
        having = [case for case in cases if measure in case.published]
        told = {name: [d for case in having if (d := _difference(case, measure, name, results)) is not None]
                for name in ATTEMPTS}  # fmt: skip
        counts = f"{len(having)} | {len(told['read'])}"
        lines.append(f"| {title.partition(' (')[0]} | {counts} | {_spread(told['first'])} | {_spread(told['read'])} |")
    return "\n".join(
        [*lines, "", "Cases from which a setting was read off are not counted among the predicted ones.", ""]
    )


def _spread(differences: Sequence[float]) -> str:
    if not differences:
        return "–"
    sizes = [abs(one) for one in differences]
    return f"{statistics.median(sizes):.3%}, {max(sizes):.3%}".replace("%", " %")


def _difference(case: PublishedCase, measure: str, attempt: str, results: Mapping[str, Any]) -> float | None:
    """Share by which the prediction is above what was published; None: there is none, or it is no prediction."""
    peak = results.get(case.id, {}).get(attempt, {}).get("peak")
    if peak is None or (case.read_off and attempt == "read"):
        return None
    published = case.published[measure]
    return float((peak[measure] - published) / published)


def _section(group: Group, results: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {group.title}\n"
    yield f"Source: <{group.source}>. Measured with {group.measured_with}.{_predicted_with(group, results)}\n"
    if group.changes:
        yield f"What reading changed: {group.changes}\n"
    for measure, title in MEASURES.items():
        cases = [case for case in group.cases if measure in case.published]
        if cases:
            yield f"{title}, MiB:\n"
            yield "| case | published | first try | | after reading | |"
            yield "|---|---:|---:|---:|---:|---:|"
            yield from (_row(case, measure, results) for case in cases)
            yield ""
    if group.note:
        yield f"{group.note}\n"
    yield from _errors(group, results)
    commands = [results[case.id]["read"]["command"] for case in group.cases if case.id in results]
    if commands:
        yield f"The first command after reading:\n\n```\n{_folded(commands[0])}\n```\n"


def _predicted_with(group: Group, results: Mapping[str, Any]) -> str:
    found = [results[case.id]["read"].get("versions") for case in group.cases if case.id in results]
    versions = next((one for one in found if one), None)
    if versions is None:
        return ""
    used = ["torch"] if group.environment == "current" else list(versions)
    return f" Predicted with {', '.join(f'{name} {versions[name]}' for name in used)}."


def _row(case: PublishedCase, measure: str, results: Mapping[str, Any]) -> str:
    cells = [case.title, f"{case.published[measure] / MIB:.2f}"]
    for name in ATTEMPTS:
        peak = results.get(case.id, {}).get(name, {}).get("peak")
        if peak is None:
            cells += ["–", ""]
            continue
        share = (peak[measure] - case.published[measure]) / case.published[measure]
        mark = " (read off)" if case.read_off and name == "read" else ""
        cells += [f"{peak[measure] / MIB:.2f}", f"{share:+.3%}{mark}".replace("%", " %").replace("-", "−")]
    return f"| {' | '.join(cells)} |"


def _errors(group: Group, results: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for case in group.cases:
        attempts = results.get(case.id, {})
        errors = [attempts[name]["error"] for name in ATTEMPTS if "error" in attempts.get(name, {})]
        reason = case.refused or next(iter(errors), None) or (None if attempts else "not run yet")
        if reason:
            reasons.setdefault(reason, []).append(case.title)
    for reason, titles in reasons.items():
        which = "any of these" if len(titles) == len(group.cases) and len(titles) > 1 else "; ".join(titles)
        yield f"No prediction for {which}: {reason.partition('. ')[0].rstrip('.')}.\n"


def _folded(command: str) -> str:
    """The command on lines of at most 140 characters."""
    lines = [""]
    for word in command.split():
        if lines[-1] and len(lines[-1]) + len(word) > 137:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}".lstrip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return "\n".join(lines)
