"""The command line of a program: what it starts, and what is wrong with it before it starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memscope import __version__
from memscope.errors import UsageError, nearest

__all__ = ["CommandLine", "advice_for", "resolve_program"]

_PYTHON = re.compile(r"(python|pypy)(\d+(\.\d+)*t?)?(\.exe)?", re.IGNORECASE)
_TAKE_A_WORD = "WX"
"""Flags of Python with a value (Python/initconfig.c, `SHORT_OPTS`), but `-c` and `-m`, which end the flags."""
_WITHOUT_SITE = {"E": "ignores PYTHONPATH", "I": "ignores PYTHONPATH", "S": "imports no sitecustomize"}
"""Flags under which memscope cannot attach itself. `-P` and `-s` leave PYTHONPATH alone."""
_LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")
"""Modules that start a script, as `python -m torch.distributed.run train.py`."""
_MOST_BYTES = 4096
_ASK = """
import importlib.machinery, importlib.util, json, sys

def spec_of(name):  # imports nothing: a package may import torch
    first, *others = name.split(".")
    spec, path = importlib.util.find_spec(first), first
    for part in others:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(path, spec.submodule_search_locations)
    return spec

def has(name):
    try:
        return spec_of(name) is not None
    except Exception:
        return False

print(json.dumps({name: has(name) for name in sys.argv[1:]}))
"""
"""Asks a Python which modules it has."""


@dataclass(frozen=True)
class CommandLine:
    """A command line that can be started."""

    words: tuple[str, ...]
    """The command line as it was given."""
    path: str
    """The executable that its first word stands for."""
    name: str
    """The script's name without its folder, such as `train.py`; of `-m pkg.train`, the module."""


@dataclass(frozen=True)
class _Invocation:
    """What a command line of Python runs."""

    flags: str
    module: str | None = None
    script: str | None = None


def resolve_program(words: Sequence[str]) -> CommandLine:
    """Find the program that a command line starts. Nothing of it runs yet.

    Raises:
        UsageError: the command line is empty, or names a command, script or module that does not exist, or a Python
            that memscope cannot attach itself to.
    """
    if not words:
        raise UsageError("no program after --: expected a command, for example memscope profile -- python train.py")
    path = shutil.which(words[0])
    if path is None:
        raise UsageError(_not_found(words))
    if not _PYTHON.fullmatch(Path(words[0]).name):
        interpreter = _shebang(Path(path))
        if interpreter is not None:
            _check_packages(interpreter)
        return CommandLine(tuple(words), path, _script_among(words[1:]) or Path(words[0]).name)
    invocation = _invocation(words)
    _check_flags(invocation)
    if invocation.script not in (None, "-"):
        _check_script(str(invocation.script))
    _check_packages(path, invocation.module)
    name = Path(words[0]).name
    if invocation.script not in (None, "-"):
        name = Path(str(invocation.script)).name
    elif invocation.module is not None:
        name = (invocation.module in _LAUNCHERS and _script_among(words[1:])) or invocation.module
    return CommandLine(tuple(words), path, name)


def advice_for(python: str) -> str:
    """How to install memscope into a Python."""
    return f"install it there: {shlex.quote(python)} -m pip install torch-memscope=={__version__}"


def _not_found(words: Sequence[str]) -> str:
    first = words[0]
    if os.path.isfile(first):
        how = "python " if first.endswith(".py") else ""
        return f'"{first}" is not executable: start it as memscope profile -- {how or "sh "}{shlex.join(words)}'
    if os.path.isfile(os.path.join(os.curdir, first)) or first.endswith(".py"):
        return f'there is no command "{first}": start a script with its Python: memscope profile -- python {first}'
    return f'there is no command "{first}" on PATH: expected the program to start, for example python train.py'


def _shebang(path: Path) -> str | None:
    """The Python that a script such as an installed console script names in its first line."""
    try:
        with path.open("rb") as file:
            line = file.read(_MOST_BYTES).partition(b"\n")[0].decode(errors="replace")
    except OSError:
        return None
    words = line.removeprefix("#!").split() if line.startswith("#!") else []
    words = [word for word in words if not (word.startswith("-") or Path(word).name == "env")]
    if not words or not _PYTHON.fullmatch(Path(words[0]).name):
        return None
    return shutil.which(words[0])


def _script_among(words: Sequence[str]) -> str | None:
    """The first of some words that is a Python file."""
    return next((Path(word).name for word in words if word.endswith(".py") and os.path.isfile(word)), None)


def _invocation(words: Sequence[str]) -> _Invocation:
    """What `python …` runs. Source: Modules/main.c and Python/getopt.c."""
    flags = ""
    rest = iter(words[1:])
    for word in rest:
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(rest, None)
        elif not word.startswith("-") or word == "-":
            return _Invocation(flags, script=word)
        else:
            found, ending = _letters(word[1:], rest)
            flags += found
            if ending is not None:
                return _Invocation(flags, module=ending[1] if ending[0] == "m" else None)
    return _Invocation(flags)


def _letters(letters: str, rest: Iterator[str]) -> tuple[str, tuple[str, str] | None]:
    """The flags of one word without values, and `-c` or `-m` with its value."""
    flags = ""
    for position, letter in enumerate(letters, start=1):
        if letter in "cm":
            return flags, (letter, letters[position:] or next(rest, ""))
        if letter in _TAKE_A_WORD:
            if not letters[position:]:
                next(rest, None)
            return flags, None
        flags += letter
    return flags, None


def _check_flags(invocation: _Invocation) -> None:
    for flag in invocation.flags:
        if flag in _WITHOUT_SITE:
            raise UsageError(
                f"python -{flag} {_WITHOUT_SITE[flag]}, by which memscope attaches to the program: leave -{flag} out"
            )


def _check_script(script: str) -> None:
    if os.path.exists(script):
        return
    path = Path(script)
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f'there is no file "{script}": the folder {folder} does not exist')
    scripts = [one.name for one in folder.glob("*.py")]
    raise UsageError(f'there is no file "{script}" in {folder.resolve()}: {nearest(path.name, scripts)}')


def _check_packages(python: str, module: str | None = None) -> None:
    """Check that a Python has torch, memscope, and the module to run."""
    names = ["torch", "memscope", *([module] if module else [])]
    done = subprocess.run([python, "-c", _ASK, *names], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        has = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UsageError(f"{python} does not work: {words[-1]}") from None
    if not has["torch"]:
        raise UsageError(
            f"{python} has no PyTorch: choose the Python of your training environment, or install torch there"
        )
    if not has["memscope"]:
        raise UsageError(f"{python} has no memscope: {advice_for(python)}")
    if module is not None and not has[module]:
        raise UsageError(
            f'{python} has no module "{module}" (python -m {module}): check its name, the folder that the program is '
            "started in, and that it is installed"
        )
