// Figures: unpacked, coloured for light or dark, drawn when they come into sight.

const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 800px)");
const coarse = matchMedia("(pointer: coarse)");
const LIGHT_COLOURS = Object.fromEntries(Object.entries(DARK_COLOURS).map(([light, other]) => [other, light]));

// Text that was deflated and put in base64.
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

// A figure comes in light colours.
function coloured(value) {
  return dark.matches ? recolour(value, DARK_COLOURS) : value;
}

// Draws a figure into its element, or another one in its place.
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
