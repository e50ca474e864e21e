// One job: how it stands, what it made, and what can be done with it.

import * as api from "./api.js";
import { LossChart } from "./chart.js";
import { readPly } from "./cloud.js";
import { CutView } from "./cut.js";
import { $, make } from "./dom.js";
import { valuesOf } from "./form.js";
import { confirmed } from "./jobs.js";

const FORMATS = ["ply", "glb", "obj", "stl", "off"];

export class JobView {
  constructor(stage, { onOpen, onChanged, onRemoved }) {
    this.stage = stage;
    this.onOpen = onOpen;
    this.onChanged = onChanged;
    this.onRemoved = onRemoved;
    this.chart = new LossChart($("losses"));
    this.cut = new CutView((does, button) => this.run(does, button));
    this.id = null;
    this.keepView = false;
    this.act("cancel", () => api.cancelJob(this.id).then((job) => this.show(job)));
    this.act("restart", () => api.restartJob(this.id).then((job) => onOpen(job.id)));
    this.act("estimate-again", () =>
      api.restartJob(this.id, { normals: "estimate" }).then((job) => onOpen(job.id)));
    this.act("delete", async () => {
      if (!(await confirmed(`Delete ${this.job.name} with its mesh and its field?`))) return;
      await api.deleteJob(this.id);
      onRemoved();
      onChanged();
    });
    $("again-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run(() => api.meshAgain(this.id, valuesOf($("again-options"))).then((job) => onOpen(job.id)));
    });
    $("downloads").replaceChildren(
      ...FORMATS.map((format) => this.download(format.toUpperCase(), `mesh?format=${format}`)),
      this.download("Field", "field", "The signed distance field, as safetensors"),
      this.download("ONNX", "onnx", "The same, for programs that run ONNX"),
      this.download("Grid", "grid", "Its values on a voxel grid, as NPZ"), this.download("Report", "report"));
  }

  act(id, does) {
    $(id).addEventListener("click", () => this.run(does, $(id)));
  }

  async run(does, button = null) {
    $("job-error").hidden = true;
    if (button) button.disabled = true;
    try {
      await does();
    } catch (error) {
      $("job-error").textContent = error.message;
      $("job-error").hidden = false;
    } finally {
      if (button) button.disabled = false;
    }
  }

  download(text, name, title = "") {
    const button = make("button", { type: "button", title }, text);
    button.addEventListener("click", () => this.run(() => api.save(this.id, name), button));
    return button;
  }

  close() {
    this.following?.abort();
    this.cut.setJob(null);
    this.id = null;
  }

  /** Shows a job, whatever its state, and follows it to its end. */
  async open(id) {
    this.close();
    this.id = id;
    this.job = null;
    this.preview = this.points = null;
    this.chart.clear();
    for (const name of ["job-problem", "job-error", "result"]) $(name).hidden = true;
    for (const name of ["job-name", "job-state", "job-about"]) $(name).textContent = "";
    if (!this.keepView) this.stage.clear();
    this.keepView = false;
    const signal = (this.following = new AbortController()).signal;
    await this.run(async () => {
      const job = await api.getJob(id);
      if (signal.aborted) return;
      this.show(job);
      // From the first event on, also of a job that has ended: its losses are part of what there is to see.
      await api.follow(id, (event) => !signal.aborted && this.take(event, job), signal);
    });
  }

  take(event, first) {
    this.chart.add(event);
    // Events of before the page was opened tell of the losses alone: how the job stands is known better.
    const past = event.attempt < first.attempt || (event.attempt === first.attempt && event.progress < first.progress);
    if (api.isFinal(event) || (!past && !api.isFinal(first))) this.show(event);
  }

  show(job) {
    const ended = api.isFinal(job), was = this.job;
    this.job = job;
    $("job-name").textContent = job.name;
    $("job-state").textContent = job.state;
    $("job-state").className = `state ${job.state}`;
    document.title = ended ? `${job.name} – sdfserver` : `${Math.round(100 * job.progress)} % ${job.name} – sdfserver`;
    $("job-about").textContent = aboutJob(job);
    $("job-progress").hidden = ended;
    $("bar").value = job.progress;
    $("stage-says").textContent = stageOf(job);
    $("eta-says").textContent = job.eta_s === null ? "" : `${duration(job.eta_s)} left`;
    $("cancel").hidden = ended;
    $("restart").hidden = $("delete").hidden = !ended;
    const noNormals = job.state === "failed" && /normals/.test(job.problem?.detail) && job.options.normals === "file";
    $("estimate-again").hidden = !noNormals;
    $("job-problem").hidden = !job.problem;
    $("job-problem").textContent = job.problem?.detail ?? "";
    $("result").hidden = job.state !== "succeeded";
    this.cut.setJob(job.state === "succeeded" ? job.id : null);
    this.look(job);
    if (job.state === "succeeded" && was?.state !== "succeeded") this.run(() => this.showReport(job.id));
    if (was && was.state !== job.state) this.onChanged();
  }

  /** Fetches what there is to be looked at and has not been shown. */
  async look(job) {
    const current = () => this.id === job.id;
    if (job.links.points && this.points === null) {
      this.points = job.id;
      try {
        const bytes = await api.fileOf(job.id, "points");
        if (bytes && current()) this.stage.showPoints(await readPly(bytes));
        else this.points = null;
      } catch {
        this.points = null;
      }
    }
    const version = job.state === "succeeded" ? "final" : job.preview;
    if (job.links.preview && this.preview !== version && this.preview !== "final") {
      this.preview = version;
      try {
        const bytes = await api.fileOf(job.id, "preview");
        if (!bytes || !current() || (this.preview === "final" && version !== "final")) return;
        this.stage.showSurface(await readPly(bytes), version === "final" ? job.id : null);
      } catch (error) {
        if (current()) this.stage.say(error.message);
      }
    }
  }

  async showReport(id) {
    const report = await api.getReport(id);
    if (this.id !== id) return;
    const { mesh, surface, input_to_mesh: distance, seconds, cloud } = report;  // older reports have no surface
    const rows = [
      ...(report.warnings ?? []).map((warning) => ["Warning", warning]),
      ["Surface", [mesh.watertight ? "closed" : "open", ...(mesh.components > 1 ? [`${mesh.components} parts`] : []),
        ...(mesh.watertight ? [`genus ${mesh.genus}`] : [])].join(", ")],
      ...(surface ? [["Because", surface.why], ["Confidence, mean", short(surface.confidence)]] : []),
      ["Triangles", mesh.faces.toLocaleString()],
      ["Area", short(mesh.area)],
      ...(mesh.watertight ? [["Volume", short(mesh.volume)]] : []),
      ["Points to surface, mean", short(distance.mean)],
      ["at most", short(distance.max)],
      ["Points used", `${cloud.used.toLocaleString()} of ${cloud.points.toLocaleString()}`],
      ["Noise, estimated", short(report.fit.noise)],
      ["Steps", report.fit.steps.toLocaleString() + (report.fit.restarts.length ? ", restarted once" : "")],
      ["Fit, mesh", `${seconds.fit.toFixed(1)} s, ${seconds.mesh.toFixed(1)} s`],
      ["All", `${seconds.total.toFixed(1)} s on ${report.device}`],
    ];
    $("report").replaceChildren(...rows.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
  }
}

const short = (value) => (value === null || value === undefined ? "unknown" : Number(value.toPrecision(4)).toLocaleString(undefined, { maximumSignificantDigits: 4 }));

function aboutJob(job) {
  const parts = [job.kind === "mesh" ? "another mesh" : `preset ${job.options.preset}`];
  const plain = ["preset", "priority", "seed", "min_component"];
  for (const [name, value] of Object.entries(job.options)) {
    const usual = value === null || value === false || value === 0 || ["auto", "file"].includes(value) || plain.includes(name);
    if (!usual) parts.push(`${name.replaceAll("_", " ")} ${value === true ? "" : value}`.trim());
  }
  return parts.join(", ");
}

function stageOf(job) {
  if (job.state === "queued") return job.queue_position ? `waiting, place ${job.queue_position} in the queue` : "waiting";
  const step = job.stage === "fit" && job.step ? `, step ${job.step} of ${job.steps}` : "";
  const again = job.attempt > 1 ? ` (attempt ${job.attempt})` : "";
  return `${job.stage ?? "starting"}${step}${again}`;
}

function duration(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
