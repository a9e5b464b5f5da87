"use strict";
// The network F(x, t, s) of tvm_ref/toy/network.py, of many points at once: its value, dF/ds, and the gradient through
// both. Times run from 1 (noise) to 0 (data). Matrices are flat arrays, row by row; clouds are [x, y, x, y, ...].

const FREQUENCIES = 4, FOURIER_FEATURES = 16; // as in network.py
const POINT_FEATURES = 2 + 2 * FOURIER_FEATURES, INPUTS = POINT_FEATURES + 4 * FREQUENCIES;
const PROJECTION = 2 * FOURIER_FEATURES; // the first of the weights, which are not trained

const std = t => Math.hypot(1 - t, t);
const layerSizes = (width, depth) => [INPUTS, ...Array(depth).fill(width), 2];
const countWeights = sizes => sizes.slice(1).reduce((sum, rows, i) => sum + rows * (sizes[i] + 1), PROJECTION);

// c(t, s) and dc/ds: c x is the average velocity over [s, t] if the data are N(0, I)
function gaussianAverageVelocity(t, s) {
  const total = std(s) + std(t), scale = 2 / (std(t) * total), c = scale * (s + t - 1);
  return [c, scale - c * (2 * s - 1) / (std(s) * total)];
}

// Phi and its density, N(0, 1), at multiples of 1/64, by Simpson's rule; between them Taylor's series, to 1e-9
const REACH = 7, PER_UNIT = 64, density = v => Math.exp(-v * v / 2) / Math.sqrt(2 * Math.PI);
const BELL = Float64Array.from({ length: 2 * REACH * PER_UNIT + 1 }, (_, i) => density(i / PER_UNIT - REACH));
const PHI = new Float64Array(BELL.length);
for (let i = 1; i < PHI.length; i++) {
  PHI[i] = PHI[i - 1] + (BELL[i - 1] + 4 * density((i - 0.5) / PER_UNIT - REACH) + BELL[i]) / (6 * PER_UNIT);
}

// C = A B^T for A [n, k] and B [m, k], in blocks of 2 x 4, whose sums stay in registers
function product(A, B, C, n, m, k) {
  const rows = n - n % 2, columns = m - m % 4;
  for (let i = 0; i < rows; i += 2) {
    for (let j = 0; j < columns; j += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let p = i * k, q = j * k, end = p + k; p < end; p++, q++) {
        const a = A[p], b = A[p + k], w0 = B[q], w1 = B[q + k], w2 = B[q + 2 * k], w3 = B[q + 3 * k];
        a0 += a * w0; a1 += a * w1; a2 += a * w2; a3 += a * w3;
        b0 += b * w0; b1 += b * w1; b2 += b * w2; b3 += b * w3;
      }
      const c = i * m + j;
      C[c] = a0; C[c + 1] = a1; C[c + 2] = a2; C[c + 3] = a3;
      C[c + m] = b0; C[c + m + 1] = b1; C[c + m + 2] = b2; C[c + m + 3] = b3;
    }
  }
  for (let i = 0; i < n; i++) { // the odd row, and columns beyond a multiple of four
    for (let j = i < rows ? columns : 0; j < m; j++) {
      let sum = 0;
      for (let p = i * k, q = j * k, end = p + k; p < end; p++, q++) sum += A[p] * B[q];
      C[i * m + j] = sum;
    }
  }
}

function transpose(A, n, m, out) { // A [n, m] to [m, n]
  for (let i = 0; i < n; i++) for (let j = 0; j < m; j++) out[j * n + i] = A[i * m + j];
}

// F(x, t, s) = c(t, s) x + (2 - s - t) MLP(x / std(t), t, t - s): network.py. The weights are one flat array, which is
// not copied: the projection, then each layer's matrix and bias
class Network {
  constructor(weights, width, depth) {
    const sizes = layerSizes(width, depth);
    let start = PROJECTION;
    const take = n => weights.subarray(start, start += n);
    Object.assign(this, { weights, sizes, rows: 0 });
    this.layers = sizes.slice(1).map((out, i) => ({ columns: sizes[i], out, W: take(out * sizes[i]), bias: take(out) }));
  }

  reserve(rows, samples) {
    if (rows <= this.rows) return;
    const make = n => new Float64Array(n), widest = Math.max(...this.sizes);
    this.rows = rows;
    this.h = this.sizes.map(n => make(rows * n)); // inputs of each layer, and the MLP's output
    this.slope = this.sizes.map(n => make(samples * n)); // gelu' and gelu'' there
    this.bend = this.sizes.map(n => make(samples * n));
    this.scratch = [0, 1, 2].map(() => make(widest * Math.max(rows, widest)));
  }

  // F [2n] for x [2n] and times [n], and dF/ds for the first `tangents` samples. A tangent is one more row of each
  // matrix: rows 0 to n - 1 are values, the others their derivatives in s
  forward(x, t, s, tangents = 0) {
    const n = x.length / 2, rows = n + tangents, { layers } = this;
    this.reserve(rows, n);
    Object.assign(this, { n, tangents, t, s, F: new Float64Array(2 * n), dF: new Float64Array(2 * tangents) });
    for (let i = 0; i < n; i++) this.features(i, x[2 * i] / std(t[i]), x[2 * i + 1] / std(t[i]), t[i], t[i] - s[i]);
    layers.forEach(({ W, bias, out, columns }, l) => {
      const z = this.h[l + 1];
      product(this.h[l], W, z, rows, out, columns);
      for (let i = 0; i < n; i++) for (let j = 0; j < out; j++) z[i * out + j] += bias[j];
      if (l < layers.length - 1) this.gelu(l + 1);
    });
    const M = this.h.at(-1), dM = M.subarray(2 * n);
    for (let i = 0; i < 2 * n; i++) {
      const k = i >> 1, [c, dc] = gaussianAverageVelocity(t[k], s[k]), fade = 2 - s[k] - t[k];
      this.F[i] = c * x[i] + fade * M[i];
      if (k < tangents) this.dF[i] = dc * x[i] - M[i] + fade * dM[i];
    }
    return this;
  }

  features(i, x, y, t, gap) { // the MLP's input, and its derivative in s
    const h = this.h[0], start = i * INPUTS, times = start + POINT_FEATURES, projection = this.weights;
    const tangent = (this.n + i) * INPUTS, moving = tangent + POINT_FEATURES + 2 * FREQUENCIES;
    h[start] = x;
    h[start + 1] = y;
    for (let k = 0; k < FOURIER_FEATURES; k++) {
      const angle = x * projection[k] + y * projection[FOURIER_FEATURES + k];
      h[start + 2 + k] = Math.sin(angle);
      h[start + 2 + FOURIER_FEATURES + k] = Math.cos(angle);
    }
    if (i < this.tangents) h.fill(0, tangent, tangent + INPUTS);
    for (let k = 0; k < FREQUENCIES; k++) {
      const w = Math.PI * (k + 1), sin = Math.sin(w * gap), cos = Math.cos(w * gap);
      [Math.sin(w * t), Math.cos(w * t), sin, cos].forEach((v, j) => { h[times + j * FREQUENCIES + k] = v; });
      if (i < this.tangents) [h[moving + k], h[moving + FREQUENCIES + k]] = [-w * cos, w * sin];
    }
  }

  gelu(l) { // GELU v Phi(v) in place of v, and its tangent
    const { n, tangents } = this, h = this.h[l], slope = this.slope[l], bend = this.bend[l], size = n * this.sizes[l];
    for (let i = 0; i < size; i++) {
      const v = h[i], inside = Math.min(REACH, Math.max(-REACH, v)), k = (inside + REACH) * PER_UNIT + 0.5 | 0;
      const a = k / PER_UNIT - REACH, d = inside - a, second = a * a - 1, third = a * (a * a - 3); // Hermite polynomials
      const phi = PHI[k] + BELL[k] * d * (1 - d * (a / 2 - d * (second / 6 - d * third / 24)));
      const bell = BELL[k] * (1 - d * (a - d * (second / 2 - d * third / 6)));
      h[i] = v * phi;
      slope[i] = phi + v * bell;
      bend[i] = (2 - v * v) * bell;
    }
    for (let i = 0; i < tangents * this.sizes[l]; i++) {
      bend[i] *= h[size + i]; // gelu'' dz, which is all that backward needs
      h[size + i] *= slope[i];
    }
  }

  // The gradient of a loss in the weights, from its gradients in F [2n] and dF/ds [2 tangents] of the last forward
  backward(gF, gdF, gradient) {
    const { n, tangents, t, s, layers } = this, rows = n + tangents, [, turned, other] = this.scratch;
    let g = this.scratch[0], start = this.weights.length; // dL/dz of a layer's output, row by row
    for (let i = 0; i < 2 * n; i++) g[i] = (2 - s[i >> 1] - t[i >> 1]) * gF[i];
    for (let i = 0; i < 2 * tangents; i++) { // dF/ds holds -M + (2 - s - t) dM/ds
      g[i] -= gdF[i];
      g[2 * n + i] = (2 - s[i >> 1] - t[i >> 1]) * gdF[i];
    }
    for (let l = layers.length - 1; l >= 0; l--) {
      const { W, out, columns } = layers[l], bias = start -= out, matrix = start -= out * columns;
      gradient.fill(0, bias, bias + out);
      for (let i = 0; i < n; i++) for (let j = 0; j < out; j++) gradient[bias + j] += g[i * out + j];
      transpose(g, rows, out, turned); // dL/dW = g^T h, of values and of tangents, which share W
      transpose(this.h[l], rows, columns, other);
      product(turned, other, gradient.subarray(matrix, bias), out, columns, rows);
      if (l === 0) break;
      transpose(W, out, columns, turned);
      product(g, turned, other, rows, columns, out); // dL/dh = g W
      for (let i = 0; i < n * columns; i++) g[i] = this.slope[l][i] * other[i];
      for (let i = 0, j = n * columns; i < tangents * columns; i++, j++) { // dh = gelu'(z) dz depends on z as well
        g[i] += this.bend[l][i] * other[j];
        g[j] = this.slope[l][i] * other[j];
      }
    }
    gradient.fill(0, 0, PROJECTION);
  }
}
