"use strict";
// The loop that draws, the story as one scrolls, and everything that is touched.

const NFE = [1, 2, 4, 8, 16, 32], KEY_MOVE = 0.08, BLEND = 600, FADE = 0.4, SWEEP = 4; // ms; seconds
const picture = new Picture($("canvas"), noise), sections = [...document.querySelectorAll("section")];
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, clock = playing ? 0 : VIEWS.steps.still, last = 0, asked = false, sweeping = false;
let shown = noise, blend = { from: noise, since: -BLEND }, active = sections[0], shot;

function ask() { // at most one frame at a time
  if (!asked) requestAnimationFrame(frame);
  asked = true;
}

function frame(now) {
  asked = false;
  const passed = Math.min(0.1, (now - last) / 1000), { cloud } = data, view = VIEWS[state.view];
  last = now;
  if (playing) clock += passed;
  if (sweeping) sweep(passed);
  for (const end = performance.now() + 8; !cloud.solved && performance.now() < end;) cloud.advance();
  const seconds = view.length ? clock % view.length : 0;
  shot = view.shot(seconds);
  const share = ease((now - blend.since) / BLEND);
  shown = share < 1 ? mix(blend.from, shot.dots, share) : shot.dots;
  const loop = view.length && playing ? Math.min(clock > view.length ? ease(seconds / FADE) : 1, ease((view.length - seconds) / FADE)) : 1;
  render(shot, share, loop);
  showRail(shot.t, shot.s);
  if (cloud.solved && share === 1) document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1; // for tests
  if (view.length && playing || share < 1 || sweeping || !cloud.solved || pad.learning) ask();
}

function render({ dots, s, t, curves, lines, ghosts, point, calls, miss, faint = 1, marks }, share, loop) {
  picture.clear();
  picture.density(data.mixture, s);
  if (ghosts) picture.dots(ghosts, 1.3, 0.45 * loop);
  if (curves) picture.tails(curves, { alpha: 0.34 * share * loop });
  if (lines) picture.tails(lines, { alpha: 0.6 * share * loop, dashes: [0.5, 3.5] });
  if (marks) picture.marks(marks, s === 0);
  picture.dots(shown, 2.3, faint * loop);
  if (point) picture.follow(point);
  $("calls").firstElementChild.textContent = calls[0];
  $("calls").lastElementChild.textContent = calls[1];
  $("miss").textContent = miss ? `off the exact flow by ${digits(miss.rms)}` : "";
  $("error").textContent = miss
    ? `Distance to the exact flow: root mean square ${digits(miss.rms)}, median ${digits(miss.median)} (single points decide the first).`
    : state.how === "exact" ? "What the others aim at." : "solving the exact flow";
  $("hint").textContent = state.view === "explore" && state.x === FIRST.x && state.y === FIRST.y ? "drag the ring" : pad.hint();
}

function show(view) { // a part of the story, whose motion starts anew
  if (view === state.view) return;
  state.view = document.body.dataset.view = view;
  blend = { from: shown, since: performance.now() };
  clock = playing ? 0 : VIEWS[view].still ?? 0;
  sweeping = false;
  showControls();
  ask();
}

function set(changes) { // of the part that explores
  const before = state.t;
  show("explore");
  Object.assign(state, changes);
  if ("s" in changes) state.t = Math.max(state.t, state.s); // one handle pushes the other
  else state.s = Math.min(state.s, state.t);
  if (state.t !== before) [state.x, state.y] = data.mixture.path(state.x, state.y, before, state.t).at(-1); // along the flow
  [state.x, state.y] = [state.x, state.y].map(v => clamp(v, -EXTENT, EXTENT));
  showControls(); // at once: the next key moves a handle from where it stands
  ask();
}

function sweep(passed) { // s from t to 0
  set({ s: Math.max(0, state.s - state.t * passed / SWEEP) });
  sweeping = state.s > 0;
  showPlay();
}

// Controls

function showPlay() {
  const moves = state.view === "explore" ? sweeping : playing;
  $("play").setAttribute("aria-label", moves ? "Pause" : "Play");
  $("play").disabled = state.view === "draw";
}

function showRail(t, s) {
  for (const [name, time] of [["t", t], ["s", s]]) {
    const share = 1 - time, text = `${name} = ${time.toFixed(2)}`;
    if ($(name + "-label").textContent !== text) {
      $(name).value = 100 * share;
      $(name).setAttribute("aria-valuetext", text);
      $(name + "-label").textContent = text;
      $(name + "-label").style.left = `clamp(30px, calc(14px + (100% - 28px) * ${share}), calc(100% - 30px))`;
    }
    $(name).style.zIndex = (name === "t") === t < 0.5 ? 2 : 1; // at an end, the handle that can move is on top
  }
  document.querySelector(".noise").style.visibility = s > 0.8 ? "hidden" : ""; // a handle's label takes its place
  document.querySelector(".data").style.visibility = t < 0.2 ? "hidden" : "";
  Object.assign($("span").style, { left: `${100 * (1 - t)}%`, width: `${100 * (t - s)}%` });
}

function showControls() {
  const shots = run().snapshots, place = shots.indexOf(snapshot());
  if ($("runs").dataset.names !== data.runs.map(({ name }) => name).join()) {
    $("runs").dataset.names = data.runs.map(({ name }) => name).join();
    $("runs").replaceChildren(...data.runs.map(({ name }, i) => {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "run", value: i });
      label.append(input, name);
      return label;
    }));
  }
  document.querySelector(`[name=run][value="${state.run}"]`).checked = true;
  document.querySelector(`[name=how][value="${state.how}"]`).checked = true;
  $("run-help").textContent = run().help;
  Object.assign($("snapshot"), { max: shots.length - 1, value: place, disabled: shots.length === 1 });
  $("snapshot-label").textContent = `${shots[place].step} of ${run().steps}`;
  Object.assign($("steps"), { value: NFE.indexOf(state.steps), disabled: state.how === "exact" });
  $("steps-label").textContent = state.how === "exact" ? "–" : state.steps;
  showPlay();
  if (state.view === "explore") showNumbers();
  keepAddress();
}

function showNumbers() {
  const { read } = VIEWS.explore.shot(), pair = a => `(${digits(a[0], 2)}, ${digits(a[1], 2)})`;
  $("df").textContent = pair(read.rate);
  $("u").textContent = pair(read.velocity);
  $("loss").textContent = digits(lossOf(read), 4);
  $("off").textContent = digits(Math.hypot(read.landing[0] - read.exact[0], read.landing[1] - read.exact[1]));
}

// The address: what differs from the start, and points that were drawn
let writing;
function keepAddress() {
  writing ??= setTimeout(() => { // browsers refuse more than a few changes a second
    writing = undefined;
    const kept = new URLSearchParams(), names = state.view === "explore" ? Object.keys(FIRST) : ["view"];
    for (const name of names) {
      if (state[name] !== FIRST[name]) kept.set(name, typeof state[name] === "number" ? +state[name].toFixed(3) : state[name]);
    }
    if (data.points) kept.set("points", pad.encode(data.points));
    history.replaceState(null, "", `#${kept}`);
  }, 300);
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1)), sane = { how: ["jump", "euler", "exact"], steps: NFE, run: data.runs.map((_, i) => i) };
  for (const [name, text] of given) {
    const value = typeof FIRST[name] === "number" ? Number(text) : text;
    if (name in FIRST && name !== "view" && !Number.isNaN(value) && (sane[name]?.includes(value) ?? true)) state[name] = value;
  }
  for (const name of ["t", "s"]) state[name] = clamp(state[name]);
  state.s = Math.min(state.s, state.t);
  [state.x, state.y] = [state.x, state.y].map(v => clamp(v, -EXTENT, EXTENT));
  if (given.has("points")) pad.load(given.get("points"));
  const section = sections.find(({ dataset }) => dataset.view === given.get("view"));
  if (section) {
    section.scrollIntoView({ behavior: "instant" });
    show(section.dataset.view);
  }
}

// Events

function connectCanvas(canvas) {
  const place = ({ clientX, clientY }, box = canvas.getBoundingClientRect()) => ({
    x: EXTENT * (2 * (clientX - box.left) / box.width - 1), y: EXTENT * (1 - 2 * (clientY - box.top) / box.height) });
  const near = (touch, { x, y } = place(touch)) => // the ring, where a finger drags; elsewhere it scrolls the page
    shot.point && Math.hypot(x - shot.point.start[0], y - shot.point.start[1]) * canvas.clientWidth / (2 * EXTENT) < 40;
  const move = event => (state.view === "draw" ? pad.add(place(event)) : set({ t: shot.t, s: shot.s, ...place(event) }));
  canvas.addEventListener("touchstart", event => near(event.touches[0]) && event.preventDefault(), { passive: false });
  let dragging = false;
  canvas.addEventListener("pointerdown", event => {
    dragging = state.view === "draw" || near(event);
    if (!dragging) return;
    canvas.setPointerCapture(event.pointerId);
    pad.lift();
    move(event);
  });
  canvas.addEventListener("pointermove", event => {
    if (dragging) (event.getCoalescedEvents?.() ?? [event]).forEach(move);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { dragging = false; });
  canvas.addEventListener("click", event => state.view === "explore" && move(event));
  canvas.addEventListener("keydown", event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step || state.view === "draw") return;
    event.preventDefault();
    set({ x: state.x + KEY_MOVE * step[0], y: state.y + KEY_MOVE * step[1] });
  });
}

function findActive() { // the section that one reads: it begins above a line in the part of the window that has text
  const top = getComputedStyle(document.body).display === "grid" ? 0 : $("stage").getBoundingClientRect().bottom;
  const line = top + 0.6 * (innerHeight - top), found = sections.findLast(section => section.getBoundingClientRect().top < line) ?? sections[0];
  sections.forEach(section => section.classList.toggle("active", section === found));
  if (found !== active) show((active = found).dataset.view);
  $("next").disabled = active === sections.at(-1);
}

function connect() {
  const on = (id, type, change) => $(id).addEventListener(type, ({ target }) => {
    sweeping = false;
    set(change(target));
  });
  on("t", "input", ({ value }) => ({ t: 1 - value / 100, s: Math.min(shot.s, 1 - value / 100) }));
  on("s", "input", ({ value }) => ({ t: Math.max(shot.t, 1 - value / 100), s: 1 - value / 100 }));
  on("snapshot", "input", ({ value }) => ({ back: run().snapshots.length - 1 - value }));
  on("steps", "input", ({ value }) => ({ steps: NFE[value] }));
  on("runs", "change", ({ value }) => ({ run: Number(value) }));
  on("how", "change", ({ value }) => ({ how: value }));
  $("play").addEventListener("click", () => {
    if (state.view !== "explore") playing = !playing;
    else if ((sweeping = !sweeping) && state.s === 0) set({ s: state.t });
    showPlay();
    ask();
  });
  $("next").addEventListener("click", () => sections[sections.indexOf(active) + 1]?.scrollIntoView());
  connectCanvas($("canvas"));
  addEventListener("scroll", findActive, { passive: true });
  new ResizeObserver(() => { findActive(); ask(); }).observe($("frame"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { picture.readColours(); ask(); });
}
