"""Run the marked blocks of the documents and compare their output with the text; `--update` rewrites the text.

The line before a fenced block marks it. Readers do not see the mark:

    <!-- run: small -->
    ```
    $ memscope devices
    (its output)
    ```

`small` blocks also run in the tests; `7b` blocks take minutes. A page's blocks run in order, at 80 columns, in an empty
folder that has `targets/` and from which Python imports. In a block of commands, `$` starts a command and the other
lines are its standard output. A Python block is executed with the names of those before it, and then its functions
`test_*` are called. Options:

    file=PATH    write the block to PATH instead of running it
    quiet        every line is a command; its output is not in the text
    columns=N    width of the terminal
    exit=N       expected exit code of the commands, 0 unless given
    from=TEXT    the text shows the output from the first line with TEXT ...
    to=TEXT      ... to the next one with this TEXT
    needs=NAME   the block runs only where this Python package is installed
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "BlockFailed", "differences", "main", "pages", "read_blocks", "run_blocks", "updated"]

ROOT = Path(__file__).parents[1]
OPTIONS = {"file", "quiet", "columns", "exit", "from", "to", "needs"}


class BlockFailed(Exception):
    """A block that cannot be read or run."""


@dataclass(frozen=True)
class Block:
    """A marked block."""

    place: str
    """Page and line, for messages."""
    first: int
    """Index of its first line of text among the lines of the page."""
    size: str
    """`small` or `7b`."""
    options: dict[str, str]
    language: str
    lines: tuple[str, ...]


def pages() -> list[Path]:
    """Every document."""
    folders = ("docs", "skills", "targets")
    return sorted([*ROOT.glob("*.md"), *(page for folder in folders for page in ROOT.glob(f"{folder}/**/*.md"))])


def read_blocks(page: str, text: str) -> list[Block]:
    """The marked blocks of a page.

    Raises:
        BlockFailed: when a mark cannot be read, or no block follows it.
    """
    lines = text.splitlines()
    blocks = []
    for number, line in enumerate(lines):
        if not line.startswith("<!-- run:"):
            continue
        place = f"{page}:{number + 1}"
        mark = re.fullmatch(r"<!-- run: (small|7b)( .*)? -->", line)
        fence = lines[number + 1] if number + 1 < len(lines) else ""
        if not mark or not fence.startswith("```"):
            raise BlockFailed(
                f"{place}: expected <!-- run: small|7b OPTION... -->, and a fenced block in the next line"
            )
        options = dict(word.partition("=")[::2] for word in shlex.split(mark[2] or ""))
        if unknown := options.keys() - OPTIONS:
            raise BlockFailed(
                f"{place}: unknown option {', '.join(sorted(unknown))}; known: {', '.join(sorted(OPTIONS))}"
            )
        end = lines.index("```", number + 2)
        blocks.append(Block(place, number + 2, mark[1], options, fence[3:], tuple(lines[number + 2 : end])))
    return blocks


def run_blocks(blocks: list[Block]) -> Iterator[tuple[Block, tuple[str, ...]]]:
    """Run the blocks of one page: each with the lines that it should have.

    Raises:
        BlockFailed: when a command ends with another exit code than expected, or Python code raises.
    """
    names: dict[str, Any] = {"__name__": "__docs__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _importable(folder):
        Path("targets").symlink_to(ROOT / "targets")
        for block in blocks:
            needs = block.options.get("needs")
            if needs and importlib.util.find_spec(needs) is None:
                yield block, block.lines
            elif file := block.options.get("file"):
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).write_text("\n".join([*block.lines, ""]), encoding="utf-8")
                yield block, block.lines
            elif block.language == "python":
                _run_python(block, names)
                yield block, block.lines
            elif "quiet" in block.options:
                _output("\n".join(["set -e", *block.lines]), block)
                yield block, block.lines
            else:
                yield block, tuple(_session(block))


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Python blocks import the files that a page writes; another page may write others of the same name."""
    sys.path.insert(0, folder)
    known = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in sys.modules.keys() - known:
            path = getattr(sys.modules[name], "__path__", ())  # torch.classes has one that is not a path
            places = [getattr(sys.modules[name], "__file__", None), *(path if isinstance(path, Iterable) else ())]
            if any(str(place).startswith(folder) for place in places):
                del sys.modules[name]


def _run_python(block: Block, names: dict[str, Any]) -> None:
    known = set(names)
    try:
        exec(compile("\n".join(block.lines), block.place, "exec", dont_inherit=True), names)
        for name in names.keys() - known:
            if name.startswith("test_"):
                names[name]()
    except Exception as error:
        raise BlockFailed(f"{block.place}: {type(error).__name__}: {error}") from error


def _session(block: Block) -> Iterator[str]:
    """The commands of a block, each followed by its output."""
    if not block.lines or not block.lines[0].startswith("$ "):
        raise BlockFailed(f"{block.place}: the first line must be a command, $ COMMAND")
    lines = iter(block.lines)
    for line in lines:
        if not line.startswith("$ "):
            continue
        command = [line]
        while command[-1].endswith("\\"):
            command.append(next(lines))
        yield from command
        printed = _output("\n".join(command)[2:], block).splitlines()
        yield from (line.rstrip() for line in _shown(printed, block))


def _output(command: str, block: Block) -> str:
    """Standard output of a command."""
    environment = {
        **os.environ,
        "COLUMNS": block.options.get("columns", "80"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", "-c", command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != int(block.options.get("exit", 0)):
        raise BlockFailed(f"{block.place}: exit code {done.returncode}\n{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def _shown(lines: list[str], block: Block) -> list[str]:
    """The part of an output that the document shows."""
    begin, end = 0, len(lines)
    try:
        if text := block.options.get("from"):
            begin = next(number for number, line in enumerate(lines) if text in line)
        if text := block.options.get("to"):
            end = next(number for number in range(begin, len(lines)) if text in lines[number]) + 1
    except StopIteration:
        raise BlockFailed(f"{block.place}: no line of the output has {text!r}") from None
    return lines[begin:end]


def differences(block: Block, lines: tuple[str, ...]) -> list[str]:
    """The text of a block against the lines it should have, as a diff; empty when only measured times differ."""
    if [_without_times(line) for line in block.lines] == [_without_times(line) for line in lines]:
        return []
    return list(difflib.unified_diff(block.lines, lines, block.place, "printed now", lineterm=""))


def _without_times(line: str) -> str:
    """A line without measured durations (`in 1.2 s`) and without dates of run folders; estimates of time stay."""
    line = re.sub(r"-\d{8}-\d{6}\b", "-DATE", line)
    return re.sub(r"\bin \d[\d.,]* (µs|ms|s|min)\b", "in TIME", line).rstrip()


def updated(text: str, results: list[tuple[Block, tuple[str, ...]]]) -> str:
    """A page with the lines that its blocks should have."""
    lines = text.splitlines()
    for block, now in reversed(results):
        if differences(block, now):
            lines[block.first : block.first + len(block.lines)] = now
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check or update pages; the exit code is 1 when one differs or fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="only the small blocks")
    parser.add_argument("--update", action="store_true", help="rewrite the blocks in place")
    parser.add_argument("pages", nargs="*", type=Path, help="default: every document")
    arguments = parser.parse_args()
    status = 0
    for page in arguments.pages or pages():
        page = page.resolve()
        text = page.read_text(encoding="utf-8")
        results = []
        try:
            found = read_blocks(os.path.relpath(page, ROOT), text)
            for block, lines in run_blocks([block for block in found if not arguments.small or block.size == "small"]):
                results.append((block, lines))
                diff = differences(block, lines)
                print(*diff or [f"{block.place}: as printed"], sep="\n", flush=True)
                status |= bool(diff) and not arguments.update
        except BlockFailed as error:
            print(error, flush=True)
            status = 1
        if arguments.update and (new := updated(text, results)) != text:
            page.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
