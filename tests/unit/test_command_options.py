"""The options of a command as a dataclass, and who may import the command line."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import pytest

from memscope.command.options import argument, option, with_options
from memscope.command.run import run_command

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Given:
    """Some options."""

    name: Annotated[str, argument()]
    sizes: Annotated[tuple[int, ...], option("--size", "-z", multiple=True, type=int)]
    is_on: Annotated[bool, option("--on", is_flag=True)]


@click.command("some")
@with_options(Given)
@click.option("--other")
def some(options: Given, other: str | None) -> int:
    """Say what was given."""
    click.echo(f"{options} {other}")
    return 3


def test_a_command_gets_its_options_as_one_value_and_others_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(some, "some", ["x", "-z", "1", "--size", "2", "--other", "y", "--debug"])
    assert ended.value.code == 3
    assert capsys.readouterr().out == f"{Given('x', (1, 2), False)} y\n"


def test_help_has_the_options_in_the_order_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(some, "some", ["--help"])
    out = capsys.readouterr().out
    assert "Say what was given." in out
    assert out.index("--size") < out.index("--on") < out.index("--debug") < out.index("--other")


def _imports(file: Path) -> set[str]:
    found = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.module or "" for node in found if isinstance(node, ast.ImportFrom)}


def test_targets_bring_their_commands_without_the_command_line_of_memscope() -> None:
    files = list((ROOT / "targets").rglob("*.py"))
    assert any("memscope.command.run" in _imports(file) for file in files), "their commands are found"
    assert not [file for file in files if any(name.startswith("memscope.cli") for name in _imports(file))]
