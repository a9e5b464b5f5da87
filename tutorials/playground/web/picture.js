"use strict";
// The picture: density, dots coloured by the angle of their noise, tails, and one point with its two arrows.

const EXTENT = 2.7, GRID = 108; // half width of what is shown (data and noise have variance 1), and cells of the density
const ARROW = 0.7, HUES = 36; // length of an arrow per velocity; tails and dots are drawn in so many colours
const $ = id => document.getElementById(id);
const INK = ["ink", "soft", "paper", "df", "u", "gap", "mass"];

class Picture {
  constructor(canvas, noise) {
    const angle = i => Math.atan2(noise[2 * i + 1], noise[2 * i]) / (2 * Math.PI) + 1;
    Object.assign(this, { canvas, pen: canvas.getContext("2d"), shade: document.createElement("canvas"), shaded: [] });
    this.bins = Array.from({ length: HUES }, () => []); // points of each colour
    for (let i = 0; i < noise.length / 2; i++) this.bins[Math.floor(angle(i) * HUES) % HUES].push(2 * i);
    this.shade.width = this.shade.height = GRID;
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement), read = name => style.getPropertyValue("--" + name).trim();
    this.colours = Object.fromEntries(INK.map(name => [name, read(name)]));
    this.hues = this.bins.map((_, i) => `oklch(${read("dot")} ${360 * (i + 0.5) / HUES})`);
    this.shaded = [];
  }

  // The coordinates of the plane from now on, and nothing on it
  clear() {
    const { canvas, pen } = this, size = canvas.clientWidth, dense = Math.min(2, devicePixelRatio);
    canvas.width = canvas.height = Math.round(size * dense);
    this.pixel = 2 * EXTENT / size;
    this.unit = Math.max(0.8, size / 620); // strokes and dots grow with the picture
    pen.setTransform(dense / this.pixel, 0, 0, -dense / this.pixel, dense * size / 2, dense * size / 2);
    pen.lineCap = pen.lineJoin = "round";
  }

  density(mixture, time) {
    if (this.shaded[0] !== mixture || Math.abs(this.shaded[1] - time) > 0.002) {
      const grid = mixture.density(time, GRID, EXTENT), top = grid.reduce((a, b) => Math.max(a, b));
      const image = new ImageData(GRID, GRID), [r, g, b, most] = this.colours.mass.split(" ").map(Number);
      grid.forEach((p, i) => image.data.set([r, g, b, most * Math.pow(p / top, 0.55)], 4 * i));
      this.shade.getContext("2d").putImageData(image, 0, 0);
      this.shaded = [mixture, time];
    }
    const { pen } = this;
    pen.save();
    pen.scale(1, -1);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(this.shade, -EXTENT, -EXTENT, 2 * EXTENT, 2 * EXTENT);
    pen.restore();
  }

  dots(cloud, radius = 2.2, alpha = 1) {
    const { pen } = this, r = radius * this.unit * this.pixel;
    pen.globalAlpha = alpha;
    this.bins.forEach((bin, hue) => {
      pen.beginPath();
      for (const i of bin) {
        pen.moveTo(cloud[i] + r, cloud[i + 1]);
        pen.arc(cloud[i], cloud[i + 1], r, 0, 7);
      }
      pen.fillStyle = this.hues[hue];
      pen.fill();
    });
    pen.globalAlpha = 1;
  }

  tails(path, { alpha, dashes = [] }) { // lines through the clouds of a path
    this.stroke(1, dashes, alpha);
    const { pen } = this;
    this.bins.forEach((bin, hue) => {
      pen.beginPath();
      for (const i of bin) {
        path.forEach((cloud, k) => (k ? pen.lineTo(cloud[i], cloud[i + 1]) : pen.moveTo(cloud[i], cloud[i + 1])));
      }
      pen.strokeStyle = this.hues[hue];
      pen.stroke();
    });
    this.stroke(1, [], 1);
  }

  stroke(width, dashes = [], alpha = 1) {
    this.pen.lineWidth = width * this.unit * this.pixel;
    this.pen.setLineDash(dashes.map(a => a * this.unit * this.pixel));
    this.pen.globalAlpha = alpha;
  }

  line(path, name, width, dashes = []) {
    const { pen } = this;
    this.stroke(width, dashes);
    pen.beginPath();
    path.forEach(([x, y]) => pen.lineTo(x, y));
    pen.strokeStyle = this.colours[name];
    pen.stroke();
    pen.setLineDash([]);
  }

  disc([x, y], radius, name) {
    this.pen.beginPath();
    this.pen.arc(x, y, radius * this.unit * this.pixel, 0, 7);
    this.pen.fillStyle = this.colours[name];
    this.pen.fill();
  }

  ring(at) {
    this.disc(at, 10, "paper");
    this.disc(at, 8.5, "ink");
    this.disc(at, 5.5, "paper");
  }

  label([x, y], text, name) {
    const { pen } = this, size = 15 * Math.max(1, this.unit) * this.pixel;
    pen.save();
    pen.scale(1, -1);
    Object.assign(pen, { font: `600 ${size}px system-ui, sans-serif`, textBaseline: "middle", textAlign: "center",
      lineWidth: size / 4, strokeStyle: this.colours.paper, fillStyle: this.colours[name] });
    pen.strokeText(text, x, -y);
    pen.fillText(text, x, -y);
    pen.restore();
  }

  // A velocity from a point, drawn towards data, as a jump goes: against time. One that would leave the picture ends at
  // its edge, with a second head and its length. Returns the tip, or nothing if that is outside
  arrow([x, y], [u, v], name, width, dashes, text, side) {
    const size = Math.hypot(u, v), reach = EXTENT - 0.12, fits = (a, b) => Math.abs(b) < 1e-9 ? 1 : ((b > 0 ? reach : -reach) - a) / b;
    const part = Math.max(0, Math.min(1, fits(x, -ARROW * u), fits(y, -ARROW * v)));
    const tip = [x - part * ARROW * u, y - part * ARROW * v], angle = Math.atan2(v, u), cut = part < 1;
    const head = Math.min(13 * this.unit * this.pixel, part * ARROW * size);
    const barb = (turn, back = 0) => [tip[0] + back * Math.cos(angle) + head * Math.cos(angle + turn),
      tip[1] + back * Math.sin(angle) + head * Math.sin(angle + turn)];
    const heads = cut ? [0, head] : [0];
    for (const [colour, w] of [["paper", width + 3], [name, width]]) {
      this.line([[x, y], tip], colour, w, colour === name ? dashes : []);
      for (const back of heads) {
        this.line([barb(0.5, back), [tip[0] + back * Math.cos(angle), tip[1] + back * Math.sin(angle)], barb(-0.5, back)], colour, w);
      }
    }
    const off = 20 * this.unit * this.pixel, inside = a => Math.min(reach - 0.15, Math.max(0.15 - reach, a));
    const away = [tip[0] - off * (Math.cos(angle) + side * Math.sin(angle)), tip[1] - off * (Math.sin(angle) - side * Math.cos(angle))];
    this.label(away.map(inside), cut ? `${text}, ${size.toFixed(1)} long` : text, name);
    return cut ? undefined : tip;
  }

  marks(points, learned) { // that were drawn
    for (const point of points) this.disc(point, learned ? 1.2 : 2.6, learned ? "soft" : "ink");
  }

  // One point. One jump is a straight dotted line, as nothing is computed between, with the two arrows whose gap is the
  // loss; several steps, or the exact flow, are a way
  follow({ start, landing, rate, velocity, exact, way }) {
    const path = way ?? [start, landing], end = path.at(-1);
    this.line(path, "paper", 4.5);
    this.line(path, "ink", way ? 2 : 1.6, way ? [] : [2, 6]);
    if (path.length < 40) path.forEach(at => this.disc(at, 3, "ink"));
    this.ring(start);
    if (!way) {
      const turn = rate[0] * velocity[1] - rate[1] * velocity[0] > 0 ? 1 : -1; // labels on the outer sides
      const tips = [this.arrow(landing, velocity, "u", 4.5, [], "u", -turn), this.arrow(landing, rate, "df", 2.6, [8, 6], "d/ds f", turn)];
      if (tips[0] && tips[1]) this.line(tips, "gap", 3, [0.1, 5]);
    }
    if (exact) this.disc(exact, 3.5, "gap");
    this.disc(end, 7.5, "paper");
    this.disc(end, 6, "ink");
  }
}
