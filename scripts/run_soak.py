"""Run the whole suite five times in random order, the last two times beside processes that keep every core busy.

No test may depend on the order, on the clock or on the load: `make soak`. A run that fails ends the script; the seed
that it prints repeats the order: `make soak SEED=N`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence

from memscope.runs.processes import cores

_RUNS = 5
_BUSY_RUNS = 2


def main(words: Sequence[str] | None = None) -> int:
    """Run the suite, and return the exit code of the first run that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="seed of the first run; each run adds 1 (default: a random one)")
    parser.add_argument("tests", nargs="*", help="arguments for pytest (default: the whole suite)")
    options = parser.parse_args(words)
    first = random.randrange(10**6) if options.seed is None else options.seed
    for number in range(_RUNS):
        seed, is_busy = first + number, number >= _RUNS - _BUSY_RUNS
        print(f"run {number + 1} of {_RUNS}: seed {seed}{', with busy cores' if is_busy else ''}", flush=True)
        with _busy_cores() if is_busy else contextlib.nullcontext():
            code = subprocess.run(_command(seed, options.tests), check=False).returncode
        if code:
            print(f"run {number + 1} failed; make soak SEED={seed} begins with the same order", file=sys.stderr)
            return code
    return 0


def _command(seed: int, tests: Sequence[str]) -> list[str]:
    """As `make test`, in another order: that of the files, and of the tests in each."""
    words = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    return [*words, "--random-order", f"--random-order-seed={seed}", *tests]


@contextlib.contextmanager
def _busy_cores() -> Iterator[None]:
    """A process for each core that does nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores())]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
