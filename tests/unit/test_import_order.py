"""Imports follow the order of the folders, in one direction and without circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ORDER = (
    ("memscope.errors", "memscope.interrupts", "memscope.units"),
    ("memscope.trace",),
    ("memscope.workload",),
    ("memscope.command",),
    ("memscope.strategies", "memscope.allocator", "memscope.analysis"),
    ("memscope.hooks",),
    ("memscope.gpu", "memscope.simulation", "memscope.exchange", "memscope.integrations"),
    ("memscope.runs",),
    ("memscope.testing", "memscope.program"),
    ("memscope.advisor",),
    ("memscope.studies",),
    ("memscope.dashboards",),
    ("memscope.cli",),
    ("memscope.__main__",),
)
"""Folders from the bottom up: a folder imports only those on its own line or above it in this list. `memscope` itself,
the front, has no place in it: it names what it offers, and loads a name on first use."""
LOOSE = {"__init__", "__main__", "errors", "interrupts", "units"}


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def sources(*folders: str) -> dict[str, Path]:
    """The file of every module by name; `targets/` and `dashboards/` are installed as subpackages of memscope."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name if folder in ("memscope", "benchmarks") else f"memscope.{name}"] = path
    return found


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports anywhere, including imports only for type checking."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def graph(folders: dict[str, Path]) -> dict[str, set[str]]:
    """Imports by module; a package stands for its `__init__`."""
    return {name: imports_of(path, set(folders)) - {name} for name, path in folders.items()}


def rank(name: str) -> int | None:
    for index, level in enumerate(ORDER):
        if any(name == folder or name.startswith(f"{folder}.") for folder in level):
            return index
    return None


def upward(imports: dict[str, set[str]]) -> Iterator[str]:
    for name, imported in imports.items():
        if (own := rank(name)) is None:
            continue
        for other in imported:
            if (theirs := rank(other)) is not None and theirs > own:
                yield f"{name} imports {other}"


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The first circle of modules found; empty if there is no circle."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(imports) if (found := walk(name, []))), [])


PACKAGE = sources("memscope", "targets", "dashboards")


@cache
def all_imports() -> dict[str, set[str]]:
    """Imports of every module of the package but its front."""
    return {name: imported for name, imported in graph(PACKAGE).items() if name != "memscope"}


def test_a_folder_imports_only_what_lies_below_it() -> None:
    assert not list(upward(all_imports()))


def test_every_module_has_a_place_in_the_order() -> None:
    without = {name for name in all_imports() if rank(name) is None}
    assert {name for name in without if not name.startswith("memscope.targets")} == set()


def test_targets_do_not_import_the_command_line() -> None:
    upwards = ("memscope.cli", "memscope.advisor", "memscope.dashboards")
    of_targets = {name: imported for name, imported in all_imports().items() if name.startswith("memscope.targets")}
    assert not [
        f"{name} → {other}" for name, found in of_targets.items() for other in found if other.startswith(upwards)
    ]


def test_nothing_but_the_search_for_targets_imports_them() -> None:
    others = {name: imported for name, imported in all_imports().items() if not name.startswith("memscope.targets")}
    found = {name for name, imported in others.items() if any(one.startswith("memscope.targets") for one in imported)}
    assert found == {"memscope.workload.target"}


def test_no_module_is_part_of_a_circle_of_imports() -> None:
    assert circle(all_imports()) == []


def test_no_benchmark_is_part_of_a_circle_of_imports() -> None:
    paths = {path.stem: path for path in (ROOT / "benchmarks").rglob("*.py")}
    assert circle(graph(paths)) == []


def test_trace_imports_only_numpy_and_msgspec() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "msgspec"}
    for name, path in PACKAGE.items():
        if name.startswith("memscope.trace"):
            nodes = [node for node in ast.walk(tree_of(path))]
            roots = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            roots |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            outside = {root for root in roots if root.split(".")[0] not in allowed}
            assert {root for root in outside if not root.startswith(("memscope.trace", *ORDER[0]))} == set()


def test_few_modules_are_outside_the_folders() -> None:
    assert {path.stem for path in (ROOT / "memscope").glob("*.py")} == LOOSE


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from memscope.cli import main", "memscope.trace.table imports memscope.cli.main"),
        ("def late():\n    import memscope.hooks.recorder", "memscope.trace.table imports memscope.hooks.recorder"),
    ],
)
def test_the_check_notices_an_import_upwards(source: str, complaint: str, tmp_path: Path) -> None:
    broken = tmp_path / "table.py"
    broken.write_text(source)
    assert complaint in list(upward(graph({**PACKAGE, "memscope.trace.table": broken})))


def test_the_check_notices_a_circle(tmp_path: Path) -> None:
    broken = tmp_path / "errors.py"
    broken.write_text("from memscope.units import parse_bytes")
    assert "memscope.errors" in circle(graph({**PACKAGE, "memscope.errors": broken}))


def names_of(path: Path) -> Iterator[str]:
    """Public classes of a module, and its type aliases."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                yield name


def twice(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Names that several modules define, with the modules."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for name in names_of(path):
            found.setdefault(name, []).append(str(path))
    return {name: places for name, places in found.items() if len(places) > 1}


def test_one_name_is_one_class() -> None:
    assert twice([*PACKAGE.values(), *sources("benchmarks").values()]) == {}


def test_the_check_notices_a_second_class_of_one_name(tmp_path: Path) -> None:
    second = tmp_path / "second.py"
    second.write_text("class Trace: ...")
    assert list(twice([*PACKAGE.values(), second])) == ["Trace"]


@pytest.mark.parametrize("folder", ["memscope", "targets", "dashboards", "benchmarks"])
def test_no_function_takes_more_than_nine_parameters(folder: str) -> None:
    many = []
    for path in sources(folder).values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in own if one.arg not in ("self", "cls")]) > 9:
                    many.append(f"{path.name}:{node.name}")
    assert many == []
