"""The documentation opened from disk, with the network off."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of two pages, with the settings of the real one."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "docs").mkdir()
    (folder / "docs/index.md").write_text("# Front\n\nSee [the other](other.md).\n", encoding="utf-8")
    (folder / "docs/other.md").write_text("# Other\n\nA fragmented segment.\n", encoding="utf-8")
    (folder / "docs/site").symlink_to(ROOT / "docs/site")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = re.sub(r"(?ms)^nav:.*?(?=^theme:)", "", settings).replace("hooks: [scripts/docs_site.py]", "")
    (folder / "mkdocs.yml").write_text(settings, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "build/site"


def test_search_finds_a_page_from_disk_and_asks_the_network_for_nothing(site: Path, browser: Any) -> None:
    context = browser.new_context(offline=True)
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").press_sequentially("fragmented")  # the search listens to keys, not to the text
    page.locator(".md-search-result__link").first.click()
    page.wait_for_url("**/other.html*")
    assert "A fragmented segment." in page.inner_text("article")
    assert asked
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))]
    context.close()
