// Search: finds modules and operators in the tables, unfolds the parts that have them, and marks their events in the
// timelines. "/" focuses the field, Enter goes to the next row, Shift+Enter to the one before, Escape clears.

const LEAST_LETTERS = 2;
const PAUSE = 200;
const field = document.getElementById("search");
const told = document.getElementById("found");
let hits = [];
let current = -1;
let marked = 0;
let latest = 0;
let searched = "";
const unfolded = new Set();

// Whether a name matches: as it is, or with the numbers of layers as *, for tables that count layers together.
function matcher(query) {
  const wanted = query.toLowerCase();
  const alike = together(wanted);
  return (name) => {
    const given = name.toLowerCase();
    return given.includes(wanted) || (alike !== wanted && given.includes("*") && given.includes(alike));
  };
}

function clearHits() {
  for (const row of hits) row.classList.remove("hit", "current");
  [hits, current] = [[], -1];
}

function tell() {
  const rows = `${count(hits.length)} ${hits.length === 1 ? "row" : "rows"}`;
  const events = `${count(marked)} ${marked === 1 ? "event" : "events"} marked`;
  const place = current < 0 ? rows : `${count(current + 1)} of ${rows}`;
  told.textContent = !searched ? "" : hits.length || marked ? `${place}, ${events}` : "No match";
}

function unfold(row) {
  for (let part = row.closest("details"); part; part = part.parentElement.closest("details")) {
    if (!part.open) unfolded.add(part);
    part.open = true;
  }
}

async function search(query) {
  const turn = ++latest;
  const matches = query.length < LEAST_LETTERS ? null : matcher(query);
  searched = matches ? query : "";
  let events = 0;
  for (const section of document.querySelectorAll("[data-moment]")) {
    if (!matches && !loaded.has(section)) continue;
    const run = await momentsOf(section);
    if (turn !== latest) return;
    const timeline = section.parentElement.querySelector(".timeline");
    timeline.found = { events: run.data.events, positions: run.find(matches) };
    events += timeline.found.positions.length;
    if (timeline.classList.contains("js-plotly-plot")) markFound(timeline);
  }
  clearHits();
  for (const part of unfolded) part.open = false;
  unfolded.clear();
  marked = events;
  if (matches) {
    const names = [...document.querySelectorAll("td code, th code, .pick")].filter((name) => matches(name.textContent));
    hits = [...new Set(names.map((name) => name.closest("tr")))];
    for (const row of hits) {
      row.classList.add("hit");
      unfold(row);
    }
  }
  tell();
}

function go(stride) {
  if (!hits.length) return;
  hits[current]?.classList.remove("current");
  current = current < 0 && stride < 0 ? hits.length - 1 : (current + stride + hits.length) % hits.length;
  hits[current].classList.add("current");
  reveal(hits[current]);
  hits[current].scrollIntoView({ block: "center" });
  tell();
}

let timer;
field.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => search(field.value.trim()), PAUSE);
});

field.addEventListener("keydown", async (event) => {
  if (event.key !== "Enter" && event.key !== "Escape") return;
  event.preventDefault();
  clearTimeout(timer);
  if (event.key === "Escape") {
    field.value = "";
    return search("");
  }
  if (field.value.trim() !== searched) await search(field.value.trim());
  go(event.shiftKey ? -1 : 1);
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, [contenteditable]");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  field.focus();
  field.select();
});
