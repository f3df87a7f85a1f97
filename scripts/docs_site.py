"""Hook of mkdocs: adds the design notes, the README of the target llama2, and the reference to the site."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads hooks by path, without their folder
from reference_pages import Page, navigation, read_package, reference_pages

__all__ = ["link_sources", "on_config", "on_files"]

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "build/reference"
"""What mkdocs.yml tells mkdocstrings to read."""

_pages: list[Page] = []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the design notes and the reference to the navigation."""
    link_sources(SOURCES)
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


def link_sources(folder: Path) -> None:
    """Make `folder/memscope` look like an installation, with links: griffe does not read setuptools' package-dir."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "memscope").mkdir(parents=True)
    for path in [*(ROOT / "memscope").iterdir(), ROOT / "targets", ROOT / "dashboards"]:
        (folder / "memscope" / path.name).symlink_to(path)
