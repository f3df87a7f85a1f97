"""memscope's entry point in processes of its own, with Ctrl-C at chosen points."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from memscope.runs import processes

TARGET = """
import dataclasses, torch
from memscope import Workload


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 4


def build(config):
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    return Workload(
        model=torch.nn.Sequential(*layers), batches=[torch.ones(2, 4)], loss=lambda m, x: m(x).square().mean(),
        optimizer_factory=torch.optim.AdamW, name="mine",
    )
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that hold something: progress bars leave empty ones."""
        return [line for line in self.err.splitlines() if line.strip()]


def run_apart(folder: Path, prelude: str, *words: str) -> Done:
    """Run `prelude`, then the entry point, in a new Python."""
    script = f"import sys\nsys.argv = ['memscope', *{list(words)!r}]\n{textwrap.dedent(prelude)}\n"
    script += "from memscope.__main__ import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def run_forked(folder: Path, prepare: Callable[[], object], *words: str) -> Done:
    """Run the entry point in a fork of this process, which has done all imports, after calling `prepare`."""
    if not can_fork():
        pytest.skip("with CUDA, PyTorch runs no backward pass in a fork of a process that ran one: run this file alone")
    for name in processes._PRELOADED:
        importlib.import_module(name)
    out, err = folder / ".out", folder / ".err"
    pid = os.fork()
    if pid == 0:
        try:
            _become(folder, out, err)
            prepare()
            sys.argv = ["memscope", *words]
            importlib.import_module("memscope.__main__").main()
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0)
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    found = Done(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text())
    out.unlink()
    err.unlink()
    return found


def can_fork() -> bool:
    """Whether PyTorch runs a backward pass in a fork of this process (torch/csrc/autograd/python_engine.cpp)."""
    if not torch.version.cuda:
        return True
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(RuntimeError):
            torch.ones((), requires_grad=True).square().backward()
            os._exit(0)
        os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _become(folder: Path, out: Path, err: Path) -> None:
    """Make this fork a process like one that a shell has started; its workers are forks of it, which start at once."""
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ["COLUMNS"] = "200"
    torch.set_num_threads(1)  # the threads of an OpenMP team are not in the fork, which would wait for them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes._context = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment, return-value]


def pressed_at(place: str, call: int = 1, how: Callable[[], object] | None = None) -> Callable[[], None]:
    """Prepares Ctrl-C at the given call of a function, named `module:function` or `module:Class.method`."""

    def prepare() -> None:
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, last), []

        def pressing(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == call:
                (how or press)()
            return original(*args, **kwargs)

        setattr(owner, last, pressing)

    return prepare


def press() -> None:
    """Ctrl-C, as this process receives it."""
    signal.raise_signal(signal.SIGINT)
