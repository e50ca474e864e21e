// The view with its tools. Works, showing nothing, where there is no WebGL or no three.js.

import * as api from "./api.js";
import { gradient } from "./colors.js";
import { $ } from "./dom.js";

const SLICE_NODES = 96;
const SLICE_PAUSE_MS = 60;
const ISO_LINES = 24;

/** What stands at the end of the colour scale, and what it measures. */
const SCALES = {
  distance: (viewer) => [`${viewer.farthest.toPrecision(2)} and more`, "distance to the nearest point"],
  confidence: () => ["1", "confidence: how far points support the surface"],
};

export class Stage {
  constructor() {
    this.viewer = null;
    this.ready = this.load();
    this.job = null;  // whose field can be sliced
    document.querySelectorAll("input[name=mode]").forEach((input) =>
      input.addEventListener("change", () => this.viewer?.setMode(input.value)));
    $("show-points").addEventListener("change", () => this.viewer?.setPointsShown($("show-points").checked));
    $("show-slice").addEventListener("change", () => this.toggleSlice());
    $("slice-at").addEventListener("input", () => this.moveSlice());
    $("slice-axis").addEventListener("change", () => this.moveSlice());
    $("reset-view").addEventListener("click", () => this.viewer?.reset());
    $("turn-up").addEventListener("click", () => this.viewer && this.turnUp());
    $("view").addEventListener("keydown", (event) => event.key === "Home" && this.viewer?.reset());
    document.querySelector("#scale .bar").style.background = gradient();
  }

  async load() {
    try {
      if (!window.THREE) throw new Error("there is no three.js");
      const { Viewer } = await import("./viewer.js");
      this.viewer = new Viewer($("view"), () => this.update());
      this.update();
    } catch (error) {
      console.error(error);
      $("view-missing").hidden = false;
      $("view-empty").hidden = true;
    }
  }

  async clear() {
    this.setJob(null);
    await this.ready;
    this.viewer?.clear();
    $("show-points").checked = true;
    this.viewer?.setPointsShown(true);
    this.say("");
    this.update();
  }

  async showPoints(cloud) {
    await this.ready;
    this.viewer?.showPoints(cloud);
  }

  /** Shows a surface; that of a job whose field can be asked may be sliced. */
  async showSurface(mesh, job) {
    await this.ready;
    if (job && $("show-points").checked) {  // they would cover what was waited for
      $("show-points").checked = false;
      this.viewer?.setPointsShown(false);
    }
    this.viewer?.showSurface(mesh);
    this.setJob(job);
    this.say(`${(mesh.indices.length / 3).toLocaleString()} triangles shown${job ? "" : ", still forming"}`);
    this.update();
  }

  setJob(job) {
    this.job = job;
    if (!job && $("show-slice").checked) {
      $("show-slice").checked = false;
      this.toggleSlice();
    }
  }

  say(text) {
    $("view-says").textContent = text;
  }

  /** Brings the tools in line with what is shown. */
  update() {
    const viewer = this.viewer;
    const anything = Boolean(viewer?.points || viewer?.surface);
    document.body.classList.toggle("showing", anything);
    $("view-empty").hidden = anything || !viewer;
    $("view-tools").hidden = !anything;
    $("modes").hidden = !viewer?.surface;
    document.querySelectorAll("input[name=mode]").forEach((input) => {
      input.checked = input.value === (viewer?.shownMode ?? "shaded");
      input.disabled = !viewer?.can(input.value);
      input.parentElement.hidden = input.disabled && ["colors", "confidence"].includes(input.value);
    });
    $("show-slice").disabled = !this.job;
    $("turn-up").textContent = viewer?.orbit.up === 1 ? "Up: y" : "Up: z";
    const scale = SCALES[viewer?.shownMode];
    $("scale").hidden = !scale;
    if (scale) [$("scale-end").textContent, $("scale-says").textContent] = scale(viewer);
  }

  turnUp() {
    this.viewer.turnUp(this.viewer.orbit.up === 1 ? 2 : 1);
    this.update();
  }

  toggleSlice() {
    const shown = $("show-slice").checked;
    $("slice-tools").hidden = !shown;
    this.asking?.abort();
    if (shown && this.viewer) $("slice-axis").value = this.viewer.orbit.facing();
    if (shown) this.moveSlice();
    else this.viewer?.hideSlice();
  }

  moveSlice() {
    clearTimeout(this.pause);
    this.pause = setTimeout(() => this.slice(), SLICE_PAUSE_MS);
  }

  async slice() {
    if (!this.viewer || !this.job || !$("show-slice").checked) return;
    this.asking?.abort();
    const { signal } = (this.asking = new AbortController());
    const axis = Number($("slice-axis").value);
    const grid = this.viewer.gridOf(axis, Number($("slice-at").value), SLICE_NODES);
    const spacing = nice(grid.size / ISO_LINES);
    try {
      const { distances } = await api.distancesAt(this.job, grid.points, signal);
      if (signal.aborted) return;
      this.viewer.showSlice(grid, distances, spacing);
      const at = grid.at + this.viewer.origin[axis];
      $("slice-says").textContent = `${"xyz"[axis]} = ${Number(at.toPrecision(4))}, a line every ${spacing}; blue is inside`;
    } catch (error) {
      if (error.name !== "AbortError") $("slice-says").textContent = error.message;
    }
  }
}

/** The next 1, 2 or 5 times a power of ten. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return Number(([1, 2, 5, 10].find((digit) => digit * power >= value) * power).toPrecision(1));
}
