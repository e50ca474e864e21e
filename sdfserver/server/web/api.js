// The public interface, /v1, and nothing else. Errors are thrown as Problem, whose message is the server's `detail`.

const base = new URL(".", document.baseURI);
const KEY = "sdfserver-api-key";

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the server answered with status ${status}`);
    this.status = status;
    this.type = body.type || "";
  }
}

export function apiKey() {
  return sessionStorage.getItem(KEY) || "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function headers(more = {}) {
  return apiKey() ? { Authorization: `Bearer ${apiKey()}`, ...more } : more;
}

function problemOf(status, text) {
  try {
    return new Problem(status, JSON.parse(text));
  } catch {
    return new Problem(status, { detail: text.slice(0, 200) });
  }
}

export async function request(path, { method = "GET", json, signal, more } = {}) {
  const options = { method, signal, headers: headers(more) };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(new URL(path, base), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "the server does not answer; is it running?" });
  }
  if (!answer.ok) throw problemOf(answer.status, await answer.text());
  return answer;
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

const job = (id) => `v1/jobs/${encodeURIComponent(id)}`;

export const getOptions = () => getJson("v1/options");
export const getSamples = () => getJson("v1/samples");
export const getJob = (id) => getJson(job(id));
export const getReport = (id) => getJson(`${job(id)}/report`);
export const listJobs = (cursor, limit = 20) =>
  getJson(`v1/jobs?limit=${limit}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
export const cancelJob = (id) => getJson(`${job(id)}/cancel`, { method: "POST" });
export const deleteJob = (id) => request(job(id), { method: "DELETE" });
export const restartJob = (id, options = {}) =>
  getJson(`${job(id)}/restart`, { method: "POST", json: options, more: once() });
export const meshAgain = (id, options) =>
  getJson(`${job(id)}/meshes`, { method: "POST", json: options, more: once() });
export const distancesAt = (id, points, signal) =>
  getJson(`${job(id)}/sdf`, { method: "POST", json: { points }, signal });

const once = () => ({ "Idempotency-Key": randomId() });

function randomId() {
  // crypto.randomUUID is for secure origins alone, and a server in a local network is none.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The bytes of a job's file, or null where it is not there yet. */
export async function fileOf(id, name, signal) {
  try {
    return await (await request(`${job(id)}/${name}`, { signal })).arrayBuffer();
  } catch (error) {
    if (error instanceof Problem && error.status === 409) return null;
    throw error;
  }
}

export const textOf = async (id, name, signal) => (await request(`${job(id)}/${name}`, { signal })).text();

export async function pictureUrl(id) {
  return URL.createObjectURL(await (await request(`${job(id)}/picture`)).blob());
}

/** Saves a job's file under the name that the server gives it. */
export async function save(id, name) {
  const answer = await request(`${job(id)}/${name}`);
  const said = answer.headers.get("content-disposition") || "";
  const encoded = /filename\*=utf-8''([^;]+)/i.exec(said);
  const plain = /filename="([^"]+)"/i.exec(said);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = encoded ? decodeURIComponent(encoded[1]) : plain ? plain[1] : "download";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Uploads a cloud; onProgress gets the share that has been sent. fetch cannot tell that, XMLHttpRequest can. */
export function submit(file, name, options, onProgress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("options", JSON.stringify(options));
    form.append("cloud", file, name);
    const upload = new XMLHttpRequest();
    upload.open("POST", new URL("v1/jobs", base));
    for (const [header, value] of Object.entries(headers(once()))) upload.setRequestHeader(header, value);
    upload.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    upload.onload = () => {
      if (upload.status === 202) resolve(JSON.parse(upload.responseText));
      else reject(problemOf(upload.status, upload.responseText));
    };
    upload.onerror = () => reject(new Problem(0, { detail: "the upload broke off; is the server running?" }));
    upload.send(form);
  });
}

/**
 * Follows a job by its server-sent events to its end, from its first event on, through broken connections.
 * onEvent gets each job as it stood. EventSource would do, could it send an API key.
 */
export async function follow(id, onEvent, signal) {
  let last = null;
  const tell = (state) => {
    try {
      onEvent(state);
    } catch (error) {
      reportError(error);  // a fault of the page's, not of the connection's
    }
  };
  for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
    try {
      const more = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
      const answer = await request(`${job(id)}/events`, { signal, more });
      for await (const event of eventsOf(answer.body)) {
        last = event.id ?? last;
        pause = 500;
        const state = JSON.parse(event.data);
        tell(state);
        if (isFinal(state)) return;
      }
      const state = await getJob(id);
      if (isFinal(state)) return tell(state);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status >= 400 && error.status < 500) throw error;
    }
    if (signal.aborted) return;
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

export const isFinal = (state) => ["succeeded", "failed", "cancelled"].includes(state.state);

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const event = { id: null, data: "" };
      for (const line of part.split("\n")) {
        if (line.startsWith("id:")) event.id = line.slice(3).trim();
        else if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      if (event.data) yield event;
    }
  }
}
