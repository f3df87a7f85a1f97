// The timeline of a run: zoom, categories shown, events found by a search, and the moment under the pointer.

function press(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}

// The zoom buttons above the figure; the one that holds is pressed.
function zooms(element, buttons) {
  for (const button of buttons) {
    button.addEventListener("click", () =>
      Plotly.relayout(element, { "xaxis.range": button.dataset.range.split(",").map(Number) }));
  }
  element.on("plotly_relayout", () => {
    const shown = element.layout.xaxis.range.join(",");
    press(buttons, buttons.find((button) => button.dataset.range === shown));
  });
  // Plotly's own double click would end the axis at the last event shown instead of the end of the run.
  element.on("plotly_doubleclick", () => buttons[0].click());
}

// A category hidden in the figure is hidden below it too.
function toggles(element, buttons, hide) {
  const hidden = new Set();
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const show = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(show));
      hidden[show ? "delete" : "add"](button.textContent);
      Plotly.restyle(element, { visible: show }, [Number(button.dataset.curve)]);
      hide(hidden);
    });
  }
}

// Plotly's markup as plain text.
function plain(markup) {
  return new DOMParser().parseFromString(markup.replaceAll("<br>", ", "), "text/html").body.textContent;
}

// Arrow keys move along the events shown, Home and End to the ends of the view; screen readers read each event.
function keys(element, readout, choose) {
  let at = -1;
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && at >= 0) return choose(at);
    const { x: events, customdata } = element._fullData.find((curve) => curve.name === "allocated");
    const [low, high] = element.layout.xaxis.range;
    const first = lowerBound(events, low);
    const last = lowerBound(events, high + 1) - 1;
    const here = at < 0 ? -1 : lowerBound(events, at);
    const stride = event.shiftKey ? 50 : 1;
    const target = { ArrowRight: here + stride, ArrowLeft: here - stride, Home: first, End: last }[event.key];
    if (target === undefined || last < first) return;
    event.preventDefault();
    const index = Math.min(last, Math.max(first, target));
    at = events[index];
    Plotly.Fx.hover(element, { xval: at }, ["xy"]);
    readout.textContent = `event ${at}: ${plain(customdata[index])}`;
  });
}

// A zoom draws the curves with more of the events that the page holds.
function detail(element, note, moment) {
  let view = element.layout.xaxis.range.join(",");
  element.on("plotly_relayout", async () => {
    const { data } = await moment;
    const now = element.layout.xaxis.range.join(",");
    if (now === view) return;
    view = now;
    await refine(element, data, note);
  });
}

// A line at the moment that the tables below describe.
function mark(element, shapes, event) {
  const line = { color: coloured(TEXT), width: 1.5 };
  const here = { type: "line", xref: "x", yref: "paper", x0: event, x1: event, y0: 0.13, y1: 1, line };
  return Plotly.relayout(element, { shapes: [...shapes, here] });
}

const FOUND_COLUMNS = 900;
const FEW_FOUND = 40;

// The curve that marks the events found by a search: few of them as lines, many as a band at the top.
function foundCurve() {
  return {
    name: "found", x: [], y: [], xaxis: "x", yaxis: "y3", mode: "lines", hoverinfo: "skip", line: { color: ACCENT, width: 1.2 },
  };
}

function markFound(element) {
  const { events, positions } = element.found ?? { positions: [] };
  const [low, high] = element.layout.xaxis.range;
  const columns = new Map();
  for (const at of positions) {
    if (events[at] < low || events[at] > high) continue;
    const column = Math.floor(((events[at] - low) / (high - low)) * FOUND_COLUMNS);
    if (!columns.has(column)) columns.set(column, events[at]);
  }
  const from = columns.size > FEW_FOUND ? 0.96 : 0;
  const marks = [...columns.values()];
  const curve = { x: [marks.flatMap((event) => [event, event, null])], y: [marks.flatMap(() => [from, 1, null])] };
  return Plotly.restyle(element, curve, [element.data.findIndex(({ name }) => name === "found")]);
}

async function drawTimeline(element) {
  const section = element.parentElement;
  const figure = JSON.parse(await unpack(element.dataset.figure));
  const { layout } = figure;
  // A finger on the plot must still scroll the page.
  if (coarse.matches) layout.dragmode = false;
  const names = figure.data.findIndex((curve) => curve.name === "phase names");
  figure.data[names].visible = !narrow.matches;
  figure.data.push(foundCurve());
  layout.yaxis3 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
  Object.assign(layout.xaxis, { nticks: narrow.matches ? 4 : 9, showspikes: true, spikemode: "across", spikesnap: "data" });
  element.replaceChildren();
  await plot(element, figure, {
    doubleClick: false,
    displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "toImage"]],
    showTips: false,
  });
  narrow.addEventListener("change", () =>
    Plotly.update(element, { visible: !narrow.matches }, { "xaxis.nticks": narrow.matches ? 4 : 9 }, [names]));
  zooms(element, [...section.querySelectorAll("button[data-range]")]);
  const shapes = element.layout.shapes ?? [];
  // Not awaited: the timeline appears before everything that the page holds has been read.
  const moment = momentsOf(section.querySelector("[data-moment]"));
  moment.then((state) => {
    state.whenShown = (event) => mark(element, shapes, event);
    hoverBox(element, state.data.scale);
  });
  const show = async (event) => (await moment).show(event);
  toggles(element, [...section.querySelectorAll("button[data-curve]")], async (names) => (await moment).hide(names));
  keys(element, section.querySelector(".readout"), show);
  detail(element, section.querySelector(".resolution"), moment);
  element.on("plotly_click", ({ points }) => show(points[0].x));
  element.on("plotly_relayout", () => element.found && markFound(element));
  if (element.found) await markFound(element);
}
