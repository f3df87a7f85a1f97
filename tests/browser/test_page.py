"""The page in the system's Chromium: opened from a file, with the network off."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memscope.dashboards.demo import training_run
from memscope.dashboards.page import EffectRow, EffectsTable, PageRun, render_page
from memscope.dashboards.palette import DARK, LIGHT
from memscope.trace import Trace

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
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is not installed"),
]
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
PLOT = ".figure .nsewdrag"
"""The area inside the axes; the first of each figure is the stack, the second the phase bar."""

# 2 layers of 1 GiB in 2 parts: parameter 4 × 512 MiB, gradient as much (from the first micro-batch on), optimizer state
# 4 × 1 GiB, activations of a micro-batch 4 × 3 × 1/12 GiB and 512 MiB of logits, workspace 8,519,680 B: 9.51 GiB. The
# workspace is taken when the backward pass begins, the gradients are complete from the second micro-batch on.
PEAK = "peak 9.51 GiB · step 1 · backward"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


def run() -> Trace:
    return training_run(layers=2, micro_batches=3, layer_bytes=2**30)


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page of runs; afterwards no script may have failed and nothing but the file may have been asked for."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts: list[Any] = []

    def open_page(
        runs: list[PageRun], table1: EffectsTable | None = None, *, width: int = 1400, **settings: Any
    ) -> Any:
        file = tmp_path / "page.html"
        file.write_text(render_page(runs, table1), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) == {(tmp_path / "page.html").as_uri()}


def shown_range(page: Any) -> list[int]:
    shown: list[float] = page.evaluate("document.querySelector('.figure').layout.xaxis.range")
    return [round(end) for end in shown]


def colours(page: Any) -> list[str]:
    """Of the figure: background, first curve and text."""
    script = (
        "(e => [e.layout.paper_bgcolor, e.data[0].fillcolor, e.layout.font.color])(document.querySelector('.figure'))"
    )
    found: list[str] = page.evaluate(script)
    return found


def comes_to(page: Any, look: Callable[[Any], Any], expected: Any) -> bool:
    """Whether the page gets there within five seconds. Playwright's own waiting evaluates text: the page forbids it."""
    for _ in range(100):
        if look(page) == expected:
            return True
        page.wait_for_timeout(50)
    return False


def test_page_draws_each_run_with_its_peak(visit: Callable[..., Any]) -> None:
    page = visit([PageRun("one", run()), PageRun("two", run())])
    for index in range(2):
        assert PEAK in page.locator(f"#run{index} .annotation-text").all_text_contents()
    assert page.locator(".figure .scatterlayer .js-fill").count() > 0


def test_hover_names_category_module_and_op(visit: Callable[..., Any]) -> None:
    trace = run()
    page = visit([PageRun("one", trace)])
    box = page.locator(PLOT).first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * trace.peak.event / trace.events, box["y"] + 60)
    label = page.locator(".hoverlayer .legend", has_text=f"event {trace.peak.event}").text_content()
    for text in (
        "step 1 · backward · micro-batch 1",
        "workspace allocated",
        "activation : 1.50 GiB",
        "parameter : 2.00 GiB",
        "output · aten.mm",
    ):
        assert text in label


def test_legend_hides_and_shows_a_category(visit: Callable[..., Any]) -> None:
    page = visit([PageRun("one", run())])
    areas = page.locator(".figure .scatterlayer .trace")
    before = areas.count()
    button = page.get_by_role("button", name="activation")
    button.click()
    assert (button.get_attribute("aria-pressed"), areas.count()) == ("false", before - 1)
    button.click()
    assert (button.get_attribute("aria-pressed"), areas.count()) == ("true", before)


def test_buttons_zoom_to_a_step_and_back(visit: Callable[..., Any]) -> None:
    trace = run()
    page = visit([PageRun("one", trace)])
    whole, step = page.get_by_role("button", name="whole run"), page.get_by_role("button", name="step 1")
    assert shown_range(page) == [0, trace.events]
    step.click()
    assert shown_range(page) == list(trace.step_range(1))
    assert (whole.get_attribute("aria-pressed"), step.get_attribute("aria-pressed")) == ("false", "true")
    whole.click()
    assert shown_range(page) == [0, trace.events]


def test_drag_zooms_and_double_click_goes_back(visit: Callable[..., Any]) -> None:
    trace = run()
    page = visit([PageRun("one", trace)])
    box = page.locator(PLOT).first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, y, steps=5)
    page.mouse.up()
    first, last = shown_range(page)
    assert abs(first - trace.events * 0.25) < 5
    assert abs(last - trace.events * 0.75) < 5
    assert page.get_by_role("button", name="whole run").get_attribute("aria-pressed") == "false"
    page.wait_for_timeout(500)  # or the release counts as the first click of the double click
    page.mouse.dblclick(box["x"] + box["width"] / 2, y)
    assert comes_to(page, shown_range, [0, trace.events])


def test_arrow_keys_read_out_events(visit: Callable[..., Any]) -> None:
    page = visit([PageRun("one", run())])
    figure = page.locator(".figure")
    figure.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    # The second allocation of the run: half of the first layer's parameters more.
    assert page.locator(".readout").inner_text() == (
        "event 1: 1.00 GiB, before the first step · setup, +512.0 MiB parameter allocated, "
        "layers.0.feed_forward · aten.empty"
    )
    assert PEAK in figure.get_attribute("aria-label")


def test_every_control_is_reached_by_tab(visit: Callable[..., Any]) -> None:
    page = visit([PageRun("one", run())])
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.className"))
    assert {"whole run", "step 0", "step 1", "parameter", "activation", "allocated"} <= reached
    assert page.evaluate("[...document.querySelectorAll('.figure')].every(e => e.tabIndex === 0 && e.ariaLabel)")


def test_texts_of_a_trace_run_no_script(visit: Callable[..., Any]) -> None:
    trace = run()
    names = tuple(HOSTILE for _ in trace.modules)
    hostile = dataclasses.replace(trace, modules=names, ops=(HOSTILE,) * len(trace.ops), meta={"target": HOSTILE})
    page = visit([PageRun(HOSTILE, hostile)], EffectsTable(("memory", HOSTILE), [EffectRow(HOSTILE, [HOSTILE])]))
    box = page.locator(PLOT).first.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.move(box["x"] + 240, box["y"] + 60)
    page.wait_for_selector(".hoverlayer .legend")
    assert "<script>document" in page.locator(".hoverlayer .legend").text_content()
    page.locator(".figure").focus()
    page.keyboard.press("End")
    assert "<script>document" in page.locator(".readout").inner_text()
    assert page.title() == f"memscope: {HOSTILE}"
    assert page.locator("h2").inner_text() == HOSTILE
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_page_and_figure_follow_the_colour_scheme(visit: Callable[..., Any], scheme: str, theme: Any) -> None:
    page = visit([PageRun("one", run())], color_scheme=scheme)
    assert colours(page) == [theme.surface, theme.categories["parameter"], theme.text]
    other, now = ("light", LIGHT) if scheme == "dark" else ("dark", DARK)
    page.emulate_media(color_scheme=other)
    assert comes_to(page, colours, [now.surface, now.categories["parameter"], now.text])


@pytest.mark.parametrize("width", [1400, 900, 400])
def test_page_fits_its_width(visit: Callable[..., Any], width: int) -> None:
    table = EffectsTable(
        ("memory", *["lora:r=16,alpha=32"] * 3), [EffectRow("gradient", ["↓ -12.5 GiB (-99.0 %)"] * 3)]
    )
    page = visit([PageRun("lora:r=16,alpha=32,targets=q_proj+v_proj+k_proj+o_proj", run())], table, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    note = page.locator(".annotation-text", has_text="peak").bounding_box()
    assert note["x"] >= 0
    assert note["x"] + note["width"] <= width
