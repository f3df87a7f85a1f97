"""A page of four runs: its list of sections, its folded parts, its search, and its width on three screens.

One page serves all tests of this module; each starts from the page as it was opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import comes_to, html_of, on_a_device

from memscope.analysis.effects import Run, compare
from memscope.dashboards.demo import training_run

pytestmark = pytest.mark.browser

WIDTHS = (1440, 768, 390)
HIGHEST_PX = 6000
LEAST_TEXT_PX = 10
LONG_LABEL = "lora:r=16,alpha=32,targets=q_proj+v_proj+k_proj+o_proj"


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    baseline = on_a_device()
    runs = [Run("baseline", baseline), *(Run(label, baseline) for label in ("lora", "amp"))]
    runs.append(Run(LONG_LABEL, training_run(layers=2, micro_batches=2, layer_bytes=2**29)))
    table = compare(baseline, runs[1:3])
    file = tmp_path_factory.mktemp("four") / "page.html"
    file.write_text(html_of(*runs, table1=table), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1440, "height": 900}, offline=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-drawn]")
    # Before any test unfolds or folds a part.
    page.height_at_first = page.evaluate("document.documentElement.scrollHeight")
    page.open_at_first = open_parts(page)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def page(opened: Any) -> Any:
    """The page at 1440 px, folded, without a search, at its top."""
    opened.set_viewport_size({"width": 1440, "height": 900})
    opened.evaluate("document.querySelectorAll('details').forEach(part => { part.open = false })")
    opened.locator("#search").fill("")
    opened.keyboard.press("Escape")
    assert comes_to(opened, found, "")
    opened.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    return opened


def found(page: Any) -> str:
    text: str = page.locator("#found").inner_text()
    return text


def open_parts(page: Any) -> list[str]:
    keys: list[str] = page.evaluate("[...document.querySelectorAll('details.part[open]')].map(part => part.id)")
    return keys


def marked_events(page: Any, key: str) -> list[int]:
    """Events that the search marks in the timeline of a run."""
    events: list[int] = page.evaluate(
        f"Array.from(document.querySelector('#{key} .timeline').data?.find(c => c.name == 'found').x ?? [])"
    )
    return sorted({event for event in events if event is not None})


def test_four_runs_are_at_most_6000_pixels_tall(page: Any) -> None:
    assert page.open_at_first == []
    assert page.height_at_first <= HIGHEST_PX


def test_the_list_stays_in_sight_and_names_every_section(page: Any) -> None:
    titles = page.locator(".contents nav > ul > li > a > b").all_inner_texts()
    assert titles[:3] == [
        "All runs on the same axes",
        "Table 1: what each strategy changes",
        "What grew and what shrank",
    ]
    assert titles[3:] == ["baseline", "lora", "amp", LONG_LABEL]
    page.locator(".contents a[href='#run2']").click()
    assert comes_to(page, lambda p: p.locator(".contents a[aria-current]").first.get_attribute("href"), "#run2")
    assert page.locator(".contents").bounding_box()["y"] >= 0
    assert page.locator("#run2 h2").bounding_box()["y"] < 200


def test_a_link_unfolds_its_part(page: Any) -> None:
    page.locator(".contents a[href='#run1']").click()
    page.locator(".contents a[href='#run1-ledger']").click()
    assert comes_to(page, open_parts, ["run1-ledger"])
    assert page.locator("#run1-ledger table.ledger").is_visible()


def test_parts_unfold_by_keyboard_and_all_at_once(page: Any) -> None:
    page.locator("#run0-ledger > summary").focus()
    page.keyboard.press("Enter")
    assert open_parts(page) == ["run0-ledger"]
    button = page.locator(".all")
    button.click()
    assert len(open_parts(page)) == page.locator("details.part").count() > 8
    button.click()
    assert (open_parts(page), button.inner_text()) == ([], "Unfold all")


def test_a_figure_in_an_unfolded_part_has_its_full_width(page: Any) -> None:
    def widths(_: Any) -> bool:
        drawn = page.evaluate(
            "[...document.querySelectorAll('#run0-allocator .figure')]"
            ".map(f => [f.clientWidth, f.querySelector('.main-svg')?.clientWidth ?? 0])"
        )
        return all(own == inside > 0 for own, inside in drawn)

    summary = page.locator("#run0-allocator > summary")
    summary.click()
    for figure in page.locator("#run0-allocator .figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
    assert comes_to(page, widths, True)
    # The window changes its width while the part is folded.
    summary.click()
    page.set_viewport_size({"width": 900, "height": 900})
    page.wait_for_timeout(300)
    summary.click()
    assert comes_to(page, widths, True)


def test_the_moment_clicked_unfolds_its_allocations(page: Any) -> None:
    timeline = page.locator("#run1 .timeline")
    timeline.scroll_into_view_if_needed()
    timeline.locator(".scatterlayer").first.wait_for()
    timeline.focus()
    for key in ("Home", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert comes_to(page, open_parts, ["run1-alive"])


def test_search_finds_rows_unfolds_their_parts_and_marks_their_events(page: Any) -> None:
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("feed_forward")
    assert comes_to(page, lambda p: "rows" in found(p), True)
    rows = page.locator("tr.hit")
    assert found(page).startswith(f"{rows.count()} rows, ")
    assert page.locator("#found").get_attribute("aria-live") == "polite"
    assert all(row.is_visible() for row in rows.all())
    assert {"run0-alive", "run1-alive", "run2-alive", "run3-alive"} <= set(open_parts(page))
    assert all("feed_forward" in row.inner_text() for row in rows.all())
    trace = on_a_device()
    page.locator("#run0 .timeline").scroll_into_view_if_needed()
    page.locator("#run0 .timeline .scatterlayer").first.wait_for()
    module = [index for index, name in enumerate(trace.modules) if "feed_forward" in name]
    born = trace.born[[code in module for code in trace.module.tolist()]].tolist()
    freed = [event for event in trace.freed[[code in module for code in trace.module.tolist()]].tolist() if event >= 0]
    assert comes_to(page, lambda p: marked_events(p, "run0"), sorted(born + freed))


def test_enter_goes_from_match_to_match_and_escape_clears(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("_log_softmax")
    page.keyboard.press("Enter")
    assert comes_to(page, lambda p: found(p).startswith("1 of "), True)
    total = page.locator("tr.hit").count()
    page.keyboard.press("Enter")
    assert found(page).startswith(f"2 of {total} rows")
    row = page.locator("tr.hit.current").bounding_box()
    assert 0 <= row["y"] <= 900
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    assert found(page).startswith(f"{total} of {total} rows")
    page.keyboard.press("Escape")
    assert comes_to(page, found, "")
    assert page.locator("tr.hit").count() == 0
    assert open_parts(page) == []
    assert page.locator("#search").input_value() == ""


def test_a_layer_is_found_where_layers_are_counted_together_and_nothing_is_told(page: Any) -> None:
    page.locator("#search").fill("layers.1.attention")
    assert comes_to(page, lambda p: p.locator("#run0 table.modules tr.hit").count(), 1)
    assert page.locator("#run0 table.modules tr.hit").inner_text().startswith("layers.*.attention")
    page.locator("#search").fill("no_such_module")
    assert comes_to(page, found, "No match")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_column_is_cut(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.locator(".all").click()
    assert comes_to(page, lambda p: p.evaluate("document.documentElement.scrollWidth"), width)
    outside = page.evaluate(
        "[...document.querySelectorAll('.page :is(p, li, dd, button, h2, h3, .figure)')]"
        ".filter(e => e.checkVisibility() && !e.closest('.scroll, .readout'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)"
    )
    assert outside == []
    # A table that is wider than its place fades where it goes on.
    cut = (
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).maskImage === 'none').map(e => e.ariaLabel)"
    )
    assert comes_to(page, lambda p: p.evaluate(cut), [])
    if width == WIDTHS[0]:
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth + 1)")
    page.locator(".all").click()


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_areas_are_at_least_10_pixels(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.locator("#run0-alive > summary").click()
    page.locator("#run0-alive .areas").scroll_into_view_if_needed()
    page.locator("#run0-alive .slicetext").first.wait_for()
    page.wait_for_timeout(400)
    sizes = page.evaluate(
        "[...document.querySelectorAll('#run0-alive .slicetext')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a).filter(size => size > 0)"
    )
    assert len(sizes) >= 3
    assert min(sizes) >= LEAST_TEXT_PX - 0.01


def test_the_hover_box_lists_no_zero_and_does_not_cover_the_point(page: Any) -> None:
    timeline = page.locator("#run0 .timeline")
    timeline.scroll_into_view_if_needed()
    timeline.locator(".scatterlayer").first.wait_for()
    plot = timeline.locator(".nsewdrag").first.bounding_box()
    for share in (0.1, 0.45, 0.55, 0.9):
        x, y = plot["x"] + plot["width"] * share, plot["y"] + plot["height"] / 2
        page.mouse.move(x - 25, y)
        page.mouse.move(x, y)
        box = page.locator("#run0 .hoverbox").bounding_box()
        assert not box["x"] <= x <= box["x"] + box["width"]
        assert " 0 B" not in page.locator("#run0 .hoverbox dl").inner_text().replace("\n", " ")
    page.mouse.move(0, 0)


def contrast(page: Any, element: str, pseudo: str = "") -> float:
    """Of text on its own background, as WCAG 2.1 defines it."""
    ratio: float = page.evaluate(
        "([selector, pseudo]) => { const style = getComputedStyle(document.querySelector(selector), pseudo || null);"
        "const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)"
        ".map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);"
        "return .2126 * r + .7152 * g + .0722 * b };"
        "const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);"
        "return (high + 0.05) / (low + 0.05) }",
        [element, pseudo],
    )
    return ratio


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_messages_of_plotly_are_readable(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.locator("#run0 .timeline").scroll_into_view_if_needed()
    page.locator("#run0 .timeline .modebar-btn").first.wait_for(state="attached")
    assert contrast(page, "#run0 .modebar-btn", "::after") >= 4.5
    page.evaluate("document.body.insertAdjacentHTML('beforeend', "
                  "'<div class=\"plotly-notifier\"><div class=\"notifier-note\">x</div></div>')")  # fmt: skip
    assert contrast(page, ".notifier-note") >= 4.5
    page.evaluate("document.querySelector('.plotly-notifier').remove()")
    page.emulate_media(color_scheme="light")


def test_a_page_is_printed_within_its_paper(page: Any, tmp_path: Path) -> None:
    page.locator("#runs .figure .main-svg").first.wait_for()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})
    widths = page.evaluate(
        "[...document.querySelectorAll('#runs .main-svg')].map(image => image.getBoundingClientRect().right)"
    )
    assert max(widths) <= 700
    assert not page.locator(".contents").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")


def test_print_has_every_figure_also_those_that_were_never_in_sight(page: Any) -> None:
    page.wait_for_selector("body[data-complete]", timeout=60_000)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    undrawn = page.evaluate(
        "[...document.querySelectorAll('.figure')].filter(figure => figure.dataset.figure"
        " || !(figure.querySelector('.main-svg')?.getBoundingClientRect().height > 0))"
        ".map(figure => figure.getAttribute('aria-label') ?? figure.className)"
    )
    assert undrawn == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.locator("details[open]").count() == 0
    assert page.pdf().startswith(b"%PDF")
