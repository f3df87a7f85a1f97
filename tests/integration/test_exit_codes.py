"""Exit codes: every row of the table in docs/compare-and-check.md, in every command that the cause can occur in."""

import errno
import re
from pathlib import Path

import click
import pytest
from commands import TARGET
from traces import TraceBuilder

from memscope.cli.main import cli
from memscope.exchange.torch_writer import torch_snapshot_bytes

PAGE = Path(__file__).parents[2] / "docs" / "compare-and-check.md"
MIB = 2**20
SMALL = """
[small]
vendor_name = "a GPU of 512 MiB"
capability = "8.0"
capacity_bytes = 536_870_912
multiprocessors = 108
"""
SMALL_DEVICE = ["--device", "small", "--device-file", "small.toml"]
COMMANDS = sorted(cli.list_commands(click.Context(cli)))
WORKS = {
    "profile": ["profile", "mine.py", "--device", "gpu", "-o", "runs"],
    "fit": ["fit", "sized.py", *SMALL_DEVICE],
    "advise": ["advise", "mine.py", "--budget", "1GB", "-s", "ga:steps=1,optim"],
    "report": ["report", "run.npz"],
    "diff": ["diff", "run.npz", "run.npz"],
    "check": ["check", "run.npz", "--budget", "1GB"],
    "import": ["import", "taken.pickle"],
    "export": ["export", "run.npz", "--to", "csv"],
    "strategies": ["strategies"],
    "targets": ["targets"],
    "devices": ["devices"],
}
FAILS = TARGET.replace("    layers =", "    raise ValueError\n    layers =")
ENDS = TARGET.replace("    layers =", "    import os; os._exit(3)\n    layers =")
SIZED = TARGET.replace("width: int = 4", "batch_size: int = 2").replace("ones(2, 4)", "ones(config.batch_size, 4)")
WIDE = TARGET.replace("Linear(4, 4)", "Linear(8192, 8192)").replace("ones(2, 4)", "ones(2, 8192)")


def raising(error):
    """Makes every command fail as it begins."""

    def fail(command, ctx):
        if command.name in COMMANDS:
            raise error
        return invoke(command, ctx)

    invoke = click.Command.invoke
    return lambda patch, folder: patch.setattr(click.Command, "invoke", fail)


def target(text):
    return lambda patch, folder: (folder / "mine.py").write_text(text)


def full_disk(patch, folder):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("memscope.trace.file.tempfile.NamedTemporaryFile", no_space)


def nothing(patch, folder): ...


CAUSES = {
    "the command did what it was asked": [(nothing, words) for words in WORKS.values()],
    "the target's code fails, ends its process, or takes longer than `--timeout`": [
        (target(text), WORKS[name]) for text in (FAILS, ENDS) for name in ("profile", "advise")
    ],
    "a bug in memscope, or too little host memory": [
        (raising(error), words) for error in (ZeroDivisionError(), MemoryError()) for words in WORKS.values()
    ],
    "an option, a name, a value or a combination is wrong": [
        *((nothing, [name, "--nonsense"]) for name in COMMANDS),
        (nothing, ["nonsense"]),
        (nothing, [*WORKS["profile"], "--timeout", "9"]),
        (nothing, [*WORKS["advise"], "--timeout", "9"]),
        (nothing, [*WORKS["profile"], "-s", "nonsense"]),
        (nothing, [*WORKS["advise"], "-s", "nonsense"]),
        (nothing, [*WORKS["profile"], "--device", "nonsense"]),
        (nothing, [*WORKS["advise"], "--device", "nonsense"]),
        *((nothing, ["fit", "sized.py", "--device", name]) for name in ("nonsense", "gpu", "cpu", "gb10")),
        (nothing, [*WORKS["fit"], "-s", "nonsense"]),
        (nothing, [*WORKS["fit"], "--allow", "nonsense"]),
        (nothing, [*WORKS["fit"], "--set", "batchsize=1"]),
        (nothing, ["fit", "mine.py", *SMALL_DEVICE]),  # it has no setting for the micro-batch
        (nothing, [*WORKS["profile"], "--set", "nonsense=1"]),
        (nothing, [*WORKS["advise"], "--set", "nonsense=1"]),
        (nothing, ["check", "run.npz", "--budget", "much"]),
        (nothing, ["advise", "mine.py", "--budget", "much"]),
    ],
    "a file or folder named on the command line is missing, of the wrong kind, damaged, or in the way": [
        *((nothing, [name, wrong]) for name in ("profile", "report") for wrong in ("no.py", "no.npz", "empty")),
        *((nothing, ["advise", wrong, "--budget", "1GB"]) for wrong in ("no.py", "empty")),
        *((nothing, ["fit", wrong]) for wrong in ("no.py", "empty")),
        *((nothing, ["diff", "run.npz", wrong]) for wrong in ("no.npz", "mine.py", "empty", "taken.pickle")),
        *((nothing, ["check", wrong, "--budget", "1GB"]) for wrong in ("no.npz", "mine.py", "empty", "taken.pickle")),
        *((nothing, ["export", wrong, "--to", "csv"]) for wrong in ("no.npz", "mine.py", "empty", "taken.pickle")),
        *((nothing, ["import", wrong]) for wrong in ("no.pickle", "mine.py", "empty")),
        *((nothing, [*words, "-o", "mine.py"]) for name, words in WORKS.items() if name in ("export", "import")),
        *((nothing, [*WORKS[name], "-o", "mine.py"]) for name in ("profile", "advise", "report")),
        *((nothing, [*WORKS[name], "--device-file", "no.toml"]) for name in ("profile", "advise")),
    ],
    "a result cannot be written; what was found is printed all the same, and traces that were written stay": [
        *((full_disk, WORKS[name]) for name in ("profile", "report", "import", "export")),
        (full_disk, [*WORKS["advise"], "--html", "page.html"]),
    ],
    "a check fails, no plan fits, or `fit` finds that the step does not fit": [
        (nothing, ["fit", "wide.py", *SMALL_DEVICE, "-s", "ga:steps=1,optim"]),
        (nothing, ["check", "run.npz", "--budget", "1MiB"]),
        (nothing, ["advise", "mine.py", "--budget", "2MiB", "-s", "ga:steps=1,optim"]),
    ],
    "the target runs out of device memory: the last run of `profile`, or a program on a GPU": [
        (target(WIDE), ["profile", "mine.py", "--device", "small", "--device-file", "small.toml"]),
    ],
    "stopped with Ctrl-C": [(raising(KeyboardInterrupt()), words) for words in WORKS.values()],
}


def table():
    """The rows of the table: code by cause."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition("### Exit codes of all commands")
    return {cause: int(code) for code, cause in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)}


@pytest.fixture
def folder(tmp_path):
    builder = TraceBuilder()
    builder.phase("forward", 0)
    builder.new("activation", 2 * MIB, module="model", op="aten.mm")
    trace = builder.trace({"target": "toy", "strategies": [], "device": {"name": "gpu", "simulated": True}})
    trace.save(tmp_path / "run.npz")
    (tmp_path / "taken.pickle").write_bytes(torch_snapshot_bytes(trace))
    (tmp_path / "mine.py").write_text(TARGET)
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "sized.py").write_text(SIZED)
    (tmp_path / "wide.py").write_text(WIDE.replace("width: int = 4", "batch_size: int = 2"))
    (tmp_path / "empty").touch()
    return tmp_path


def test_the_table_has_the_causes_that_are_tested():
    assert set(table()) == set(CAUSES)
    assert {word for cause in CAUSES.values() for _, (word, *_) in cause} >= set(COMMANDS)


@pytest.mark.parametrize(
    ("cause", "prepare", "words"), [(cause, *one) for cause, found in CAUSES.items() for one in found]
)
def test_the_exit_code_is_that_of_the_cause_in_every_command(cause, prepare, words, run, folder, monkeypatch):
    prepare(monkeypatch, folder)
    code, _, err = run(*words)
    assert code == table()[cause], err
    assert "Traceback" not in err
    assert ("This is a bug" in err) is ("ZeroDivisionError" in err)
    if "the target's code" in cause:
        assert f"{folder / 'mine.py'}:" in err, "the line is named"
