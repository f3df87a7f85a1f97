"""What is alive at a moment: chosen on the timeline, shown as areas and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from pages import PLOT, comes_to, html_of, point_at, run

from memscope.analysis.effects import Run
from memscope.dashboards.breakdown import AreaNode, tree
from memscope.dashboards.html import html_page
from memscope.dashboards.names import spoken
from memscope.dashboards.run_card import Room, run_section
from memscope.trace import CATEGORIES, Trace
from memscope.units import format_bytes

pytestmark = pytest.mark.browser

Visit = Callable[..., Any]


def heading(page: Any) -> str:
    part = page.locator("[data-moment] > summary").first
    return f"{part.locator('h3').inner_text()}: {part.locator('.gist').inner_text()}"


def cells(page: Any, table: str) -> list[list[str]]:
    found: list[list[str]] = page.evaluate(
        f"[...document.querySelector('table.{table}').tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))"
    )
    return found


def areas(page: Any) -> dict[str, tuple[int, str]]:
    """Bytes and label of every area, by its id."""
    data = page.evaluate("(d => [d.ids, d.values, d.labels])(document.querySelector('.areas').data[0])")
    return {key: (size, label) for key, size, label in zip(*data, strict=True)}


def flat(node: AreaNode, parent: str = "") -> dict[str, tuple[int, str]]:
    key = f"{parent}\x1f{node.label}" if parent else node.label
    found = {key: (node.size_bytes, node.label)}
    for inner in node.inner.values():
        found |= flat(inner, key)
    return found


def draw_areas(page: Any) -> None:
    page.locator(".areas").scroll_into_view_if_needed()
    page.locator(".areas .slicetext").first.wait_for()


def click_event(page: Any, trace: Trace, event: int) -> None:
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(*point_at(page, trace, event))
    page.mouse.click(*point_at(page, trace, event))


def valley(trace: Trace) -> int:
    """An event of step 0 between micro-batches: nothing but parameters, gradients and the new input is alive."""
    marks = (trace.mark_step == 0) & (trace.mark_micro_batch == 1)
    return int(trace.mark_event[marks][0])


def test_a_click_on_the_peak_fills_the_breakdown(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    click_event(page, trace, valley(trace))
    assert comes_to(page, lambda p: heading(p).startswith("Alive then: "), True)
    click_event(page, trace, trace.peak.event)
    assert comes_to(page, lambda p: heading(p).startswith("Alive at the peak: 9.51 GiB · step 1 · backward"), True)
    draw_areas(page)
    assert areas(page) == flat(tree(trace, trace.peak.event))
    assert cells(page, "allocations")[0][:4] == ["1.00 GiB", "optimizer state", "layers.0.attention", "aten.zeros_like"]


def test_the_breakdown_of_any_moment_is_that_of_the_trace(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    draw_areas(page)
    for event in (3, valley(trace), trace.events - 1):
        click_event(page, trace, event)
        assert comes_to(page, lambda p, event=event: heading(p).endswith(f"event {event:,}"), True)
        assert comes_to(page, areas, flat(tree(trace, event)))
        sizes = {row[0]: int(row[3].replace(",", "")) for row in cells(page, "categories")}
        total = sizes.pop("allocated")
        alive = trace.by_category(at=event)
        assert sizes == {spoken(name): alive[name] for name in CATEGORIES if spoken(name) in sizes}
        assert total == trace.allocated[event]


def test_what_is_written_in_the_page_is_what_the_script_shows_of_the_peak(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    before = {name: cells(page, name) for name in ("categories", "modules", "allocations")}, heading(page)
    click_event(page, trace, valley(trace))
    assert comes_to(page, lambda p: heading(p).startswith("Alive then: "), True)
    page.get_by_role("button", name="peak").click()
    after = {name: cells(page, name) for name in ("categories", "modules", "allocations")}, heading(page)
    assert after == before


def test_layers_can_be_seen_one_by_one(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    draw_areas(page)
    page.get_by_role("button", name="layers together").click()
    assert comes_to(page, areas, flat(tree(trace, trace.peak.event, layers_together=False)))
    assert cells(page, "modules")[0][0] == "layers.0.attention"


def test_a_moment_is_chosen_with_the_keyboard(visit: Visit) -> None:
    page = visit(html_of(run()))
    page.locator(".timeline").focus()
    for key in ("Home", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert comes_to(page, heading, "Alive then: 1.00 GiB · setup · event 1")
    assert [row[2] for row in cells(page, "allocations")] == ["layers.0.attention", "layers.0.feed_forward"]


def test_a_category_that_is_hidden_is_left_out_below_too(visit: Visit) -> None:
    page = visit(html_of(run()))
    draw_areas(page)
    page.get_by_role("button", name="optimizer state").click()
    assert comes_to(page, lambda p: cells(p, "allocations")[0][1], "parameter")
    assert not [key for key in areas(page) if "optimizer state" in key]
    # What is allocated in all stays in sight.
    assert heading(page).startswith("Alive at the peak: 9.51 GiB")
    page.get_by_role("button", name="optimizer state").click()
    assert comes_to(page, lambda p: cells(p, "allocations")[0][1], "optimizer state")


def test_a_module_lists_what_is_in_it(visit: Visit) -> None:
    page = visit(html_of(run()))
    page.locator(".pick", has_text="output").click()
    caption = page.locator("table.allocations caption").inner_text()
    # At the peak: the logits and the workspace of the product.
    assert caption == "Largest allocations in output (2 of 2)"
    assert [row[0] for row in cells(page, "allocations")] == ["512.0 MiB", "8.12 MiB"]


def test_an_area_lists_what_is_in_it_and_the_path_leads_back(visit: Visit) -> None:
    page = visit(html_of(run()))
    draw_areas(page)

    def press(label: str) -> None:
        box = page.locator(".areas .slicetext", has_text=label).first.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    caption = page.locator("table.allocations caption")
    press("feed_forward")
    assert comes_to(
        page, lambda _: caption.inner_text().startswith("Largest allocations in layers.* / feed_forward"), True
    )
    page.wait_for_timeout(1000)  # for plotly to have moved the areas
    press("allocated")
    assert comes_to(page, lambda _: caption.inner_text().startswith("Largest allocations ("), True)


def test_the_areas_can_be_walked_as_a_list_by_keyboard_alone(visit: Visit) -> None:
    page = visit(html_of(run()))
    draw_areas(page)
    page.locator("button[data-show=together]").focus()
    words, lines = "document.activeElement.innerText", []
    for keys in (["Tab", "Enter"], ["Tab"], ["Tab", "Enter"], ["Tab", "Tab", "Enter"]):
        for key in keys:
            page.keyboard.press(key)
        lines.append(" ".join(page.evaluate(words).split()))
    # At the peak each of the 4 parts has a parameter, a gradient, optimizer state and 3 activations: 4 × (1/2 + 1/2 + 1
    # + 3/12) = 9 GiB, half of it in each kind of part; with logits, workspace and input that is 9.51 GiB in 27 pieces.
    assert lines[:2] == ["The areas as a list", "allocated 9.51 GiB, 100.0%, 27 allocations"]
    assert lines[2].startswith("layers.* 9.00 GiB, 94.7%")
    assert lines[3].startswith("feed_forward 4.50 GiB, 47.3%")
    # The one with the focus can be seen to have it, and the list of allocations follows.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    caption = page.locator("table.allocations caption")
    assert caption.inner_text().startswith("Largest allocations in layers.* / feed_forward (")
    page.keyboard.press("Tab")
    assert page.evaluate(words).startswith("aten.zeros_like")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert comes_to(page, lambda _: caption.inner_text().startswith("Largest allocations in layers.* ("), True)


def test_of_more_than_the_page_holds_the_rest_is_counted_by_category(visit: Visit) -> None:
    trace = run()
    section = run_section(Run("few", trace), "run0", Room(4000, 4000, 10), opened=True)
    page = visit(html_page("few", "few", [section]))
    draw_areas(page)
    alive = trace.at(trace.peak.event)
    largest = sorted(trace.size[alive].tolist(), reverse=True)
    page.get_by_role("button", name="peak").click()
    note = page.locator(".rest").inner_text()
    assert note.startswith(f"{len(alive) - 10} smaller allocations, none above ")
    assert note.endswith(f"are counted by category only: {format_bytes(sum(largest[10:]))} together.")
    # The areas still sum to what is allocated.
    assert areas(page)["allocated"][0] == trace.peak.allocated_bytes
    assert caption_count(page) == f"Largest allocations (10 of {len(alive)})"


def caption_count(page: Any) -> str:
    text: str = page.locator("table.allocations caption").inner_text()
    return text


def test_the_script_writes_sizes_as_python_does(visit: Visit) -> None:
    page = visit(html_of(run()))
    sizes = [0, 1, 1023, 1024, 1152, 1153, 10234, 10235, 1047552, 1048524, 1048525, 2**20, 9.995 * 2**20, 2**30 * 1.125]
    sizes += [(2**40) + 12345, 2**50, *(3**power for power in range(1, 32))]
    whole = [int(size) for size in sizes]
    assert page.evaluate("sizes => sizes.map(formatBytes)", whole) == [format_bytes(size) for size in whole]


def test_a_finger_scrolls_and_a_tap_shows_the_moment(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace), width=400, has_touch=True, is_mobile=True)
    assert page.evaluate("document.querySelector('.timeline').layout.dragmode") is False
    box = page.locator(PLOT).first.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    assert comes_to(page, lambda p: heading(p).startswith("Alive then: "), True)


def test_modules_without_a_name_are_told_so(visit: Visit) -> None:
    trace = dataclasses.replace(run(), modules=("",) * len(run().modules))
    page = visit(html_of(trace))
    draw_areas(page)
    assert areas(page) == flat(tree(trace, trace.peak.event))
    assert cells(page, "modules") == [["(no module)", "9.51 GiB", "100.0%"]]
