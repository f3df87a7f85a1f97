"""The page of traces, without a browser: what it says, that it fetches nothing, and that it stays small."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import re
import zlib
from html import escape
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from traces import TraceBuilder

from memscope.analysis.effects import Run, compare
from memscope.dashboards.demo import training_run
from memscope.dashboards.page import render_page
from memscope.errors import UsageError
from memscope.trace import CATEGORIES, Trace

GIB = 2**30
HOSTILE = "<script>document.title='taken'</script>\"'&"


def small(**meta: Any) -> Trace:
    """Six events; 3, 4, 6, 4, 7, 6 GiB allocated after them: the peak is in the backward pass, at event 4."""
    run = TraceBuilder()
    run.phase("setup")
    run.new("parameter", 3 * GIB, module="layers.0.w")
    run.phase("forward", 0)
    activation = run.new("activation", GIB, module="layers.17.w", op="aten.mm")
    run.free(run.new("temporary", 2 * GIB, module="output", op="aten.add"))
    run.phase("backward", 0)
    run.new("gradient", 3 * GIB, module="layers.2.w", op="aten.mm")
    run.free(activation)
    return run.trace(meta)


def page_of(*runs: Run, **more: Any) -> str:
    """The page without plotly's own script, and with what is packed laid open."""
    page = render_page(list(runs) or [Run("a", small())], **more)
    page = re.sub(r'<script type="text/plain" id="plotly">[^<]*</script>', "", page)
    return re.sub(r'data-(?:figure|moment)="([^"]*)"', lambda found: found[0] + unpacked(found[1]), page)


def unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()


def run_a() -> Run:
    return Run("a", small())


def hostile_runs() -> list[Run]:
    meta = {
        "target": HOSTILE, "strategies": [HOSTILE], "device": {"name": HOSTILE, "simulated": True},
        "versions": {"torch": HOSTILE}, "inferred": [HOSTILE], "notes": [HOSTILE], "imported": {"notes": [HOSTILE]},
    }  # fmt: skip
    trace = dataclasses.replace(small(), modules=(HOSTILE,) * 4, ops=(HOSTILE,) * 3, meta=meta)
    other = dataclasses.replace(trace, size=2 * trace.size, meta={**meta, "strategies": [HOSTILE * 2]})
    return [Run(HOSTILE, trace), Run(HOSTILE, other)]


def test_no_text_of_a_trace_becomes_markup() -> None:
    page = render_page(hostile_runs(), baselines=[HOSTILE])
    assert HOSTILE not in page
    assert "<script>document" not in page
    # Title, heading, and of both runs the link, facts, notes, module and allocation tables.
    assert page.count(escape(HOSTILE)) >= 20


def test_hover_texts_are_escaped_for_plotly() -> None:
    figures = re.findall(r'data-figure="([^"]*)"', render_page(hostile_runs()))
    assert len(figures) >= 4
    for figure in figures:
        assert "<script>document" not in json.dumps(json.loads(unpacked(figure)), ensure_ascii=False)


def test_page_refers_to_nothing_outside_itself() -> None:
    page = page_of()
    for reference in ("http:", "https:", "//cdn", "src=", "@import", "url(", "<link"):
        assert reference not in page
    assert "default-src 'none'" in page


def test_plotly_is_embedded_once_however_many_runs() -> None:
    page = render_page([Run(str(index), small()) for index in range(3)])
    (packed,) = re.findall(r'id="plotly">([^<]*)<', page)
    assert unpacked(packed) == get_plotlyjs()
    assert page.count('class="figure timeline"') == 3


def test_page_of_many_long_runs_stays_below_eight_megabytes() -> None:
    random = np.random.default_rng(0)
    trace = training_run(layers=32, micro_batches=64)
    noisy = dataclasses.replace(
        trace, size=random.integers(1, 2**28, len(trace)), category=random.integers(0, len(CATEGORIES), len(trace))
    )
    assert trace.events > 80_000
    assert len(render_page([Run(str(index), noisy) for index in range(14)]).encode()) < 8_000_000


def test_page_states_the_run_and_its_peak() -> None:
    meta = {
        "target": "targets/llama2", "strategies": ["lora:r=16", "amp"], "device": {"name": "A100", "simulated": True},
        "versions": {"torch": "2.13.0"}, "parameters": {"total": 2000, "trainable": 5}, "capacity": 40 * GIB,
    }  # fmt: skip
    page = page_of(Run("both", small(**meta)))
    for text in (
        "<title>memscope: targets/llama2</title>",
        "<dd>7.00 GiB</dd>",
        "<dd>step 0 · backward · micro-batch 0 · event 4 of 6</dd>",
        "<dd>lora:r=16, amp</dd>",
        "<dd>A100 (simulated)</dd>",
        "<dd>40.0 GiB</dd>",
        "<dd>2.13.0</dd>",
        "<dd>5 of 2,000 (0.25%)</dd>",
    ):
        assert text in page


def test_the_head_states_device_kind_date_and_settings_of_all_runs() -> None:
    settings = {"n_layers": 32, "dtype": "fp32", "n_kv_heads": None}
    device = {"name": "A100", "simulated": True}
    first = small(settings=settings, device=device)
    second = small(settings=settings | {"dtype": "bf16"}, device=device | {"simulated": False})
    page = page_of(Run("a", first), Run("b", second))
    head = page[page.index("<header>") : page.index("</header>")]
    today = datetime.date.today().isoformat()
    for text in (
        f'<time datetime="{today}">',
        "<dt>device</dt><dd>A100</dd>",
        "<dt>recorded</dt><dd>simulated · measured</dd>",
        "<dt>n_layers</dt><dd>32</dd>",
        "<dt>dtype</dt><dd>fp32 | bf16</dd>",
        "<dt>n_kv_heads</dt><dd>none</dd>",
    ):
        assert text in head


def test_the_list_of_sections_links_every_run_and_its_parts() -> None:
    page = page_of(Run("one", small()), Run("<two>", small()))
    links = re.findall(r'<a href="#([^"]*)"><b>([^<]*)</b>', page)
    assert links == [
        ("runs", "All runs on the same axes"),
        ("differences", "What grew and what shrank"),
        ("run0", "one"),
        ("run1", "&lt;two&gt;"),
    ]
    for key in re.findall(r'<a href="#([^"]*)">', page):
        assert page.count(f'id="{key}"') == 1


def test_the_parts_of_a_single_run_start_with_the_allocations_unfolded_and_of_several_runs_folded() -> None:
    assert '<details class="part" id="run0-alive" open' in page_of()
    assert "open" not in "".join(
        re.findall(r'<details class="part" id="run\d-alive"[^>]{0,6}', page_of(*2 * [run_a()]))
    )


def test_people_read_names_with_spaces() -> None:
    trace = training_run(layers=1)
    page = page_of(Run("a", trace), Run("b", training_run(layers=2)))
    for name in ("optimizer state", "zero grad"):
        assert f">{name}<" in page or f"{name}<" in page
    shown = re.sub(r"var\(--[a-z_]+\)|<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "optimizer_state" not in shown
    assert "zero_grad" not in shown


def test_changes_below_a_thousandth_of_the_peak_are_folded() -> None:
    def with_norm(size_bytes: int) -> Trace:
        run = TraceBuilder()
        run.phase("setup")
        run.new("parameter", 1000 * GIB, module="large")
        run.new("parameter", size_bytes, module="norm")
        return run.trace()

    page = page_of(Run("a", with_norm(0)), Run("b", with_norm(GIB // 2)))
    # Half a GiB of 1000: 0.05 %, once as category and once as module.
    assert "2 changes below 0.1% of the peak</summary>" in page
    assert "<code>norm</code></td><td>+512.0 MiB</td>" in page
    assert "Allocations that changed most" not in page


def test_a_measured_run_is_marked_so() -> None:
    assert "<dd>H200 (measured)</dd>" in page_of(Run("a", small(device={"name": "H200", "simulated": False})))


def test_what_is_inferred_or_not_exact_is_said() -> None:
    page = page_of(Run("a", small(inferred=["category"], imported={"notes": ["two frees were lost"]})))
    assert "Inferred from stacks, not recorded: category, by the functions that ran at each allocation" in page
    assert "By category (inferred)" in page
    assert "By module," in page
    assert "Not exact: two frees were lost." in page


def test_breakdown_at_the_peak_sums_to_the_peak() -> None:
    # At event 4: parameter 3, activation 1, gradient 3 of 7 GiB; shares 3/7 = 42.9 %, 1/7 = 14.3 %.
    page = page_of()
    assert f"parameter</th><td>3.00 GiB</td><td>42.9%</td><td>{3 * GIB:,}</td>" in page
    assert f"activation</th><td>1.00 GiB</td><td>14.3%</td><td>{GIB:,}</td>" in page
    assert "temporary</th><td>0 B</td><td>0.0%</td><td>0</td>" in page
    assert f"allocated</th><td>7.00 GiB</td><td>100.0%</td><td>{7 * GIB:,}</td>" in page


def test_layers_of_a_stack_are_counted_together() -> None:
    assert "<code>layers.<wbr>*.<wbr>w</code></th><td>7.00 GiB</td>" in page_of()


def test_largest_allocations_are_listed_with_birth_and_death() -> None:
    page = page_of()
    assert "<td>step 0 · forward · micro-batch 0</td><td>step 0 · backward</td><td>1 to 5</td>" in page
    assert "<td>setup</td><td>the end</td><td>0 to the end</td>" in page
    assert "Largest allocations (3 of 3)" in page


def test_a_run_without_an_allocator_has_neither_ledger_nor_segments() -> None:
    page = page_of()
    assert "Ledger" not in page
    assert 'id="run0-allocator"' not in page


def test_several_runs_are_drawn_on_the_same_axes_and_compared_with_the_first() -> None:
    half = dataclasses.replace(small(), size=small().size // 2, requested=small().size // 2)
    page = page_of(Run("plain", small()), Run("half", half))
    assert "All runs on the same axes" in page
    # 3.5 against 7 GiB.
    assert '<h3>half against plain</h3> <span class="gist">-3.50 GiB, each at its own peak</span>' in page
    assert "All runs on the same axes" not in page_of()


def test_what_was_set_otherwise_is_named_with_the_allocations_that_changed() -> None:
    double = dataclasses.replace(small(strategies=["lora"]), size=2 * small().size)
    page = page_of(Run("plain", small(strategies=[])), Run("double", double))
    assert "Settings that differ: strategies none → lora" in page
    # At the peak a parameter and a gradient of 3 GiB each, which are 6 GiB in the other run.
    assert "+3.00 GiB</td>" in page


def test_table_1_stands_above_the_runs_with_what_it_rests_on() -> None:
    run = training_run()
    trace = dataclasses.replace(run, meta={**run.meta, "flops": [10, 10]})
    table = compare(trace, [Run("same", trace, {"gradient": "↓"})])
    page = page_of(Run("baseline", trace), Run("same", trace), table1=table, baselines=["Dropout is off (lora)"])
    assert f"gradient</th><td>{table.columns[0]['gradient']}</td>" in page
    assert "Baseline: Dropout is off (lora)" in page
    assert "same, gradient: usually ↓, here –" in page
    assert 0 < page.index('id="table1"') < page.index('id="run0"')


def test_prediction_is_held_against_measurement_of_the_same_plan() -> None:
    plan = {"target": "t", "strategies": ["lora"], "settings": {}}
    predicted = small(**plan, device={"name": "gpu", "simulated": True})
    measured = dataclasses.replace(
        small(**plan, device={"name": "gpu", "simulated": False}), size=np.array([3, 1, 2, 4]) * GIB
    )
    page = page_of(Run("sim", predicted), Run("real", measured))
    assert "sim (simulated) against real (measured), each at its own peak" in page
    # Gradient: 3 GiB predicted, 4 measured.
    assert "gradient</th><td>3.00 GiB</td><td>4.00 GiB</td><td>-1.00 GiB</td><td>-25.00%</td>" in page


def test_page_without_a_run_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one trace"):
        render_page([])


def test_page_of_an_empty_trace_is_refused() -> None:
    with pytest.raises(UsageError, match="the trace is empty"):
        render_page([Run("empty", TraceBuilder().trace())])


def test_runs_are_drawn_one_after_the_other_and_told_of() -> None:
    told: list[tuple[str, int, int]] = []
    runs = [Run("one", small()), Run("two", small())]
    render_page(runs, progress=lambda *what: told.append(what))
    assert told == [("drawing one", 0, 2), ("drawing two", 1, 2)]


def test_a_run_with_inference_and_many_steps_has_parts_for_both() -> None:
    run = TraceBuilder()
    run.phase("setup")
    run.new("parameter", 3 * GIB)
    for step in range(4):
        run.phase("forward", step)
        run.new("activation", GIB, module=HOSTILE, op="aten.mm")  # never freed
        run.phase("inference", step)
        run.free(run.new("temporary", 2 * GIB))
    page = page_of(Run("a", run.trace({"models": {"(model)": HOSTILE, "Critic": "Critic"}})))
    assert 'id="run0-phases"' in page
    assert 'id="run0-steps"' in page
    assert "leaves 1.00 GiB allocated" in page
    highest = re.search(r"inference</th><td>(.*?)</td><td>(.*?)</td>", page)
    assert highest
    assert highest.groups() == ("9.00 GiB", "step 3")  # 3 + 4 * 1 + 2
    assert '"name":"peak allocated"' in page
    assert HOSTILE not in page
    plain = page_of()
    assert "run0-phases" not in plain
    assert "run0-steps" not in plain
