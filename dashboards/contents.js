// The list of sections: links unfold their targets, and the section in sight is marked. Tables fade where they scroll.

// Unfolds a part and all parts around it.
function reveal(element) {
  for (let part = element?.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
}

function revealTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  reveal(target);
  target.scrollIntoView();
}

addEventListener("hashchange", revealTarget);
if (location.hash) revealTarget();

const links = new Map([...document.querySelectorAll(".contents nav a")].map((link) =>
  [document.getElementById(link.getAttribute("href").slice(1)), link]));

for (const [target, link] of links) link.addEventListener("click", () => reveal(target));

// The last target above the upper third of the window is the one in sight.
function markCurrent() {
  let current = null;
  for (const target of links.keys()) if (target.getBoundingClientRect().top < innerHeight / 3) current = target;
  for (const [target, link] of links) {
    const isCurrent = target === current;
    if (isCurrent === link.hasAttribute("aria-current")) continue;
    link.toggleAttribute("aria-current", isCurrent);
    if (isCurrent) {
      link.setAttribute("aria-current", "true");
      const bar = link.closest("nav");
      if (bar.scrollWidth > bar.clientWidth) bar.scrollTo({ left: link.offsetLeft - bar.clientWidth / 3 });
    }
  }
}

let asked = false;
addEventListener("scroll", () => {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    markCurrent();
  });
}, { passive: true });
markCurrent();

const unfoldAll = document.querySelector(".all");
unfoldAll.addEventListener("click", () => {
  const unfold = unfoldAll.getAttribute("aria-pressed") !== "true";
  unfoldAll.setAttribute("aria-pressed", String(unfold));
  unfoldAll.textContent = unfold ? "Fold all" : "Unfold all";
  for (const part of document.querySelectorAll("details.part")) part.open = unfold;
});

function fade(region) {
  region.classList.toggle("before", region.scrollLeft > 1);
  region.classList.toggle("after", region.scrollLeft + region.clientWidth < region.scrollWidth - 1);
}

const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) fade(target.closest(".scroll"));
});
for (const region of document.querySelectorAll(".scroll")) {
  region.addEventListener("scroll", () => fade(region), { passive: true });
  widths.observe(region);
  widths.observe(region.firstElementChild);
}
