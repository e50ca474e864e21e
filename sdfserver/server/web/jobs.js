// The list of past jobs, newest first: picture, name, state, time, and what can be done with each.

import * as api from "./api.js";
import { $, make } from "./dom.js";

const REFRESH_MS = 4000;

export class JobList {
  constructor({ onOpen, onRemoved }) {
    this.onOpen = onOpen;
    this.onRemoved = onRemoved;
    this.pages = 1;
    this.pictures = new Map();
    this.rows = new Map();
    $("more-jobs").addEventListener("click", () => {
      this.pages += 1;
      this.refresh();
    });
  }

  set current(id) {
    this.shown = id;
    for (const [key, row] of this.rows) this.mark(row, key);
  }

  async start() {
    clearInterval(this.timer);
    await this.refresh();
    this.timer = setInterval(() => document.hidden || this.refresh().catch(() => {}), REFRESH_MS);
  }

  async refresh() {
    const found = [];
    let cursor = null;
    for (let page = 0; page < this.pages; page++) {
      const answer = await api.listJobs(cursor);
      found.push(...answer.jobs);
      cursor = answer.next;
      if (!cursor) break;
    }
    $("more-jobs").hidden = !cursor;
    $("jobs-empty").hidden = found.length > 0;
    const before = this.rows;
    this.rows = new Map(found.map((job) => [job.id, this.rowOf(job, before.get(job.id))]));
    const rows = [...this.rows.values()].map(({ element }) => element);
    // Only where something came or went: what has the keyboard's focus stays where it is.
    if (rows.length !== $("jobs").children.length || rows.some((row, i) => row !== $("jobs").children[i])) {
      $("jobs").replaceChildren(...rows);
    }
  }

  rowOf(job, before) {
    const row = before ?? this.newRow(job);
    this.mark(row, job.id);
    row.about.textContent = about(job);
    if (row.state !== job.state) {
      row.state = job.state;
      row.badge.textContent = job.state;
      row.badge.className = `state ${job.state}`;
      const ended = api.isFinal(job);
      row.actions.replaceChildren(...(ended
        ? [this.button("Again", job, () => api.restartJob(job.id).then((next) => this.onOpen(next.id))),
           this.button("Delete", job, () => this.remove(job))]
        : [this.button("Cancel", job, () => api.cancelJob(job.id))]));
      if (job.state === "succeeded") this.showPicture(job.id, row.thumb);
    }
    return row;
  }

  newRow(job) {
    const thumb = make("span", { className: "thumb" }), badge = make("span"), about = make("span");
    const link = make("a", { href: `#job=${job.id}` }, job.name), actions = make("div", { className: "actions" });
    const element = make("li", {}, thumb, link, actions, make("p", { className: "note" }, badge, " ", about));
    return { element, thumb, link, badge, about, actions, state: null };
  }

  mark(row, id) {
    row.element.classList.toggle("current", id === this.shown);
    if (id === this.shown) row.link.setAttribute("aria-current", "true");
    else row.link.removeAttribute("aria-current");
  }

  button(text, job, act) {
    const button = make("button", { type: "button", ariaLabel: `${text} ${job.name}` }, text);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await act();
        await this.refresh();
      } catch (error) {
        $("server").textContent = error.message;
      } finally {
        button.disabled = false;
      }
    });
    return button;
  }

  async remove(job) {
    if (!(await confirmed(`Delete ${job.name} with its mesh and its field?`))) return;
    await api.deleteJob(job.id);
    this.onRemoved(job.id);
  }

  async showPicture(id, thumb) {
    try {
      if (!this.pictures.has(id)) this.pictures.set(id, await api.pictureUrl(id));
      thumb.replaceChildren(make("img", { src: this.pictures.get(id), alt: "" }));
    } catch {
      // An older server's job, or one that has just expired: it goes without.
    }
  }
}

/** Whether the user says yes. */
export async function confirmed(question) {
  const dialog = $("confirm");
  $("confirm-says").textContent = question;
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

function about(job) {
  const { level, resolution, preset } = job.options;
  const what = job.kind === "reconstruction" ? preset
    : `mesh again${resolution ? ` at ${resolution}` : ""}${level ? `, level ${level}` : ""}`;
  if (job.state === "running") return `${what}, ${Math.round(100 * job.progress)} %`;
  if (job.state === "queued") return `${what}, place ${job.queue_position ?? "?"}`;
  return `${what}, ${ago(job.finished_at)}`;
}

function ago(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (seconds < 90) return "just now";
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 130_000) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(time).toLocaleDateString();
}
