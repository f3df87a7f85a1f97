"""Hook of mkdocs: adds the design notes, the README of the target llama2 and the reference; holds the site offline."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads hooks by path, without their folder
from reference_pages import Page, navigation, read_package, reference_pages

__all__ = ["link_sources", "loaded_from_network", "on_config", "on_files", "on_post_build", "on_startup"]

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "build/reference"
"""What mkdocs.yml tells mkdocstrings to read."""

_pages: list[Page] = []


def on_startup(command: str, dirty: bool) -> None:
    """Link the sources before mkdocstrings is configured: it drops a path that does not exist."""
    link_sources(SOURCES)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the design notes and the reference to the navigation."""
    _pages[:] = reference_pages(read_package("memscope", SOURCES))
    docs = Path(config.docs_dir)
    notes: list[Any] = sorted(note.relative_to(docs).as_posix() for note in docs.glob("design/*.md"))
    config.nav = [*(config.nav or []), {"Design notes": notes}, {"Reference": navigation(_pages)}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    readme = (ROOT / "targets/llama2/README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "targets/llama2.md", content=readme.replace("../../docs/", "../")))
    for page in _pages:
        files.append(File.generated(config, page.path, content=page.text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from the network.

    Raises:
        PluginError: when a page or a style sheet does.
    """
    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css"):
            for address in loaded_from_network(file.read_text(encoding="utf-8"), file.suffix):
                raise PluginError(f"{file.relative_to(config.site_dir)} loads {address}: the site must work offline")


def loaded_from_network(text: str, suffix: str) -> Iterator[str]:
    """The addresses from which a browser would load a part of an `.html` or `.css` file. Links are not loaded."""
    loads = _Loads()
    if suffix == ".html":
        loads.feed(text)
    else:
        loads.addresses += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)
    return (address for address in loads.addresses if re.match(r"(https?:)?//", address))


class _Loads(HTMLParser):
    """Collects the addresses of what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.addresses += [values[key] for key in ("src", "srcset", "poster", "data") if key in values]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(values.get("href", ""))


def link_sources(folder: Path) -> None:
    """Make `folder/memscope` look like an installation, with links: griffe does not read setuptools' package-dir."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "memscope").mkdir(parents=True)
    for path in [*(ROOT / "memscope").iterdir(), ROOT / "targets", ROOT / "dashboards"]:
        (folder / "memscope" / path.name).symlink_to(path)
