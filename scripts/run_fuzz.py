"""Read changed files of every format, in child processes, and tell what memscope does not withstand: `make fuzz`.

The files of a run follow from --seed and their number. A finding is a crash, an error without a message of memscope, a
message that is empty or very long, code that is run, more than 1 GiB, or more than 5 s of CPU time. Its file is kept in
the folder of findings; the fix belongs together with a test, or with the file in tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
_BATCH = 500


def main() -> int:
    """Run the files, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="files over all formats (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files (default: %(default)s)")
    parser.add_argument("--formats", help="only these formats, separated by commas")
    parser.add_argument("--processes", type=int, default=2, help="child processes at once (default: %(default)s)")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), help="folder of findings")
    options = parser.parse_args()

    import_all()
    from fuzz.children import Outcome, run_files
    from fuzz.formats import FORMATS, task

    names = options.formats.split(",") if options.formats else list(FORMATS)
    tasks = {name: task(name, options.seed) for name in names}
    share = -(-options.files // len(names))
    batches = [(name, range(at, min(at + _BATCH, share))) for at in range(0, share, _BATCH) for name in names]
    outcomes, began = {name: Outcome() for name in names}, time.monotonic()
    with ThreadPoolExecutor(options.processes) as pool:
        for name, outcome in pool.map(lambda one: (one[0], run_files(tasks[one[0]], one[1])), batches):
            outcomes[name].add(outcome)
    seconds = time.monotonic() - began
    print(f"{'format':10}{'files':>9}{'refused':>9}{'slowest':>10}{'memory':>10}{'findings':>10}")
    for name, outcome in outcomes.items():
        row = f"{name:10}{outcome.files:>9,}{outcome.refused:>9,}{outcome.slowest:>8.2f} s"
        print(f"{row}{outcome.most_bytes / 2**20:>6.0f} MiB{len(outcome.findings):>10}")
    files = sum(outcome.files for outcome in outcomes.values())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{files:,} files in {seconds:.0f} s, {60 * files / seconds:,.0f} a minute; {options.processes} processes, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time"
    )
    found = [finding for outcome in outcomes.values() for finding in outcome.findings]
    for finding in found:
        options.findings.mkdir(parents=True, exist_ok=True)
        path = options.findings / f"{finding.task}-{options.seed}-{finding.number}{FORMATS[finding.task].suffix}"
        path.write_bytes(tasks[finding.task].make(finding.number))
        print(f"{path}: {finding.reason}")
    return 1 if found else 0


def import_all() -> None:
    """Import what the children use, so that they share it."""
    import numpy as np
    import torch

    import memscope.cli.check
    import memscope.cli.diff
    import memscope.cli.report
    import memscope.dashboards.grid_card
    import memscope.dashboards.page
    import memscope.dashboards.plan_page
    import memscope.exchange.chrome_trace
    import memscope.exchange.tables
    import memscope.exchange.torch_reader
    import memscope.exchange.torch_writer
    import memscope.simulation.devices.catalogue
    import memscope.strategies.ckpt.layer_plan
    import memscope.strategies.plugins
    import memscope.testing  # noqa: F401

    torch.set_num_threads(1)
    np.zeros(1)


if __name__ == "__main__":
    sys.exit(main())
