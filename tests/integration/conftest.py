"""Fixtures: the command line in an empty folder, and fine-tuned weights."""

import pytest
from finetunes import run as fine_tune
from finetunes import small
from installed import installing

from memscope.cli.main import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command line in an empty folder: `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def install():
    """Install strategies beside some of the shipped ones."""
    with installing() as install:
        yield install


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder of weights with a tokenizer, trained for one step. Tests must not change it."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert fine_tune(*small(samples=2, held_out=0), "-o", str(folder)) == 0
    return folder / "weights"
