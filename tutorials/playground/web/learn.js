"use strict";
// Terminal Velocity Matching (arXiv 2511.19797, algorithm 1) for points that a visitor draws: what tvm_ref/objectives/tvm.py
// and tvm_ref/toy/training.py do, with Adam. Runs in a worker of the page, with network.js.

const BATCH = 64, WIDTH = 64, DEPTH = 3, RATE = 1e-2, WARMUP = 50, CLIP = 1, DECAY = 0.99;

// Normal numbers from a seed: mulberry32, and Box and Muller's transform
function makeRandom(seed) {
  const uniform = () => {
    seed = seed + 0x6d2b79f5 | 0;
    let a = Math.imul(seed ^ seed >>> 15, seed | 1);
    a ^= a + Math.imul(a ^ a >>> 7, a | 61);
    return ((a ^ a >>> 14) >>> 0) / 2 ** 32;
  };
  return { uniform, normal: () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()) };
}

// gap* (sec. 7.3): g = t - s and s are logit-normal, s truncated to s <= 1 - g (here by rejection), s' drawn on its own
function drawTimes(random) {
  const logitNormal = mean => 1 / (1 + Math.exp(-mean - random.normal())), g = logitNormal(-0.8);
  let s = logitNormal(-0.4);
  while (s > 1 - g) s = logitNormal(-0.4);
  return [s + g, s, logitNormal(-0.4)];
}

// Eq. 12: the mean of both terms over a batch, and its gradient in the network's weights. `target` is frozen
function tvmLoss(network, target, { x0, x1, t, s, sPrime }, gradient) {
  const n = t.length, between = time => x0.map((a, i) => (1 - time[i >> 1]) * a + time[i >> 1] * x1[i]);
  const xt = between(t), points = new Float64Array(4 * n), starts = new Float64Array(2 * n), ends = new Float64Array(2 * n);
  points.set(xt); // both terms in one pass: jumps from t to s with their derivatives, then velocities at s'
  points.set(between(sPrime), 2 * n);
  starts.set(t);
  starts.set(sPrime, n);
  ends.set(s);
  ends.set(sPrime, n);
  const { F, dF } = network.forward(points, starts, ends, n);
  // u* where the jump lands, x_t + sg f: no gradient goes through it
  const u = target.forward(xt.map((a, i) => a + (s[i >> 1] - t[i >> 1]) * F[i]), s, s).F;
  const gF = new Float64Array(4 * n), gdF = new Float64Array(2 * n);
  let terminal = 0, boundary = 0;
  for (let i = 0; i < 2 * n; i++) {
    const h = s[i >> 1] - t[i >> 1], gap = h === 0 ? 0 : F[i] + h * dF[i] - u[i]; // d/ds f - u* (eq. 17 and 8)
    const miss = F[2 * n + i] - (x1[i] - x0[i]); // flow matching at s' (eq. 1)
    terminal += gap * gap / (2 * n); // two numbers to a point, n points
    boundary += miss * miss / (2 * n);
    gF[i] = gap / n;
    gdF[i] = h * gap / n;
    gF[2 * n + i] = miss / n;
  }
  network.backward(gF, gdF, gradient);
  return [terminal, boundary];
}

// A training on points [x, y, ...], each with a Gaussian of width sigma around it
class Learner {
  constructor(points, sigma, steps, seed = 1, width = WIDTH, depth = DEPTH) {
    const random = makeRandom(seed), sizes = layerSizes(width, depth), weights = new Float64Array(countWeights(sizes));
    for (let i = 0; i < PROJECTION; i++) weights[i] = random.normal();
    for (let l = 1, i = PROJECTION; l < sizes.length - 1; l++) { // as PyTorch starts; the last layer stays zero
      const bound = 1 / Math.sqrt(sizes[l - 1]);
      for (const end = i + sizes[l] * (sizes[l - 1] + 1); i < end; i++) weights[i] = bound * (2 * random.uniform() - 1);
    }
    Object.assign(this, { points, sigma, steps, random, step: 0, weights, average: weights.slice() });
    this.network = new Network(weights, width, depth);
    this.target = new Network(this.average, width, depth); // follows by EMA; it is sampled, too
    [this.gradient, this.first, this.second] = [0, 1, 2].map(() => new Float64Array(weights.length));
  }

  batch(n = BATCH) {
    const { points, sigma, random } = this, times = [0, 1, 2].map(() => new Float64Array(n));
    const x0 = new Float64Array(2 * n), x1 = new Float64Array(2 * n);
    for (let i = 0; i < n; i++) {
      const k = Math.floor((i + random.uniform()) / n * points.length / 2); // one of each n-th part of them
      for (const j of [0, 1]) {
        x0[2 * i + j] = points[2 * k + j] + sigma * random.normal();
        x1[2 * i + j] = random.normal();
      }
      drawTimes(random).forEach((time, j) => { times[j][i] = time; });
    }
    return { x0, x1, t: times[0], s: times[1], sPrime: times[2] };
  }

  learn() { // one step; returns the two terms of the loss
    const { weights, average, gradient, first, second } = this, terms = tvmLoss(this.network, this.target, this.batch(), gradient);
    const clip = Math.min(1, CLIP / Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0))), step = ++this.step;
    const rate = RATE * Math.min(1, step / WARMUP) * 0.5 * (1 + Math.cos(Math.PI * Math.min(1, step / (this.steps + 1))));
    for (let i = PROJECTION; i < weights.length; i++) { // Adam
      const g = clip * gradient[i];
      first[i] += 0.1 * (g - first[i]);
      second[i] += 0.01 * (g * g - second[i]);
      weights[i] -= rate * first[i] / (1 - 0.9 ** step) / (Math.sqrt(second[i] / (1 - 0.99 ** step)) + 1e-8);
      average[i] += (1 - DECAY) * (weights[i] - average[i]);
    }
    return terms;
  }
}

// In a worker: learn the points that the page sends, in about `seconds`, and report ten times a second
const LIMITS = [1000, 4000], TRIAL = 40; // steps at least and at most; steps after which the speed is known
if (typeof importScripts === "function") {
  onmessage = ({ data: { points, sigma, seconds } }) => {
    const learner = new Learner(points, sigma, Infinity), begun = performance.now();
    let told = begun, terms = [0, 0], since = 0;
    while (learner.step < learner.steps) {
      terms = learner.learn().map((term, i) => term + terms[i]);
      since++;
      const now = performance.now(), spent = (now - begun) / 1000, { step } = learner;
      if (step === TRIAL) learner.steps = Math.round(Math.min(LIMITS[1], Math.max(LIMITS[0], seconds * TRIAL / spent)));
      if (now - told < 100 && step !== 1 && step !== learner.steps) continue;
      postMessage({ step, steps: learner.steps, spent, terms: terms.map(term => term / since), weights: learner.average.slice() });
      [told, terms, since] = [now, [0, 0], 0];
    }
  };
}
