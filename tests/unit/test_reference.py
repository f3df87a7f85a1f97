"""The documentation site: the reference's examples run, each public name has one page, nothing is loaded from afar."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import pytest

import memscope

ROOT = Path(__file__).parents[2]
SOURCES = {
    "memscope": ROOT / "memscope",
    "memscope.targets": ROOT / "targets",
    "memscope.dashboards": ROOT / "dashboards",
}
sys.path.insert(0, str(ROOT / "scripts"))

from docs_site import link_sources, loaded_from_network  # noqa: E402
from reference_pages import public_names, read_package, reference_pages  # noqa: E402


@pytest.mark.parametrize("name", memscope.__all__)
def test_every_name_of_the_front_has_an_example_that_runs(name: str) -> None:
    shown = getattr(memscope, name)
    examples = doctest.DocTestParser().get_doctest(shown.__doc__, {}, name, None, None)
    assert examples.examples
    told: list[str] = []
    failed, _ = doctest.DocTestRunner().run(examples, out=told.append)
    assert not failed, "".join(told)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> griffe.Module:
    """The package as it is, read by griffe."""
    folder = tmp_path_factory.mktemp("sources")
    link_sources(folder)
    return read_package("memscope", folder)


def test_every_name_that_an_all_lists_has_the_page_of_its_object(sources: griffe.Module) -> None:
    names = public_names(sources)
    titles = {page.text.rpartition("::: ")[2].strip() for page in reference_pages(sources)}
    for module, path in public_files():
        listed = listed_in(path)
        assert list(names[module]) == listed
        for name, page in names[module].items():
            assert page in titles
            if is_importable(module):
                assert imported(page) is imported(f"{module}.{name}")


def public_files() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            module = ".".join(part for part in parts if part != "__init__")
            if not any(part.startswith("_") for part in module.split(".")):
                yield module, path


def listed_in(path: Path) -> list[str]:
    for line in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return list(ast.literal_eval(line.value))
    return []


def is_importable(module: str) -> bool:
    """Whether the framework of an integration is installed."""
    framework = module.removeprefix("memscope.integrations.")
    return framework not in ("lightning", "transformers", "accelerate") or bool(importlib.util.find_spec(framework))


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_a_name_has_its_page_at_the_shortest_public_path_and_nowhere_else(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "p/__init__.py": "from p.deep.inner import f\n__all__ = ['f']",
            "p/deep/__init__.py": "from p.deep._hidden import g\n__all__ = ['g']",
            "p/deep/_hidden.py": "__all__ = ['g', 'own']\ndef g(): ...\ndef own(): ...",
            "p/deep/inner.py": "__all__ = ['f', 'Thing', 'thing']\ndef f(): ...\nclass Thing: ...\ndef thing(): ...",
        },
    )
    paths = [page.path.removeprefix("reference/") for page in reference_pages(package) if "index" not in page.path]
    assert paths == ["f.md", "deep/g.md", "deep/inner/Thing.md", "deep/inner/thing-2.md"]


def test_a_function_that_hides_its_module_of_the_same_name_is_found(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "p/room/__init__.py": "from p.room.check import check\n__all__ = ['check']",
            "p/room/check.py": "__all__ = ['check']\ndef check(): ...",
        },
    )
    assert public_names(package)["p.room"] == {"check": "p.room.check"}


def test_a_listed_name_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.__all__ lists gone, which the module does not define"):
        public_names(package_of(tmp_path, {"p/__init__.py": "__all__ = ['gone']"}))


def package_of(folder: Path, files: dict[str, str]) -> griffe.Module:
    for name, text in {"p/__init__.py": "", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_package("p", folder)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".html", '<script src="https://cdn.example/x.js"></script>'),
        (".html", '<link rel="stylesheet" href="https://fonts.example/css">'),
        (".html", '<link href="https://fonts.example" rel="preconnect" crossorigin>'),
        (".html", '<img src="//img.example/x.png">'),
        (".css", '@import "https://fonts.example/css";'),
        (".css", "body { background: url( 'http://img.example/x.png') }"),
    ],
)
def test_what_a_page_loads_from_the_network_is_found(suffix: str, text: str) -> None:
    assert len(list(loaded_from_network(text, suffix))) == 1


def test_links_and_local_files_are_not_loaded_from_the_network() -> None:
    page = '<a href="https://pytorch.org">x</a><img src="pictures/x.webp"><link rel="icon" href="../favicon.png">'
    assert not list(loaded_from_network(page, ".html"))
    assert not list(loaded_from_network("a { background: url(data:image/svg+xml;base64,AA) }", ".css"))
