"""Comparison of measured and predicted allocations, and the table that `make gpu` prints.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_advice import advice_table
from gpu_finetune import finetune_lines
from gpu_table2 import table2_lines

from memscope.allocator.history import History
from memscope.allocator.replay import Replay, replay
from memscope.trace import CATEGORIES, PHASES, Ints, Trace
from memscope.units import format_bytes, format_change


@dataclass(frozen=True)
class Aligned:
    """The alignment of two sequences of sizes."""

    partner: Ints
    """Index in the second sequence of each allocation of the first; -1: none `[allocations of the first]`."""
    places: tuple[tuple[slice, slice], ...]
    """The differences, in order: a range that only the first sequence has, and one that only the second has."""


def align(ours: Ints, theirs: Ints, *, window: int = 200, confirm: int = 8) -> Aligned:
    """Align two sequences, and resume after each difference by skipping the fewest sizes on both sides together.

    Sizes are skipped, at most `window` of both sequences, if the next `confirm` sizes (or all to the end) agree again.
    If no such point exists, the rest is one difference.
    """
    partner = np.full(len(ours), -1, dtype=np.int64)
    places: list[tuple[slice, slice]] = []
    i = j = 0
    while True:
        length = min(len(ours) - i, len(theirs) - j)
        unequal = np.flatnonzero(ours[i : i + length] != theirs[j : j + length])
        same = int(unequal[0]) if unequal.size else length
        partner[i : i + same] = np.arange(j, j + same)
        i, j = i + same, j + same
        if i == len(ours) and j == len(theirs):
            return Aligned(partner, tuple(places))
        skip_ours, skip_theirs = _resume(ours[i:], theirs[j:], window, confirm)
        places.append((slice(i, i + skip_ours), slice(j, j + skip_theirs)))
        i, j = i + skip_ours, j + skip_theirs


def _resume(ours: Ints, theirs: Ints, window: int, confirm: int) -> tuple[int, int]:
    """Number of sizes to skip in each sequence so that they agree again."""
    one, other = ours[: window + confirm].tolist(), theirs[: window + confirm].tolist()
    for skipped in range(1, window + 1):
        for a in range(max(0, skipped - len(other) + 1), min(skipped, len(one) - 1) + 1):
            b = skipped - a
            if one[a] == other[b] and one[a : a + confirm] == other[b : b + confirm]:
                return a, b
    return len(ours), len(theirs)


def compare_sequences(history: History, replayed: Replay, trace: Trace) -> dict[str, Any]:
    """Compare a GPU's allocations with simulated ones, as JSON values; `replayed` is the replay of `history`."""
    aligned = align(history.sizes, trace.requested)
    at = int(replayed.allocated.argmax())
    alive = (history.born <= at) & ((history.freed < 0) | (history.freed > at))
    partner = aligned.partner[alive]
    blocks = replayed.block_sizes[alive]
    known = np.where(partner >= 0, trace.category[partner], len(CATEGORIES))
    sizes = np.bincount(known, weights=blocks, minlength=len(CATEGORIES) + 1)
    identical = not aligned.places
    return {
        "allocations": {"measured": len(history.sizes), "predicted": len(trace)},
        "identical": identical,
        "identical_with_frees": identical and bool(np.array_equal(history.freed, trace.freed)),
        "first_difference": None if identical else _first(history, trace, aligned),
        "first_free": _first_free(history, trace) if identical else None,
        "places": len(aligned.places),
        "only_measured": sum(place.stop - place.start for place, _ in aligned.places),
        "only_predicted": sum(place.stop - place.start for _, place in aligned.places),
        "differences": _grouped(history, trace, aligned),
        "measured_by_category": {
            name: int(size) for name, size in zip((*CATEGORIES, "unmatched"), sizes, strict=True) if size
        },
    }


def _first(history: History, trace: Trace, aligned: Aligned) -> dict[str, Any]:
    place, other = aligned.places[0]
    here = _located(trace, min(other.start, len(trace) - 1))
    sides = {"measured": history.sizes[place.start :], "predicted": trace.requested[other.start :]}
    return {"index": place.start, **{name: sizes[:6].tolist() for name, sizes in sides.items()}, **here}


def _first_free(history: History, trace: Trace) -> dict[str, Any] | None:
    """The first allocation that the two free at different events."""
    unequal = np.flatnonzero(history.freed != trace.freed)
    if not unequal.size:
        return None
    never = np.iinfo(np.int64).max
    ends = [np.where(freed < 0, never, freed)[unequal] for freed in (history.freed, trace.freed)]
    index = int(unequal[np.minimum(*ends).argmin()])
    events = {"measured": int(history.freed[index]), "predicted": int(trace.freed[index])}
    return {"index": index, "size": int(trace.requested[index]), **events, **_located(trace, index)}


def _located(trace: Trace, index: int) -> dict[str, Any]:
    return {
        "op": trace.ops[int(trace.op[index])],
        "module": trace.modules[int(trace.module[index])],
        "phase": PHASES[int(trace.phase[index])],
        "step": int(trace.step[index]),
        "micro_batch": int(trace.micro_batch[index]),
    }


def _grouped(history: History, trace: Trace, aligned: Aligned, most: int = 20) -> list[dict[str, Any]]:
    """The differences grouped by their sizes on both sides and the simulated operator, most frequent first."""
    counts: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], int] = {}
    for place, other in aligned.places:
        here = _located(trace, min(other.start, len(trace) - 1))
        sizes = tuple(history.sizes[place][:8].tolist()), tuple(trace.requested[other][:8].tolist())
        key = (*sizes, here["op"], here["phase"])
        counts[key] += 1
        first.setdefault(key, place.start)
    names = ("only_measured", "only_predicted", "op", "phase")
    return [
        {"count": n, "first": first[key], **dict(zip(names, key, strict=True))} for key, n in counts.most_common(most)
    ]


ACTIONS = ("alloc", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap")
"""The actions that a replay needs. Out-of-memory entries are omitted, because they do not hold the memory limit."""


def write_history(path: Path, entries: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write a history in the format of `tests/golden`, column by column, which compresses to a third of the size."""
    codes = {action: code for code, action in enumerate(ACTIONS)}
    rows = [[codes[e["action"]], e["addr"], e["size"], e["stream"]] for e in entries if e["action"] in codes]
    about = about | {"actions": ACTIONS, "trace": "rows of action, addr, size, stream"}
    columns = np.asfortranarray(np.array(rows, dtype=np.int64).reshape(-1, 4))
    np.savez_compressed(path, about=np.array(json.dumps(about)), trace_0=columns)


def imitated(trace: Trace) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the peaks and the history that a GPU's allocator would have recorded for a run, for use without a GPU."""
    done = replay(trace.requested, trace.born, trace.freed)
    moves: list[tuple[int, int, str, int, int]] = [
        (event.event, 0, event.action, event.address, event.size_bytes) for event in done.segment_events
    ]
    columns = (trace.born, trace.freed, done.addresses, trace.requested)
    for born, freed, address, size in zip(*(column.tolist() for column in columns), strict=True):
        moves.append((born, 1, "alloc", address, size))
        if freed >= 0:
            moves.append((freed, 1, "free_completed", address, size))
    moves.sort(key=lambda move: move[:2])
    peaks = {"allocated": done.peak_allocated, "reserved": done.peak_reserved, "requested": int(done.requested.max())}
    return peaks, [{"action": action, "addr": addr, "size": size, "stream": 0} for _, _, action, addr, size in moves]


def off(measured: int, predicted: int) -> float:
    """Return the relative error of a prediction, as a fraction of the measured value."""
    return (predicted - measured) / measured


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return worst and median errors, and the numbers of identical sequences and replays."""
    done = [row for row in rows if row["status"] == "measured" and "predicted" in row]
    errors = {
        name: sorted(abs(off(row["measured"][name], row["predicted"][name])) for row in done)
        for name in ("allocated", "reserved", "requested")
    }
    return {
        "cells": len(rows),
        "measured": sum(row["status"] == "measured" for row in rows),
        "compared": len(done),
        "identical": sum(bool(row.get("comparison", {}).get("identical")) for row in done),
        "replayed": sum(row.get("replay", {}).get("exact", False) for row in rows),
        **{f"{name}_worst": values[-1] for name, values in errors.items() if values},
        **{f"{name}_median": median(values) for name, values in errors.items() if values},
    }


def table(results: dict[str, Any]) -> str:
    """Return the content of `cells.json` as Markdown tables."""
    rows, total = results["cells"], results["summary"]
    device, versions = results["device"], results["versions"]
    lines = [
        f"# {'Dry run, nothing here is a measurement: ' if results['dry_run'] else ''}LLaMA2 {results['preset']}, "
        f"measured on {device['name']} and predicted for {results['predicted_for']}",
        "",
        f"{results['date']}, commit {results['commit']}, driver {device['driver']}, PyTorch {versions['torch']}, "
        f"CUDA {versions['cuda']}. A step: 8 samples of {', '.join(map(str, results['lengths']))} tokens. "
        "Sizes are peaks over two steps, in MiB; seconds are those of the third step, without recording.",
        "",
        "| cell | allocated | predicted | off | reserved | predicted | off | s | replay | largest category off | "
        "first difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|---|---|",
        *(_line(row) for row in rows),
        "",
        f"{total['measured']} of {total['cells']} cells measured, {total['compared']} compared, in "
        f"{results['seconds']:.0f} s; allocation sequences identical in {total['identical']}; replays of the measured "
        f"history identical to the byte in {total['replayed']}.",
    ]
    for name in ("allocated", "reserved", "requested"):
        if f"{name}_worst" in total:
            lines.append(f"{name}: worst {total[f'{name}_worst']:.4%}, median {total[f'{name}_median']:.4%}.")
    if results["overhead"]:
        lines += ["", "Median time of a steady step, in seconds:", "", "| cell | recorded by | s | overhead |"]
        lines += ["|---|---|--:|--:|", *(_overhead(run, results["overhead"]) for run in results["overhead"])]
    lines += advice_table(results["advice"]) if results["advice"] else []
    lines += [*table2_lines(results["table2"], results["predicted_for"]), *finetune_lines(results["finetuning"])]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"| {row['name']} | {row['status'].replace('|', '/')} |" + " |" * 9
    real, guess = row["measured"], row.get("predicted")
    words = [row["name"]]
    for name in ("allocated", "reserved"):
        words.append(_mib(real[name]))
        words += [_mib(guess[name]), f"{off(real[name], guess[name]):+.3%}"] if guess else ["", ""]
    words.append(f"{real['seconds']:.3f}" if real.get("seconds") else "")
    words.append(_replay(row.get("replay")))
    words += [_category(row), _difference(row)]
    return "| " + " | ".join(word.replace("|", "/") for word in words) + " |"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f}"


def _replay(replay: dict[str, Any] | None) -> str:
    if replay is None:
        return ""
    return "identical" if replay["exact"] else f"differs: {replay['first_difference']}"


def _category(row: dict[str, Any]) -> str:
    if "comparison" not in row or "error" in row["comparison"] or "predicted" not in row:
        return ""
    real, guess = row["comparison"]["measured_by_category"], row["predicted"]["by_category"]
    change = {name: guess.get(name, 0) - real.get(name, 0) for name in {*real, *guess}}
    worst = max(sorted(change), key=lambda name: abs(change[name]))
    return f"{worst} {format_change(change[worst])}" if change[worst] else "none"


def _difference(row: dict[str, Any]) -> str:
    if row["measured"].get("out_of_memory"):
        told = row.get("predicted", {}).get("out_of_memory")
        return "ran out of memory, as predicted" if told else "ran out of memory, not predicted"
    comparison = row.get("comparison", {"error": row.get("problem", "not compared")})
    if "error" in comparison:
        return str(comparison["error"])
    first = comparison["first_difference"]
    if first is None:
        return "none" if comparison["identical_with_frees"] else "none (frees in another order)"
    sizes = [format_bytes(first[side][0]) if first[side] else "none" for side in ("measured", "predicted")]
    where = f"{first['op']} in {first['module'] or 'no module'}, step {first['step']} {first['phase']}"
    return f"#{first['index']}: {sizes[0]}, predicted {sizes[1]}, {where}; {comparison['places']} places"


def _overhead(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    words = f"| {run['cell']} | {run['by']} | "
    if "median" not in run:
        return f"{words}{str(run['unavailable']).replace('|', '/')} | |"
    same = [other for other in runs if (other["cell"], other["by"]) == (run["cell"], "nothing")]
    bare = [other["median"] for other in same if "median" in other]
    seconds = run["median"]
    return f"{words}{seconds:.4f} | {f'{off(min(bare), seconds):+.1%}' if bare else ''} |"
