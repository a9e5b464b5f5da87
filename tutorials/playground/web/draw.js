"use strict";
// Points that a visitor draws, and the worker that learns them.

const SPACING = 0.045, FEWEST = 24, MOST = 256, SIGMA = 0.07, SECONDS = 20, KEEP = [0.01, 0.03, 0.1, 0.3]; // snapshots, as the toy keeps
const polar = (n, curve) => Array.from({ length: n }, (_, i) => curve((i + 0.5) / n));
const PRESETS = {
  moons: () => polar(160, r => (r < 0.5 ? [Math.cos(2 * Math.PI * r) - 0.5, Math.sin(2 * Math.PI * r) - 0.25]
    : [0.5 - Math.cos(2 * Math.PI * (r - 0.5)), 0.25 - Math.sin(2 * Math.PI * (r - 0.5))])),
  spiral: () => polar(220, r => [Math.sqrt(r) * Math.cos(3 * Math.PI * Math.sqrt(r)), Math.sqrt(r) * Math.sin(3 * Math.PI * Math.sqrt(r))]),
  heart: () => polar(200, r => 2 * Math.PI * r).map(a => [16 * Math.sin(a) ** 3,
    13 * Math.cos(a) - 5 * Math.cos(2 * a) - 2 * Math.cos(3 * a) - Math.cos(4 * a)]),
};

const pad = {
  points: [], // [x, y] each, as drawn
  last: null, worker: null, learning: false, dots: noise,

  add({ x, y }) { // a stroke's next place: points at equal distances on the way there
    const from = this.last ?? [x, y], pieces = Math.max(1, Math.floor(Math.hypot(x - from[0], y - from[1]) / SPACING));
    if (this.last && Math.hypot(x - from[0], y - from[1]) < SPACING) return;
    this.stop();
    if (data !== original) this.use(original); // drawing starts from an empty sheet
    for (let i = 1; i <= pieces; i++) this.points.push([from[0] + (x - from[0]) * i / pieces, from[1] + (y - from[1]) * i / pieces]);
    this.last = [x, y];
    this.tell("");
  },

  lift() {
    this.last = null;
  },

  replace(points) { // by a preset, scaled to the picture when standardised
    this.stop();
    this.points = points;
    this.tell("");
  },

  letters(text) {
    const width = 240, height = 90, pen = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    Object.assign(pen, { font: "700 84px system-ui, sans-serif", textAlign: "center", textBaseline: "middle" });
    pen.fillText(text, width / 2, height / 2, width);
    const { data: pixels } = pen.getImageData(0, 0, width, height), random = makeRandom(5), dark = [];
    for (let i = 0; i < width * height; i++) if (pixels[4 * i + 3] > 128) dark.push([i % width, -Math.floor(i / width)]);
    return dark.length ? Array.from({ length: MOST }, () => dark[Math.floor(random.uniform() * dark.length)]) : [];
  },

  // At most 256 points, of mean 0 and, with the Gaussians around them, variance 1 on the axis where they are wider and at
  // least 0.36 on the other; nothing if they are too few or too close
  standardised() {
    const n = Math.min(MOST, this.points.length), kept = Array.from({ length: n }, (_, i) => this.points[Math.floor((i + 0.5) * this.points.length / n)]);
    const mean = [0, 1].map(j => kept.reduce((sum, p) => sum + p[j], 0) / n);
    const deviation = [0, 1].map(j => Math.sqrt(kept.reduce((sum, p) => sum + (p[j] - mean[j]) ** 2, 0) / n)), most = Math.max(...deviation);
    if (n < FEWEST || most < 0.05) return undefined;
    const scale = deviation.map(d => Math.sqrt(1 - SIGMA ** 2) / Math.max(d, 0.6 * most));
    return Float64Array.from(kept.flatMap(p => [0, 1].map(j => scale[j] * (p[j] - mean[j]))));
  },

  learn(points = this.standardised()) {
    if (!points) return this.tell("A few more points, please.");
    this.stop();
    const centres = Float64Array.from({ length: points.length / 2 * 3 }, (_, i) => (i % 3 < 2 ? points[Math.floor(i / 3) * 2 + i % 3] : 0));
    const own = { name: "TVM, learned here", help: "Learned in this page, from the points that were drawn.", learns_jumps: true, steps: 1, snapshots: [] };
    this.fresh = makeData(new Mixture(centres, SIGMA), [own], points);
    Object.assign(this, { learning: true, dots: noise, points: Array.from({ length: points.length / 2 }, (_, i) => [...points.subarray(2 * i, 2 * i + 2)]) });
    const code = ["network", "learn-code"].map(id => $(id).textContent), url = URL.createObjectURL(new Blob(code));
    this.worker = new Worker(url);
    this.worker.onerror = ({ message }) => this.tell(`This browser cannot learn here: ${message}`);
    this.worker.onmessage = ({ data: report }) => this.receive(report, own);
    this.worker.postMessage({ points, sigma: SIGMA, seconds: SECONDS });
    this.tell("warming up");
    return undefined;
  },

  receive(report, own) {
    const { step, steps, spent, terms, weights } = report, model = new Model(new Network(weights, WIDTH, DEPTH), true), kept = own.snapshots;
    const due = steps < Infinity ? [1, ...KEEP.map(share => share * steps)].filter(at => step >= at).length : 1;
    if (due > kept.length - 1) kept.push({ step, model }); // the last is always the newest
    else kept[kept.length - 1] = { step, model };
    own.steps = Number.isFinite(steps) ? steps : step;
    if (data !== this.fresh) this.use(this.fresh);
    this.model = model;
    this.learning = step !== steps;
    this.tell(this.learning ? `${spent.toFixed(0)} s, ${Math.round(step / spent)} steps a second; loss ${digits(terms[0])} + ${digits(terms[1])}`
      : `Learned in ${spent.toFixed(0)} s and ${step} steps. The whole page shows your points now: scroll up, or explore.`);
    $("progress").hidden = !this.learning;
    $("progress").value = step / steps;
    showControls();
  },

  use(chosen) {
    data = chosen;
    Object.assign(state, { run: 0, back: 0, x: FIRST.x, y: FIRST.y, t: 1, s: 0 });
    showControls();
  },

  stop() {
    this.worker?.terminate();
    this.learning = false;
  },

  shot() { // single jumps of the network as it is, which the dots approach in a few frames
    const { points, fresh } = this, trained = data !== original && data === fresh && this.model;
    if (!trained) return { t: 1, s: 1, dots: noise, faint: 0.25, marks: points, calls: [points.length, points.length === 1 ? "point" : "points"] };
    const goal = remember("drawn", this.model, () => this.model.jump(noise, 1, 0));
    this.dots = this.learning ? mix(this.dots, goal, 0.25) : goal;
    const { step, model } = data.runs[0].snapshots.at(-1);
    return { t: 1, s: 0, dots: model === this.model ? this.dots : goal, marks: points, calls: [step, `of ${data.runs[0].steps} steps; every dot is one jump`] };
  },

  hint() {
    return state.view === "draw" && !this.points.length ? "draw here" : "";
  },

  tell(text) {
    $("status").textContent = text;
    $("learn").textContent = this.learning ? "stop" : "learn";
    $("original").hidden = data === original;
    ask();
  },

  encode: points => btoa(String.fromCharCode(...points.map(v => clamp(Math.round(128 + 127 * v / 3), 0, 255)))).replace(/\+/g, "-").replace(/\//g, "_"),

  load(text) {
    let bytes;
    try {
      bytes = [...atob(text.replace(/-/g, "+").replace(/_/g, "/"))].map(c => 3 * (c.charCodeAt(0) - 128) / 127);
    } catch {
      return this.tell("The points in this page's address are damaged.");
    }
    this.points = Array.from({ length: bytes.length >> 1 }, (_, i) => [bytes[2 * i], bytes[2 * i + 1]]);
    return this.learn();
  },

  connect() {
    $("presets").addEventListener("click", ({ target }) => {
      const { preset } = target.dataset;
      if (!preset) return;
      this.replace(preset === "letters" ? this.letters($("letters").value) : PRESETS[preset]());
      this.learn();
    });
    $("letters").addEventListener("keydown", ({ key }) => key === "Enter" && document.querySelector("[data-preset=letters]").click());
    $("learn").addEventListener("click", () => {
      if (!this.learning) return this.learn();
      this.stop();
      return this.tell("Stopped.");
    });
    $("clear").addEventListener("click", () => {
      this.replace([]);
      this.use(original);
      this.tell("");
    });
    $("original").addEventListener("click", () => $("clear").click());
  },
};

pad.connect();
connect();
document.body.dataset.view = state.view;
showControls();
findActive();
pad.tell("");
readAddress();
