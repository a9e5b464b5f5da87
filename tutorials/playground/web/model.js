"use strict";
// A model as it is sampled, and the exact flow: what tvm_ref's flow_map.py and toy/data/mixture.py compute.

const decode = base64 => new Float32Array(Uint8Array.from(atob(base64), c => c.charCodeAt(0)).buffer);
const constant = (n, value) => new Float64Array(n).fill(value);

// Jumps of f(x, t, s) = (s - t) F(x, t, s), or Euler steps where training taught no jumps
class Model {
  constructor(network, learnsJumps) {
    Object.assign(this, { network, learnsJumps });
  }

  velocity(x, t) { // u(x, t) = F(x, t, t)
    return this.network.forward(x, constant(x.length / 2, t), constant(x.length / 2, t)).F;
  }

  jump(x, t, s, euler = !this.learnsJumps) { // a cloud at time t to time s
    const n = x.length / 2, { F } = this.network.forward(x, constant(n, t), constant(n, euler ? t : s));
    return x.map((v, i) => v + (s - t) * F[i]);
  }

  terminalVelocity(x, t, s) { // d/ds f = F + (s - t) dF/ds (eq. 17)
    if (!this.learnsJumps) return this.velocity(x, t);
    const n = x.length / 2, { F, dF } = this.network.forward(x, constant(n, t), constant(n, s), n);
    return F.map((v, i) => v + (s - t) * dF[i]);
  }

  path(x, t, s, steps, euler) { // the clouds at the start and after each of equal steps
    const path = [x];
    for (let k = 0; k < steps; k++) path.push(this.jump(path[k], t + (s - t) * k / steps, t + (s - t) * (k + 1) / steps, euler));
    return path;
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

  // The density at time t on a grid of size x size over [-extent, extent]^2, from the top; up to a constant. A Gaussian
  // is a product of one in x and one in y, so that few exponentials will do
  density(t, size, extent) {
    const { centres } = this, grid = new Float64Array(size * size), precision = -0.5 / this.variance(t);
    const place = i => extent * ((2 * i + 1) / size - 1), across = new Float64Array(size);
    for (let k = 0; k < centres.length; k += 3) {
      const weight = Math.exp(centres[k + 2]);
      for (let j = 0; j < size; j++) across[j] = Math.exp(precision * (place(j) - (1 - t) * centres[k]) ** 2);
      for (let i = 0; i < size; i++) {
        const down = weight * Math.exp(precision * (place(i) + (1 - t) * centres[k + 1]) ** 2);
        if (down < 1e-6 * weight) continue;
        for (let j = 0, at = i * size; j < size; j++, at++) grid[at] += down * across[j];
      }
    }
    return grid;
  }
}

// The exact flow of a fixed cloud of noise, solved once and then read off at any time
class ExactCloud {
  constructor(mixture, noise, steps = 40) {
    const top = Math.asinh(1 / mixture.c);
    Object.assign(this, { mixture, steps, top, h: -top / steps, states: [Float64Array.from(noise)], slopes: [] });
  }

  get solved() {
    return this.slopes.length > this.steps;
  }

  get reached() { // the time down to which it is solved
    return this.solved ? 0 : Math.min(1, this.mixture.c * Math.sinh(this.top + Math.max(0, this.slopes.length - 1) * this.h));
  }

  advance() { // one step, so that a page can show something between
    const k = this.slopes.length, now = this.states[k], next = new Float64Array(now.length), slopes = next.slice();
    for (let i = 0; i < now.length; i += 2) {
      const [state, slope] = this.mixture.step(now[i], now[i + 1], this.top + k * this.h, this.h);
      next.set(state, i);
      slopes.set(slope, i);
    }
    this.slopes.push(slopes);
    this.states.push(next);
  }

  at(time) { // cubic Hermite interpolation in z, as far as it is solved
    if (this.slopes.length < 2) return this.states[0];
    const k = (Math.asinh(Math.max(time, this.reached) / this.mixture.c) - this.top) / this.h;
    const i = Math.min(this.slopes.length - 2, Math.max(0, Math.floor(k)));
    const r = k - i, q = 1 - r, [a, b] = this.states.slice(i, i + 2), [da, db] = this.slopes.slice(i, i + 2);
    return a.map((v, j) => q * q * (1 + 2 * r) * v + r * r * (1 + 2 * q) * b[j]
      + r * q * this.h * (q * da[j] - r * db[j]));
  }

  path(t, s) { // the clouds from t to s that are solved, and both ends
    const { states, slopes, top, h, mixture: { c } } = this, inner = [];
    for (let k = 0; k < slopes.length; k++) {
      const time = c * Math.sinh(top + k * h);
      if (time < t - 1e-6 && time > s + 1e-6) inner.push(states[k]);
    }
    return [this.at(t), ...inner, this.at(s)];
  }
}

// Distances between two clouds of the same noise: root mean square, and median (as torch has it, the lower middle)
function errors(cloud, exact) {
  const distances = new Float64Array(cloud.length / 2)
    .map((_, i) => Math.hypot(cloud[2 * i] - exact[2 * i], cloud[2 * i + 1] - exact[2 * i + 1])).sort();
  const meanSquare = distances.reduce((sum, d) => sum + d * d, 0) / distances.length;
  return { rms: Math.sqrt(meanSquare), median: distances[(distances.length - 1) >> 1] };
}
