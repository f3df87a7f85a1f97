"""The content of an installation, and the imports of the command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {"memscope": "memscope", "memscope/targets": "targets", "memscope/dashboards": "dashboards"}
"""Folder in an installation → folder in the repository."""
DECLARED = [
    EntryPoint(name, value, group)
    for group, table in {
        "console_scripts": PYPROJECT["project"]["scripts"],
        **PYPROJECT["project"]["entry-points"],
    }.items()
    for name, value in table.items()
]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments` in `cwd`, without the caller's PYTHONPATH, and wait for it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def modules_loaded_by(*arguments: str, cwd: Path) -> set[str]:
    """Every module Python imported, as its own `-X importtime` log names them; the run must succeed."""
    done = python("-X", "importtime", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def installed_files() -> set[str]:
    """Files that an installation must have, as paths from its root: everything in the source folders but bytecode."""
    return {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for installed, folder in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of the sources, so that nothing is left in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in SOURCES.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    done = python("-c", build, cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.parametrize("place", ["repository root", "elsewhere"])
@pytest.mark.parametrize("module", ["memscope.targets.llama2", "memscope.dashboards"])
def test_top_level_folders_import_as_memscope(module: str, place: str, tmp_path: Path) -> None:
    # In the repository root, `./memscope` comes first on the path and contains neither folder.
    done = python("-c", f"import {module}", cwd=ROOT if place == "repository root" else tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_code_is_listed_for_installation() -> None:
    folders = {str(Path(file).parent).replace("/", ".") for file in installed_files() if file.endswith("/__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_wheel_holds_every_file_of_the_three_folders(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == installed_files()


@pytest.mark.parametrize(
    ("folder", "suffix"), [("llama2/data", ".json"), ("llama2/data", ".model"), ("hf/models", ".toml")]
)
def test_wheel_holds_the_data_of_targets(folder: str, suffix: str, wheel: Path) -> None:
    held = zipfile.ZipFile(wheel).namelist()
    assert [name for name in held if name.startswith(f"memscope/targets/{folder}/") and name.endswith(suffix)]


def test_unpacked_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "import memscope.targets.llama2 as t, memscope.dashboards as d; print(t.__file__); print(d.__file__)"
    done = python("-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == [
        site / "memscope/targets/llama2/__init__.py",
        site / "memscope/dashboards/__init__.py",
    ]


def test_help_imports_no_heavy_package(tmp_path: Path) -> None:
    loaded = modules_loaded_by("-m", "memscope", "--help", cwd=tmp_path)
    assert "memscope.cli.main" in loaded
    assert not loaded & {"torch", "plotly", "numpy", "msgspec"}


def test_the_list_of_targets_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    loaded = modules_loaded_by("-m", "memscope", "targets", cwd=tmp_path)
    assert "memscope.targets.hf.catalogue" in loaded
    assert not loaded & {"torch", "transformers"}


def test_the_help_check_notices_an_import(tmp_path: Path) -> None:
    assert "plotly" in modules_loaded_by("-c", "import plotly", cwd=tmp_path)


@pytest.mark.parametrize(
    "module",
    [
        "memscope",
        "memscope.analysis.check",
        "memscope.dashboards",
        "memscope.analysis.diff",
        "memscope.errors",
        "memscope.testing.pytest_plugin",
        "memscope.trace",
        "memscope.units",
    ],
)
def test_reading_a_trace_needs_no_torch(module: str, tmp_path: Path) -> None:
    loaded = modules_loaded_by("-c", f"import {module}", cwd=tmp_path)
    assert module in loaded
    assert "torch" not in loaded


def test_the_distribution_is_not_the_one_of_the_same_name_on_the_package_index() -> None:
    # `memscope` on PyPI is a C++ tool of somebody else.
    assert PYPROJECT["project"]["name"] == "torch-memscope"
    assert set(packages_distributions()["memscope"]) == {"torch-memscope"}


@pytest.mark.parametrize(
    "text", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("targets/**/*.md")], ids=str
)
def test_no_document_installs_the_package_of_the_same_name(text: Path) -> None:
    assert not re.search(r"pip install (-\S+ )*[\"']?memscope\b", text.read_text(encoding="utf-8"))


def test_dir_lists_the_public_names_before_they_are_loaded(tmp_path: Path) -> None:
    done = python("-c", "import memscope; print(*dir(memscope))", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    public = "Plan Recorder StepPlan Strategy Trace Workload advise fit hf record recorded simulate"
    assert done.stdout.split() == sorted(["__version__", *public.split()])


def test_the_strategies_that_come_with_memscope_are_registered() -> None:
    names = {point.name for point in entry_points(group="memscope.strategies") if point.value.startswith("memscope.")}
    assert names == {"adamw", "amp", "bf16", "ckpt", "fp8", "ga", "lora", "loss", "pack"}


@pytest.mark.parametrize("point", DECLARED, ids=lambda point: point.name)
def test_every_entry_point_resolves(point: EntryPoint) -> None:
    loaded = point.load()
    assert callable(loaded) or (point.group == "pytest11" and isinstance(loaded, ModuleType))
