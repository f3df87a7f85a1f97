"""Make the pictures of docs/ and README: pages of real traces of LLaMA2-7B, photographed in Chromium.

    python scripts/make_docs_pictures.py [FOLDER]

Needs playwright and the system's Chromium, as the browser tests do. Traces and pages go to FOLDER, which is created if
needed; traces in it are reused. Without FOLDER everything is made anew and thrown away.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
TARGET = ROOT / "targets" / "llama2"
DEVICE = "a100-40gb"
MOST_BYTES = 150_000
WIDTH, PHONE_WIDTH = 1240, 400
QUALITY = 72


@dataclass(frozen=True)
class Picture:
    """A part of a page to photograph: from the top of one element to the bottom of another."""

    name: str
    page: str
    first: str
    last: str
    width: int = WIDTH
    scheme: str = "light"
    click: float | None = None
    """Where to click the first timeline first, as a share of the run."""
    hide: Sequence[str] = ()
    """Categories to hide first."""
    search: str = ""
    """What to search for first."""


LEFT_OUT = ("parameter",)
WITH_CONTENTS = ("header", ".search")
"""Pictures that begin there show the list of sections too."""
PICTURES_TO_MAKE = (
    Picture("page", "lora+amp.html", "header", "#run0 .phases"),
    Picture("moment", "lora+amp.html", "#run0-alive", "#run0-alive .tables", hide=LEFT_OUT),
    Picture("largest", "lora+amp.html", "#run0-alive", "#run0 table.allocations", click=0.36, hide=LEFT_OUT),
    Picture("search", "lora+amp.html", ".search", "#run0 .phases", search="log_softmax"),
    Picture("allocator", "lora+amp.html", "#run0-allocator", "#run0-allocator .figure:nth-of-type(2)"),
    Picture("runs", "report.html", "#runs", "#runs .figure"),
    Picture("differences", "report.html", "#difference1", "#difference1 .figure"),
    Picture("plan", "plan.html", "#plan", "#front .figure"),
    Picture("phone", "lora+amp.html", "header", "#run0 .phases", width=PHONE_WIDTH, scheme="dark"),
)


def make_pages(folder: Path) -> None:
    """Profile, report and advise into a folder; each is left out where its page is there."""
    traces = [folder / f"{name}.npz" for name in ("baseline", "lora", "amp", "lora+amp")]
    if not all(trace.exists() for trace in traces):
        memscope("profile", TARGET, "--strategies", "lora,amp", "--device", DEVICE, "-o", folder, "-f")
    memscope("report", traces[3], "-o", folder / "lora+amp.html", "-f")
    memscope("report", *traces, "-o", folder / "report.html", "-f")
    if not (folder / "plan.html").exists():
        words = ("--budget", "31GB", "--device", DEVICE, "-s", "lora", "-o", folder / "plan.json", "-f")
        memscope("advise", TARGET, *words, "--html", folder / "plan.html")


def memscope(*words: object) -> None:
    """Run a command; exit code 4 says only that the plan does not fit."""
    done = subprocess.run([sys.executable, "-m", "memscope", *map(str, words)], stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 4):
        sys.exit(f"memscope {' '.join(map(str, words))} ended with {done.returncode}")


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's browser."""
    with sync_playwright() as started:
        path = shutil.which("chromium") or "/usr/bin/chromium"
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def photograph(browser: Any, picture: Picture, folder: Path) -> bytes:
    """The picture as WebP."""
    size = {"width": picture.width, "height": 900}
    context = browser.new_context(viewport=size, offline=True, color_scheme=picture.scheme)
    page = context.new_page()
    page.goto((folder / picture.page).as_uri())
    page.wait_for_selector("body[data-drawn]")
    reveal = "selector => reveal(document.querySelector(selector))"
    page.evaluate(reveal, picture.last)
    for name in picture.hide:
        page.get_by_role("button", name=name, exact=True).first.click()
    if picture.click is not None:
        box = page.locator(".timeline .nsewdrag").first.bounding_box()
        page.mouse.click(box["x"] + box["width"] * picture.click, box["y"] + box["height"] / 2)
    if picture.search:
        page.locator("#search").fill(picture.search)
        page.locator("tr.hit").first.wait_for()
    for figure in page.locator(".figure:visible").all()[:12]:
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(800)
    first, last = (page.locator(name).first.bounding_box() for name in (picture.first, picture.last))
    top = max(0, first["y"] - 12)
    left = 0 if picture.first in WITH_CONTENTS else max(0, first["x"] - 12)
    height = last["y"] + last["height"] + 14 - top
    clip = {"x": left, "y": top, "width": picture.width - left, "height": height, "scale": 1}
    asked = {"format": "webp", "quality": QUALITY, "clip": clip, "captureBeyondViewport": True}
    taken = context.new_cdp_session(page).send("Page.captureScreenshot", asked)
    context.close()
    return base64.b64decode(taken["data"])


def main(folder: Path) -> None:
    """Make all pages and all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    make_pages(folder)
    PICTURES.mkdir(exist_ok=True)
    with chromium() as browser:
        for picture in PICTURES_TO_MAKE:
            data = photograph(browser, picture, folder)
            if len(data) > MOST_BYTES:
                sys.exit(f"{picture.name} has {len(data):,} bytes, more than {MOST_BYTES:,}")
            (PICTURES / f"{picture.name}.webp").write_bytes(data)
            print(f"{picture.name}.webp: {len(data):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
