// The outline in a plane, as the server draws it: looked at along an axis, and taken as SVG or DXF.

import * as api from "./api.js";
import { $ } from "./dom.js";

const PAUSE_MS = 60;
const CELLS = 192;  // for looking; what is saved is finer

export class CutView {
  /** `run` does something, and shows its error; it may disable a button meanwhile. */
  constructor(run) {
    this.job = null;
    $("cut").addEventListener("toggle", () => this.move());
    $("cut-axis").addEventListener("change", () => this.move());
    $("cut-at").addEventListener("input", () => this.move());
    for (const format of ["svg", "dxf"]) {
      const button = $(`cut-${format}`);
      button.addEventListener("click", () => run(() => api.save(this.job, this.query({ format })), button));
    }
  }

  /** The job whose field is cut; null for none. */
  setJob(job) {
    if (this.job === job) return;
    this.job = job;
    this.asking?.abort();
    $("cut").open = false;
    $("cut-at").value = 0.5;
    this.show(null);
  }

  query(more) {
    return `slice?${new URLSearchParams({ axis: $("cut-axis").value, share: $("cut-at").value, ...more })}`;
  }

  move() {
    clearTimeout(this.pause);
    if (this.job && $("cut").open) this.pause = setTimeout(() => this.look(), PAUSE_MS);
  }

  async look() {
    this.asking?.abort();
    const { signal } = (this.asking = new AbortController());
    try {
      const drawing = await api.textOf(this.job, this.query({ whole: true, resolution: CELLS }), signal);
      if (signal.aborted) return;
      this.show(drawing);
      const axis = $("cut-axis").value, empty = drawing.includes("<path") ? "" : ": nothing there";
      const at = Number(/through ([^<]+)</.exec(drawing)[1].split(",")["xyz".indexOf(axis)]);
      const width = Number(/viewBox="\S+ \S+ (\S+)/.exec(drawing)[1]);
      $("cut-says").textContent = `${axis} = ${at.toFixed(Math.max(0, 3 - Math.floor(Math.log10(width))))}${empty}`;
    } catch (error) {
      if (error.name !== "AbortError") $("cut-says").textContent = error.message;
    }
  }

  show(drawing) {
    const view = $("cut-view");
    if (view.src) URL.revokeObjectURL(view.src);
    if (drawing) view.src = URL.createObjectURL(new Blob([drawing], { type: "image/svg+xml" }));
    else view.removeAttribute("src");
    view.hidden = !drawing;
  }
}
