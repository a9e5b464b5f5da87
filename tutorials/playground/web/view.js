// What is seen and touched. DATA is what page.py wrote; model.js computes.

const EXTENT = 2.7; // half width of the pictures; data and noise have variance 1
const EULER_STEPS = [1, 2, 4, 8, 16, 32], ARROW = 0.6, KEY_MOVE = 0.08, CURVE = 32, SWEEP = 4000; // ms
const $ = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
const pause = () => new Promise(resolve => setTimeout(resolve)); // lets the browser draw and listen
const digits = (v, n = 3) => v.toFixed(n).replace("-", "−");

const mixture = new Mixture(decode(DATA.centres), DATA.sigma), noise = decode(DATA.noise), points = noise.length;
const models = DATA.runs.map(run => run.snapshots.map(({ weights }) =>
  new Model(new Network(decode(DATA.weights[weights]), run.width, run.depth), run.learns_jumps)));
const lines = gridOverNoise(0.6, 6), cloud = new ExactCloud(mixture, [...noise, ...lines.flat()]);
// t and s; the run, and how many snapshots before its end; Euler's steps; the point that is followed, at time t
const state = { t: 1, s: 0, run: 0, back: 0, steps: 4, grid: true, x: DATA.start[0], y: DATA.start[1] };
let solved = false, asked = false, sweeping = 0;

const snapshot = () => Math.max(0, models[state.run].length - 1 - state.back);
const model = () => models[state.run][snapshot()];
const cloudAt = time => // the grid follows the points; before the flow is solved, only the noise is known
  (solved ? cloud.at(time) : cloud.states[0]).subarray(0, state.grid ? undefined : points);

function gridOverNoise(cell, parts) { // lines [x, y, x, y, ...] of a square grid, `parts` pieces to a cell
  const n = Math.floor(EXTENT / cell), across = Array.from({ length: 2 * n + 1 }, (_, i) => (i - n) * cell);
  const along = Array.from({ length: 2 * n * parts + 1 }, (_, i) => (i / parts - n) * cell);
  return [...across.map(a => along.flatMap(b => [a, b])), ...across.map(a => along.flatMap(b => [b, a]))];
}

// Drawing ----------------------------------------------------------------------------------------------------------

class Picture {
  constructor(id) {
    this.figure = $(id);
    this.canvas = this.figure.querySelector("canvas");
    this.pen = this.canvas.getContext("2d");
  }

  draw(now, exact, path, evaluations) { // the cloud at time s, and one point's way from the ring to the filled dot
    this.figure.querySelector(".cost").textContent = evaluations;
    if (solved) {
      const { rms, median } = errors(now.subarray(0, points), exact.subarray(0, points));
      this.say(now === exact ? "what the others aim at" : `error ${digits(rms)}, median ${digits(median)}`);
    }
    this.cloud(now, state.s, solved ? exact : now);
    this.line(path, "page", 6);
    this.line(path, "start", 2.5);
    this.disc(path.at(-1), 6, "start");
    this.disc(path[0], 9, "start");
    this.disc(path[0], 5.5, "page");
  }

  say(text) {
    this.figure.querySelector(".error").textContent = text;
  }

  cloud(now, s, exact = now) { // points and grid at time s, and lines to where the exact flow puts the points
    this.mass(s);
    for (let i = points; i < now.length; i += lines[0].length) this.line(pairs(now, i, lines[0].length), "grid", 0.7);
    for (let i = 0; i < points; i += 2) this.line([...pairs(now, i, 2), ...pairs(exact, i, 2)], "error", 1);
    for (let i = 0; i < points; i += 2) this.disc([now[i], now[i + 1]], 2, "dot");
  }

  mass(s) { // clear, and show where the flow has its mass at time s: two standard deviations around every centre
    const size = this.canvas.clientWidth, dense = devicePixelRatio, { pen } = this, { centres } = mixture;
    this.canvas.width = this.canvas.height = Math.round(size * dense);
    this.pixel = 2 * EXTENT / size;
    pen.setTransform(dense / this.pixel, 0, 0, -dense / this.pixel, dense * size / 2, dense * size / 2);
    pen.lineCap = pen.lineJoin = "round";
    for (let i = 0; i < centres.length; i += 3) {
      this.disc([(1 - s) * centres[i], (1 - s) * centres[i + 1]], 2 * Math.sqrt(mixture.variance(s)) / this.pixel, "mass");
    }
  }

  line(path, name, width, dashes = []) {
    const { pen } = this;
    pen.setLineDash(dashes.map(a => a * this.pixel));
    pen.beginPath();
    path.forEach(([x, y]) => pen.lineTo(x, y));
    Object.assign(pen, { strokeStyle: colours[name], lineWidth: width * this.pixel });
    pen.stroke();
  }

  disc([x, y], radius, name) {
    this.pen.beginPath();
    this.pen.arc(x, y, radius * this.pixel, 0, 7);
    this.pen.fillStyle = colours[name];
    this.pen.fill();
  }

  arrow(x, y, u, v, name, width, dashes = []) { // a velocity, drawn towards data, as the jump goes: against time. Returns its tip
    const tip = [x - ARROW * u, y - ARROW * v], angle = Math.atan2(v, u);
    const head = Math.min(14 * this.pixel, ARROW * Math.hypot(u, v));
    const barb = turn => [tip[0] + head * Math.cos(angle + turn), tip[1] + head * Math.sin(angle + turn)];
    this.line([[x, y], tip], name, width, dashes);
    this.line([barb(0.5), tip, barb(-0.5)], name, width);
    return tip;
  }
}

const pairs = (a, start, count) => Array.from({ length: count / 2 }, (_, i) => [a[start + 2 * i], a[start + 2 * i + 1]]);
const pictures = { exact: new Picture("exact"), jump: new Picture("jump"), euler: new Picture("euler") };
const colours = {};
function readColours() {
  for (const name of ["page", "mass", "grid", "dot", "error", "df", "u", "start"]) colours[name] = colour(name);
}

function drawJump(exact) {
  const { t, s, x, y } = state, picture = pictures.jump;
  const [lx, ly, dx, dy] = model().jump(t, s, true)(x, y), [u, v] = model().velocity(s)(lx, ly); // eq. 12, first term
  const curve = Array.from({ length: CURVE + 1 }, (_, i) => model().jump(t, t + (s - t) * i / CURVE)(x, y));
  picture.draw(moved(cloudAt(t), model().jump(t, s)), exact, curve, "1 evaluation");
  for (const [a, b] of [[u, v], [dx, dy]]) picture.arrow(lx, ly, a, b, "page", 8); // a rim, seen above dots and lines
  const tips = [picture.arrow(lx, ly, u, v, "u", 5), picture.arrow(lx, ly, dx, dy, "df", 2, [7, 5])];
  picture.line(tips, "error", 3, [0, 5]);
  picture.disc([lx, ly], 6, "start");
  $("df").textContent = `(${digits(dx, 2)}, ${digits(dy, 2)})`;
  $("u").textContent = `(${digits(u, 2)}, ${digits(v, 2)})`;
  $("loss").textContent = $("gap").textContent = digits(((dx - u) ** 2 + (dy - v) ** 2) / 2, 4);
  const [ex, ey] = mixture.path(x, y, t, s).at(-1);
  $("off").textContent = digits(Math.hypot(lx - ex, ly - ey));
}

let eulerBusy = false, eulerStale = false;
async function drawEuler() { // these steps cost most: in pieces, and once more if something changed meanwhile
  eulerStale = true;
  if (eulerBusy) return;
  eulerBusy = true;
  while (eulerStale) {
    eulerStale = false;
    const { t, s, steps, x, y } = state, chosen = model(), path = [[x, y]], exact = cloudAt(s), h = (s - t) / steps;
    let now = cloudAt(t);
    for (let i = 0; i < steps; i++) {
      const velocity = chosen.velocity(t + i * h);
      const step = (px, py) => { const [u, v] = velocity(px, py); return [px + h * u, py + h * v]; };
      path.push(step(...path[i]));
      now = moved(now, step);
      await pause();
    }
    pictures.euler.draw(now, exact, path, `${steps} evaluation${steps > 1 ? "s" : ""}`);
  }
  eulerBusy = false;
  if (solved) document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1; // for tests: all three are up to date
}

function draw() { // at most once per frame
  if (asked || !solved) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    readColours();
    const exact = cloudAt(state.s);
    drawJump(exact);
    pictures.exact.draw(exact, exact, mixture.path(state.x, state.y, state.t, state.s), "solved finely");
    drawEuler();
  });
}

// Controls ---------------------------------------------------------------------------------------------------------

function showControls() {
  const run = DATA.runs[state.run];
  for (const name of ["t", "s"]) {
    const share = 1 - state[name], text = `${name} = ${state[name].toFixed(2)}`;
    $(name).value = 100 * share;
    $(name).setAttribute("aria-valuetext", text);
    $(name + "-label").textContent = text;
    $(name + "-label").style.left = `clamp(30px, calc(14px + (100% - 28px) * ${share}), calc(100% - 30px))`;
    $(name).style.zIndex = (name === "t") === state.t < 0.5 ? 2 : 1; // at an end, the handle that can move is on top
  }
  document.querySelector(".noise").style.visibility = state.s > 0.9 ? "hidden" : ""; // a handle's label takes its place
  document.querySelector(".data").style.visibility = state.t < 0.1 ? "hidden" : "";
  Object.assign($("span").style, { left: `${100 * (1 - state.t)}%`, width: `${100 * (state.t - state.s)}%` });
  $("jump-title").textContent = run.learns_jumps ? "One jump" : "One Euler step";
  $("run-help").textContent = run.help;
  document.querySelector(`[name=run][value="${state.run}"]`).checked = true;
  const last = models[state.run].length - 1;
  Object.assign($("snapshot"), { max: last, value: snapshot(), disabled: last === 0 });
  $("snapshot-label").textContent = `${run.snapshots[snapshot()].step} / ${run.steps}`;
  $("steps").value = EULER_STEPS.indexOf(state.steps);
  $("steps-label").textContent = state.steps;
  $("grid").checked = state.grid;
}

function set(changes) {
  const before = state.t, inside = v => Math.min(EXTENT, Math.max(-EXTENT, v));
  Object.assign(state, changes);
  if ("s" in changes) state.t = Math.max(state.t, state.s); // one handle pushes the other
  else state.s = Math.min(state.s, state.t);
  if (state.t !== before) [state.x, state.y] = mixture.path(state.x, state.y, before, state.t).at(-1); // along the flow
  [state.x, state.y] = [inside(state.x), inside(state.y)];
  showControls(); // at once: the next key moves a handle from where it stands
  draw();
}

function play() { // sweep s from t to 0, or stop doing so
  const begun = performance.now(), stop = sweeping || state.t === 0;
  const tick = now => {
    set({ s: state.t * Math.max(0, 1 - Math.max(0, now - begun) / SWEEP) });
    sweeping = state.s > 0 ? requestAnimationFrame(tick) : 0;
    $("play").textContent = sweeping ? "■ stop" : "▶ play";
  };
  cancelAnimationFrame(sweeping);
  sweeping = 0;
  $("play").textContent = "▶ play";
  if (!stop) tick(begun);
}

function connectCanvas(canvas) {
  const place = ({ clientX, clientY }, box = canvas.getBoundingClientRect()) => ({
    x: EXTENT * (2 * (clientX - box.left) / box.width - 1), y: EXTENT * (1 - 2 * (clientY - box.top) / box.height) });
  const near = (touch, { x, y } = place(touch)) => // the ring, where a finger drags; elsewhere it scrolls the page
    Math.hypot(x - state.x, y - state.y) * canvas.clientWidth / (2 * EXTENT) < 40;
  canvas.addEventListener("touchstart", event => near(event.touches[0]) && event.preventDefault(), { passive: false });
  let dragging = false;
  canvas.addEventListener("pointerdown", event => {
    dragging = event.pointerType === "mouse" || near(event);
    if (dragging) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => dragging && set(place(event)));
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { dragging = false; });
  canvas.addEventListener("click", event => set(place(event)));
  canvas.addEventListener("keydown", event => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    set({ x: state.x + KEY_MOVE * move[0], y: state.y + KEY_MOVE * move[1] });
  });
}

function connect() {
  const on = (id, type, change) => $(id).addEventListener(type, ({ target }) => {
    if (sweeping) play();
    set(change(target));
  });
  on("t", "input", ({ value }) => ({ t: 1 - value / 100 }));
  on("s", "input", ({ value }) => ({ s: 1 - value / 100 }));
  on("snapshot", "input", ({ value }) => ({ back: models[state.run].length - 1 - value }));
  on("steps", "input", ({ value }) => ({ steps: EULER_STEPS[value] }));
  on("grid", "change", ({ checked }) => ({ grid: checked }));
  on("runs", "change", ({ value }) => ({ run: Number(value) }));
  on("tries", "click", ({ dataset }) => JSON.parse(dataset.set || "{}"));
  $("play").addEventListener("click", play);
  Object.values(pictures).forEach(({ canvas }) => connectCanvas(canvas));
  new ResizeObserver(draw).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

async function begin() {
  connect();
  showControls();
  readColours();
  for (const picture of Object.values(pictures)) picture.cloud(cloudAt(1), 1); // noise, at once
  await pause();
  drawJump(cloudAt(1)); // what needs no exact flow, as t = 1 at first
  for (const share of cloud.solve()) { // the flow as far as it is solved: noise becoming data
    const k = cloud.states.length - 2;
    pictures.exact.cloud(cloud.states[k].subarray(0, cloudAt(1).length), cloud.time(k));
    pictures.exact.say(`solving: ${Math.round(100 * share)} %`);
    await pause();
  }
  solved = true;
  draw();
}
begin();
