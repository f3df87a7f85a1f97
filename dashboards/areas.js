// The areas of a moment: modules, in them operators and categories; and the same tree as a list.

const SMALLEST_SHARE = 1 / 2000;
const SMALLEST_TEXT = 10;
const SMALLER = "smaller ones";
const SEPARATOR = "\x1f";

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

// Gathers nodes that are too small to see, and sets the largest category of each node.
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
    // The root has no category, and Plotly writes its label in the colour of text on any background.
    marker: { colors: [GRID, ...rows.slice(1).map((row) => CATEGORY_COLOURS[row.category])] },
    customdata: rows.map((row) => [formatBytes(row.size), share(row.size, root.size), count(row.number), row.category]),
    texttemplate: "%{label}<br>%{customdata[0]}",
    hovertemplate: "%{label}<br>%{customdata[0]}, %{customdata[1]} of all<br>%{customdata[2]} allocations, " +
      "mostly %{customdata[3]}<extra></extra>",
    pathbar: { thickness: 22 },
    tiling: { pad: 1 },
  };
  const font = { family: "system-ui, sans-serif", size: 12, color: TEXT };
  const hoverlabel = { bgcolor: SURFACE, bordercolor: TEXT, font, align: "left" };
  const layout = {
    margin: { l: 0, r: 0, t: 26, b: 4 }, font, paper_bgcolor: SURFACE, hoverlabel,
    uniformtext: { minsize: SMALLEST_TEXT, mode: "hide" },
  };
  return { data: [areas], layout };
}

// The areas as nested lists, for keyboards and screen readers; the list of a node is made when it is first opened.
function branch(node, total, path, choose) {
  const words = `${formatBytes(node.size)}, ${share(node.size, total)}, ${count(node.number)} allocations`;
  const colour = path.length ? [swatch(node.category)] : [];
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
