"""Jobs of `make gpu` in forks of a server that has imported PyTorch, in place of new Pythons that import it again."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from memscope.runs import processes

__all__ = ["BENCHMARKS", "ForkedJob"]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _work(orders: Connection, folder: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(BENCHMARKS))
    sys.stdin = io.StringIO(orders.recv())
    importlib.import_module("gpu_cells").main()


class ForkedJob:
    """What `Processes` of `gpu.py` needs of a process that has started `gpu_cells.py`."""

    def __init__(self, folder: Path) -> None:
        context = processes._context()
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, str(folder)), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, order: str | None = None, timeout: float | None = None) -> None:
        if order is not None:
            self._orders.send(order)
        self._process.join(timeout)
        if self._process.is_alive():
            assert timeout is not None, "without a limit, a process is waited for until it ends"
            raise subprocess.TimeoutExpired("gpu_cells", timeout)

    def kill(self) -> None:
        self._process.kill()
