// Figures: unpacked, coloured for light or dark, drawn, resized when unfolded, and scaled for print.

const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 800px)");
const coarse = matchMedia("(pointer: coarse)");
const LIGHT_COLOURS = Object.fromEntries(Object.entries(DARK_COLOURS).map(([light, other]) => [other, light]));

// Text that was deflated and encoded in base64.
async function unpack(text) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

function recolour(value, colours) {
  if (typeof value === "string") return colours[value] ?? value;
  if (Array.isArray(value)) return value.map((inner) => recolour(inner, colours));
  if (value === null || typeof value !== "object" || ArrayBuffer.isView(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, recolour(inner, colours)]));
}

// Figures are packed in light colours.
function coloured(value) {
  return dark.matches ? recolour(value, DARK_COLOURS) : value;
}

// Draws a figure into its element, in place of any other.
function plot(element, { data, layout }, config) {
  element.config = { responsive: true, displaylogo: false, displayModeBar: false, ...config };
  return Plotly.react(element, coloured(data), coloured(layout), element.config);
}

dark.addEventListener("change", () => {
  for (const element of document.querySelectorAll(".figure.js-plotly-plot")) {
    const colours = dark.matches ? DARK_COLOURS : LIGHT_COLOURS;
    Plotly.react(element, recolour(element.data, colours), recolour(element.layout, colours), element.config);
  }
});

async function drawPlain(element) {
  const figure = JSON.parse(await unpack(element.dataset.figure));
  element.replaceChildren();
  await plot(element, figure);
}

// A figure that was drawn, and folded while the window changed its width, takes the new width when it is unfolded.
document.addEventListener("toggle", ({ target }) => {
  if (!target.open) return;
  for (const element of target.querySelectorAll(".figure.js-plotly-plot")) {
    if (element.offsetParent && element.clientWidth !== element._fullLayout.width) Plotly.Plots.resize(element);
  }
}, true);

// Paper has another width than the window, and nobody can unfold it: figures are scaled to it, and no fold hides one.
let openedForPrint = [];
addEventListener("beforeprint", () => {
  openedForPrint = [...document.querySelectorAll("details:not([open])")].filter((fold) => fold.querySelector(".figure"));
  for (const fold of openedForPrint) fold.open = true;
  for (const image of document.querySelectorAll(".figure .main-svg")) {
    image.setAttribute("viewBox", `0 0 ${image.getAttribute("width")} ${image.getAttribute("height")}`);
  }
});
addEventListener("afterprint", () => {
  for (const fold of openedForPrint) fold.open = false;
  for (const image of document.querySelectorAll(".figure .main-svg")) image.removeAttribute("viewBox");
});
