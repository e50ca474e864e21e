// Draws a cloud and a surface, and a slice through the distance field; drawn anew only when something has changed.
// Everything is relative to the origin of what was shown first, so that map coordinates keep their digits.

import { Orbit } from "./orbit.js";
import { colorOf } from "./colors.js";

const THREE = window.THREE;

const SLICE_VERTEX = `
  attribute float distance;
  varying float d;
  void main() {
    d = distance;
    gl_Position = projectionMatrix * modelViewMatrix * vec4(position, 1.0);
  }`;
const SLICE_FRAGMENT = `
  uniform float spacing;
  uniform float reach;
  varying float d;
  void main() {
    float far = clamp(abs(d) / reach, 0.0, 1.0);
    vec3 side = d < 0.0 ? vec3(0.16, 0.42, 0.72) : vec3(0.85, 0.47, 0.18);
    vec3 color = mix(vec3(0.97), side, 0.15 + 0.6 * sqrt(far));
    float turns = d / spacing;
    float line = abs(fract(turns - 0.5) - 0.5) / fwidth(turns);
    color = mix(color * 0.55, color, clamp(line - 0.3, 0.0, 1.0));
    float zero = abs(d) / fwidth(d);
    color = mix(vec3(0.05), color, clamp(zero - 1.0, 0.0, 1.0));
    gl_FragColor = vec4(color, 1.0);
  }`;

export class Viewer {
  constructor(canvas, onChange = () => {}) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.renderer = new THREE.WebGLRenderer({ canvas, antialias: true, preserveDrawingBuffer: true });
    this.renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    this.renderer.localClippingEnabled = true;
    this.scene = new THREE.Scene();
    this.camera = new THREE.PerspectiveCamera(40, 1, 0.01, 100);
    this.scene.add(this.camera, new THREE.HemisphereLight(0xffffff, 0x8890a0, 0.55));
    const light = new THREE.DirectionalLight(0xffffff, 0.65);
    light.position.set(-0.6, 0.9, 1);
    this.camera.add(light);
    this.orbit = new Orbit(this.camera, canvas, () => this.draw());
    this.mode = null;  // colours where there are any
    this.pointsShown = true;
    this.clip = new THREE.Plane();
    this.clear();
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.resize();
  }

  /** Empties the view; the next thing that is shown is looked at from the start. */
  clear() {
    for (const name of ["points", "surface", "slice"]) this.remove(name);
    this.origin = null;
    this.box = null;
    this.sliceAxis = null;
    this.values = {};
    this.draw();
  }

  remove(name) {
    const object = this[name];
    this[name] = null;
    if (!object) return;
    this.scene.remove(object);
    object.geometry.dispose();
    object.material.dispose();
  }

  place(object, cloud) {
    if (this.origin === null) {
      this.origin = cloud.origin;
      object.geometry.computeBoundingBox();
      this.box = object.geometry.boundingBox.clone();
      this.orbit.up = upOf(cloud);
      this.reset();
    }
    object.position.fromArray(cloud.origin.map((value, axis) => value - this.origin[axis]));
    this.scene.add(object);
  }

  reset() {
    if (this.box) this.orbit.lookAt(this.box);
    this.draw();
  }

  turnUp(axis) {
    this.orbit.up = axis;
    this.reset();
  }

  showPoints(cloud) {
    this.remove("points");
    const geometry = new THREE.BufferGeometry();
    geometry.setAttribute("position", vectors(cloud.positions));
    const colors = cloud.colors ? bytes(cloud.colors) : cloud.normals ? vectors(normalColors(cloud.normals)) : null;
    if (colors) geometry.setAttribute("color", colors);
    const material = new THREE.PointsMaterial({
      size: 2.2, sizeAttenuation: false, vertexColors: Boolean(colors), color: colors ? 0xffffff : 0x808890,
    });
    this.points = new THREE.Points(geometry, material);
    this.place(this.points, cloud);
    this.update();
  }

  showSurface(mesh) {
    this.remove("surface");
    const geometry = new THREE.BufferGeometry();
    geometry.setAttribute("position", vectors(mesh.positions));
    geometry.setIndex(new THREE.BufferAttribute(mesh.indices, 1));
    if (mesh.normals) geometry.setAttribute("normal", vectors(mesh.normals));
    else geometry.computeVertexNormals();
    this.values = { distance: mesh.distances, confidence: mesh.confidence, colors: mesh.colors };
    this.farthest = mesh.distances ? quantile(mesh.distances, 0.99) || 1 : null;
    this.surface = new THREE.Mesh(geometry, new THREE.MeshBasicMaterial());
    this.place(this.surface, mesh);
    this.update();
  }

  /** Whether the surface has what that way of drawing it shows. */
  can(mode) {
    return Boolean(this.surface && (!NEEDS_VALUES.includes(mode) || this.values[mode]));
  }

  /** How the surface is drawn: as was chosen, if it can be. */
  get shownMode() {
    const wanted = this.mode ?? "colors";
    return this.can(wanted) ? wanted : "shaded";
  }

  setMode(mode) {
    this.mode = mode;
    this.update();
  }

  setPointsShown(shown) {
    this.pointsShown = shown;
    this.update();
  }

  /** Dresses the surface as the mode says, and shows or hides the points. */
  update() {
    if (this.points) this.points.visible = this.pointsShown || !this.surface;
    if (this.surface) {
      const mode = this.shownMode;
      const geometry = this.surface.geometry;
      const colors = {
        normals: () => vectors(normalColors(geometry.attributes.normal.array)),
        distance: () => vectors(scaleColors(this.values.distance, this.farthest)),
        confidence: () => vectors(scaleColors(this.values.confidence, 1)),
        colors: () => bytes(this.values.colors),
      }[mode];
      if (colors) geometry.setAttribute("color", colors());
      this.surface.material.dispose();
      const common = { side: THREE.DoubleSide, clippingPlanes: this.sliceAxis === null ? [] : [this.clip] };
      this.surface.material = {
        shaded: () => new THREE.MeshStandardMaterial({ color: 0xb9c6d8, roughness: 0.65, metalness: 0, ...common }),
        wireframe: () => new THREE.MeshBasicMaterial({ color: 0x5b7fae, wireframe: true, ...common }),
        normals: () => new THREE.MeshBasicMaterial({ vertexColors: true, ...common }),
        distance: () => new THREE.MeshLambertMaterial({ vertexColors: true, ...common }),
        confidence: () => new THREE.MeshLambertMaterial({ vertexColors: true, ...common }),
        colors: () => new THREE.MeshLambertMaterial({ vertexColors: true, ...common }),
      }[mode]();
    }
    this.draw();
    this.onChange();
  }

  // The slice

  /** Where a slice across `axis` at `share` (0 to 1) of the box lies: a grid of n x n points in world units. */
  gridOf(axis, share, n) {
    const box = this.box.clone().expandByScalar(0.08 * this.box.getSize(new THREE.Vector3()).length());
    const low = box.min.toArray(), high = box.max.toArray();
    const [u, v] = [0, 1, 2].filter((other) => other !== axis);
    const at = low[axis] + share * (high[axis] - low[axis]);
    const positions = new Float32Array(3 * n * n), points = [];
    for (let i = 0; i < n * n; i++) {
      const point = [0, 0, 0];
      point[axis] = at;
      point[u] = low[u] + ((i % n) / (n - 1)) * (high[u] - low[u]);
      point[v] = low[v] + (Math.floor(i / n) / (n - 1)) * (high[v] - low[v]);
      positions.set(point, 3 * i);
      points.push(point.map((value, k) => value + this.origin[k]));
    }
    return { axis, at, n, positions, points, size: Math.max(high[u] - low[u], high[v] - low[v]) };
  }

  /** Shows the slice with these distances, `spacing` between its iso-lines, and cuts the surface open at it. */
  showSlice(grid, distances, spacing) {
    this.remove("slice");
    const geometry = new THREE.BufferGeometry(), n = grid.n;
    geometry.setAttribute("position", vectors(grid.positions));
    geometry.setAttribute("distance", new THREE.BufferAttribute(Float32Array.from(distances), 1));
    const indices = [];
    for (let row = 0; row < n - 1; row++) {
      for (let column = 0; column < n - 1; column++) {
        const a = row * n + column;
        indices.push(a, a + 1, a + n, a + 1, a + n + 1, a + n);
      }
    }
    geometry.setIndex(indices);
    const uniforms = { spacing: { value: spacing }, reach: { value: 8 * spacing } };
    this.slice = new THREE.Mesh(geometry, new THREE.ShaderMaterial({
      uniforms, vertexShader: SLICE_VERTEX, fragmentShader: SLICE_FRAGMENT, side: THREE.DoubleSide,
      extensions: { derivatives: true }, polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1,
    }));
    this.scene.add(this.slice);
    // What stands between the slice and the eye is cut away.
    const toEye = this.camera.position.getComponent(grid.axis) > grid.at ? -1 : 1;
    const normal = new THREE.Vector3().setComponent(grid.axis, toEye);
    this.clip.set(normal, -toEye * grid.at);
    const fresh = this.sliceAxis === null;
    this.sliceAxis = grid.axis;
    if (fresh) this.update();
    else this.draw();
  }

  hideSlice() {
    this.remove("slice");
    this.sliceAxis = null;
    this.update();
  }

  // Drawing

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement;
    if (!width || !height) return;
    this.renderer.setSize(width, height, false);
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      const background = getComputedStyle(this.canvas).getPropertyValue("--view").trim() || "#ffffff";
      this.renderer.setClearColor(new THREE.Color(background));
      this.renderer.render(this.scene, this.camera);
      this.canvas.dataset.frames = Number(this.canvas.dataset.frames || 0) + 1;
    });
  }
}

const NEEDS_VALUES = ["distance", "confidence", "colors"];

const vectors = (array) => new THREE.BufferAttribute(array, 3);
const bytes = (array) => new THREE.BufferAttribute(array, 3, true);

function scaleColors(values, top) {
  const colors = new Float32Array(3 * values.length);
  values.forEach((value, i) => colors.set(colorOf(value / top), 3 * i));
  return colors;
}

function normalColors(normals) {
  const colors = new Float32Array(normals.length);
  for (let i = 0; i < normals.length; i++) colors[i] = 0.5 + 0.5 * normals[i];
  return colors;
}

function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** The axis that is up, 1 (y) or 2 (z): that on whose lower side more of the points look down. Files do not say it. */
function upOf({ positions, normals }) {
  if (!normals) return 2;
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity], looking = [0, 0, 0];
  for (let i = 0; i < positions.length; i++) {
    low[i % 3] = Math.min(low[i % 3], positions[i]);
    high[i % 3] = Math.max(high[i % 3], positions[i]);
  }
  for (let i = 0; i < positions.length; i++) {
    const axis = i % 3;
    if (normals[i] < -0.8 && positions[i] < low[axis] + 0.03 * (high[axis] - low[axis])) looking[axis]++;
  }
  return looking[1] > looking[2] ? 1 : 2;
}
