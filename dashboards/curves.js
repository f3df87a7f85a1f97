// The curves of a run at all events that the page holds, which a zoom shows.

function summed(differences) {
  let value = 0;
  return differences.map((difference) => (value += difference));
}

// Position of the first value that is at least `least`.
function lowerBound(values, least) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < least) low = middle + 1;
    else high = middle;
  }
  return low;
}

function decodeCurves(data) {
  data.events = summed(data.events);
  data.sizes = Object.fromEntries(Object.entries(data.sizes).map(([name, curve]) => [name, summed(curve)]));
  data.marks.event = summed(data.marks.event);
  data.reserved &&= summed(data.reserved);
  data.total = data.events.map((_, index) => Object.values(data.sizes).reduce((sum, curve) => sum + curve[index], 0));
}

// An event in the words of the figure's hover text.
function described(data, index) {
  const { happened, marks, modules, ops } = data;
  const mark = Math.max(0, lowerBound(marks.event, data.events[index] + 1) - 1);
  const [step, phase] = [marks.step[mark], PHASES[marks.phase[mark]]];
  const when = step < 0
    ? `before the first step · ${phase}`
    : `step ${step} · ${phase} · micro-batch ${marks.microBatch[mark]}`;
  const [sign, done] = happened.born[index] ? ["+", "allocated"] : ["−", "freed"];
  return [
    formatBytes(data.total[index]), when,
    `${sign}${formatBytes(happened.size[index])} ${CATEGORIES[happened.category[index]]} ${done}`,
    `${escaped(modules[happened.module[index]])} · ${escaped(ops[happened.op[index]])}`,
  ].join("<br>");
}

// The positions of the largest and of the smallest value in each of equal stretches.
function extremes(values, first, last, stretches) {
  const found = [];
  for (let stretch = 0; stretch < stretches; stretch++) {
    const begin = first + Math.floor((stretch * (last - first + 1)) / stretches);
    const end = first + Math.floor(((stretch + 1) * (last - first + 1)) / stretches);
    let [low, high] = [begin, begin];
    for (let index = begin; index < end; index++) {
      if (values[index] < values[low]) low = index;
      if (values[index] > values[high]) high = index;
    }
    found.push(low, high);
  }
  return found;
}

// Positions to show between two events: all that are held, if few; otherwise those shown of the whole run, which include
// the peaks of steps, and the extremes of stretches. One more on either side lets the lines leave the view.
function positionsIn(data, low, high) {
  const first = Math.max(0, lowerBound(data.events, low + 1) - 1);
  const last = Math.min(data.events.length - 1, lowerBound(data.events, high));
  if (last - first < data.atFirst.length) return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  const kept = data.atFirst.slice(lowerBound(data.atFirst, first), lowerBound(data.atFirst, last + 1));
  const more = extremes(data.total, first, last, Math.floor((data.atFirst.length - kept.length) / 2));
  return [...new Set([first, ...kept, ...more, last])].sort((one, other) => one - other);
}

function resolution(data, shown, low, high) {
  const within = (events) => lowerBound(events, high) - lowerBound(events, low);
  const all = Math.min(high, data.runEvents) - Math.max(low, 0);
  const [seen, held] = [within(shown), within(data.events)];
  if (seen >= Math.floor(all)) return `All ${count(seen)} events in view are shown.`;
  const of = `${count(seen)} of ${count(Math.round(all))} events in view are shown`;
  const what = `${of}, the highest and lowest of each stretch`;
  return seen < held ? `${what}; zoom in for more.` : `${what}: as many as this page holds here.`;
}

// The phases between two events, equal neighbours joined; if there are too many, those at even distances.
function phasesIn(data, low, high) {
  const { event, phase, step } = data.marks;
  const found = [];
  for (let index = Math.max(0, lowerBound(event, low + 1) - 1); index < event.length && event[index] < high; index++) {
    const [first, last] = [index ? event[index] : 0, event[index + 1] ?? data.runEvents];
    const here = { first, last, phase: phase[index], step: step[index] };
    if (here.last <= here.first) continue;
    const before = found.at(-1);
    if (before?.phase === here.phase && before.step === here.step) before.last = here.last;
    else found.push(here);
  }
  const most = data.atFirst.length;
  if (found.length <= most) return found;
  const kept = found.filter(({ first, last }) =>
    Math.ceil(((last - low) * most) / (high - low)) > Math.ceil(((first - low) * most) / (high - low)));
  return kept.map((here, index) => ({ ...here, last: kept[index + 1]?.first ?? here.last }));
}

// The bars of a phase, as phases.py draws them, or the names of the phases that have room for one.
function phaseCurve(name, found, low, high) {
  if (name !== "phase names") {
    const here = found.filter(({ phase }) => PHASES[phase] === name);
    return {
      x: here.flatMap(({ first, last }) => [first, first, last, last, null]),
      y: here.flatMap(() => [...PHASE_BAR, null]),
    };
  }
  const seen = found.map(({ first, last, phase }) => [Math.max(first, low), Math.min(last, high), PHASES[phase]]);
  const wide = seen.filter(([first, last]) => last - first >= LABELLED_SHARE * (high - low));
  return {
    x: wide.map(([first, last]) => (first + last) / 2),
    y: wide.map(() => PHASE_LABEL),
    text: wide.map(([, , label]) => label),
  };
}

// Draws the curves again with the events held in the view, and says how many those are.
async function refine(element, data, note) {
  const [low, high] = element.layout.xaxis.range;
  const positions = positionsIn(data, low, high);
  const events = positions.map((index) => data.events[index]);
  const curves = { ...data.sizes, allocated: data.total, reserved: data.reserved };
  const phases = phasesIn(data, low, high);
  const found = element.data.map(({ name }) => {
    if (name === "phase names" || PHASES.includes(name)) return phaseCurve(name, phases, low, high);
    if (!curves[name]) return {};
    const sizes = positions.map((where) => curves[name][where]);
    const told = name === "allocated" ? positions.map((where) => described(data, where)) : undefined;
    return { x: events, y: sizes.map((size) => size / data.scale), customdata: told };
  });
  // Values that a curve lacks stay unchanged.
  await Plotly.restyle(element, Object.fromEntries(
    ["x", "y", "customdata", "text"].map((key) => [key, found.map((curve) => curve[key])])));
  note.textContent = resolution(data, events, low, high);
}
