"use strict";
// Draws the figures of the page. Each waits in its element's data-figure: JSON, deflated, in base64.

const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 800px)");
const coarse = matchMedia("(pointer: coarse)");

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function paint(element, themes) {
  const [data, layout] = themes[dark.matches ? "dark" : "light"];
  return Plotly.update(element, data, layout);
}

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

function toggles(element, buttons) {
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const show = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(show));
      Plotly.restyle(element, { visible: show }, [Number(button.dataset.curve)]);
    });
  }
}

// Arrow keys move along the events shown, Home and End to the ends of the view; what is there is read out.
function keys(element, events, descriptions, readout) {
  let position = -1;
  element.addEventListener("keydown", (event) => {
    const [low, high] = element.layout.xaxis.range;
    const first = events.findIndex((x) => x >= low);
    const last = events.findLastIndex((x) => x <= high);
    const stride = event.shiftKey ? 50 : 1;
    const target = { ArrowRight: position + stride, ArrowLeft: position - stride, Home: first, End: last }[event.key];
    if (target === undefined || first < 0 || last < first) return;
    event.preventDefault();
    position = Math.min(last, Math.max(first, target));
    Plotly.Fx.hover(element, { xval: events[position] }, ["xy"]);
    const text = new DOMParser().parseFromString(descriptions[position].replaceAll("<br>", ", "), "text/html");
    readout.textContent = `event ${events[position]}: ${text.body.textContent}`;
  });
}

async function draw(element) {
  const section = element.parentElement;
  const { figure, themes } = await unpack(element.dataset.figure);
  element.removeAttribute("data-figure");
  delete figure.layout.height;
  // A finger on the plot must still scroll the page.
  if (coarse.matches) figure.layout.dragmode = false;
  const config = {
    responsive: true,
    displaylogo: false,
    doubleClick: false,
    displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "toImage"]],
  };
  element.replaceChildren();
  // Set before drawing, because each drawing takes time; the figure comes in light colours.
  const names = figure.data.findIndex((curve) => curve.name === "phase names");
  figure.data[names].visible = !narrow.matches;
  figure.layout.xaxis.nticks = narrow.matches ? 5 : 9;
  await Plotly.newPlot(element, figure.data, figure.layout, config);
  if (dark.matches) await paint(element, themes);
  dark.addEventListener("change", () => paint(element, themes));
  narrow.addEventListener("change", () =>
    Plotly.update(element, { visible: !narrow.matches }, { "xaxis.nticks": narrow.matches ? 5 : 9 }, [names]));
  zooms(element, [...section.querySelectorAll("button[data-range]")]);
  toggles(element, [...section.querySelectorAll("button[data-curve]")]);
  const total = element._fullData.find((curve) => curve.name === "allocated");
  keys(element, Array.from(total.x), total.customdata, section.querySelector(".readout"));
}

async function drawAll() {
  for (const element of document.querySelectorAll(".figure")) {
    try {
      await draw(element);
    } catch (error) {
      element.textContent = `The timeline cannot be drawn by this browser (${error}); it needs one of 2023 or later.`;
      throw error;
    }
  }
  document.body.dataset.drawn = "true";
}

drawAll();
