// Reads clouds and meshes in the browser: to show a file at once, before it has been uploaded, and what the server
// sends (PLY). The server's readers have the last word; of a large file only a part of the rows is read here.
//
// A cloud: { origin, positions, normals, colors, distances, confidence, indices, count, hasNormals }. positions are
// relative to `origin`, so that map coordinates keep their digits as float32; colors are bytes; `count` is how many
// points the file has.

const MAX_SHOWN = 100_000;
const MAX_TEXT_BYTES = 48 * 2 ** 20;
const BLOCKS = 128;

const SIZES = { i1: 1, u1: 1, i2: 2, u2: 2, i4: 4, u4: 4, f4: 4, f8: 8 };
const GETTERS = {
  i1: "getInt8", u1: "getUint8", i2: "getInt16", u2: "getUint16", i4: "getInt32", u4: "getUint32",
  f4: "getFloat32", f8: "getFloat64",
};
const PLY_TYPES = {
  char: "i1", int8: "i1", uchar: "u1", uint8: "u1", short: "i2", int16: "i2", ushort: "u2", uint16: "u2",
  int: "i4", int32: "i4", uint: "u4", uint32: "u4", float: "f4", float32: "f4", double: "f8", float64: "f8",
};
const TEXT_FORMATS = ["xyz", "xyzn", "pts", "txt", "asc", "csv"];

/** The cloud of a File, or null where its format cannot be read here. Throws an Error with a plain message. */
export async function readCloud(file) {
  const format = file.name.split(".").pop().toLowerCase();
  if (format === "ply") return plyCloud(file);
  if (format === "pcd") return pcdCloud(file);
  if (format === "npy") return npyCloud(file);
  if (format === "stl") return stlCloud(file);
  if (format === "obj") return objCloud(await textOf(file));
  if (format === "off") return offCloud(await textOf(file));
  if (TEXT_FORMATS.includes(format)) return tableCloud(await textOf(file), file);
  return null;
}

/** The mesh or the points in the bytes of a PLY that the server sent. */
export const readPly = (bytes) => plyCloud(new Blob([bytes]), Infinity);

async function textOf(file) {
  return file.slice(0, MAX_TEXT_BYTES).text();
}

function cloudOf(points, normals, count, more = {}) {
  const { hasNormals = normals !== null, colors = null, distances = null, confidence = null, indices = null } = more;
  const n = points.length / 3;
  if (!n) throw new Error("the file holds no points");
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let i = 0; i < points.length; i++) {
    const axis = i % 3;
    if (points[i] < low[axis]) low[axis] = points[i];
    if (points[i] > high[axis]) high[axis] = points[i];
  }
  if (!low.every(Number.isFinite) || !high.every(Number.isFinite)) throw new Error("the file holds no numbers");
  const origin = low.map((value, axis) => (value + high[axis]) / 2);
  const positions = new Float32Array(points.length);
  for (let i = 0; i < points.length; i++) positions[i] = points[i] - origin[i % 3];
  normals &&= Float32Array.from(normals);
  return { origin, positions, normals, colors, distances, confidence, indices, count, hasNormals };
}

// Rows of one size: binary PLY and PCD

/** Columns of rows of `stride` bytes that start at `offset`; where there are many, evenly spread blocks of them. */
async function rowsOf(blob, offset, count, stride, columns, littleEndian, most) {
  const blocks = count <= most ? [[0, count]] : Array.from({ length: BLOCKS }, (_, i) => {
    const size = Math.floor(most / BLOCKS);
    return [Math.floor((i * (count - size)) / (BLOCKS - 1)), size];
  });
  const total = blocks.reduce((sum, [, size]) => sum + size, 0);
  const found = Object.fromEntries(Object.keys(columns).map((name) => [name, new Float64Array(total)]));
  let row = 0;
  for (const [first, size] of blocks) {
    const start = offset + first * stride;
    const view = new DataView(await blob.slice(start, start + size * stride).arrayBuffer());
    if (view.byteLength < size * stride) throw new Error("the file is cut off");
    for (let i = 0; i < size; i++, row++) {
      for (const name in columns) {
        const { at, type } = columns[name];
        found[name][row] = view[GETTERS[type]](i * stride + at, littleEndian);
      }
    }
  }
  return found;
}

function interleaved(found, names) {
  if (!names.every((name) => found[name])) return null;
  const n = found[names[0]].length, values = new Float64Array(3 * n);
  names.forEach((name, axis) => {
    for (let i = 0; i < n; i++) values[3 * i + axis] = found[name][i];
  });
  return values;
}

const POSITION = ["x", "y", "z"];
const NORMAL = [["nx", "ny", "nz"], ["normal_x", "normal_y", "normal_z"]];
const COLOR = [["red", "green", "blue"], ["r", "g", "b"], ["diffuse_red", "diffuse_green", "diffuse_blue"]];

function cloudOfRows(found, count, more = {}) {
  const points = interleaved(found, POSITION);
  if (points === null) throw new Error("the file has no x, y and z");
  const normals = NORMAL.map((names) => interleaved(found, names)).find(Boolean) ?? null;
  const colors = COLOR.map((names) => interleaved(found, names)).find(Boolean);
  return cloudOf(points, normals, count, {
    hasNormals: normals !== null || Boolean(more.faces),
    colors: colors ? bytesOf(colors, more.wholeColors) : null,
    ...more,
  });
}

/** Colours as bytes, by their type and their maximum as the server tells it; null where they are no colours. */
function bytesOf(values, whole = false) {
  let top = 0;
  for (const value of values) {
    if (!(value >= 0 && value <= 65535)) return null;
    if (value > top) top = value;
  }
  const scale = top <= 1.01 && !whole ? 255 : top <= 255 ? 1 : 1 / 256;
  return Uint8Array.from(values, (value) => Math.min(255, scale < 1 ? Math.floor(value * scale) : Math.round(value * scale)));
}

async function headerOf(blob, end) {
  const bytes = new Uint8Array(await blob.slice(0, 65536).arrayBuffer());
  const text = new TextDecoder("latin1").decode(bytes);
  const at = text.search(end);
  if (at < 0) throw new Error("the file's header has no end");
  const length = text.indexOf("\n", at) + 1;
  return { lines: text.slice(0, length).split(/\r?\n/), length };
}

async function plyCloud(blob, most = MAX_SHOWN) {
  const { lines, length } = await headerOf(blob, /^end_header/m);
  const elements = [];
  let encoding = "";
  for (const line of lines) {
    const words = line.trim().split(/\s+/);
    if (words[0] === "format") encoding = words[1];
    else if (words[0] === "element") elements.push({ name: words[1], count: Number(words[2]), properties: [] });
    else if (words[0] === "property") elements.at(-1).properties.push(words.slice(1));
  }
  const vertex = elements[0];
  if (vertex?.name !== "vertex" || vertex.properties.some((property) => property[0] === "list")) return null;
  const faces = elements[1]?.name === "face" ? elements[1].count : 0;
  if (encoding === "ascii") return plyText(blob, length, vertex, faces);
  const littleEndian = encoding === "binary_little_endian";
  const columns = {};
  let stride = 0;
  for (const [type, name] of vertex.properties) {
    columns[name] = { at: stride, type: PLY_TYPES[type] };
    stride += SIZES[PLY_TYPES[type]];
  }
  const wanted = Object.fromEntries(
    [...POSITION, ...NORMAL.flat(), ...COLOR.flat(), "distance", "confidence"]
      .filter((name) => columns[name]).map((name) => [name, columns[name]]));
  const found = await rowsOf(blob, length, vertex.count, stride, wanted, littleEndian, most);
  const [distances, confidence] = ["distance", "confidence"].map((name) => found[name] ? Float32Array.from(found[name]) : null);
  const indices = most === Infinity && faces ? await triangles(blob, length + stride * vertex.count, faces) : null;
  return cloudOfRows(found, vertex.count, { faces, distances, confidence, indices, wholeColors: wholeColors(vertex) });
}

/** Whether the colours of a PLY's vertices are of a whole type: then 1 is no full share. */
const wholeColors = (vertex) =>
  !vertex.properties.some(([type, name]) => COLOR.flat().includes(name) && PLY_TYPES[type]?.startsWith("f"));

/** Triangles as the server writes them: a byte that says 3, and three int32. */
async function triangles(blob, offset, count) {
  const view = new DataView(await blob.slice(offset, offset + 13 * count).arrayBuffer());
  const indices = new Uint32Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let j = 0; j < 3; j++) indices[3 * i + j] = view.getInt32(13 * i + 1 + 4 * j, true);
  }
  return indices;
}

async function plyText(blob, offset, vertex, faces) {
  const names = vertex.properties.map((property) => property[1]);
  const lines = (await blob.slice(offset, offset + MAX_TEXT_BYTES).text()).split("\n").slice(0, vertex.count);
  return cloudOfRows(columnsOf(lines, names), vertex.count, { faces, wholeColors: wholeColors(vertex) });
}

/** Columns of lines of numbers, of MAX_SHOWN lines at most. */
function columnsOf(lines, names) {
  const step = Math.max(1, Math.ceil(lines.length / MAX_SHOWN));
  const rows = [];
  for (let i = 0; i < lines.length; i += step) {
    const row = lines[i].trim().split(/[\s,;]+/).map(Number);
    if (row.length >= names.length && row.slice(0, 3).every(Number.isFinite)) rows.push(row);
  }
  return Object.fromEntries(names.map((name, i) => [name, Float64Array.from(rows, (row) => row[i])]));
}

async function pcdCloud(blob) {
  const { lines, length } = await headerOf(blob, /^DATA\s/m);
  const fields = Object.fromEntries(lines.map((line) => line.trim().split(/\s+/)).map(([key, ...rest]) => [key, rest]));
  const count = Number(fields.POINTS?.[0] ?? 0), data = fields.DATA[0];
  if (data === "ascii") {
    const text = await blob.slice(length, length + MAX_TEXT_BYTES).text();
    return cloudOfRows(columnsOf(text.split("\n").slice(0, count), fields.FIELDS), count);
  }
  if (data !== "binary") return null;
  const columns = {};
  let stride = 0;
  fields.FIELDS.forEach((name, i) => {
    const type = fields.TYPE[i].toLowerCase() + fields.SIZE[i];
    if ([...POSITION, ...NORMAL.flat(), ...COLOR.flat()].includes(name)) columns[name] = { at: stride, type };
    if (["rgb", "rgba"].includes(name) && fields.SIZE[i] === "4") columns.packed = { at: stride, type: "u4" };
    stride += Number(fields.SIZE[i]) * Number(fields.COUNT?.[i] ?? 1);
  });
  const found = await rowsOf(blob, length, count, stride, columns, true, MAX_SHOWN);
  if (found.packed) COLOR[0].forEach((name, i) => (found[name] = found.packed.map((bits) => (bits >>> (16 - 8 * i)) & 255)));
  return cloudOfRows(found, count, { wholeColors: Boolean(found.packed) });
}

async function npyCloud(blob) {
  const bytes = new DataView(await blob.slice(0, 12).arrayBuffer());
  const long = bytes.getUint8(6) > 1;
  const offset = (long ? 12 : 10) + (long ? bytes.getUint32(8, true) : bytes.getUint16(8, true));
  const header = await blob.slice(0, offset).text();
  const shape = /\((\d+),\s*(\d+)\)/.exec(header);
  const descr = /'descr':\s*'<(f[48])'/.exec(header);
  if (!shape || !descr || /'fortran_order':\s*True/.test(header)) return null;
  const [count, width] = [Number(shape[1]), Number(shape[2])];
  const names = [...POSITION, ...(width >= 6 ? NORMAL[0] : [])], size = SIZES[descr[1]];
  const columns = Object.fromEntries(names.map((name, i) => [name, { at: i * size, type: descr[1] }]));
  return cloudOfRows(await rowsOf(blob, offset, count, width * size, columns, true, MAX_SHOWN), count);
}

// Surfaces: their vertices are the cloud, and the server takes normals from the faces

async function stlCloud(blob) {
  const start = new DataView(await blob.slice(0, 84).arrayBuffer());
  const count = start.byteLength === 84 ? start.getUint32(80, true) : 0;
  if (84 + 50 * count !== blob.size) {
    const corners = [...(await textOf(blob)).matchAll(/vertex\s+(\S+)\s+(\S+)\s+(\S+)/g)];
    return cloudOf(corners.flatMap((match) => match.slice(1, 4).map(Number)), null, corners.length, { hasNormals: true });
  }
  const columns = Object.fromEntries([...NORMAL[0], ...POSITION].map((name, i) => [name, { at: 4 * i, type: "f4" }]));
  return cloudOfRows(await rowsOf(blob, 84, count, 50, columns, true, MAX_SHOWN), 3 * count);
}

function objCloud(text) {
  const lines = text.split("\n");
  const of = (key) => lines.filter((line) => line.startsWith(`${key} `)).map((line) => line.slice(key.length + 1));
  const vertices = of("v"), vn = of("vn"), faces = lines.some((line) => line.startsWith("f "));
  const found = columnsOf(vertices, POSITION);
  if (vn.length === vertices.length) Object.assign(found, columnsOf(vn, NORMAL[0]));
  return cloudOfRows(found, vertices.length, { hasNormals: faces || vn.length === vertices.length });
}

function offCloud(text) {
  const lines = text.replace(/#.*$/gm, "").split("\n").map((line) => line.trim()).filter(Boolean);
  const head = /^(?:ST)?C?(N?)OFF\s*/.exec(lines[0]);
  if (!head) throw new Error("the file does not begin with OFF");
  const rest = lines[0].slice(head[0].length) ? [lines[0].slice(head[0].length), ...lines.slice(1)] : lines.slice(1);
  const [count, faces] = rest[0].split(/\s+/).map(Number);
  const found = columnsOf(rest.slice(1, 1 + count), head[1] ? [...POSITION, ...NORMAL[0]] : POSITION);
  return cloudOfRows(found, count, { hasNormals: Boolean(head[1]) || faces > 0 });
}

/** Lines of numbers: x y z, and normals where the next three, or those that a header names, are unit vectors; colours
 * where a header names them, or where six columns or a PTS have them. */
function tableCloud(text, file) {
  const lines = text.split("\n");
  const isRow = (line) => line.trim().split(/[\s,;]+/).slice(0, 3).every((word) => word !== "" && Number.isFinite(+word));
  const first = lines.findIndex((line) => isRow(line) && line.trim().split(/[\s,;]+/).length >= 3);
  if (first < 0) throw new Error("no line of the file begins with three numbers");
  const width = lines[first].trim().split(/[\s,;]+/).length;
  const header = lines.slice(0, first).map((line) => line.replace(/[#/"]/g, " ").trim().toLowerCase().split(/[\s,;]+/));
  const named = header.find((words) => words.length === width && POSITION.every((name) => words.includes(name)));
  const isPts = width === 7 && /\.pts$/i.test(file.name);
  const names = named ?? (isPts ? [...POSITION, "intensity", ...COLOR[0]] : [...POSITION, ...NORMAL[0]].slice(0, width >= 6 ? 6 : 3));
  const found = columnsOf(lines.slice(first), names);
  const normals = NORMAL.map((names) => interleaved(found, names)).find(Boolean);
  if (normals && !named && !areUnit(normals)) {
    const areColors = width === 6 && normals.every((value) => value >= 0 && value <= 255);
    NORMAL[0].forEach((name, i) => {
      if (areColors) found[COLOR[0][i]] = found[name];
      delete found[name];
    });
  }
  const read = Math.min(file.size, MAX_TEXT_BYTES);
  return cloudOfRows(found, Math.round(((lines.length - first) * file.size) / read) - (text.endsWith("\n") ? 1 : 0));
}

function areUnit(vectors) {
  const n = Math.min(vectors.length / 3, 1000);
  let unit = 0;
  for (let i = 0; i < n; i++) {
    unit += Math.abs(Math.hypot(vectors[3 * i], vectors[3 * i + 1], vectors[3 * i + 2]) - 1) < 0.05 ? 1 : 0;
  }
  return unit > 0.9 * n;
}
