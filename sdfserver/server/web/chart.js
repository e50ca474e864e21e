// The loss terms against the step, on a logarithmic axis, as SVG.

import { make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 340, HEIGHT = 150, LEFT = 34, BOTTOM = 18, TOP = 6, RIGHT = 6;
const COLORS = ["#3b76c4", "#d9822b", "#3a9a5b", "#b4483e", "#8a63b8", "#6d7683"];

export class LossChart {
  constructor(figure) {
    this.svg = figure.querySelector("svg");
    this.legend = figure.querySelector("figcaption");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.figure = figure;
    this.clear();
  }

  clear() {
    this.rows = [];
    this.draw();
  }

  /** Adds the losses of a job's event, if it has new ones. */
  add({ step, steps, losses, attempt }) {
    if (!step || !Object.keys(losses).length) return;
    const last = this.rows.at(-1);
    if (last && last.step === step && last.attempt === attempt) return;
    if (last && (last.attempt !== attempt || step < last.step)) this.rows = [];
    this.rows.push({ step, losses, attempt });
    this.steps = steps;
    this.draw();
  }

  draw() {
    this.svg.replaceChildren();
    this.legend.replaceChildren();
    this.figure.hidden = !this.rows.length;
    if (!this.rows.length) return;
    const names = [...new Set(this.rows.flatMap((row) => Object.keys(row.losses)))];
    const latest = (name) => this.rows.at(-1).losses[name]?.toPrecision(2) ?? "";
    const values = this.rows.flatMap((row) => Object.values(row.losses)).filter((value) => value > 0);
    const low = Math.floor(Math.log10(Math.max(Math.min(...values), 1e-9)));
    const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
    const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / this.steps;
    const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - Math.log10(value))) / (high - low);
    for (let power = low; power <= high; power++) {
      this.line(LEFT, y(10 ** power), WIDTH - RIGHT, y(10 ** power), "grid");
      this.text(LEFT - 4, y(10 ** power) + 3, `1e${power}`, "end");
    }
    for (const share of [0, 0.5, 1]) {
      const anchor = share === 1 ? "end" : share ? "middle" : "start";
      this.text(x(share * this.steps), HEIGHT - 4, Math.round(share * this.steps), anchor);
    }
    names.forEach((name, i) => {
      const path = document.createElementNS(SVG, "polyline");
      const points = this.rows.filter((row) => row.losses[name] > 0).map((row) => `${x(row.step)},${y(row.losses[name])}`);
      path.setAttribute("points", points.join(" "));
      path.setAttribute("stroke", COLORS[i % COLORS.length]);
      this.svg.append(path);
      const item = make("span", {}, `${name.replaceAll("_", "-")} ${latest(name)}`);
      item.style.setProperty("--mark", COLORS[i % COLORS.length]);
      this.legend.append(item);
    });
    this.svg.setAttribute("aria-label", `Losses at step ${this.rows.at(-1).step}, on a logarithmic axis: ` +
      names.map((name) => `${name} ${latest(name)}`).join(", "));
  }

  line(x1, y1, x2, y2, kind) {
    const line = document.createElementNS(SVG, "line");
    for (const [name, value] of Object.entries({ x1, y1, x2, y2, class: kind })) line.setAttribute(name, value);
    this.svg.append(line);
  }

  text(x, y, content, anchor) {
    const text = document.createElementNS(SVG, "text");
    for (const [name, value] of Object.entries({ x, y, "text-anchor": anchor })) text.setAttribute(name, value);
    text.textContent = content;
    this.svg.append(text);
  }
}
