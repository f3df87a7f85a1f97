// The allocations alive at a moment: sums and the largest allocations, from those that the page holds.

const PART = /\.(?!(?:\d+|\*)(?:\.|$))/;
const TOP_MODULES = 8;
const TOP_ALLOCATIONS = 15;

// Births are packed as differences, deaths as lifetimes; a lifetime of 0 does not end.
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

// The path to an allocation: modules, operator, category.
function pathOf(data, row, layersTogether) {
  const { columns, ops } = data;
  const parts = moduleOf(data, row, layersTogether).split(PART);
  return [...parts, ops[columns.op[row]], CATEGORIES[columns.category[row]]].filter(Boolean);
}

// The content of a cell, given as text, or as [kind, text]: code, a category with its colour, a module to choose.
function content(cell) {
  const [kind, text] = Array.isArray(cell) ? cell : ["", cell];
  if (kind === "code") return [breakable("code", text)];
  if (kind === "module") return [breakable("button", text, { type: "button", className: "pick" })];
  return kind === "" ? [text] : [swatch(text), text];
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

// One moment: the exact bytes of every category, the allocations held that are alive, and the bytes of those not held by
// category. The last two leave out hidden categories.
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

// `found` tells which allocations a search matches; null without a search.
function tellSums(section, data, moment, layersTogether, found) {
  fill(section.querySelector("table.categories"), [
    ...moment.sizes.toReversed().map(([name, size]) =>
      [["swatch", name], formatBytes(size), share(size, moment.total), count(size)]),
    ["allocated", formatBytes(moment.total), share(moment.total, moment.total), count(moment.total)],
  ]);
  const byModule = new Map();
  const rows = found ? moment.rows.filter(found) : moment.rows;
  for (const row of rows) add(byModule, moduleOf(data, row, layersTogether), data.columns.size[row]);
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

// The largest allocations: all, or those within the labels chosen in the areas, or those that a search matches.
function tellLargest(section, data, moment, chosen, layersTogether, found) {
  const sizes = data.columns.size;
  const isWithin = (path) => chosen.every((label, index) => path[index] === label);
  const within = moment.rows.filter((row) => isWithin(pathOf(data, row, layersTogether)) && (!found || found(row)));
  const largest = within.toSorted((one, other) => sizes[other] - sizes[one]).slice(0, TOP_ALLOCATIONS);
  const table = section.querySelector("table.allocations");
  fill(table, largest.map((row) => cellsOf(data, row)));
  const all = within.length + (chosen.length || found ? 0 : moment.notHeld);
  const where = `${chosen.length ? ` in ${chosen.join(" / ")}` : ""}${found ? " that match the search" : ""}`;
  table.caption.textContent = `Largest allocations${where} (${largest.length} of ${count(all)})`;
  const note = section.querySelector(".rest");
  const left = moment.rest.reduce((sum, [, size]) => sum + size, 0);
  note.hidden = !moment.notHeld;
  note.textContent = `${count(moment.notHeld)} smaller allocations, none above ${formatBytes(data.largestLeftOut)}, ` +
    `are counted by category only: ${formatBytes(left)} together.`;
}

const loaded = new WeakMap();

// The moments of a run, read when they are first needed.
function momentsOf(section) {
  if (!loaded.has(section)) loaded.set(section, moments(section));
  return loaded.get(section);
}

// Shows moments in a part of a run: `show` takes an event of the timeline, `hide` the names of categories to hide,
// `find` whether a name matches a search. `whenShown` is called with each event shown.
async function moments(section) {
  const data = decode(JSON.parse(await unpack(section.dataset.moment)));
  const area = section.querySelector(".areas");
  const [toPeak, layers] = ["peak", "together"].map((name) => section.querySelector(`button[data-show=${name}]`));
  const peak = lowerBound(data.events, data.peak);
  const layersTogether = () => layers.getAttribute("aria-pressed") === "true";
  let position = peak;
  let hidden = new Set();
  let chosen = [];
  let found = null;

  const now = () => momentAt(data, position, hidden);
  const list = () => tellLargest(section, data, now(), chosen, layersTogether(), found);
  const sums = () => tellSums(section, data, now(), layersTogether(), found);

  function choose(path) {
    chosen = path.at(-1) === SMALLER ? path.slice(0, -1) : path;
    list();
  }

  // Plotly keeps neither the level of a treemap nor its listeners; both start anew.
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
    sums();
    list();
    await drawAreas();
  }

  async function show(at) {
    position = lowerBound(data.events, at);
    const when = described(data, position).split("<br>")[1].replace("before the first step · ", "");
    const { event, total } = now();
    toPeak.setAttribute("aria-pressed", String(position === peak));
    section.querySelector("h3").textContent = position === peak ? "Alive at the peak" : "Alive then";
    section.querySelector("summary .gist").textContent = `${formatBytes(total)} · ${when} · event ${count(event)}`;
    section.open = true;
    await Promise.all([state.whenShown(event), refresh()]);
  }

  // The positions of the events whose module or operator matches; 0 of them where nothing in the run does.
  function find(matches) {
    const [byModule, byOp] = [data.modules, data.ops].map((names) => names.map((name) => Boolean(matches?.(name))));
    const { columns, happened } = data;
    const known = byModule.includes(true) || byOp.includes(true);
    found = known ? (row) => byModule[columns.module[row]] || byOp[columns.op[row]] : null;
    chosen = [];
    sums();
    list();
    if (!known) return [];
    return Array.from(data.events.keys()).filter((at) => byModule[happened.module[at]] || byOp[happened.op[at]]);
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
  section.querySelector("summary .gist").ariaLive = "polite";
  sums();
  drawAreas();
  const state = { data, show, find, whenShown: () => {}, hide: (names) => { hidden = names; return refresh(); } };
  return state;
}
