// Sizes, shares and names as Python writes them.

// Of two equally near decimals, the even one.
function decimals(value, digits) {
  const scaled = value * 10 ** digits;
  const tie = scaled - Math.floor(scaled) === 0.5 && Math.floor(scaled) % 2 === 0;
  return (tie ? Math.floor(scaled) / 10 ** digits : value).toFixed(digits);
}

function formatBytes(size) {
  if (size < 1024) return `${size} B`;
  for (const [unit, scale] of [["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30], ["TiB", 2 ** 40]]) {
    const value = size / scale;
    if (value < 1023.95 || unit === "TiB") return `${decimals(value, value >= 9.995 ? 1 : 2)} ${unit}`;
  }
}

const share = (part, whole) => `${decimals((part / (whole || 1)) * 100, 1)}%`;
const count = (number) => number.toLocaleString("en-US");
const together = (module) => module.replace(/\.\d+(?=\.|$)/g, ".*");
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function occasion(step, phase) {
  if (step >= 0) return `step ${step} · ${PHASES[phase]}`;
  const before = { setup: "setup", outside: "before step 0" };
  return before[PHASES[phase]] ?? `before step 0 · ${PHASES[phase]}`;
}

function add(sums, key, value) {
  sums.set(key, (sums.get(key) ?? 0) + value);
}

function make(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

// A small square in the colour of a category, a phase, or another named colour of the theme.
function swatch(name) {
  const element = make("span", "", { className: "swatch" });
  element.style.setProperty("--swatch", `var(--${name.replaceAll(" ", "_")})`);
  return element;
}

// A name that may break after each dot.
function breakable(tag, name, properties) {
  const element = make(tag, "", properties);
  name.split(/(?<=\.)/).forEach((part, index) => element.append(...(index ? [document.createElement("wbr")] : []), part));
  return element;
}
