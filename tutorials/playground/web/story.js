"use strict";
// What the picture shows in each part of the story, as a function of seconds: a "shot". DATA is what page.py wrote.

const STEPS = 40; // of the flow in the first part
const noise = Float64Array.from(decode(DATA.noise));
const clamp = (a, low = 0, high = 1) => Math.min(high, Math.max(low, a));
const ease = a => clamp(a) ** 2 * (3 - 2 * clamp(a));
const mix = (a, b, share) => a.map((v, i) => v + share * (b[i] - v));
const digits = (v, n = 3) => v.toFixed(n).replace("-", "−");
const meanSquare = (a, b) => a.reduce((sum, v, i) => sum + (v - b[i]) ** 2, 0) / a.length;

// Data, their exact flow, and the networks that learned them. A run's snapshots are [{ step, model }]
const makeData = (mixture, runs, points) => ({ mixture, runs, points, cloud: new ExactCloud(mixture, noise), memo: {} });
const original = makeData(new Mixture(decode(DATA.centres), DATA.sigma), DATA.runs.map(run => ({
  ...run, snapshots: run.snapshots.map(({ step, weights }) => (
    { step, model: new Model(new Network(decode(DATA.weights[weights]), run.width, run.depth), run.learns_jumps) })),
})));
let data = original;

// The view; t and s; the run, and how many snapshots before its end; how noise is carried, in how many steps; the point
// that is followed, at time t
const FIRST = { view: "steps", t: 1, s: 0, run: 0, back: 0, how: "jump", steps: 1, x: DATA.start[0], y: DATA.start[1] };
const state = { ...FIRST };

const run = () => data.runs[state.run];
const snapshot = () => run().snapshots[Math.max(0, run().snapshots.length - 1 - state.back)];
const storyRun = () => data.runs.find(({ learns_jumps }) => learns_jumps) ?? data.runs[0]; // that the story shows

function remember(name, key, compute) { // the last result under a name, as long as its key stays
  if (data.memo[name]?.key !== key) data.memo[name] = { key, value: compute() };
  return data.memo[name].value;
}

// One point's jump, the velocity of its landing and the model's there
function follow(model, start, t, s) {
  const x = Float64Array.from(start), landing = model.jump(x, t, s);
  return { start, landing, rate: model.terminalVelocity(x, t, s), velocity: model.velocity(landing, s) };
}
const lossOf = ({ rate, velocity }) => meanSquare(rate, velocity); // eq. 12, first term

// The weights and the start, of some, from which the two arrows differ most but stay in the picture
function widestGap(snapshots) {
  const few = noise.slice(0, 128), s = 0.35, candidates = snapshots.flatMap(({ step, model }) => {
    const landing = model.jump(few, 1, s), rate = model.terminalVelocity(few, 1, s), velocity = model.velocity(landing, s);
    return Array.from({ length: few.length / 2 }, (_, i) => {
      const [start, r, u] = [few, rate, velocity].map(a => [...a.subarray(2 * i, 2 * i + 2)]);
      return { step, model, start, gap: Math.hypot(...start) < 2 && Math.max(Math.hypot(...r), Math.hypot(...u)) < 2 ? meanSquare(r, u) : 0 };
    });
  });
  return candidates.reduce((a, b) => (b.gap > a.gap ? b : a));
}

// (t, s) at some seconds, and between them
const MOVES = [[0, 1, 1], [0.6, 1, 1], [3.4, 1, 0], [4.2, 1, 0], [5.8, 0.6, 0], [7.2, 0.6, 0.4], [8.6, 0.9, 0.4], [10, 0.9, 0], [11, 0.9, 0]];
function timesAt(seconds) {
  const i = Math.max(1, MOVES.findIndex(([at]) => at >= seconds)), [from, to] = [MOVES[i - 1], MOVES[i]];
  return mix(from, to, ease((seconds - from[0]) / (to[0] - from[0]))).slice(1);
}

// Each: seconds until it repeats (none: it stands still), the second that is shown without motion, and the shot
const VIEWS = {
  steps: { length: 8, still: 4, shot(seconds) {
    const part = clamp((seconds - 0.5) / 5.5), s = Math.max(1 - part, data.cloud.reached), count = Math.round((1 - s) * STEPS);
    return { t: 1, s, dots: data.cloud.at(s), curves: data.cloud.path(1, s), calls: [count, count === 1 ? "small step" : "small steps"] };
  } },

  jump: { length: 5, still: 3, shot(seconds) {
    const landing = remember("landing", storyRun(), () => storyRun().snapshots.at(-1).model.jump(noise, 1, 0));
    const fly = ease((seconds - 0.8) / 0.7), dots = mix(noise, landing, fly);
    return { t: 1, s: 1 - fly, dots, lines: [noise, dots], calls: fly ? [1, "call"] : [0, "calls"] };
  } },

  times: { length: 11, still: 6.8, shot(seconds) {
    const [t, s] = timesAt(seconds), start = data.cloud.at(t), dots = storyRun().snapshots.at(-1).model.jump(start, t, s);
    return { t, s, dots, ghosts: start, lines: [start, dots], calls: [1, "call"] };
  } },

  arrows: { length: 8, still: 3, shot(seconds) {
    const t = 1, s = 0.45 + 0.35 * Math.cos(2 * Math.PI * seconds / 8), { snapshots } = storyRun();
    const { step, model, start } = remember("gap", snapshots, () => widestGap(snapshots));
    const point = follow(model, start, t, s);
    return { t, s, dots: model.jump(noise, t, s), faint: 0.4, point, calls: [digits(lossOf(point)), `loss at this point, step ${step}`] };
  } },

  training: { length: 10, still: 9, shot(seconds) {
    const { snapshots, steps } = storyRun(), hold = 6.6 / snapshots.length, k = Math.min(snapshots.length - 1, Math.floor(seconds / hold));
    const clouds = remember("training", snapshots.length + storyRun().name, () => []);
    const landing = i => clouds[i] ??= snapshots[i].model.jump(noise, 1, 0);
    const dots = mix(landing(Math.max(0, k - 1)), landing(k), ease((seconds - k * hold) / 0.5));
    return { t: 1, s: 0, dots, lines: [noise, dots], calls: [snapshots[k].step, `of ${steps} training steps`] };
  } },

  draw: { shot: () => pad.shot() },

  explore: { shot: () => remember("explore", JSON.stringify([state, data.cloud.solved, snapshot().step]), exploreShot) },
};

function exploreShot() {
  const { t, s, how, steps, x, y } = state, { model } = snapshot(), start = data.cloud.at(t), exact = data.cloud.at(s);
  const euler = how === "euler" || !model.learnsJumps, truth = data.mixture.path(x, y, t, s);
  const path = how === "exact" ? [start, exact] : model.path(start, t, s, steps, euler), dots = path.at(-1);
  const point = { ...follow(model, [x, y], t, s), exact: truth.at(-1) }, read = { ...point };
  if (how === "exact") point.way = truth;
  else if (steps > 1 || how === "euler") point.way = model.path(Float64Array.from([x, y]), t, s, steps, euler);
  const calls = how === "exact" ? ["exact", "flow, solved finely"] : [steps, steps === 1 ? "call" : "calls"];
  const miss = how === "exact" || !data.cloud.solved ? undefined : errors(dots, exact);
  return { t, s, dots, calls, point, read, miss, ghosts: t < 1 && how !== "exact" ? start : undefined,
    curves: how === "exact" ? data.cloud.path(t, s) : undefined, lines: how === "exact" ? undefined : path };
}
