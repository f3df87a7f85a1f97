"""The page in the system's Chromium: opened from a file, with the network off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import PLOT, comes_to, html_of, on_a_device, point_at, run
from traces import TraceBuilder

from memscope.analysis.effects import Run
from memscope.dashboards.demo import training_run
from memscope.dashboards.html import Section, html_page
from memscope.dashboards.palette import DARK, LIGHT
from memscope.dashboards.run_card import Room, run_section
from memscope.dashboards.timeline import timeline
from memscope.trace import PHASES, Trace

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"

# 2 layers of 1 GiB in 2 parts: parameter 4 × 512 MiB, gradient as much (from the first micro-batch on), optimizer state
# 4 × 1 GiB, activations of a micro-batch 4 × 3 × 1/12 GiB and 512 MiB of logits, workspace 8,519,680 B: 9.51 GiB. The
# workspace is taken when the backward pass begins, the gradients are complete from the second micro-batch on.
PEAK = "peak 9.51 GiB · step 1 · backward"

Visit = Callable[..., Any]


def shown_range(page: Any) -> list[int]:
    shown: list[float] = page.evaluate("document.querySelector('.timeline').layout.xaxis.range")
    return [round(end) for end in shown]


def colours(page: Any) -> list[str]:
    """Of the timeline: background, first curve and text; and the background of the areas."""
    script = (
        "(([e, a]) => [e.layout.paper_bgcolor, e.data[0].fillcolor, e.layout.font.color, a.layout.paper_bgcolor])"
        "(['.timeline', '.areas'].map(name => document.querySelector(name)))"
    )
    found: list[str] = page.evaluate(script)
    return found


def test_page_draws_each_run_with_its_peak(visit: Visit) -> None:
    page = visit(html_of(run(), run()))
    for index in range(2):
        page.locator(f"#run{index} .timeline").scroll_into_view_if_needed()
        note = page.locator(f"#run{index} .annotation-text", has_text=PEAK)
        note.wait_for()
    assert page.locator(".timeline .scatterlayer .js-fill").count() > 0


def test_peak_shown_is_that_of_the_trace(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    shown = page.evaluate(
        "(c => [c.x[0], c.y[0]])(document.querySelector('.timeline').data.find(c => c.name == 'peak'))"
    )
    assert [shown[0], shown[1] * 2**30] == [trace.peak.event, trace.peak.allocated_bytes]
    assert page.locator("#run0 .facts dd").first.inner_text() == "9.51 GiB"


def test_figures_out_of_sight_are_drawn_too(visit: Visit) -> None:
    page = visit(html_of(run(), run(), run()))
    page.locator("#run2 .timeline .scatterlayer").first.wait_for(state="attached")
    assert page.evaluate("window.scrollY") == 0


def test_hover_names_category_module_and_op(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    page.mouse.move(*point_at(page, trace, trace.peak.event))
    label = page.locator(".hoverbox", has_text=f"event {trace.peak.event}").inner_text()
    for text in (
        "step 1 · backward · micro-batch 1",
        "workspace allocated",
        "activation\n1.50 GiB",
        "parameter\n2.00 GiB",
        "output · aten.mm",
    ):
        assert text in label


def test_legend_hides_and_shows_a_category(visit: Visit) -> None:
    page = visit(html_of(run()))
    areas = page.locator(".timeline .scatterlayer .trace")
    before = areas.count()
    button = page.get_by_role("button", name="activation")
    button.click()
    assert (button.get_attribute("aria-pressed"), areas.count()) == ("false", before - 1)
    button.click()
    assert (button.get_attribute("aria-pressed"), areas.count()) == ("true", before)


def test_buttons_zoom_to_a_step_and_back(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
    whole, step = page.get_by_role("button", name="whole run"), page.get_by_role("button", name="step 1")
    assert shown_range(page) == [0, trace.events]
    step.click()
    assert shown_range(page) == list(trace.step_range(1))
    assert (whole.get_attribute("aria-pressed"), step.get_attribute("aria-pressed")) == ("false", "true")
    whole.click()
    assert shown_range(page) == [0, trace.events]


def test_drag_zooms_and_double_click_goes_back(visit: Visit) -> None:
    trace = run()
    page = visit(html_of(trace))
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


def detailed() -> tuple[Trace, Section]:
    """A run of some 3,700 events of which its timeline shows 300 at first, and its page holds 1,200 more."""
    trace = training_run(layers=16, micro_batches=6)
    return trace, run_section(Run("long", trace), "run0", Room(300, 1200, 5000), opened=True)


def drawn(page: Any) -> dict[int, tuple[float, str]]:
    """GiB allocated, and what is told of it, at each event drawn."""
    found = page.evaluate(
        "(c => [c.x, c.y, c.customdata].map(v => Array.from(v)))"
        "(document.querySelector('.timeline')._fullData.find(c => c.name == 'allocated'))"
    )
    return {event: (size, text) for event, size, text in zip(*found, strict=True)}


def told(page: Any) -> str:
    text: str = page.locator(".resolution").inner_text()
    return text


def test_a_zoom_shows_more_events_of_what_the_page_holds_each_exact(visit: Visit) -> None:
    trace, section = detailed()
    page = visit(html_page("long", "long", [section]))
    at_first = drawn(page)
    assert told(page) == (
        f"{len(at_first):,} of {trace.events:,} events in view are shown, the highest and lowest of each stretch; zoom "
        "in for more."
    )
    page.get_by_role("button", name="step 1").click()
    assert comes_to(page, lambda p: len(drawn(p)) != len(at_first), True)
    first, last = trace.step_range(1)
    inside = [event for event in drawn(page) if first <= event < last]
    assert len(inside) > 1.5 * len([event for event in at_first if first <= event < last])
    for event, (size, _) in drawn(page).items():
        assert size * 2**30 == trace.allocated[event]
    assert max(size for size, _ in drawn(page).values()) * 2**30 == trace.peak.allocated_bytes
    page.get_by_role("button", name="whole run").click()
    assert comes_to(page, drawn, at_first)


def test_around_the_peak_every_event_is_held_and_told_as_the_figure_tells_it(visit: Visit) -> None:
    trace, section = detailed()
    page = visit(html_page("long", "long", [section]))
    low, high = trace.peak.event - 60, trace.peak.event + 60
    page.evaluate(f"Plotly.relayout(document.querySelector('.timeline'), {{'xaxis.range': [{low}, {high}]}})")
    assert comes_to(page, told, "All 120 events in view are shown.")
    everything = next(curve for curve in timeline(trace, most_positions=trace.events).data if curve.name == "allocated")
    shown = drawn(page)
    assert set(range(low, high)) <= set(shown)
    assert {event: text for event, (_, text) in shown.items()} == {e: everything.customdata[e] for e in shown}


def test_phases_too_many_for_the_whole_run_are_all_there_in_a_zoom(visit: Visit) -> None:
    trace = training_run(layers=1, micro_batches=200)
    page = visit(
        html_page("many", "many", [run_section(Run("many", trace), "run0", Room(100, 1000, 5000), opened=True)])
    )
    first = int(trace.mark_event[trace.mark_micro_batch == 100][0])
    curve = "(n => document.querySelector('.timeline').data.find(c => c.name == n))"
    page.evaluate(f"Plotly.relayout(document.querySelector('.timeline'), {{'xaxis.range': [{first}, {first + 26}]}})")
    # A micro-batch has 26 events. Forward: input, 2 × (scratch made and freed, 3 activations) = 11; loss: logits = 1,
    # too short for its name; backward: workspace, logits, 2 × (gradient made and freed, 3 frees), two more = 14.
    assert comes_to(page, lambda p: p.evaluate(f"Array.from({curve}('phase names').text)"), ["forward", "backward"])
    marks = [(int(e), PHASES[p]) for e, p in zip(trace.mark_event, trace.mark_phase, strict=True)]
    inside = [(event, name) for event, name in marks if first <= event < first + 26]
    assert [name for _, name in inside] == ["forward", "loss", "backward"]
    for event, name in inside:
        assert event in page.evaluate(f"Array.from({curve}('{name}').x)")


def test_where_the_page_holds_no_more_it_says_so(visit: Visit) -> None:
    page = visit(html_page("long", "long", [detailed()[1]]))
    page.evaluate("Plotly.relayout(document.querySelector('.timeline'), {'xaxis.range': [100, 200]})")
    assert comes_to(page, lambda p: told(p).endswith("as many as this page holds here."), True)
    assert " of 100 events in view are shown" in told(page)


def test_the_picture_is_there_without_scripts(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(html_of(run()), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator(".sketch path").count() == 7
    assert page.locator(".sketch b").inner_text() == PEAK
    assert page.locator(".sketch svg").bounding_box()["height"] > 300
    assert not page.locator(".areas").is_visible()
    assert not page.locator("#search").is_visible()
    # The axes have their ticks and units: up to 1.14 × 9.51 GiB in steps of 2, and the phases their names.
    assert page.locator(".sketch .unit").inner_text() == "GiB"
    assert page.locator(".sketch .tick").all_inner_texts() == ["0", "2", "4", "6", "8", "10"]
    assert page.locator(".sketch .event").first.inner_text() == "event 0"
    assert page.locator(".sketch .step").all_inner_texts() == ["step 0", "step 1"]
    assert "backward" in page.locator(".sketched-phases i").all_inner_texts()
    context.close()


def test_arrow_keys_read_out_events(visit: Visit) -> None:
    page = visit(html_of(run()))
    figure = page.locator(".timeline")
    figure.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    # The second allocation of the run: half of the first layer's parameters more.
    assert page.locator(".readout").inner_text() == (
        "event 1: 1.00 GiB, before the first step · setup, +512.0 MiB parameter allocated, "
        "layers.0.feed_forward · aten.empty"
    )
    assert PEAK in figure.get_attribute("aria-label")


def test_every_control_is_reached_by_tab(visit: Visit) -> None:
    page = visit(html_of(run()))
    reached = set()
    for _ in range(50):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.className"))
    assert {"whole run", "step 0", "step 1", "parameter", "activation", "allocated", "peak"} <= reached
    assert {"layers together", "layers.*.attention"} <= reached
    assert page.evaluate("[...document.querySelectorAll('.timeline')].every(e => e.tabIndex === 0)")
    assert page.evaluate("[...document.querySelectorAll('.figure')].every(e => e.ariaLabel.length > 20)")


def hostile_run() -> Run:
    trace = run()
    names = tuple(HOSTILE for _ in trace.modules)
    hostile = dataclasses.replace(trace, modules=names, ops=(HOSTILE,) * len(trace.ops), meta={"target": HOSTILE})
    return Run(HOSTILE, hostile)


def test_texts_of_a_trace_run_no_script(visit: Visit) -> None:
    page = visit(html_of(hostile_run(), hostile_run()))
    page.locator("#run0 .timeline").scroll_into_view_if_needed()
    page.locator("#run0 .timeline .nsewdrag").first.wait_for()
    x, y = point_at(page, run(), 20)
    page.mouse.move(x, y)
    page.mouse.move(x + 40, y)
    page.wait_for_selector("#run0 .hoverbox:not([hidden])")
    assert "<script>document" in page.locator("#run0 .hoverbox").inner_text()
    page.mouse.click(x + 40, y)
    page.locator("#run0 .areas .slicetext").first.wait_for()
    assert "<script>document" in page.locator("#run0 table.allocations").inner_text()
    assert "<script>document" in page.locator("#run0 .areas").text_content()
    page.locator("#run0 .pick").first.click()
    page.locator("#run0 .timeline").focus()
    page.keyboard.press("End")
    assert "<script>document" in page.locator("#run0 .readout").inner_text()
    assert page.title() == f"memscope: {HOSTILE}"
    assert page.locator("#run0 h2").inner_text() == HOSTILE
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_page_and_figures_follow_the_colour_scheme(visit: Visit, scheme: str, theme: Any) -> None:
    page = visit(html_of(run()), color_scheme=scheme)
    page.locator(".areas").scroll_into_view_if_needed()
    page.locator(".areas .slicetext").first.wait_for()
    assert colours(page) == [theme.surface, theme.categories["parameter"], theme.text, theme.surface]
    other, now = ("light", LIGHT) if scheme == "dark" else ("dark", DARK)
    page.emulate_media(color_scheme=other)
    expected = [now.surface, now.categories["parameter"], now.text, now.surface]
    assert comes_to(page, colours, expected)


def test_allocator_is_drawn_with_its_segments(visit: Visit) -> None:
    trace = on_a_device()
    page = visit(html_of(trace))
    page.locator("#run0-allocator > summary").click()
    for figure in page.locator("#run0-allocator .figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
    assert page.locator("#run0-allocator .barlayer .point").count() > 0
    assert "which share segments with live allocations" in page.locator("#run0-allocator p").first.inner_text()
    assert "runs out of memory in step 1, forward, layers.1.attention" in page.locator(".warning").first.inner_text()


def test_a_run_with_a_single_event_is_drawn(visit: Visit) -> None:
    built = TraceBuilder()
    built.phase("setup")
    built.new("parameter", 512, module="w")
    page = visit(html_of(built.trace()))
    assert page.locator(".annotation-text", has_text="peak 512 B").count() == 1


def test_a_run_of_many_steps_is_drawn(visit: Visit) -> None:
    page = visit(html_of(training_run(layers=2, steps=40, micro_batches=1)))
    assert page.locator("button[data-range]").count() == 41
