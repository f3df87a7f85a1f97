"""The reference: one page for every public name of a package, and one for every public module.

A name is public when the `__all__` of a public module lists it; a module is public when no part of its path starts with
an underscore. An object that several modules list has one page, at the shortest path. Griffe reads the sources;
nothing is imported.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe

__all__ = ["Page", "navigation", "public_names", "read_package", "reference_pages"]


@dataclass(frozen=True)
class Page:
    """A page of the reference."""

    path: str
    """Of its file in the site."""
    module: str
    """The module that it describes, or whose name it describes."""
    text: str
    """In Markdown."""


def read_package(name: str, folder: Path) -> griffe.Module:
    """The package `name` in `folder`."""
    package = griffe.load(name, search_paths=[folder], try_relative_path=False, allow_inspection=False)
    assert isinstance(package, griffe.Module)
    return package


def public_names(package: griffe.Module) -> dict[str, dict[str, str]]:
    """Each public module → each name in its `__all__` → the path that has the name's page.

    Raises:
        ValueError: when an `__all__` lists a name that the module does not define.
    """
    shortest: dict[str, str] = {}
    listed: dict[str, dict[str, str]] = {}
    for module in _modules(package):
        listed[module.path] = {}
        for name in map(str, module.exports or ()):
            target = _target(module, name)
            listed[module.path][name] = target.path
            paths = {shortest.get(target.path, target.path), f"{module.path}.{name}"}
            shortest[target.path] = min(paths, key=lambda path: (path.count("."), path != target.path, path))
    return {module: {name: shortest[target] for name, target in targets.items()} for module, targets in listed.items()}


def reference_pages(package: griffe.Module) -> list[Page]:
    """The pages of a package, each module's before those of its names."""
    listed = public_names(package)
    pages = []
    for module, names in listed.items():
        pages.append(Page(f"{_folder(module)}/index.md", module, _module_text(package, module, listed)))
        for name, path in names.items():
            if path == f"{module}.{name}":
                pages.append(Page(_file(path, listed), module, f"---\ntitle: {name}\n---\n\n::: {path}\n"))
    return pages


def navigation(pages: Iterable[Page]) -> list[Any]:
    """The pages as mkdocs nests them: those of a module, then its submodules as sections."""
    sections: dict[str, list[Any]] = {}
    for page in pages:
        if page.module not in sections:
            above, _, name = page.module.rpartition(".")
            sections[page.module] = []
            if above:
                sections[above].append({name: sections[page.module]})
        sections[page.module].append(page.path)
    return next(iter(sections.values()))


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for name, below in sorted(module.modules.items()):
        if not name.startswith("_") and not below.is_alias:
            yield from _modules(below)


def _target(module: griffe.Module, name: str) -> griffe.Object:
    """The object behind a name, where it is defined."""
    if name not in module.members:
        raise ValueError(f"{module.path}.__all__ lists {name}, which the module does not define")
    found = module.members[name]
    target = found.final_target if isinstance(found, griffe.Alias) else found
    if isinstance(target, griffe.Module) and name in target.members:
        # The package re-exports a function of its submodule of the same name: griffe keeps the submodule.
        return _target(target, name)
    return target


def _folder(module: str) -> str:
    return "reference" if "." not in module else "reference/" + module.partition(".")[2].replace(".", "/")


def _file(path: str, listed: Mapping[str, Mapping[str, str]]) -> str:
    """The file of a name's page. `Ledger` and `ledger` get two files, also on file systems that ignore case."""
    module, _, name = path.rpartition(".")
    twins = [other for other in listed[module] if other.lower() == name.lower()]
    return f"{_folder(module)}/{name}{'-2' if name != twins[0] else ''}.md"


def _module_text(package: griffe.Module, module: str, listed: Mapping[str, Mapping[str, str]]) -> str:
    """The module's docstring, a table of its names, and one of its submodules."""
    below = [other for other in listed if other.rpartition(".")[0] == module]
    names = {f"`{name}`": path for name, path in listed[module].items()}
    modules = {f"`{other}`": other for other in below}
    text = f"---\ntitle: {module}\n---\n\n::: {module}\n    options: {{members: false}}\n\n"
    for title, rows in (("Name", names), ("Module", modules)):
        if rows:
            text += f"## {title}s\n\n| {title} | Description |\n|---|---|\n"
        for shown, path in rows.items():
            file = f"{_folder(path)}/index.md" if path in listed else _file(path, listed)
            link = posixpath.relpath(file, _folder(module))
            text += f"| [{shown}]({link}) | {_first_line(package, path)} |\n"
        text += "\n"
    return text


def _first_line(package: griffe.Module, path: str) -> str:
    found = package
    for part in path.split(".")[1:]:
        found = found.members[part]
    target = found.final_target if isinstance(found, griffe.Alias) else found
    text = target.docstring.value if target.docstring else ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
