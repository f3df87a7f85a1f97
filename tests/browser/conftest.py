"""The system's Chromium, with the network off."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def tab(browser: Any) -> Iterator[Any]:
    """The page that most tests share: its process compiles plotly once, which takes longer than most tests."""
    context = browser.new_context(offline=True)
    yield context.new_page()
    context.close()


@pytest.fixture
def visit(browser: Any, tab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens a page in place of the one before; afterwards no script may have failed and nothing but the file may have
    been asked for.
    """
    file = tmp_path_factory.getbasetemp() / "page.html"  # always the same, or plotly would be compiled again
    complaints: list[str] = []
    requests: list[str] = []
    contexts: list[Any] = []
    listeners = {
        "console": lambda message: complaints.append(f"console: {message.text}"),
        "pageerror": lambda error: complaints.append(f"error: {error}"),
        "request": lambda request: requests.append(request.url),
    }

    def open_page(html: str, *, width: int = 1400, color_scheme: str = "light", **settings: Any) -> Any:
        file.write_text(html, encoding="utf-8")
        page = tab
        if settings:  # those of a context
            contexts.append(browser.new_context(offline=True, **settings))
            page = contexts[-1].new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=color_scheme)
        page.mouse.move(0, 0)
        for event, listener in listeners.items():
            page.on(event, listener)
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    if not contexts:
        for event, listener in listeners.items():
            tab.remove_listener(event, listener)
        tab.goto("about:blank")  # a page that is opened twice in a row keeps its scroll position
    assert complaints == []
    assert set(requests) == {file.as_uri()}
