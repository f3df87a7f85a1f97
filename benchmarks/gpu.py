"""Measure LLaMA2-7B training on this machine's GPU and compare memscope's predictions with it: `make gpu`.

Each cell, one way to train, runs in a fresh process, while its prediction is simulated on the CPU. The same applies to
each combination of Table 2. Then memscope's own program fine-tunes the model, and so do transformers and PEFT. Work
that does not fit into the time limit is skipped, and marked as skipped in the table. `--dry-run` tries the script
without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from gpu_advice import CASES
from gpu_finetune import ATTENTION, compare_programs
from gpu_plan import STEP, TIMED, Budget, TrainingCell, covering
from gpu_report import summary, table
from gpu_table2 import CARD, GRID, Table2

HERE = Path(__file__).resolve().parent
GOLDEN_CELLS = 4
GOLDEN_BYTES = 2 * 2**20
"""Size limit of a history that is kept as a golden file in the repository."""
AT_THE_END_SECONDS = 20.0
"""Time reserved for comparisons that are still running when the last measurement ends."""
JOB_SECONDS = 120.0
"""Time limit of a job, so that one that hangs does not block the others."""
GUESS_SECONDS = 45.0
"""Assumed time of a cell until one has been measured."""
FINETUNING_SECONDS = 190.0
"""Time limit of fine-tuning and Table 2 together."""
PAIR_SECONDS = 90.0
"""Assumed time of both fine-tuning programs together; none has been measured when they begin."""
EARLY_CELLS = 8
"""Number of cells that are measured before everything else."""


class Processes:
    """Runs jobs of `gpu_cells.py`. The next process for the GPU starts, and imports PyTorch, ahead of time.

    Without a budget, jobs may take any time.
    """

    def __init__(self, scratch: Path, log: IO[str], budget: Budget | None) -> None:
        self._scratch, self._log, self._budget = scratch, log, budget
        self._numbers = itertools.count()
        self._ready = self._start()

    def _start(self) -> subprocess.Popen[str]:
        # Not in the checkout, where Python would import ./memscope instead of the installed package.
        command = [sys.executable, str(HERE / "gpu_cells.py")]
        streams = {"stdin": subprocess.PIPE, "stdout": self._log, "stderr": self._log}
        return subprocess.Popen(command, cwd=self._scratch, text=True, **streams)  # type: ignore[call-overload, no-any-return]

    def do(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run a job in a process of its own, in parallel to other jobs."""
        return self._finish(self._start(), kind, job)

    def do_next(self, kind: str, **job: Any) -> dict[str, Any]:
        """Run a job in the process that is ready, and start the next process."""
        process, self._ready = self._ready, self._start()
        return self._finish(process, kind, job)

    def _finish(self, process: subprocess.Popen[str], kind: str, job: dict[str, Any]) -> dict[str, Any]:
        result = self._scratch / f"result-{next(self._numbers)}.json"
        limit = None
        if self._budget is not None:
            # Comparisons may use the time that is reserved for the end.
            limit = min(JOB_SECONDS, self._budget.left + (AT_THE_END_SECONDS - 3.0) * (kind == "compare"))
        try:
            process.communicate(json.dumps({"kind": kind, "result": str(result), **job}) + "\n", timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"stopped after {limit:.0f} s"}
        if result.exists():
            return json.loads(result.read_text())  # type: ignore[no-any-return]
        return {"error": f"the process ended without a result, exit status {process.returncode}"}

    def close(self) -> None:
        """End the ready process, which has no job."""
        self._ready.kill()
        self._ready.communicate()


class Measurements:
    """All cells of one run, with their results so far."""

    def __init__(self, options: argparse.Namespace, processes: Processes, scratch: Path, budget: Budget) -> None:
        self.options, self._processes, self._scratch, self._budget = options, processes, scratch, budget
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 3))
        self.cells = covering(options.cells)
        self._common = {"preset": options.preset, "device": "cpu" if options.dry_run else "cuda"}
        self._predictions: dict[TrainingCell, Future[dict[str, Any]]] = {}
        self._comparisons: dict[TrainingCell, Future[dict[str, Any]]] = {}
        self._measured: dict[TrainingCell, dict[str, Any]] = {}
        self._status = dict.fromkeys(self.cells, "skipped: no time left")
        self._taken: list[float] = []
        self.overhead: list[dict[str, Any]] = []
        self.advice: list[dict[str, Any]] = []
        self._advice: list[Future[dict[str, Any]]] = []
        self._tables = [Table2(options.grid, memory, self._common) for memory in (None, CARD)][: options.rounds]
        self.finetuning = [
            {"attention": kind, "problem": "skipped: no time left"} for kind in ATTENTION[: options.rounds]
        ]
        self.about: dict[str, Any] = {}

    def _files(self, cell: TrainingCell) -> dict[str, str]:
        return {"trace": str(self._scratch / f"{cell.name}.npz"), "history": str(self.history(cell))}

    def history(self, cell: TrainingCell) -> Path:
        """Return the path of a cell's allocator history, which exists once the cell is measured."""
        return self._scratch / f"golden-{cell.name}.npz"

    def predict(self) -> None:
        """Start to simulate every cell, in order."""
        for cell in self.cells:
            job = {"cell": asdict(cell), "predicted_for": self.options.predict_for, **self._common, **self._files(cell)}
            self._predictions[cell] = self._pool.submit(self._processes.do, "predict", **job)
        for number, (cell, share) in enumerate(CASES[: self.options.advised]):
            file = str(self._scratch / f"plan-{number}.json")
            job = {"cell": asdict(cell), "share": share, "plan_file": file, **self._common}
            job["predicted_for"] = self.options.predict_for
            self._advice.append(self._pool.submit(self._processes.do, "advise", **job))
        if self._budget.allows([], GUESS_SECONDS):
            for grid in self._tables:
                grid.predict(self._processes, self._pool, self.options.predict_for)

    def finetune(self) -> Iterator[None]:
        """Compare the programs and measure Table 2 within their time limit, most important work first."""
        most = math.inf if self.options.dry_run else FINETUNING_SECONDS
        share = Budget(min(most, self._budget.left), reserve_seconds=0.0)
        programs = [partial(self._compare_programs, number, share) for number in range(len(self.finetuning))]
        tables = [partial(grid.measure, self._processes, share, GUESS_SECONDS) for grid in self._tables]
        for work in (*programs[:1], *tables, *programs[1:]):
            work()
            yield

    def _compare_programs(self, number: int, share: Budget) -> None:
        job = {"steps": self.options.tuned, "folder": str(self._scratch / f"finetune-{number}"), **self._common}
        self.finetuning[number] = compare_programs(ATTENTION[number], job, self._processes, share, PAIR_SECONDS)

    @property
    def table2(self) -> list[dict[str, Any]]:
        """Every combination on the whole GPU and on the smaller card, with its results so far."""
        return [row for grid in self._tables for row in grid.rows()]

    def follow_advice(self) -> None:
        """Measure each advised plan, and the same cell without checkpoints and with every layer checkpointed."""
        for (cell, share), future in zip(CASES, self._advice, strict=False):
            row: dict[str, Any] = {"case": f"{cell.name}, {share:.0%} of its memory", **future.result()}
            self.advice.append(row)
            if "error" in row or not row["feasible"]:
                row["problem"] = row.get("error", "nothing fits")
                continue
            row["measured"] = {}
            for name, plan in (("planned", row["plan"]), ("none", row["none"]), ("all", row["all"])):
                if not self._budget.allows(self._taken, GUESS_SECONDS):
                    row["problem"] = "skipped: no time left"
                    break
                done = self._processes.do_next("measure_plan", cell=asdict(cell), plan=plan, **self._common)
                row["measured"][name] = done
                if "error" in done:
                    row["problem"] = f"{name}: {done['error']}"
                    break

    def measure(self, cell: TrainingCell) -> None:
        """Measure a cell if time allows, and start its comparison."""
        if not self._budget.allows(self._taken, GUESS_SECONDS):
            return
        began = self._budget.spent
        job = {"cell": asdict(cell), "about": self.about, **self._common, **self._files(cell)}
        done = self._processes.do_next("measure", **job)
        self._taken.append(self._budget.spent - began)
        self._status[cell] = f"failed: {done['error']}" if "error" in done else "measured"
        if "error" not in done:
            self._measured[cell] = done | {"process_seconds": self._taken[-1]}
            self._comparisons[cell] = self._pool.submit(self._compare, cell)

    def _compare(self, cell: TrainingCell) -> dict[str, Any]:
        self._predictions[cell].exception()
        return self._processes.do("compare", **self._files(cell))

    def time_recorders(self) -> None:
        """Time a step under each recorder, with nothing else running: first wait for all simulations."""
        for future in self._predictions.values():
            future.exception()
        for grid in self._tables:
            grid.wait()
        for cell, by in TIMED[: self.options.timed]:
            known = {"cell": cell.name, "by": by}
            if not self._budget.allows(self._taken, GUESS_SECONDS):
                self.overhead.append(known | {"unavailable": "skipped: no time left"})
                continue
            job = {"cell": asdict(cell), "by": by, "steps": self.options.steps, **self._common}
            done = self._processes.do_next("overhead", **job)
            self.overhead.append(known | done | {"unavailable": done.get("unavailable", done.get("error"))})

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each cell with its results so far, without waiting for any."""
        for cell in self.cells:
            row: dict[str, Any] = {"name": cell.name, "cell": asdict(cell), "plan": cell.plan}
            row |= {"status": self._status[cell], "measured": self._measured.get(cell)}
            predicted, compared = _known(self._predictions.get(cell)), _known(self._comparisons.get(cell))
            if "error" in predicted:
                row["problem"] = f"prediction {predicted['error']}"
            elif predicted:
                row["predicted"] = predicted
            yield row | ({"comparison": compared} if "error" in compared else compared)

    def finish(self) -> None:
        """Wait for the comparisons; each job ends by itself at its time limit."""
        for future in self._comparisons.values():
            future.exception()
        self._pool.shutdown(cancel_futures=True)


def _known(future: Future[dict[str, Any]] | None) -> dict[str, Any]:
    return future.result() if future and future.done() and not future.cancelled() else {}


def written(out: Path, session: Measurements, machine: dict[str, Any], budget: Budget) -> str:
    """Write the results so far to `cells.json` and `table.md`; return the table."""
    options, rows = session.options, list(session.rows())
    settings = {
        name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ
    }
    results = {
        "schema_version": 1,
        "dry_run": options.dry_run,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "preset": options.preset,
        "lengths": [tokens for tokens, _ in STEP],
        "predicted_for": options.predict_for,
        "allocator_settings": settings,
        **machine,
        "seconds": budget.spent,
        "cells": rows,
        "overhead": session.overhead,
        "advice": session.advice,
        "table2": session.table2,
        "finetuning": session.finetuning,
        "summary": summary(rows),
    }
    (out / "cells.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (out / "table.md").write_text(text)
    return text


def _commit() -> str:
    return os.environ.get("MEMSCOPE_COMMIT") or _output("git", "-C", str(HERE), "rev-parse", "HEAD") or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def keep_histories(out: Path, session: Measurements) -> None:
    """Save the first small histories as golden files, and all others in one archive."""
    paths = [path for path in map(session.history, session.cells) if path.exists()]
    golden = [path for path in paths if path.stat().st_size < GOLDEN_BYTES][:GOLDEN_CELLS]
    for path in golden:
        shutil.copy(path, out / path.name)
    with zipfile.ZipFile(out / "histories.zip", "w") as archive:
        for path in paths:
            if path not in golden:
                archive.write(path, path.name)


def about_histories(machine: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a history file's origin."""
    torch, device = machine["versions"]["torch"], machine["device"]
    settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    return {
        "source": f"torch.cuda.memory._record_memory_history of PyTorch {torch} on {device['name']}: two steps",
        "device": device["name"],
        "torch": torch,
        "commit": _commit(),
        "driver_addresses": tuple(map(int, torch.split(".")[:2])) < (2, 12),
        "cases": [{"settings": settings, "capacity_bytes": None, "device_bytes": device.get("total_memory", 0)}],
    }


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or HERE / "results" / datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=Path(default), help="folder for the results (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="time for everything (default: 510; in a dry run: any)")
    parser.add_argument("--cells", type=int, default=24, help="how many cells (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps under each recorder (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=len(TIMED), help="number of timings (default: %(default)s)")
    parser.add_argument(
        "--advised", type=int, default=len(CASES), help="number of advised cases to measure (default: %(default)s)"
    )
    parser.add_argument("--grid", default=GRID, help="strategies of Table 2, without settings (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="1: Table 2 and fine-tuning; 2: also Table 2 for 40 GB and fine-tuning with sdpa (default: 2)",
    )
    parser.add_argument(
        "--tuned", type=int, default=25, help="fine-tuning steps (default: %(default)s, which is 200 samples)"
    )
    parser.add_argument("--preset", help="preset of targets/llama2 (default: 7b; in a dry run: debug)")
    parser.add_argument("--predict-for", default="h200-141gb", help="device to simulate (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="try the script on the CPU, without measuring anything")
    options = parser.parse_args(words)
    options.preset = options.preset or ("debug" if options.dry_run else "7b")
    if options.seconds is None:
        options.seconds = math.inf if options.dry_run else 510.0
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parsed(words)
    budget = Budget(options.seconds, reserve_seconds=AT_THE_END_SECONDS)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(options.out / "gpu.log", "w") as log:
        scratch = Path(folder)
        processes = Processes(scratch, log, None if options.dry_run else budget)
        try:
            machine = processes.do_next("probe")
            if "error" in machine or (machine["device"]["name"] == "CPU" and not options.dry_run):
                print(
                    f"make gpu: PyTorch finds no CUDA device here: {machine}. Try the script without one: --dry-run",
                    file=sys.stderr,
                )
                return 1
            driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            machine["device"]["driver"] = driver or "unknown"
            session = Measurements(options, processes, scratch, budget)
            session.about = about_histories(machine)
            session.predict()
            early = min(EARLY_CELLS, max(len(session.cells) - 1, 0))
            for cell in session.cells[:early]:
                session.measure(cell)
                written(options.out, session, machine, budget)
            session.time_recorders()
            for _ in session.finetune():
                written(options.out, session, machine, budget)
            session.follow_advice()
            for cell in session.cells[early:]:
                session.measure(cell)
                written(options.out, session, machine, budget)
            session.finish()
            keep_histories(options.out, session)
            print(written(options.out, session, machine, budget), flush=True)
        finally:
            processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
