// The page: which of its parts is shown, and what passes between them.

import * as api from "./api.js";
import { readCloud } from "./cloud.js";
import { $, make } from "./dom.js";
import { fieldsOf, valuesOf } from "./form.js";
import { JobView } from "./job.js";
import { JobList } from "./jobs.js";
import { Stage } from "./stage.js";

const stage = new Stage();
const jobs = new JobList({ onOpen: openJob, onRemoved: (id) => view.id === id && openNew() });
const view = new JobView(stage, { onOpen: openJob, onChanged: () => jobs.refresh().catch(report), onRemoved: openNew });
let chosen = null;  // the file that Reconstruct uploads
let options = null;

// Choosing a cloud

async function choose(file) {
  chosen = file;
  if (location.hash.startsWith("#job=")) history.pushState(null, "", "#new");  // without a hashchange
  await route();
  $("submit-error").hidden = true;
  $("no-normals").hidden = true;
  $("estimate").checked = false;
  $("start").disabled = false;
  $("cloud-says").textContent = `${file.name}: reading …`;
  stage.clear();
  try {
    const cloud = await readCloud(file);
    if (chosen !== file) return;
    if (cloud === null) {
      $("cloud-says").textContent = `${file.name}, ${megabytes(file.size)}: its points show once the server has read it.`;
      return;
    }
    const about = cloud.count > cloud.positions.length / 3 ? `, ${(cloud.positions.length / 3).toLocaleString()} of them shown` : "";
    $("cloud-says").textContent = `${file.name}: ${cloud.count.toLocaleString()} points${about}`;
    $("no-normals").hidden = cloud.hasNormals;
    $("estimate").checked = !cloud.hasNormals;
    stage.showPoints(cloud);
  } catch (error) {
    if (chosen === file) $("cloud-says").textContent = `${file.name}: ${error.message}; the server may say more.`;
  }
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

async function chooseSample(name) {
  try {
    const answer = await api.request(`v1/samples/${name}`);
    await choose(new File([await answer.blob()], `${name}.ply`));
  } catch (error) {
    report(error);
  }
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) choose($("file").files[0]);
  $("file").value = "";
});
for (const name of ["dragenter", "dragover"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
for (const name of ["dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop" || event.relatedTarget === null) document.body.classList.remove("dropping");
  });
}
window.addEventListener("drop", (event) => {
  const file = event.dataTransfer.files[0];
  if (file) choose(file);
});

// Sending it

function wanted() {
  const values = valuesOf($("more-options"));
  values.preset = document.querySelector("input[name=preset]:checked").value;
  if ($("resolution").value) values.resolution = Number($("resolution").value);
  if ($("device").value !== "auto") values.device = $("device").value;
  if ($("estimate").checked || values.viewpoint) values.normals = "estimate";
  return values;
}

$("job-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!chosen) return;
  const file = chosen, start = $("start");
  start.disabled = true;
  $("submit-error").hidden = true;
  try {
    const job = await api.submit(file, file.name, wanted(), (share) => {
      start.textContent = `Uploading ${Math.round(100 * share)} %`;
    });
    view.keepView = true;
    location.hash = `job=${job.id}`;
    jobs.refresh();
  } catch (error) {
    $("submit-error").textContent = error.message;
    $("submit-error").hidden = false;
    if (error.status === 401) askForKey();
  } finally {
    start.textContent = "Reconstruct";
    start.disabled = false;
  }
});

// Which part is shown: #new, or #job=<id>

function openJob(id) {
  location.hash = `job=${id}`;
}

function openNew() {
  location.hash = "new";
}

async function route() {
  const id = /^#job=(\w+)$/.exec(location.hash)?.[1];
  $("new-panel").hidden = Boolean(id);
  $("job-panel").hidden = !id;
  jobs.current = id ?? null;
  if (id) {
    await view.open(id);
  } else {
    view.close();
    if (!chosen) stage.clear();
  }
}

window.addEventListener("hashchange", () => {
  chosen = null;
  forget();
  route();
});

function forget() {
  $("cloud-says").textContent = "";
  $("no-normals").hidden = true;
  $("estimate").checked = false;
  $("start").disabled = true;
}

// What the server offers

function askForKey() {
  document.body.classList.add("locked");
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setApiKey($("key").value.trim());
  $("key-form").hidden = true;
  document.body.classList.remove("locked");
  $("key").value = "";
  start();
});

function report(error) {
  if (error.status === 401) askForKey();
  $("server").textContent = error.message;
}

function showOptions() {
  $("formats").textContent = `${options.cloud_formats.join(", ")}; up to ${(options.limits.upload_bytes / 2 ** 30).toFixed(1)} GiB`;
  $("file").accept = options.cloud_formats.map((name) => `.${name}`).join(",");
  $("server").textContent = options.devices.length
    ? "" : "No worker is running: jobs wait until one is.";
  $("presets").querySelectorAll("label").forEach((label) => label.remove());
  for (const [name, preset] of Object.entries(options.presets)) {
    const checked = name === options.default_preset;
    const input = make("input", { type: "radio", name: "preset", value: name, checked });
    const note = make("span", { className: "note" }, preset.summary);
    $("presets").append(make("label", {}, input, make("strong", {}, name), note));
    input.addEventListener("change", showResolutions);
  }
  showResolutions();
  $("device").replaceChildren(...options.job_options.properties.device.enum.map((name) => new Option(name, name)));
  $("more-options").replaceChildren(...fieldsOf(options.job_options, "job"));
  $("again-options").replaceChildren(...fieldsOf(options.mesh_options, "again", { skip: ["priority"] }));
}

function showResolutions() {
  const preset = document.querySelector("input[name=preset]:checked").value, before = $("resolution").value;
  const choices = [64, 128, 256, 512, 1024, 2048].filter((value) => value <= options.limits.resolution);
  $("resolution").replaceChildren(
    new Option(`${options.presets[preset].resolution} (preset)`, ""), ...choices.map((value) => new Option(value, value)));
  $("resolution").value = before;
}

async function showSamples() {
  const { samples } = await api.getSamples();
  $("samples").replaceChildren("Or try: ", ...samples.flatMap((sample) => {
    const button = make("button", { type: "button", title: sample.summary }, sample.name);
    button.addEventListener("click", () => chooseSample(sample.name));
    return [button, " "];
  }));
}

async function start() {
  try {
    options = await api.getOptions();
    showOptions();
    await Promise.all([showSamples(), jobs.start(), route()]);
  } catch (error) {
    report(error);
  }
}

start();
