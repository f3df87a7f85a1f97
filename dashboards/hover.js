// The box that describes the event under the pointer: beside the point, never over it, without categories of 0 bytes.

function hoverBox(element, scale) {
  const box = make("div", "", { className: "hoverbox", hidden: true });
  element.append(box);
  element.on("plotly_hover", ({ points }) => {
    const total = points.find(({ data }) => data.name === "allocated");
    if (!total) return;
    const [size, when, change, where] = total.customdata.split("<br>").map(plain);
    const rows = points.filter(({ data, y }) => data.name !== "allocated" && y > 0);
    const list = make("dl", "");
    for (const { data, y } of rows.reverse()) {
      const name = make("dt", "");
      name.append(swatch(data.name === "reserved" ? "muted" : data.name), data.name);
      list.append(name, make("dd", formatBytes(Math.round(y * scale))));
    }
    const lines = [`event ${count(total.x)} · ${when}`, `allocated ${size}`, change, where];
    box.replaceChildren(...lines.map((line) => make("p", line)), list);
    const { range } = element._fullLayout.xaxis;
    const isRight = (total.x - range[0]) / (range[1] - range[0]) > 0.5;
    box.className = `hoverbox ${isRight ? "left" : "right"}`;
    box.hidden = false;
  });
  element.on("plotly_unhover", () => (box.hidden = true));
}
