// The timeline of a run: zoom, categories shown, and the moment a reader points at.

function press(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}

// The zoom buttons above the figure, and the button that says which one holds.
function zooms(element, buttons) {
  for (const button of buttons) {
    button.addEventListener("click", () =>
      Plotly.relayout(element, { "xaxis.range": button.dataset.range.split(",").map(Number) }));
  }
  element.on("plotly_relayout", () => {
    const shown = element.layout.xaxis.range.join(",");
    press(buttons, buttons.find((button) => button.dataset.range === shown));
  });
  // Plotly's own double click would leave the axis at the data's end instead of the run's.
  element.on("plotly_doubleclick", () => buttons[0].click());
}

// What is hidden in the figure is left out below it too.
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

// Arrow keys move along the events shown, Home and End to the ends of the view; what is there is read out.
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

// Where a reader zooms in, the curves are drawn with more of what the page holds.
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

// A line where the moment is that the tables below tell of.
function mark(element, shapes, event) {
  const line = { color: coloured(TEXT), width: 1.5 };
  const here = { type: "line", xref: "x", yref: "paper", x0: event, x1: event, y0: 0.13, y1: 1, line };
  return Plotly.relayout(element, { shapes: [...shapes, here] });
}

async function drawTimeline(element) {
  const section = element.parentElement;
  const figure = JSON.parse(await unpack(element.dataset.figure));
  // A finger on the plot must still scroll the page.
  if (coarse.matches) figure.layout.dragmode = false;
  const names = figure.data.findIndex((curve) => curve.name === "phase names");
  figure.data[names].visible = !narrow.matches;
  figure.layout.xaxis.nticks = narrow.matches ? 5 : 9;
  element.replaceChildren();
  await plot(element, figure, {
    doubleClick: false,
    displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "toImage"]],
  });
  narrow.addEventListener("change", () =>
    Plotly.update(element, { visible: !narrow.matches }, { "xaxis.nticks": narrow.matches ? 5 : 9 }, [names]));
  zooms(element, [...section.querySelectorAll("button[data-range]")]);
  const shapes = element.layout.shapes ?? [];
  // Not waited for: the timeline is there before all that the page holds has been read.
  const moment = moments(section.querySelector(".moment"), (event) => mark(element, shapes, event));
  const show = async (event) => (await moment).show(event);
  toggles(element, [...section.querySelectorAll("button[data-curve]")], async (names) => (await moment).hide(names));
  keys(element, section.querySelector(".readout"), show);
  detail(element, section.querySelector(".resolution"), moment);
  element.on("plotly_click", ({ points }) => show(points[0].x));
}
