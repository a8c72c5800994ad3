const tip = document.getElementById("tip");
const back = document.getElementById("back");
const AROUND = 60, SHOWN = 200; // characters of a source in the tooltip
let shown = null; // the element that the tooltip describes
let leaving = 0; // timer that hides the tooltip, so that the pointer can move into it

// Texts and ranges

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** The characters start to stop (UTF-16) of an element's text. */
function rangeIn(root, start, stop) {
  const range = document.createRange();
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  let at = 0, begun = false;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const end = at + node.length;
    if (!begun && start < end) {
      range.setStart(node, start - at);
      begun = true;
    }
    if (begun && stop <= end) {
      range.setEnd(node, stop - at);
      break;
    }
    at = end;
  }
  return range;
}

/** A slice without halves of characters at its ends. */
function slice(text, start, stop) {
  return text.slice(start, stop).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "");
}

function shorten(text) {
  return text.length <= SHOWN ? text : `${slice(text, 0, SHOWN / 2)} [...] ${slice(text, -SHOWN / 2)}`;
}

// The tooltip

function excerpt(copy) {
  const quote = document.createElement("blockquote");
  const { at, start, stop, before, after } = copy.dataset;
  if (at) {
    const text = document.getElementById(at).textContent;
    quote.append(slice(text, Math.max(start - AROUND, 0), start), element("mark", shorten(slice(text, start, stop))));
    quote.append(slice(text, stop, Number(stop) + AROUND));
  } else if (before || after) {
    quote.append(before, element("mark", shorten(copy.textContent)), after);
  }
  return quote.childNodes.length ? [quote] : [];
}

function describeCopy(copy) {
  return [element("strong", copy.dataset.heading), element("p", copy.dataset.place), ...excerpt(copy)];
}

function describePass(pass) {
  const { number, drafted, accepted, wrote } = pass.dataset;
  const head = element("strong", `Pass ${number} of ${pass.parentElement.childElementCount}`);
  const said = element("p", `${drafted} drafted, ${accepted} accepted, ${wrote} written`);
  const range = rangeOfPass(pass);
  return range ? [head, said, element("blockquote", shorten(range.toString()))] : [head, said];
}

function show(target, x, y) {
  clearTimeout(leaving);
  if (shown && shown !== target) hide();
  shown = target;
  tip.replaceChildren(...(target.matches(".pass") ? describePass(target) : describeCopy(target)));
  tip.hidden = false;
  if (target.matches(".copy")) target.setAttribute("aria-describedby", "tip");
  putTip(x, y);
}

/** Under the line that the pointer is on, or under the whole of what has the focus; above it where there is no room. */
function putTip(x, y) {
  const lines = [...shown.getClientRects()];
  const pointed = lines.find((line) => y >= line.top && y <= line.bottom);
  const { top, left, bottom } = pointed ?? shown.getBoundingClientRect();
  const hasRoom = bottom + 8 + tip.offsetHeight <= innerHeight;
  tip.style.top = `${hasRoom ? bottom + 8 : Math.max(top - 8 - tip.offsetHeight, 4)}px`;
  tip.style.left = `${Math.max(8, Math.min(x ?? left, innerWidth - tip.offsetWidth - 12))}px`;
}

function hide() {
  clearTimeout(leaving);
  shown?.removeAttribute("aria-describedby");
  shown = null;
  tip.hidden = true;
  CSS.highlights.delete("pass");
}

// Forward passes

/** Draws the bars of an answer when they come into view; a long run has many thousands of them. */
function draw(strip) {
  const drafted = strip.dataset.drafted.split(" ").map(Number);
  const accepted = strip.dataset.accepted.split(" ").map(Number);
  const most = Math.log2(1 + Math.max(1, ...drafted));
  let left = Number(strip.dataset.tokens);
  strip.append(...drafted.map((length, i) => {
    const pass = document.createElement("span");
    const wrote = Math.min(accepted[i] + 1, left);
    left -= wrote;
    Object.assign(pass, { className: "pass", id: `${strip.dataset.answer}-${i + 1}` });
    Object.assign(pass.dataset, { number: i + 1, drafted: length, accepted: accepted[i], wrote });
    pass.setAttribute("role", "option");
    pass.setAttribute("aria-selected", "false");
    pass.setAttribute("aria-label", `pass ${i + 1}: ${length} drafted, ${accepted[i]} accepted, ${wrote} written`);
    const full = (100 * Math.log2(1 + length)) / most, filled = (full * accepted[i]) / Math.max(length, 1);
    for (const [name, height] of [["i", filled], ["u", full - filled]]) {
      const part = document.createElement(name);
      part.style.height = `${height}%`;
      if (height > 0) pass.append(part);
    }
    return pass;
  }));
}

function rangeOfPass(pass) {
  const { answer, ends } = pass.parentElement.dataset;
  if (!ends) return null;
  const all = ends.split(" ").map(Number), i = pass.dataset.number - 1;
  return rangeIn(document.getElementById(answer), i ? all[i - 1] : 0, all[i]);
}

function showPass(pass) {
  show(pass);
  const range = rangeOfPass(pass);
  if (range) CSS.highlights.set("pass", new Highlight(range));
}

function select(strip, pass) {
  strip.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  if (!pass) return;
  pass.setAttribute("aria-selected", "true");
  strip.setAttribute("aria-activedescendant", pass.id);
  showPass(pass);
}

const drawer = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    drawer.unobserve(target);
    draw(target);
  }
}, { rootMargin: "300px" });
document.querySelectorAll(".passes").forEach((strip) => drawer.observe(strip));

// Going to a source and back. The address says whose source is shown, so that the browser's own buttons work.

let jumped = null; // the copied span whose source is shown
const linkOfAddress = () => document.getElementById(location.hash.replace(/^#from-/, "")) ?? null;

function unfold(text) {
  for (let box = text.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  const button = text.parentElement.querySelector(".fold");
  if (button && text.classList.contains("folded")) toggle(button);
}

function bringUp(place) {
  const top = place.getClientRects()[0]?.top ?? 0;
  scrollBy({ top: top - innerHeight / 3, behavior: "instant" });
}

function visit(copy) {
  hide();
  jumped = copy;
  const { at, start, stop, place } = copy.dataset;
  const text = document.getElementById(at);
  unfold(text);
  const range = rangeIn(text, Number(start), Number(stop));
  CSS.highlights.set("source", new Highlight(range));
  text.focus({ preventScroll: true });
  bringUp(range);
  back.hidden = false;
  back.firstElementChild.textContent = `Source: ${place}`;
}

function leave() {
  const from = jumped;
  jumped = null;
  CSS.highlights.delete("source");
  back.hidden = true;
  unfold(from);
  from.focus({ preventScroll: true });
  bringUp(from);
}

function follow() {
  const copy = location.hash.startsWith("#from-") ? linkOfAddress() : null;
  if (copy?.dataset.at) visit(copy);
  else if (jumped) leave();
}

function goBack() {
  if (history.state > 0) history.back();
  else location.replace("#conversations");
}

let depth = history.state ?? 0; // jumps since the page was opened
history.replaceState(depth, "");
addEventListener("hashchange", () => {
  if (history.state === null) history.replaceState(depth + 1, "");
  depth = history.state;
  follow();
});
follow();

// Pointer, keyboard, buttons

function toggle(button) {
  const folded = document.getElementById(button.getAttribute("aria-controls")).classList.toggle("folded");
  button.dataset.all ??= button.textContent;
  button.textContent = folded ? button.dataset.all : "Show less";
  button.setAttribute("aria-expanded", String(!folded));
}

document.addEventListener("mouseover", (event) => {
  const target = event.target.closest("main .copy, .pass, #tip");
  if (!target) return;
  if (target === tip) clearTimeout(leaving);
  else if (target.matches(".pass")) showPass(target);
  else show(target, event.clientX, event.clientY);
});
document.addEventListener("mouseout", (event) => {
  if (shown && event.target.closest(".copy, .pass, #tip")) {
    clearTimeout(leaving);
    leaving = setTimeout(hide, 150);
  }
});
document.addEventListener("focusin", (event) => {
  if (event.target.matches("main .copy:focus-visible")) show(event.target);
  if (event.target.matches(".passes:focus-visible")) {
    if (!event.target.childElementCount) {
      drawer.unobserve(event.target);
      draw(event.target);
    }
    select(event.target, event.target.querySelector("[aria-selected=true]") ?? event.target.firstElementChild);
  }
});
document.addEventListener("focusout", (event) => {
  if (event.target.matches(".passes")) select(event.target, null);
  if (event.target.matches(".copy, .passes")) hide();
});
document.addEventListener("scroll", () => {
  if (shown?.matches(":focus, :focus *")) putTip(); // it was scrolled into view
  else if (shown) hide();
}, { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && shown) hide();
  else if (event.key === "Escape" && jumped) goBack();
  const strip = event.target.closest(".passes");
  const now = strip?.querySelector("[aria-selected=true]");
  const next = {
    ArrowRight: now?.nextElementSibling,
    ArrowLeft: now?.previousElementSibling,
    Home: strip?.firstElementChild,
    End: strip?.lastElementChild,
  };
  if (strip && event.key in next) {
    event.preventDefault();
    if (next[event.key]) select(strip, next[event.key]);
  }
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.copy");
  if (link && link.hash === location.hash) visit(link); // the address does not change
  if (event.target.matches(".fold")) toggle(event.target);
});
back.querySelector("button").addEventListener("click", goBack);

const theme = document.getElementById("theme");
const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const nameTheme = () => { theme.textContent = isDark() ? "Light theme" : "Dark theme"; };
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();
