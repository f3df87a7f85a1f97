"""The matrix of architectures: which of them memscope simulates, and whether a simulation equals a run.

    make models                                    runs the checks that have no result yet, and writes docs/models.md
    PYTHONPATH=tests .venv/bin/python benchmarks/bench_models.py --only GPT-2,BERT --checks cpu,lora --again

Results are kept in build/models, a JSON file for each model. `--part 0/2` takes every second model, so that two
processes can share the work. The whole matrix takes an hour of CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures.matrix import ROWS, allocations
from architectures.row import Mode, Row

from memscope import advise, record, simulate
from memscope.errors import MemscopeError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "models"
DEVICE = "a100-80gb"
DTYPES = {"fp32": ("fp32", "off"), "amp": ("fp32", "bf16"), "bf16": ("bf16", "off")}
TINY = ("cpu", "lora", "ckpt", "advise")
TECHNIQUES = ("lora", "ckpt", "advise")

Results = Mapping[str, Mapping[str, Any]]
"""Name of a model → check → its outcome."""


def usual_checks(row: Row, attention: str) -> list[str]:
    """The checks `ATTENTION-DTYPE` of the usual size."""
    return [f"{attention}-{dtype}" for dtype in DTYPES] if attention in (row.attentions or ("any",)) else []


def checks_of(row: Row) -> list[str]:
    """The checks of a model: of its tiny size, then of the usual one."""
    return [*TINY, *(name for attention in ("eager", "sdpa", "any") for name in usual_checks(row, attention))]


def check(row: Row, name: str, folder: Path) -> str:
    """Run a check; returns what is wrong, or nothing."""
    if name == "cpu":
        return difference(row, folder)
    if name == "advise":
        build = row.how.build("tiny", Mode(), folder)
        # With these two strategies given, what is left to choose are the layers to recompute: every option is measured.
        advise(build, budget="30GB", device=DEVICE, strategies="optim:fused,ga:steps=1")
        return ""
    if name in TINY:
        simulate(row.how.build("tiny", Mode(), folder), device=DEVICE, strategies=name)
        return ""
    attention, dtype = name.split("-")
    mode = Mode(None if attention == "any" else attention, *DTYPES[dtype])
    simulate(row.how.build("usual", mode, folder), device=DEVICE)
    return ""


def difference(row: Row, folder: Path) -> str:
    """Where the simulated step of the tiny size first differs from the recorded one."""
    build = row.how.build("tiny", Mode(), folder)
    seed()
    run = allocations(record(build))
    seed()
    simulated = allocations(simulate(build, device="cpu"))
    if simulated == run:
        return ""
    pairs = itertools.zip_longest(simulated, run)
    place, (ours, theirs) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{len(simulated)} allocations simulated, {len(run)} recorded; number {place} is {ours}, recorded {theirs}"


def seed() -> None:
    """Start random numbers again; transformers draws the masked frames of a speech model with NumPy."""
    torch.manual_seed(0)
    np.random.seed(0)


def result(row: Row, name: str, folder: Path) -> dict[str, Any]:
    """The outcome of a check, as JSON."""
    began = time.process_time()
    try:
        note = check(row, name, folder)
    except MemscopeError as error:
        note = str(error)
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
    return {"ok": not note, "note": note, "cpu_seconds": round(time.process_time() - began, 2)}


def run(row: Row, wanted: list[str], again: bool) -> None:
    """Run the wanted checks of a model that have no result yet, or all of them."""
    file = RESULTS / f"{row.name.replace('/', '-')}.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in checks_of(row):
        if (wanted and name not in wanted) or (name in done and not again):
            continue
        done[name] = {"ok": False, "note": "the process ended", "cpu_seconds": 0}
        file.write_text(json.dumps(done, indent=1))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            done[name] = result(row, name, Path(folder))
        file.write_text(json.dumps(done, indent=1))
        print(f"{row.name:20} {name:10} {done[name]['cpu_seconds']:7.2f} s  {done[name]['note'][:600]}", flush=True)


PAGE = """# Which models were tried

{passed} of {count} architectures pass:

- in a tiny size, the simulated step on `cpu` equals the recorded one, allocation by allocation: operator, size,
  category, phase and module, in order;
- in its usual size, two steps simulate on `{device}` with fp32 weights, with autocast to bf16, and with bf16 weights,
  in eager attention and in SDPA where the model has both. Nothing of the usual size was run on a GPU.

| | models |
|---|---:|
| the simulated step on `cpu` equals the recorded one | {cpu} of {count} |
| the usual size simulates in every mode | {usual} of {count} |
| `-s lora` simulates, with targets that memscope chooses | {lora} of {count} |
| `-s ckpt` simulates, with every layer | {ckpt} of {count} |
| `memscope advise` plans which layers to recompute, in the tiny size | {advise} of {count} |

The usual size is the default configuration of transformers unless a remark says otherwise; two samples of 512 tokens,
or of as many as the model has positions. In a cell, *yes* means all three dtypes, – that there is no such attention;
where attention is no choice, the result stands under *eager*.

{tables}
## Why some fail

{failures}

Written by `make models` with PyTorch {torch} and transformers {transformers} on {date}.
"""


def page(results: Results) -> str:
    """docs/models.md."""
    rows = [row for row in ROWS.values() if set(checks_of(row)) <= set(results.get(row.name, {}))]

    def passing(names: Any) -> list[Row]:
        return [row for row in rows if all(results[row.name][name]["ok"] for name in names(row))]

    groups = itertools.groupby(rows, lambda row: row.group)
    return PAGE.format(
        passed=len(passing(lambda row: [name for name in checks_of(row) if name not in TECHNIQUES])),
        usual=len(passing(lambda row: checks_of(row)[len(TINY) :])),
        count=len(rows),
        device=DEVICE,
        **{name: len(passing(lambda _, name=name: [name])) for name in TINY},
        tables="".join(table(group, list(members), results) for group, members in groups),
        failures="\n".join(failures(rows, results)),
        torch=torch.__version__.partition("+")[0],
        transformers=importlib.metadata.version("transformers"),
        date=datetime.date.today().isoformat(),
    )


def table(group: str, rows: list[Row], results: Results) -> str:
    """The table of a group of models."""
    lines = [
        f"## {group}\n",
        "| model | equals its run | eager | SDPA | LoRA | ckpt | advise | remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = results[row.name]
        cells = [
            cell(["cpu"], found),
            cell(usual_checks(row, "eager") or usual_checks(row, "any"), found),
            cell(usual_checks(row, "sdpa"), found),
            *(cell([name], found) for name in TECHNIQUES),
        ]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.about} |")
    return "\n".join(lines) + "\n\n"


def cell(names: list[str], found: Mapping[str, Any]) -> str:
    """What some checks found: yes, no, or the dtypes that fail."""
    failed = [name.partition("-")[2] for name in names if not found[name]["ok"]]
    if not failed:
        return "yes" if names else "–"
    return "**no**" if len(failed) == len(names) else f"**not {', '.join(failed)}**"


def failures(rows: list[Row], results: Results) -> Iterator[str]:
    """A line for each model with a failure: why, or else what was reported."""
    for row in rows:
        notes = {name: results[row.name][name]["note"] for name in checks_of(row) if not results[row.name][name]["ok"]}
        if notes:
            reported = " ".join(next(iter(notes.values())).split())[:300]
            yield f"- **{row.name}** ({', '.join(notes)}): {row.why or f'`{reported}`'}"


def main() -> None:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of models, joined by commas")
    parser.add_argument("--checks", default="", help=f"{','.join(TINY)} and ATTENTION-DTYPE, such as sdpa-amp")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth model, from the Ith on")
    parser.add_argument("--again", action="store_true", help="repeat finished checks")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    first, step = map(int, options.part.split("/"))
    only = [name for name in options.only.split(",") if name]
    for row in [*ROWS.values()][first::step]:
        if not only or row.name in only:
            run(row, [name for name in options.checks.split(",") if name], options.again)
    files = {name: RESULTS / f"{name.replace('/', '-')}.json" for name in ROWS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    (ROOT / "docs" / "models.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
