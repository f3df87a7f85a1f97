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

async function start() {
  const [source] = await Promise.all([unpack(document.getElementById("plotly").textContent), painted()]);
  startPlotly(source);
  let drawing = Promise.resolve();
  const watch = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watch.unobserve(target);
      drawing = drawing.then(() => draw(target));
    }
    drawing.then(shown);
  }, { rootMargin: "400px 0px" });
  for (const element of document.querySelectorAll(".figure")) watch.observe(element);
}

start();
