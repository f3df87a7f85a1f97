"""`make docs` refuses broken pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("See [this](other.md#part).", None),
        ("See [this](gone.md).", "'gone.md', but the target is not found"),
        ("See [this](other.md#gone).", "does not contain an anchor '#gone'"),
        ("::: json.no_such_name", "json.no_such_name could not be found"),
    ],
    ids=["whole", "page", "anchor", "name"],
)
def test_the_command_of_make_docs_refuses_a_broken_page(text: str, complaint: str | None, tmp_path: Path) -> None:
    (options,) = re.findall(r"\$\(BIN\)/mkdocs (build .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("hooks: [scripts/docs_site.py]", "")
    settings = re.sub(r"(?ms)^nav:.*?(?=^theme:)", "", settings)
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/site").symlink_to(ROOT / "docs/site")
    (tmp_path / "docs/index.md").write_text(f"# Front\n\n{text}\n", encoding="utf-8")
    (tmp_path / "docs/other.md").write_text("# Other\n\n## Part\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *options.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr
