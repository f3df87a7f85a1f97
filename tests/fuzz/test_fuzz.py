"""Changed files of every format are read or refused in words. `make fuzz` reads far more of them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from fuzz.formats import CORPUS, FORMATS, corpus, task

FILES = 60
"""Changed files of each format; `make fuzz` reads 100,000."""
REFUSED = {
    "trace": {"declared.npz": "it unpacks to 8.00 GiB, and one of"},
    "snapshot": {
        "shared-tuples.pickle": "a tuple of other than one to three integers",
        "colliding.pickle": "an integer of more than 64 bits",
        "infinite.pickle": "time_us of annotation 0 is inf",
        "twice.pickle": "segments 0 and 1 are both at address",
        "code-reduce.pickle": "Nothing in it was executed",
        "code-inside.pickle": "Nothing in it was executed",
        "code-newobj.pickle": "Nothing in it was executed",
        "code-obj.pickle": "Nothing in it was executed",
    },
    "plan": {"nested.json": "no JSON"},
    "grid": {"nested.json": "truncated or damaged JSON"},
    "devices": {
        "nested.toml": "nested too deep", "key.toml": "more than 1000 characters", "dotted.toml": "more than 1000",
    },
    "words": {"digits.txt": "is not a size", "bits.txt": "is in bits"},
}  # fmt: skip
"""The files of the corpus that must be refused, with words of the message; the others must be read."""


@pytest.mark.parametrize("name", FORMATS)
def test_the_corpus_is_read_or_refused_as_it_must_be(name: str, tmp_path: Path) -> None:
    path, own = tmp_path / f"file{FORMATS[name].suffix}", task(name)
    for file, data in corpus(name).items():
        path.write_bytes(data)
        told = ""
        try:
            own.use(path, Random(1))
        except own.told as error:
            told = str(error)
        expected = REFUSED[name].get(file)
        if expected is not None or name != "words":  # no text is a size, a limit and settings at once
            assert (expected or "has no value for") in told if expected or told else not told, (file, told)


@pytest.mark.parametrize("name", FORMATS)
def test_changed_files_are_read_or_refused_in_words(name: str, tmp_path: Path) -> None:
    own = task(name)
    path = tmp_path / f"file{own.suffix}"
    for number in range(len(corpus(name)), len(corpus(name)) + FILES):
        path.write_bytes(own.make(number))
        with suppress(*own.told):
            own.use(path, Random(1))
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_follows_from_its_number(name: str) -> None:
    assert [task(name).make(n) for n in range(20, 40)] == [task(name).make(n) for n in range(20, 40)]
    assert task(name).make(30) != task(name, seed=1).make(30)


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 40_000


NOTICED = """
import os, signal, sys, time
from fuzz.children import Task, run_files

def use(path, rng):
    match path.read_bytes():
        case b"0": raise ValueError("told")
        case b"1": raise KeyError("not told")
        case b"2": os.kill(os.getpid(), signal.SIGSEGV)
        case b"3": bytearray(2**28)
        case b"4": sum(range(10**12))
        case b"5": os.system("true")
        case b"6": open("/dev/full", "w").close()
        case b"7": raise ValueError("x" * 10_000)

outcome = run_files(Task("t", ".txt", lambda n: b"%d" % n, use, (ValueError,)), range(9), 2**27, 1)
print(outcome.files, outcome.refused)
for finding in outcome.findings:
    print(finding.number, finding.reason.partition(" in ")[0].partition(": xx")[0].strip())
"""


def test_crashes_memory_time_and_code_are_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTICED], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "9 2",  # read, and refused in words, too many of them in one case
        "1 KeyError: 'not told'",
        "2 killed by SIGSEGV",
        "3 MemoryError:",
        "4 more than 1 s",
        "5 code did os.system b'true'",
        "6 code did open '/dev/full'",
        "7 a message of 10000 characters",
    ]
