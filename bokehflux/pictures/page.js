const at = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const bounded = value => Math.min(Math.max(value, 0), 1);
const scenes = JSON.parse(at("data").textContent);
const views = all("[name=view]").map(radio => radio.value);
const sees = scenes.some(each => each.lens)
  && Boolean(document.createElement("canvas").getContext("webgl2")?.getExtension("EXT_color_buffer_float"));

// What is shown. `shot` and `other` count the scene's pictures; the pivot, if any, is the last of them.
const now = { scene: 0, shot: 0, other: 0, view: "level", times: 4, split: .5, actual: false, x: .5, y: .5,
  keys: true, through: 15, focus: null, shape: null };
let scene, pictures, lens;

function set(change) {
  Object.assign(now, change);
  draw();
}

function draw() {
  const shot = scene.shots[now.shot], other = pictures[now.other], { view } = now;
  const compares = ["beside", "wipe", "difference"].includes(view), first = view === "other" ? other : shot;
  at("main").className = now.actual ? `${view} actual` : view;
  put(at("under"), first);
  at("second").hidden = !compares;
  if (compares) put(at("over"), other);
  const [left, right] = all(".chip");
  left.textContent = shot.label; right.textContent = other.label;

  const title = compares ? `${shot.label} against ${other.label}` : first.label;
  const looks = view === "lens";
  at("now").textContent = looks ? `bokeh ${rounded(now.through)} through the lens` : view === "difference" ? `${title}, difference times ${now.times}` : title;
  at("measured").textContent = looks ? "" : compares ? `sharpness ${shot.sharpness.toFixed(2)}, ${other.sharpness.toFixed(2)}`
    : `sharpness ${first.sharpness.toFixed(2)}`;
  dial(looks);
  at("level").value = looks ? now.through : shot.level;
  at("level").setAttribute("aria-valuetext", looks ? at("now").textContent : shot.label);
  at("lens").hidden = at("through").hidden = !looks;
  at("play").hidden = looks;
  at("against").hidden = looks || pictures.length < 2;
  if (looks) glance();
  for (const radio of all("[name=view]")) radio.checked = radio.value === view;
  at("other").value = now.other;
  at("other-label").textContent = other.label[0].toUpperCase() + other.label.slice(1);
  at("times").value = now.times;
  at("amplified").hidden = view !== "difference";
  at("actual").setAttribute("aria-pressed", now.actual);
  at("keys").checked = now.keys;
  // A browser saves nothing from one file to another; it can show where the picture is.
  const isFile = location.protocol === "file:" && !first.src.startsWith("data:");
  Object.assign(at("save"), { href: first.src, download: first.file, target: isFile ? "_blank" : "",
    textContent: isFile ? "Open its file" : "Save this picture" });
  if (looks) Object.assign(at("save"), { href: "#", target: "", textContent: "Save this picture",
    download: `lens-${rounded(now.through)}.png` });
  for (const [i, dot] of all(".dot").entries()) {
    dot.classList.toggle("now", i === now.shot);
    dot.classList.toggle("other", compares && i === now.other);
  }
  for (const tick of at("ticks").children) tick.classList.toggle("now", Number(tick.dataset.index) === now.shot);

  at("handle").hidden = view !== "wipe";
  const percent = Math.round(100 * now.split);
  at("handle").setAttribute("aria-valuenow", percent);
  at("handle").setAttribute("aria-valuetext", `${percent} % ${shot.label}, ${100 - percent} % ${other.label}`);
  at("main").style.setProperty("--split", now.split);
  // |a - b| * times, exactly: brightness() multiplies.
  at("stage").style.filter = view === "difference" ? `brightness(${now.times})` : "";
  fit();
  preload();
  remember();
}

// The level's ends: those of the pictures, or all that there are through a lens.
function dial(looks) {
  const levels = scene.shots.map(shot => shot.level), [min, max] = looks ? [0, 30] : [Math.min(...levels), Math.max(...levels)];
  Object.assign(at("level"), { min, max });
  at("transport").hidden = !looks && levels.length < 2;
}
const rounded = level => Math.round(10 * level) / 10;

// What the lens shows; the first time it takes a moment.
let asked = 0;
async function glance() {
  const { lens: data } = scene, number = ++asked;
  if (lens?.data !== data) {
    lens ??= new Lens(at("through"));
    await lens.load(data);
    if (number !== asked) return;
  }
  if (!(now.shape in data.shapes)) now.shape = Object.keys(data.shapes)[0];
  at("shape").replaceChildren(...Object.keys(data.shapes).map(name => new Option(name, name, false, name === now.shape)));
  lens.render(now.through, now.focus ?? lens.own, now.shape);
  at("depth").value = lens.share(now.focus ?? lens.own);
  at("own").setAttribute("aria-pressed", now.focus === null);
  at("through").setAttribute("aria-label", `${scene.prompt}: ${at("now").textContent}`);
  const sharp = now.focus === null ? "" : ` --focus ${now.point || rounded(10 * lens.share(now.focus)) / 10}`;
  at("asked").textContent = `--bokeh-targets ${rounded(now.through)}${sharp} --aperture ${now.shape}`;
}

function put(image, shot) {
  if (image.getAttribute("src") !== shot.src) image.src = shot.src;
  image.alt = `${scene.prompt}: ${shot.label}`;
}

// The size of the pictures on the stage.
function fit() {
  const [width, height] = scene.size, { style } = at("main"), dots = devicePixelRatio;
  style.setProperty("--ratio", width / height);
  style.setProperty("--x", now.x); style.setProperty("--y", now.y);
  for (const [name, size] of [["--w", width], ["--h", height]])
    if (now.actual) style.setProperty(name, `${size / dots}px`); else style.removeProperty(name);
  if (now.actual) at("stage").tabIndex = 0; else at("stage").removeAttribute("tabindex");
  // Enlarged pixels stay sharp: smoothing would look like blur.
  const { clientWidth, clientHeight } = at("under");
  const scale = dots * Math.min(clientWidth / width, clientHeight / height);
  for (const image of [at("under"), at("over")]) image.style.imageRendering = scale >= 1 ? "pixelated" : "auto";
}

// The neighbours are loaded before they are asked for.
let ahead = [];
function preload() {
  ahead = [-1, 1, 2].map(step => scene.shots[now.shot + step]).filter(Boolean).map(shot => {
    const image = new Image(); image.src = shot.src; return image; });
}

// The address keeps what is shown, so that a link or a reload shows the same. Browsers limit how often it may be set.
let writing;
function remember() {
  clearTimeout(writing);
  writing = setTimeout(() => {
    const level = now.view === "lens" ? rounded(now.through) : scene.shots[now.shot].level;
    const where = new URLSearchParams({ scene: now.scene + 1, level, view: now.view });
    if (!["level", "lens"].includes(now.view)) where.set("with", sought(now.other));
    if (now.view === "difference") where.set("times", now.times);
    if (!now.keys) where.set("keys", "off");
    history.replaceState(null, "", "#" + where);
  }, 200);
}
const sought = number => number < scene.shots.length ? scene.shots[number].level : "pivot";

function recall() {
  const where = new URLSearchParams(location.hash.slice(1));
  const number = Number(where.get("scene")) - 1, times = Number(where.get("times"));
  choose(scenes[number] ? number : 0);
  const shot = nearest(where.get("level")), view = where.get("view"), other = where.get("with");
  const can = view === "lens" ? !at("has-lens").hidden : pictures.length > 1 && views.includes(view);
  if (view === "lens") now.through = 30 * bounded(Number(where.get("level")) / 30 || 0);
  set({ shot, keys: where.get("keys") !== "off", view: can ? view : "level",
    times: [...at("times").options].some(each => Number(each.text) === times) ? times : 4,
    other: other === null || other === "pivot" ? now.other : nearest(other) });
}

// The number of the picture whose level is nearest; the one that is shown, if several are.
function nearest(level) {
  const far = i => Math.abs(scene.shots[i].level - (Number(level) || 0));
  return scene.shots.reduce((best, _, i) => far(i) < far(best) ? i : best, now.shot);
}

function choose(number) {
  const level = scene?.shots[now.shot].level;
  scene = scenes[number];
  pictures = scene.pivot ? [...scene.shots, scene.pivot] : scene.shots;
  Object.assign(now, { scene: number, shot: 0, other: pictures.length - 1, focus: null, shape: null });
  at("has-lens").hidden = !scene.lens || !sees;
  if (now.view === "lens" && at("has-lens").hidden) now.view = "level";
  now.shot = nearest(level);
  if (pictures.length < 2 && now.view !== "lens") now.view = "level";
  at("scene").value = number;
  at("prompt").textContent = scene.prompt;
  at("made").textContent = scene.footer;
  dial(now.view === "lens");
  at("views").hidden = pictures.length < 2 && at("has-lens").hidden;
  at("other").replaceChildren(...pictures.map((shot, i) => new Option(shot.label, i)));
  at("curve").innerHTML = scene.curve;
  at("recipe").replaceChildren(...Object.entries(scene.recipe).flatMap(([key, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = key; dd.textContent = typeof value === "string" ? value : JSON.stringify(value);
    return [dt, dd]; }));
  fold(true);
  mark();
}

// A mark for every level where the slider has it; numbers where there is room, round ones first. Where the room does
// not do for all of one roundness, less round ones get none.
function mark() {
  const { min, max } = at("level"), room = at("ticks").clientWidth, span = max - min || 1;
  const place = level => (level - min) / span;
  const tick = (level, index) => {
    const mark = document.createElement("span");
    mark.textContent = level; mark.dataset.index = index; mark.style.left = `${100 * place(level)}%`;
    return mark;
  };
  const marks = scene.shots.map((shot, i) => tick(shot.level, i));
  at("ticks").replaceChildren(...marks);
  const rough = ({ level }, i) => i === 0 || i === marks.length - 1 ? 0
    : 1 + [10, 5, 2, 1, .5].findIndex(step => level % step === 0) || 9;
  const order = scene.shots.map((shot, i) => [rough(shot, i), i]).sort(([a, i], [b, j]) => a - b || i - j);
  const widths = marks.map(mark => mark.offsetWidth), taken = [];
  let finest = Infinity;
  for (const [roughness, i] of order) {
    const middle = place(scene.shots[i].level) * room, half = widths[i] / 2;
    const inside = Math.min(Math.max(middle, half - 12), room + 12 - half);
    const [left, right] = [inside - half, inside + half];
    marks[i].style.setProperty("--shift", `${inside - middle}px`);
    const free = roughness <= finest && taken.every(([from, to]) => right + 6 <= from || to + 6 <= left);
    if (free) taken.push([left, right]); else marks[i].classList.add("unlabelled");
    if (!free) finest = Math.min(finest, roughness);
  }
  const anchor = scene.pivot ? place(scene.pivot.level) : -1;
  if (0 <= anchor && anchor <= 1) {
    const mark = tick(scene.pivot.level, -1);
    mark.className = "anchor unlabelled";
    at("ticks").append(mark);
  }
}

function fold(folded) {
  at("prompt").classList.add("folded");
  const long = at("prompt").scrollHeight > at("prompt").clientHeight + 1;
  at("prompt").classList.toggle("folded", folded);
  at("unfold").hidden = !long;
  at("unfold").setAttribute("aria-expanded", !folded);
  at("unfold").textContent = folded ? "Show the whole prompt" : "Fold the prompt";
  if (folded) at("main").style.setProperty("--above", `${at("stage").getBoundingClientRect().top + scrollY}px`);
}

// Up and down through the levels, each once its picture is there.
let timer = 0, way = 1;
function play(on) {
  clearTimeout(timer);
  timer = on ? setTimeout(advance) : 0;
  at("play").setAttribute("aria-pressed", on);
  at("now").setAttribute("aria-live", on ? "off" : "polite");
}
async function advance() {
  const started = timer, { length } = scene.shots;
  if (length < 2) return play(false);
  if (!scene.shots[now.shot + way]) way = -way;
  set({ shot: now.shot + way, view: now.view === "other" ? "level" : now.view });
  await at("under").decode().catch(() => {});
  if (timer === started) timer = setTimeout(advance, Math.min(400, Math.max(60, 5000 / length)));
}
function go(shot) {
  play(false);
  if (now.view === "lens") return set({ through: 30 * bounded((now.through + Math.sign(shot - now.shot) / 2) / 30) });
  set({ shot: Math.min(Math.max(shot, 0), scene.shots.length - 1) });
}
function show(view) {
  if (view === "lens" ? !at("has-lens").hidden : pictures.length > 1) { play(false); set({ view }); }
}
function toggleFull() {
  if (document.fullscreenElement) document.exitFullscreen(); else at("figure").requestFullscreen();
}

// Dragging moves the wipe; at 1:1 it moves the picture, and the wipe by its handle.
let drag, from;
const pull = {
  wipe: event => {
    const { left, width } = at("stage").getBoundingClientRect();
    set({ split: bounded((event.clientX - left) / width) });
  },
  pan: event => {
    pan(event.clientX - from[0], event.clientY - from[1]);
    from = [event.clientX, event.clientY];
  },
};
function pan(right, down) {
  const { clientWidth, clientHeight } = at("under").parentElement;
  const moved = (part, by, hidden) => hidden > 0 ? bounded(part - by / hidden) : .5;
  set({ x: moved(now.x, right, at("under").offsetWidth - clientWidth),
    y: moved(now.y, down, at("under").offsetHeight - clientHeight) });
}
at("stage").addEventListener("click", event => {
  if (now.view !== "lens" || now.actual || lens?.data !== scene.lens) return;
  const { left, top, width, height } = at("through").getBoundingClientRect(), [wide, high] = scene.size;
  const scale = Math.min(width / wide, height / high);
  const x = Math.floor((event.clientX - left - (width - wide * scale) / 2) / scale);
  const y = Math.floor((event.clientY - top - (height - high * scale) / 2) / scale);
  if (x >= 0 && y >= 0 && x < wide && y < high) set({ focus: lens.at(x, y), point: `${x},${y}` });
});
at("stage").addEventListener("pointerdown", event => {
  drag = now.actual && event.target !== at("handle") ? pull.pan : now.view === "wipe" ? pull.wipe : null;
  if (!drag || event.button) return;
  from = [event.clientX, event.clientY];
  at("stage").setPointerCapture(event.pointerId);
  drag(event);
});
at("stage").addEventListener("pointermove", event => {
  if (at("stage").hasPointerCapture(event.pointerId)) drag(event);
});

const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
at("stage").addEventListener("keydown", event => {
  const [right, down] = arrows[event.key] || [];
  if (right === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === at("handle")) set({ split: bounded(now.split + .02 * (right - down)) });
  else if (now.actual) pan(-40 * right, -40 * down);
  else return;
  event.preventDefault();
  event.stopPropagation();
});
at("level").addEventListener("keydown", event => {
  const far = Math.ceil(scene.shots.length / 10);
  const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  go(now.shot + step);
  event.preventDefault();
});
const keys = { l: () => show("level"), p: () => show("other"), s: () => show("beside"), w: () => show("wipe"),
  d: () => show("difference"), x: () => show("lens"), 1: () => set({ actual: !now.actual }), f: toggleFull };
document.addEventListener("keydown", event => {
  if (!now.keys || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const step = arrows[event.key]?.[0];
  const busy = event.target.closest(step ? "input, [role=slider]" : "button, input, summary");
  if (step && !busy) go(now.shot + step);
  else if (event.key === " " && !busy) play(!timer);
  else return keys[event.key.toLowerCase()]?.();
  event.preventDefault();
});

at("level").addEventListener("input", () => now.view === "lens" ? set({ through: Number(at("level").value) })
  : go(nearest(at("level").value)));
at("depth").addEventListener("input", () =>
  lens?.data === scene.lens && set({ focus: lens.grey(Number(at("depth").value)), point: null }));
at("shape").addEventListener("change", () => set({ shape: at("shape").value }));
at("own").addEventListener("click", () => set({ focus: null }));
at("save").addEventListener("click", () => { if (now.view === "lens") at("save").href = at("through").toDataURL(); });
at("curve").addEventListener("click", event => {
  const far = dot => {
    const { left, right } = dot.getBoundingClientRect();
    return Math.abs(event.clientX - (left + right) / 2);
  };
  go(Number(all(".dot").reduce((best, dot) => far(dot) < far(best) ? dot : best).dataset.index));
});
at("scene").addEventListener("change", () => { choose(Number(at("scene").value)); draw(); });
at("views").addEventListener("change", event => show(event.target.value));
at("other").addEventListener("change", () => set({ other: Number(at("other").value) }));
at("times").addEventListener("change", () => set({ times: Number(at("times").value) }));
at("keys").addEventListener("change", () => set({ keys: at("keys").checked }));
at("actual").addEventListener("click", keys[1]);
at("full").addEventListener("click", toggleFull);
at("full").hidden = !document.fullscreenEnabled;
document.addEventListener("fullscreenchange", () =>
  at("full").setAttribute("aria-pressed", document.fullscreenElement !== null));
at("play").addEventListener("click", () => play(!timer));
at("unfold").addEventListener("click", () => fold(!at("prompt").classList.contains("folded")));
for (const image of [at("under"), at("over")]) {
  image.addEventListener("load", () => at("lost").hidden = true);
  image.addEventListener("error", () => {
    const file = decodeURI(image.getAttribute("src"));
    at("lost").textContent = `${file} cannot be shown: expected in a folder beside this page.`;
    at("lost").hidden = false;
  });
}
new ResizeObserver(fit).observe(at("stage"));
new ResizeObserver(() => { mark(); draw(); fold(at("prompt").classList.contains("folded")); }).observe(at("dial"));
addEventListener("hashchange", recall);

scenes.forEach((each, i) => at("scene").add(new Option(
  `${i + 1}: ${each.prompt.slice(0, 60)} (seed ${each.recipe.seed})`, i)));
at("scenes").hidden = scenes.length < 2;
recall();
