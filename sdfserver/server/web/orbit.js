// Turns, moves and nears a camera about what it looks at: by mouse, touch and keyboard.

const THREE = window.THREE;

export class Orbit {
  constructor(camera, element, onChange) {
    this.camera = camera;
    this.element = element;
    this.onChange = onChange;
    this.target = new THREE.Vector3();
    this.up = 2;
    this.size = 1;
    this.pointers = new Map();
    element.addEventListener("pointerdown", (event) => this.press(event));
    element.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    element.addEventListener("contextmenu", (event) => event.preventDefault());
    element.addEventListener("keydown", (event) => this.key(event));
    this.lookAt(new THREE.Box3(new THREE.Vector3(-1, -1, -1), new THREE.Vector3(1, 1, 1)));
  }

  /** Looks at the whole of a box, from the front, above and a little from the side. */
  lookAt(box) {
    box.getCenter(this.target);
    this.size = box.getSize(new THREE.Vector3()).length() || 1;
    this.distance = 1.5 * this.size;
    this.turned = 0.63;
    this.raised = 0.39;
    this.apply();
  }

  /** The vector with these parts to the right, to the back and up, in the scene's axes. */
  toScene(right, back, up) {
    return this.up === 1 ? new THREE.Vector3(right, up, back) : new THREE.Vector3(right, -back, up);
  }

  apply() {
    const across = Math.cos(this.raised);
    const eye = this.toScene(across * Math.sin(this.turned), across * Math.cos(this.turned), Math.sin(this.raised));
    this.camera.up.copy(this.toScene(0, 0, 1));
    this.camera.position.copy(this.target).addScaledVector(eye, this.distance);
    this.camera.near = this.distance / 200;
    this.camera.far = this.distance + 4 * this.size;
    this.camera.updateProjectionMatrix();
    this.camera.lookAt(this.target);
    this.onChange();
  }

  /** The axis, 0 to 2, along which the camera looks most nearly. */
  facing() {
    const along = this.camera.getWorldDirection(new THREE.Vector3()).toArray().map(Math.abs);
    return along.indexOf(Math.max(...along));
  }

  turn(x, y) {
    this.turned -= x;
    this.raised = Math.min(1.55, Math.max(-1.55, this.raised + y));
    this.apply();
  }

  /** Moves by a share of the height of the view. */
  pan(x, y) {
    const height = 2 * this.distance * Math.tan((this.camera.fov * Math.PI) / 360);
    this.camera.updateMatrix();
    const right = new THREE.Vector3(), up = new THREE.Vector3();
    this.camera.matrix.extractBasis(right, up, new THREE.Vector3());
    this.target.addScaledVector(right, -x * height).addScaledVector(up, y * height);
    this.apply();
  }

  zoom(factor) {
    this.distance = Math.min(20 * this.size, Math.max(0.02 * this.size, this.distance * factor));
    this.apply();
  }

  press(event) {
    this.element.setPointerCapture(event.pointerId);
    this.element.focus({ preventScroll: true });
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const height = this.element.clientHeight;
    const x = (event.clientX - before.x) / height, y = (event.clientY - before.y) / height;
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (others.length) {  // two fingers
      const other = others[0][1];
      const was = Math.hypot(before.x - other.x, before.y - other.y);
      const is = Math.hypot(event.clientX - other.x, event.clientY - other.y);
      if (was > 0 && is > 0) this.zoom(was / is);
      this.pan(x / 2, y / 2);
    } else if (event.buttons & 6 || event.shiftKey) {
      this.pan(x, y);
    } else {
      this.turn(4 * x, 4 * y);
    }
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp((event.deltaMode === 1 ? 30 : 1) * event.deltaY * 0.0012));
  }

  key(event) {
    const step = 0.12, sign = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (sign && event.shiftKey) this.pan(sign[0] * 0.05, sign[1] * 0.05);
    else if (sign) this.turn(sign[0] * step, sign[1] * step);
    else if (event.key === "+" || event.key === "=") this.zoom(0.85);
    else if (event.key === "-") this.zoom(1 / 0.85);
    else return;
    event.preventDefault();
  }
}
