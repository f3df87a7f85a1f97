// What is alive at a moment: areas, sums and the largest allocations, from those that the page holds.

const SMALLEST_SHARE = 1 / 2000;
const SMALLER = "smaller ones";
const SEPARATOR = "\x1f";
const PART = /\.(?!(?:\d+|\*)(?:\.|$))/;
const TOP_MODULES = 8;
const TOP_ALLOCATIONS = 15;

// As Python writes it: of two equally near decimals the even one.
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
  return step < 0 ? PHASES[phase] : `step ${step} · ${PHASES[phase]}`;
}

function add(sums, key, value) {
  sums.set(key, (sums.get(key) ?? 0) + value);
}

// Births come as differences, deaths as lives; a life of 0 does not end.
function decode(data) {
  const columns = data.columns;
  decodeCurves(data);
  data.alive = summed(data.alive);
  columns.born = summed(columns.born);
  columns.freed = columns.life.map((life, row) => (life ? columns.born[row] + life : Infinity));
  return data;
}

function aliveAt({ born, freed }, event) {
  const rows = [];
  for (let row = 0; row < born.length && born[row] <= event; row++) if (freed[row] > event) rows.push(row);
  return rows;
}

function moduleOf({ columns, modules }, row, layersTogether) {
  const module = modules[columns.module[row]];
  return (layersTogether ? together(module) : module) || "(no module)";
}

// Where an allocation lies: modules, operator, category.
function pathOf(data, row, layersTogether) {
  const { columns, ops } = data;
  const parts = moduleOf(data, row, layersTogether).split(PART);
  return [...parts, ops[columns.op[row]], CATEGORIES[columns.category[row]]].filter(Boolean);
}

function insert(root, path, size, number) {
  const nodes = [root];
  for (const label of path) {
    const { inner } = nodes.at(-1);
    if (!inner.has(label)) inner.set(label, { label, size: 0, number: 0, inner: new Map(), category: label });
    nodes.push(inner.get(label));
  }
  for (const node of nodes) {
    node.size += size;
    node.number += number;
  }
}

// Gathers what is too small to see, and says of each node which category holds most of it.
function finish(node, smallest) {
  if (!node.inner.size) return new Map([[node.category, node.size]]);
  const sums = new Map();
  for (const inner of node.inner.values()) for (const [name, size] of finish(inner, smallest)) add(sums, name, size);
  node.category = CATEGORIES.reduce((best, name) => ((sums.get(name) ?? -1) > (sums.get(best) ?? -1) ? name : best));
  const small = [...node.inner.values()].filter((inner) => inner.size < smallest);
  if (small.length) {
    const rest = { label: SMALLER, size: 0, number: 0, inner: new Map(), category: small[0].category };
    let largest = -1;
    for (const inner of small) {
      node.inner.delete(inner.label);
      rest.size += inner.size;
      rest.number += inner.number;
      if (inner.size > largest) [largest, rest.category] = [inner.size, inner.category];
    }
    node.inner.set(SMALLER, rest);
  }
  return sums;
}

function listed(node, parent, rows) {
  const id = parent ? parent + SEPARATOR + node.label : node.label;
  rows.push({ ...node, id, parent });
  for (const inner of node.inner.values()) listed(inner, id, rows);
  return rows;
}

function treemap(root) {
  finish(root, root.size * SMALLEST_SHARE);
  const rows = listed(root, "", []);
  const areas = {
    type: "treemap",
    ids: rows.map((row) => row.id),
    parents: rows.map((row) => row.parent),
    labels: rows.map((row) => escaped(row.label)),
    values: rows.map((row) => row.size),
    branchvalues: "total",
    // The whole is no category: plotly writes its label in the text's colour whatever lies below.
    marker: { colors: [GRID, ...rows.slice(1).map((row) => CATEGORY_COLOURS[row.category])] },
    customdata: rows.map((row) => [formatBytes(row.size), share(row.size, root.size), count(row.number), row.category]),
    texttemplate: "%{label}<br>%{customdata[0]}",
    hovertemplate: "%{label}<br>%{customdata[0]}, %{customdata[1]} of all<br>%{customdata[2]} allocations, most of it " +
      "%{customdata[3]}<extra></extra>",
    pathbar: { thickness: 22 },
    tiling: { pad: 1 },
  };
  const font = { family: "system-ui, sans-serif", size: 12, color: TEXT };
  const hoverlabel = { bgcolor: SURFACE, bordercolor: TEXT, font, align: "left" };
  const layout = { margin: { l: 0, r: 0, t: 26, b: 4 }, font, paper_bgcolor: SURFACE, hoverlabel };
  return { data: [areas], layout };
}

// The areas as a list within lists, for keyboards and screen readers: what is within a node is made when it is opened.
function branch(node, total, path, choose) {
  const words = `${formatBytes(node.size)}, ${share(node.size, total)}, ${count(node.number)} allocations`;
  const colour = path.length ? content(["swatch", node.category]).slice(0, 1) : [];
  const line = [...colour, `${node.label} `, make("span", words)];
  const item = document.createElement("li");
  if (!node.inner.size) {
    item.append(...line);
    return item;
  }
  const [details, summary, list] = ["details", "summary", "ul"].map((tag) => make(tag, ""));
  summary.append(...line);
  details.append(summary, list);
  item.append(details);
  const open = () => list.replaceChildren(...[...node.inner.values()].sort((one, other) => other.size - one.size)
    .map((inner) => branch(inner, total, [...path, inner.label], choose)));
  summary.addEventListener("click", () => {
    if (!list.children.length) open();
    choose(details.open ? path.slice(0, -1) : path);
  });
  if (!path.length) {
    open();
    details.open = true;
  }
  return item;
}

function make(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

// What a cell holds: text; [kind, text] for code, for a category with its colour, and for a module to choose.
function content(cell) {
  const [kind, text] = Array.isArray(cell) ? cell : ["", cell];
  if (kind === "code") return [make("code", text)];
  if (kind === "module") return [make("button", text, { type: "button", className: "pick" })];
  if (kind === "") return [text];
  const swatch = make("span", "", { className: "swatch" });
  swatch.style.setProperty("--swatch", `var(--${text})`);
  return [swatch, text];
}

function fill(table, rows) {
  table.tBodies[0].replaceChildren(...rows.map((cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((cell, index) => {
      const element = index ? make("td", "") : make("th", "", { scope: "row" });
      element.append(...content(cell));
      return element;
    }));
    return line;
  }));
}

// The figures of one moment: all bytes by category, exact; which of the allocations held are alive; and by category the
// bytes of those that are not held. Of the last two, only categories that are not hidden.
function momentAt(data, position, hidden) {
  const event = data.events[position];
  const rows = aliveAt(data.columns, event);
  const sizes = Object.entries(data.sizes).map(([name, curve]) => [name, curve[position]]);
  const held = new Map();
  for (const row of rows) add(held, CATEGORIES[data.columns.category[row]], data.columns.size[row]);
  const rest = sizes.map(([name, size]) => [name, size - (held.get(name) ?? 0)]);
  return {
    event,
    sizes,
    total: data.total[position],
    rows: rows.filter((row) => !hidden.has(CATEGORIES[data.columns.category[row]])),
    rest: rest.filter(([name, size]) => size > 0 && !hidden.has(name)),
    notHeld: data.alive[position] - rows.length,
    isWhole: !sizes.some(([name]) => hidden.has(name)),
  };
}

function treeOf(data, moment, layersTogether) {
  const root = { label: moment.isWhole ? "allocated" : "shown", size: 0, number: 0, inner: new Map(), category: "other" };
  for (const row of moment.rows) insert(root, pathOf(data, row, layersTogether), data.columns.size[row], 1);
  for (const [name, size] of moment.rest) insert(root, ["(not listed)", name], size, 0);
  return root;
}

function tellSums(section, data, moment, layersTogether) {
  fill(section.querySelector("table.categories"), [
    ...moment.sizes.toReversed().map(([name, size]) =>
      [["swatch", name], formatBytes(size), share(size, moment.total), count(size)]),
    ["allocated", formatBytes(moment.total), share(moment.total, moment.total), count(moment.total)],
  ]);
  const byModule = new Map();
  for (const row of moment.rows) add(byModule, moduleOf(data, row, layersTogether), data.columns.size[row]);
  const largest = [...byModule].sort((one, other) => other[1] - one[1]).slice(0, TOP_MODULES);
  fill(section.querySelector("table.modules"), largest.map(
    ([name, size]) => [["module", name], formatBytes(size), share(size, moment.total)]));
}

function cellsOf({ columns, modules, ops }, row) {
  const ends = columns.freed[row] < Infinity;
  const step = columns.step[row];
  return [
    formatBytes(columns.size[row]),
    ["swatch", CATEGORIES[columns.category[row]]],
    ["code", modules[columns.module[row]]],
    ["code", ops[columns.op[row]]],
    occasion(step, columns.phase[row]) + (step < 0 ? "" : ` · micro-batch ${columns.microBatch[row]}`),
    ends ? occasion(columns.diedStep[row], columns.diedPhase[row]) : "the end",
    `${count(columns.born[row])} to ${ends ? count(columns.freed[row]) : "the end"}`,
  ];
}

// The largest allocations, of all or of what lies within the labels chosen in the areas.
function tellLargest(section, data, moment, chosen, layersTogether) {
  const sizes = data.columns.size;
  const isWithin = (path) => chosen.every((label, index) => path[index] === label);
  const within = moment.rows.filter((row) => isWithin(pathOf(data, row, layersTogether)));
  const largest = within.toSorted((one, other) => sizes[other] - sizes[one]).slice(0, TOP_ALLOCATIONS);
  const table = section.querySelector("table.allocations");
  fill(table, largest.map((row) => cellsOf(data, row)));
  const all = within.length + (chosen.length ? 0 : moment.notHeld);
  table.caption.textContent =
    `Largest allocations${chosen.length ? ` in ${chosen.join(" / ")}` : ""} (${largest.length} of ${count(all)})`;
  const note = section.querySelector(".rest");
  const left = moment.rest.reduce((sum, [, size]) => sum + size, 0);
  note.hidden = !moment.notHeld;
  note.textContent = `${count(moment.notHeld)} smaller allocations, none above ${formatBytes(data.largestLeftOut)}, ` +
    `are counted by category only: ${formatBytes(left)} together.`;
}

// Shows moments in a section; `show` takes an event of the timeline, `hide` the names of categories to leave out.
async function moments(section, onShow) {
  const data = decode(JSON.parse(await unpack(section.dataset.moment)));
  const area = section.querySelector(".areas");
  const [toPeak, layers] = ["peak", "together"].map((name) => section.querySelector(`button[data-show=${name}]`));
  const peak = lowerBound(data.events, data.peak);
  const layersTogether = () => layers.getAttribute("aria-pressed") === "true";
  let position = peak;
  let hidden = new Set();
  let chosen = [];

  const now = () => momentAt(data, position, hidden);
  const list = () => tellLargest(section, data, now(), chosen, layersTogether());

  function choose(path) {
    chosen = path.at(-1) === SMALLER ? path.slice(0, -1) : path;
    list();
  }

  // Plotly forgets neither the level it was drawn at nor its listeners; both begin anew.
  async function drawAreas() {
    if (!area.dataset.inSight) return;
    const root = treeOf(data, now(), layersTogether());
    const figure = treemap(root);
    section.querySelector(".tree > ul").replaceChildren(branch(root, root.size, [], choose));
    if (area.removeAllListeners) Plotly.purge(area);
    await plot(area, figure);
    area.on("plotly_treemapclick", ({ points, nextLevel }) =>
      choose((nextLevel ?? points[0].id).split(SEPARATOR).slice(1)));
  }

  async function refresh() {
    chosen = [];
    tellSums(section, data, now(), layersTogether());
    list();
    await drawAreas();
  }

  async function show(at) {
    position = lowerBound(data.events, at);
    const when = described(data, position).split("<br>")[1].replace("before the first step · ", "");
    const { event, total } = now();
    toPeak.setAttribute("aria-pressed", String(position === peak));
    section.querySelector("h3").firstChild.textContent = position === peak ? "Alive at the peak: " : "Alive then: ";
    section.querySelector(".what").textContent = `${formatBytes(total)} · ${when} · event ${count(event)}`;
    await Promise.all([onShow(event), refresh()]);
  }

  section.querySelector("table.modules").addEventListener("click", ({ target }) => {
    if (!target.classList.contains("pick")) return;
    chosen = target.textContent.split(PART);
    list();
  });
  toPeak.addEventListener("click", () => show(data.peak));
  layers.addEventListener("click", () => {
    layers.setAttribute("aria-pressed", String(!layersTogether()));
    return refresh();
  });
  area.drawAreas = drawAreas;
  tellSums(section, data, now(), true);
  drawAreas();
  return { data, show, hide: (names) => { hidden = names; return refresh(); } };
}
