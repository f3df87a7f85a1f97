// Starts the page: unpacks Plotly, then draws each figure when it comes into sight.

function startPlotly(source) {
  const script = document.createElement("script");
  script.textContent = source;
  document.head.append(script);
}

async function draw(element) {
  try {
    if (element.classList.contains("timeline")) await drawTimeline(element);
    else if (element.classList.contains("areas")) {
      element.dataset.inSight = "true";
      await element.drawAreas?.();
    } else await drawPlain(element);
    element.removeAttribute("data-figure");
  } catch (error) {
    element.textContent = `This browser cannot draw this figure (${error}). It needs a browser of 2023 or later.`;
    throw error;
  }
}

// Everything in sight is drawn.
function shown() {
  if (document.body.dataset.drawn) return;
  performance.mark("drawn");
  document.body.dataset.drawn = "true";
}

// The still pictures are on the screen; a page in the background shows none.
async function painted() {
  if (!document.hidden) await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
  performance.mark("painted");
}

function idle() {
  return new Promise((next) => (window.requestIdleCallback ?? setTimeout)(next));
}

async function start() {
  const [source] = await Promise.all([unpack(document.getElementById("plotly").textContent), painted()]);
  startPlotly(source);
  const waiting = new Set(document.querySelectorAll(".figure"));
  let drawing = Promise.resolve();
  const drawNext = (element) => {
    watch.unobserve(element);
    if (waiting.delete(element)) drawing = drawing.then(() => draw(element));
  };
  const watch = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) drawNext(target);
    drawing.then(shown).then(drawOthers);
  }, { rootMargin: "400px 0px" });
  for (const element of waiting) watch.observe(element);

  // Figures out of sight are drawn in spare time, since a browser does not wait for figures when it prints.
  async function drawOthers() {
    for (const element of waiting) {
      await idle();
      drawNext(element);
      await drawing;
    }
    document.body.dataset.complete = "true";
  }
}

start();
