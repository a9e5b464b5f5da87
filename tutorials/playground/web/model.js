"use strict";
// The trained network and the exact flow, computed as network.py, flow_map.py and mixture.py of tvm_ref compute them.
// Times run from 1 (noise) to 0 (data); clouds are flat arrays [x, y, x, y, ...].

const FREQUENCIES = 4, FOURIER_FEATURES = 16; // as in network.py
const POINT_FEATURES = 2 + 2 * FOURIER_FEATURES, INPUTS = POINT_FEATURES + 4 * FREQUENCIES;

const decode = base64 => new Float32Array(Uint8Array.from(atob(base64), c => c.charCodeAt(0)).buffer);
const std = t => Math.hypot(1 - t, t);

// c(t, s) and dc/ds: c x is the average velocity over [s, t] if the data are N(0, I)
function gaussianAverageVelocity(t, s) {
  const total = std(s) + std(t), scale = 2 / (std(t) * total), c = scale * (s + t - 1);
  return [c, scale - c * (2 * s - 1) / (std(s) * total)];
}

// GELU v Phi(v) in place of v, and its tangent. Phi by Abramowitz and Stegun 7.1.26, whose error is below 1e-7
function gelu(a, da) {
  for (let i = 0; i < a.length; i++) {
    const v = a[i], k = 1 / (1 + 0.3275911 * Math.abs(v) * Math.SQRT1_2), bell = Math.exp(-v * v / 2);
    const tail = 0.5 * bell * k * (0.254829592
      + k * (-0.284496736 + k * (1.421413741 + k * (-1.453152027 + k * 1.061405429))));
    const phi = v > 0 ? 1 - tail : tail;
    a[i] = v * phi;
    da[i] *= phi + v * bell / Math.sqrt(2 * Math.PI);
  }
}

// W h, added to `out`
function addProduct({ W, columns }, h, out) {
  for (let i = 0; i < out.length; i++) {
    let sum = 0;
    for (let j = 0, k = i * columns; j < h.length; j++, k++) sum += W[k] * h[j];
    out[i] += sum;
  }
}

// F(x, t, s) = c(t, s) x + (2 - s - t) MLP(x / std(t), t, t - s): network.py
class Network {
  constructor(weights, width, depth) {
    const sizes = [INPUTS, ...Array(depth).fill(width), 2];
    let start = 0;
    const take = n => weights.subarray(start, start += n);
    this.projection = take(2 * FOURIER_FEATURES);
    this.layers = sizes.slice(1).map((rows, i) => ({ columns: sizes[i], W: take(rows * sizes[i]), bias: take(rows) }));
    this.values = [POINT_FEATURES, ...sizes.slice(1)].map(n => new Float64Array(n)); // of each layer's inputs
    this.rates = this.values.map(a => new Float64Array(a.length)); // and d/ds of them
  }

  // The function (x, y) -> F and, with `tangent`, dF/ds: 4 numbers. What times alone decide is computed once
  at(t, s, tangent = false) {
    const { layers, projection, values, rates } = this, [c, dc] = gaussianAverageVelocity(t, s), fade = 2 - s - t;
    const timeBias = Float64Array.from(layers[0].bias), timeRate = new Float64Array(timeBias.length);
    for (let k = 0; k < FREQUENCIES; k++) {
      const w = Math.PI * (k + 1), g = w * (t - s);
      const features = [Math.sin(w * t), Math.cos(w * t), Math.sin(g), Math.cos(g)];
      const dfeatures = [0, 0, -w * Math.cos(g), w * Math.sin(g)];
      for (let i = 0; i < timeBias.length; i++) {
        for (let j = 0; j < 4; j++) {
          const weight = layers[0].W[i * INPUTS + POINT_FEATURES + j * FREQUENCIES + k];
          timeBias[i] += weight * features[j];
          timeRate[i] += weight * dfeatures[j];
        }
      }
    }
    return (x, y) => {
      const a = values[0];
      a[0] = x / std(t);
      a[1] = y / std(t);
      for (let k = 0; k < FOURIER_FEATURES; k++) {
        const angle = a[0] * projection[k] + a[1] * projection[FOURIER_FEATURES + k];
        a[2 + k] = Math.sin(angle);
        a[2 + FOURIER_FEATURES + k] = Math.cos(angle);
      }
      layers.forEach((layer, i) => {
        if (i) gelu(values[i], rates[i]);
        values[i + 1].set(i ? layer.bias : timeBias);
        addProduct(layer, values[i], values[i + 1]);
        if (tangent && i === 0) rates[1].set(timeRate);
        if (tangent && i > 0) addProduct(layer, rates[i], rates[i + 1].fill(0));
      });
      const [u, v] = values.at(-1), [du, dv] = rates.at(-1);
      return [c * x + fade * u, c * y + fade * v, dc * x - u + fade * du, dc * y - v + fade * dv];
    };
  }
}

// A model as it is sampled: f(x, t, s) = (s - t) F(x, t, s), or one Euler step where training taught no jumps
class Model {
  constructor(network, learnsJumps) {
    Object.assign(this, { network, learnsJumps });
  }

  velocity(t) { // (x, y) -> u = F(x, t, t)
    return this.network.at(t, t);
  }

  jump(t, s, tangent) { // (x, y) -> x + f and, with `tangent`, d/ds f = F + (s - t) dF/ds (eq. 17): 4 numbers
    const F = this.network.at(t, this.learnsJumps ? s : t, tangent), h = s - t, turn = this.learnsJumps ? h : 0;
    return (x, y) => {
      const [u, v, du, dv] = F(x, y);
      return [x + h * u, y + h * v, u + turn * du, v + turn * dv];
    };
  }
}

// Data sum_k w_k N(m_k, sigma^2 I), given as [x, y, log w] each, and their exact flow
class Mixture {
  constructor(centres, sigma) {
    Object.assign(this, { centres, sigma, c: 0.7 * sigma, logits: new Float64Array(centres.length / 3) });
  }

  variance(t) {
    return (1 - t) ** 2 * this.sigma ** 2 + t * t;
  }

  velocity(x, y, t) { // u(x, t) = E[x1 - x0 | x_t = x]
    const { centres, logits } = this, k = 1 - t, variance = this.variance(t);
    let top = -Infinity, sum = 0, mx = 0, my = 0;
    for (let i = 0; i < logits.length; i++) {
      const dx = x - k * centres[3 * i], dy = y - k * centres[3 * i + 1];
      logits[i] = centres[3 * i + 2] - (dx * dx + dy * dy) / (2 * variance);
      if (logits[i] > top) top = logits[i];
    }
    for (let i = 0; i < logits.length; i++) {
      if (logits[i] < top - 40) continue; // below every digit
      const p = Math.exp(logits[i] - top);
      sum += p;
      mx += p * centres[3 * i];
      my += p * centres[3 * i + 1];
    }
    const a = (t - k * this.sigma ** 2) / variance;
    return [a * (x - k * mx / sum) - mx / sum, a * (y - k * my / sum) - my / sum];
  }

  slope(x, y, z) { // dx/dz = u(x, c sinh z) c cosh z, time = c sinh z: fine steps near 0, where u changes fast
    const rate = this.c * Math.cosh(z), time = Math.min(1, Math.max(0, this.c * Math.sinh(z)));
    return this.velocity(x, y, time).map(u => rate * u);
  }

  step(x, y, z, h) { // one RK4 step in z: the state after it, and the slope before it
    const a = this.slope(x, y, z), b = this.slope(x + h / 2 * a[0], y + h / 2 * a[1], z + h / 2);
    const c = this.slope(x + h / 2 * b[0], y + h / 2 * b[1], z + h / 2);
    const d = this.slope(x + h * c[0], y + h * c[1], z + h);
    return [[x, y].map((v, i) => v + h / 6 * (a[i] + 2 * b[i] + 2 * c[i] + d[i])), a];
  }

  path(x, y, t, s, steps = 64) { // the states psi(x, t, .) from t to s
    const z = Math.asinh(t / this.c), h = (Math.asinh(s / this.c) - z) / steps, path = [[x, y]];
    for (let i = 0; i < steps; i++) path.push(this.step(...path[i], z + i * h, h)[0]);
    return path;
  }
}

// The exact flow of a fixed cloud of noise, solved once and then read off at any time
class ExactCloud {
  constructor(mixture, noise, steps = 40) {
    const top = Math.asinh(1 / mixture.c);
    Object.assign(this, { mixture, steps, top, h: -top / steps, states: [Float64Array.from(noise)], slopes: [] });
  }

  time(k) { // of a state
    return Math.min(1, Math.max(0, this.mixture.c * Math.sinh(this.top + k * this.h)));
  }

  *solve() { // step by step, so that a page can show something between; yields the share that is done
    for (let k = 0; k <= this.steps; k++) {
      const now = this.states[k], next = new Float64Array(now.length), slopes = new Float64Array(now.length);
      for (let i = 0; i < now.length; i += 2) {
        const [state, slope] = this.mixture.step(now[i], now[i + 1], this.top + k * this.h, this.h);
        next.set(state, i);
        slopes.set(slope, i);
      }
      this.slopes.push(slopes);
      this.states.push(next);
      yield k / this.steps;
    }
  }

  at(time) { // cubic Hermite interpolation in z
    const k = (Math.asinh(time / this.mixture.c) - this.top) / this.h, i = Math.min(this.steps - 1, Math.floor(k));
    const r = k - i, q = 1 - r, [a, b] = this.states.slice(i, i + 2), [da, db] = this.slopes.slice(i, i + 2);
    return a.map((v, j) => q * q * (1 + 2 * r) * v + r * r * (1 + 2 * q) * b[j]
      + r * q * this.h * (q * da[j] - r * db[j]));
  }
}

// Move every point of a cloud by a function (x, y) -> [x, y, ...]
function moved(cloud, move) {
  const result = new Float64Array(cloud.length);
  for (let i = 0; i < cloud.length; i += 2) [result[i], result[i + 1]] = move(cloud[i], cloud[i + 1]);
  return result;
}

// Distances between two clouds of the same noise: root mean square, and median (as torch has it, the lower middle)
function errors(cloud, exact) {
  const distances = new Float64Array(cloud.length / 2)
    .map((_, i) => Math.hypot(cloud[2 * i] - exact[2 * i], cloud[2 * i + 1] - exact[2 * i + 1])).sort();
  const meanSquare = distances.reduce((sum, d) => sum + d * d, 0) / distances.length;
  return { rms: Math.sqrt(meanSquare), median: distances[(distances.length - 1) >> 1] };
}
