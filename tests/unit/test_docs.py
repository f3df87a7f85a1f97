"""The documents show what is printed today; the check of it can fail."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from commands import can_fork, run_forked

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import run_docs  # noqa: E402
from run_docs import Block, BlockFailed, differences, pages, read_blocks, run_blocks, updated  # noqa: E402

SMALL = {
    page.relative_to(ROOT).as_posix(): small
    for page in pages()
    if (small := [b for b in read_blocks(page.name, page.read_text(encoding="utf-8")) if b.size == "small"])
}


def page_of(text: str, mark: str = "run: small", language: str = "") -> str:
    return f"Before.\n\n<!-- {mark} -->\n```{language}\n{text}\n```\n\nAfter.\n"


def result(page: str) -> list[str]:
    ((block, lines),) = run_blocks(read_blocks("page.md", page))
    return differences(block, lines)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of memscope are forks of this process: a new Python imports for seconds."""
    in_shell = run_docs._output

    def output(command: str, block: Block) -> str:
        words, _, file = command.removeprefix("set -e\n").partition(" > ")
        name, *arguments = shlex.split(words)
        if name != "memscope" or set(words) & set("|;&<>$*\n") or not can_fork():
            return in_shell(command, block)

        def prepare() -> None:
            os.environ["COLUMNS"] = block.options.get("columns", "80")
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

        done = run_forked(Path.cwd(), prepare, *arguments)
        if done.code != int(block.options.get("exit", 0)):
            raise BlockFailed(f"{block.place}: exit code {done.code}\n{command}\n{done.out}{done.err}")
        if file:
            Path(file).write_text(done.out, encoding="utf-8")
        return "" if file else done.out

    monkeypatch.setattr(run_docs, "_output", output)


@pytest.mark.parametrize("page", SMALL)
@pytest.mark.usefixtures("forked")
def test_small_blocks_print_what_the_page_shows(page: str) -> None:
    for block, lines in list(run_blocks(SMALL[page])):
        assert not differences(block, lines), "\n".join(differences(block, lines))


def test_a_changed_number_is_a_difference_and_updated() -> None:
    page = page_of("$ echo 12 MiB\n11 MiB\n$ echo end\nend")
    results = list(run_blocks(read_blocks("page.md", page)))
    assert result(page)[-4:] == ["-11 MiB", "+12 MiB", " $ echo end", " end"]
    assert updated(page, results) == page_of("$ echo 12 MiB\n12 MiB\n$ echo end\nend")


def test_measured_times_are_no_difference_but_estimated_ones_are() -> None:
    assert not result(page_of("$ echo simulated in 3.2 s\nsimulated in 17 s"))
    assert result(page_of("$ echo step time 3.2 s\nstep time 17 s"))


def test_the_date_in_the_name_of_a_run_folder_is_no_difference() -> None:
    assert not result(
        page_of("$ echo runs/llama2-20261121-190459/report.html\nruns/llama2-20261120-080000/report.html")
    )
    assert result(page_of("$ echo runs/llama2-20261121-190459/report.html\nruns/gpt-20261121-190459/report.html"))


def test_a_block_that_needs_a_package_runs_only_where_it_is_installed() -> None:
    assert not result(page_of("raise SystemExit", "run: small needs=surely_not_installed", "python"))
    with pytest.raises(BlockFailed, match=r"page\.md:3: ValueError: it runs"):
        result(page_of("raise ValueError('it runs')", "run: small needs=torch", "python"))


def test_a_part_of_the_output_can_be_shown() -> None:
    assert not result(page_of("$ seq 9\n3\n4\n5", 'run: small from=3 to="5"'))
    with pytest.raises(BlockFailed, match=r"page\.md:3: no line of the output has '12'"):
        result(page_of("$ seq 9\n3", "run: small from=12"))


def test_a_command_must_end_as_expected() -> None:
    assert not result(page_of("$ exit 4", "run: small exit=4"))
    with pytest.raises(BlockFailed, match=r"page\.md:3: exit code 4"):
        result(page_of("$ exit 4"))
    with pytest.raises(BlockFailed, match=r"page\.md:3: exit code 1"):
        result(page_of("true\nfalse\ntrue", "run: small quiet"))


def test_commands_find_the_targets_and_files_of_their_page() -> None:
    page = page_of("hello", "run: small file=a/b.txt")
    page += page_of("$ cat a/b.txt; ls -d targets/llama2\nhello\ntargets/llama2")
    assert not [diff for block, lines in run_blocks(read_blocks("page.md", page)) for diff in differences(block, lines)]


def test_python_blocks_import_the_files_of_their_own_page_only() -> None:
    for value in (1, 2):
        page = page_of(f"value = {value}", "run: small file=mine.py", "python")
        page += page_of(f"import mine\nassert mine.value == {value}", language="python")
        assert len(list(run_blocks(read_blocks("page.md", page)))) == 2


def test_python_blocks_of_a_page_share_names_and_their_tests_are_called() -> None:
    page = page_of("x = 3", language="python") + page_of("def test_x():\n    assert x == 4", language="python")
    with pytest.raises(BlockFailed, match=r"page\.md:11: AssertionError"):
        list(run_blocks(read_blocks("page.md", page)))


@pytest.mark.parametrize("mark", ["run: tiny", "run:", "run: small -- no", "run: small lines=3"])
def test_a_mark_that_cannot_be_read_is_refused(mark: str) -> None:
    with pytest.raises(BlockFailed, match=r"page\.md:3"):
        read_blocks("page.md", page_of("$ true", mark))


def test_a_mark_without_a_block_is_refused() -> None:
    with pytest.raises(BlockFailed, match="a fenced block in the next line"):
        read_blocks("page.md", "<!-- run: small -->\n\n```\n$ true\n```\n")
