#!/usr/bin/env python3
"""Makes the clouds in this folder, the same bytes every time: `python data/make.py [FOLDER]`.

Shapes are implicit functions f(x, y, z), negative inside; normals are f's gradient and point outward. Points are
uniform by area: uniform points of a thin shell |f| / |grad f| < h, moved onto the surface.

The same bytes on every machine: after two tables of sines and cosines, rounded at once, only + - * / sqrt, min and
max follow, which IEEE 754 fixes to the last bit, and sums are written out, since the order of a library's sum is
its own. Random numbers come from the raw bits of PCG64, the one stream that NumPy promises to keep.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Implicit = Callable[[Array, Array, Array], Array]

DECIMALS = 5


# --- numbers that are the same everywhere -------------------------------------------------------------------------


class Random:
    """Uniform and normal numbers from PCG64's raw bits."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, *shape: int) -> Array:
        """Numbers in [0, 1) with 53 random bits."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def normal(self, *shape: int) -> Array:
        """Nearly normal: the sum of twelve uniform numbers less six. No logarithm, so no libm."""
        total = np.zeros(shape)
        for _ in range(12):
            total += self.uniform(*shape)
        return total - 6.0


def circle(turns: Array) -> tuple[Array, Array]:
    """Cosine and sine of so many turns, rounded so that one libm's last bit cannot show."""
    return np.round(np.cos(2 * np.pi * turns), 9), np.round(np.sin(2 * np.pi * turns), 9)


def norm(*components: Array) -> Array:
    """Length of a vector given by its components."""
    total = components[0] * components[0]
    for component in components[1:]:
        total = total + component * component
    return np.sqrt(total)


def unit(vectors: Array) -> Array:
    """Rows of (n, 3) scaled to length one."""
    return vectors / norm(*vectors.T)[:, None]


# --- shapes -------------------------------------------------------------------------------------------------------


def smooth_min(a: Array, b: Array, width: float) -> Array:
    """The polynomial smooth minimum: a union whose seam is rounded over `width`."""
    overlap = np.maximum(width - np.abs(a - b), 0.0) / width
    return np.minimum(a, b) - overlap * overlap * (width / 4)


def ellipsoid(x: Array, y: Array, z: Array, center: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    """About the distance to an ellipsoid: first-order, exact for a sphere."""
    u, v, w = x - center[0], y - center[1], z - center[2]
    k0 = norm(u / radii[0], v / radii[1], w / radii[2])
    k1 = norm(u / radii[0] ** 2, v / radii[1] ** 2, w / radii[2] ** 2)
    return k0 * (k0 - 1.0) / np.maximum(k1, 1e-12)


def tapered(px: Array, py: Array, pz: Array, a: Array, b: Array, radius_a: float, radius_b: float) -> Array:
    """About the distance to a rod from a to b whose radius runs from radius_a to radius_b."""
    along = b - a
    length2 = along[0] * along[0] + along[1] * along[1] + along[2] * along[2]
    t = ((px - a[0]) * along[0] + (py - a[1]) * along[1] + (pz - a[2]) * along[2]) / length2
    t = np.minimum(np.maximum(t, 0.0), 1.0)
    away = norm(px - a[0] - t * along[0], py - a[1] - t * along[1], pz - a[2] - t * along[2])
    return away - (radius_a + t * (radius_b - radius_a))


def chain(points: Array, radii: Array) -> Implicit:
    """A union of tapered rods along a polyline."""

    def f(x: Array, y: Array, z: Array) -> Array:
        rods = zip(points, points[1:], radii, radii[1:], strict=False)
        value = np.full(x.shape, np.inf)
        for a, b, radius_a, radius_b in rods:
            value = np.minimum(value, tapered(x, y, z, a, b, radius_a, radius_b))
        return value

    return f


def knot() -> Implicit:
    """A trefoil whose tube is thinner where it crosses itself."""
    turns = np.arange(121) / 120
    c1, s1 = circle(turns)
    c2, s2 = circle(2 * turns)
    c3, s3 = circle(3 * turns)
    return chain(np.stack([s1 + 2 * s2, c1 - 2 * c2, -1.2 * s3], axis=1) / 3, 0.16 - 0.05 * c3)


def duck(x: Array, y: Array, z: Array) -> Array:
    """A bath duck, swimming along +x."""
    body = ellipsoid(x, y, z, (0.0, 0.0, 0.0), (0.78, 0.52, 0.42))
    tail = tapered(x, y, z, np.array([-0.5, 0.0, 0.1]), np.array([-0.92, 0.0, 0.42]), 0.24, 0.05)
    head = ellipsoid(x, y, z, (0.48, 0.0, 0.72), (0.33, 0.31, 0.32))
    bill = ellipsoid(x, y, z, (0.86, 0.0, 0.66), (0.2, 0.16, 0.05))
    wing = ellipsoid(x, np.abs(y), z, (-0.12, 0.5, 0.12), (0.42, 0.09, 0.2))
    value = smooth_min(smooth_min(body, tail, 0.25), head, 0.3)
    return smooth_min(smooth_min(value, bill, 0.08), wing, 0.08)


def bracket(x: Array, y: Array, z: Array) -> Array:
    """An angle bracket in millimetres: two plates, a rib, a slot and three bores. All edges sharp."""
    base = np.maximum(np.maximum(np.abs(x - 40) - 40, np.abs(y) - 25), np.abs(z - 5) - 5)
    wall = np.maximum(np.maximum(np.abs(x - 5) - 5, np.abs(y) - 25), np.abs(z - 30) - 30)
    slope = (x + z - 55) * 0.5**0.5
    rib = np.maximum(np.maximum(slope, np.abs(y) - 4), np.maximum(-x + 1, -z + 1))
    solid = np.minimum(np.minimum(base, wall), rib)
    bores = np.minimum(norm(x - 62, y - 13) - 5, norm(x - 62, y + 13) - 5)
    slot = norm(np.maximum(np.abs(y) - 9, 0.0), z - 45) - 6
    return np.maximum(solid, -np.minimum(bores, slot))


def goblet() -> Implicit:
    """A stemmed glass: a wall of 5% of its height around a bowl, on a slender stem."""
    quarter = np.arange(17) / 64
    c, s = circle(quarter)
    bowl = np.stack([0.62 * s, 1.42 - 0.62 * c], axis=1)
    profile = np.concatenate([[[0.5, 0.0], [0.12, 0.06], [0.0, 0.14]], bowl, [[0.66, 1.6], [0.66, 1.85]]])
    radii = np.concatenate([[0.04, 0.06, 0.09], np.linspace(0.09, 0.05, 5), np.full(12, 0.05), [0.05, 0.045]])
    line = chain(np.column_stack([profile, np.zeros(len(profile))]), radii)

    def f(x: Array, y: Array, z: Array) -> Array:
        return line(norm(x, y), z, np.zeros_like(x))

    return f


def lattice(x: Array, y: Array, z: Array) -> Array:
    """Chmutov's surface of degree 6, T6(x) + T6(y) + T6(z) = 0: 27 nodes joined by 54 struts, so of genus 28."""

    def chebyshev(t: Array) -> Array:
        s = t * t
        return ((32 * s - 48) * s + 18) * s - 1

    return chebyshev(x) + chebyshev(y) + chebyshev(z)


def terrain(x: Array, y: Array, z: Array) -> Array:
    """A hillside in metres, as a height above the plane: the surface is open."""
    hills = [(60.0, 55.0, 26.0, 18.0), (25.0, 20.0, 14.0, 12.0), (95.0, 18.0, 10.0, 14.0), (85.0, 62.0, -9.0, 9.0)]
    height = 0.06 * x - 0.04 * y
    for cx, cy, top, width in hills:
        away = ((x - cx) * (x - cx) + (y - cy) * (y - cy)) / (width * width)
        height = height + top / ((1 + away) * (1 + away))
    return z - height


# --- sampling -----------------------------------------------------------------------------------------------------


def value_and_gradient(f: Implicit, points: Array, step: float) -> tuple[Array, Array]:
    """f (n,) and its gradient (n, 3), by central differences."""
    gradient = np.empty_like(points)
    for axis in range(3):
        offset = np.zeros(3)
        offset[axis] = step
        gradient[:, axis] = (f(*(points + offset).T) - f(*(points - offset).T)) / (2 * step)
    return f(*points.T), gradient


def cells_near(f: Implicit, low: Array, high: Array) -> tuple[Array, Array]:
    """Centres (n, 3) of those of 32^3 cells that may touch the surface, and the size of a cell (3,)."""
    side = (high - low) / 32
    steps = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    centers = low + (steps + 0.5) * side
    value, gradient = value_and_gradient(f, centers, float(side.max()) * 1e-3)
    # Twice the half diagonal, and the slope at the centre or one: wide enough for every shape here.
    return centers[np.abs(value) < float(norm(*side)) * np.maximum(norm(*gradient.T), 1.0)], side


def sample(f: Implicit, count: int, low: Array, high: Array, seed: int) -> tuple[Array, Array]:
    """`count` points (n, 3) of f = 0 in the box from low to high, uniform by area, and their normals."""
    random, size = Random(seed), float((high - low).max())
    shell, step = size * 0.004, size * 1e-6
    centers, side = cells_near(f, low, high)
    found: list[tuple[Array, Array]] = []
    while sum(len(points) for points, _ in found) < count:
        cell = (random.uniform(20_000) * len(centers)).astype(np.int64)
        points = centers[cell] + (random.uniform(20_000, 3) - 0.5) * side
        value, gradient = value_and_gradient(f, points, step)
        near = np.abs(value) < shell * norm(*gradient.T)
        points, start = points[near], unit(gradient[near])
        for _ in range(3):
            value, gradient = value_and_gradient(f, points, step)
            points = points - gradient * (value / norm(*gradient.T) ** 2)[:, None]
        value, gradient = value_and_gradient(f, points, step)
        normals = unit(gradient)
        cosine = normals[:, 0] * start[:, 0] + normals[:, 1] * start[:, 1] + normals[:, 2] * start[:, 2]
        # A point that crossed a crease on its way would crowd it.
        good = (np.abs(value) < 1e-9 * size * norm(*gradient.T)) & (cosine > 0.8)
        good &= ((points >= low) & (points <= high)).all(axis=1)
        found.append((points[good], normals[good]))
    points, normals = (np.concatenate(parts)[:count] for parts in zip(*found, strict=True))
    return points, normals


def thin(points: Array, normals: Array, count: int) -> tuple[Array, Array]:
    """The `count` points that are farthest from one another, chosen one by one (farthest-point sampling)."""
    chosen = [0]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        offset = points - points[chosen[-1]]
        nearest = np.minimum(nearest, norm(*offset.T))
        chosen.append(int(np.argmax(nearest)))
    return points[chosen], normals[chosen]


def disturb(points: Array, normals: Array, sigma: float, normal_sigma: float, seed: int) -> tuple[Array, Array]:
    """Points moved by normal noise of `sigma` per axis, normals tilted by `normal_sigma` per axis."""
    random = Random(seed)
    return points + sigma * random.normal(*points.shape), unit(normals + normal_sigma * random.normal(*normals.shape))


# --- files --------------------------------------------------------------------------------------------------------


def ply(points: Array, normals: Array | None, kind: str = "float") -> bytes:
    """A little-endian binary PLY; positions are `kind`, normals always float."""
    names = [(kind, name) for name in "xyz"] + [("float", name) for name in ("nx", "ny", "nz") if normals is not None]
    header = ["ply", "format binary_little_endian 1.0", "comment made by data/make.py", f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for kind, name in names] + ["end_header", ""]
    rows = np.empty(len(points), dtype=[(name, "<f8" if kind == "double" else "<f4") for kind, name in names])
    # Adding zero turns -0.0 into 0.0: which of the two a rounding leaves must not matter.
    for axis, name in enumerate("xyz"):
        rows[name] = np.round(points[:, axis], DECIMALS) + 0.0
    for axis, name in enumerate(("nx", "ny", "nz")):
        if normals is not None:
            rows[name] = np.round(normals[:, axis], DECIMALS) + 0.0
    return "\n".join(header).encode("ascii") + rows.tobytes()


def make() -> Iterator[tuple[str, bytes]]:
    """Every cloud: its file's name and its bytes."""

    def box(*corners: float) -> tuple[Array, Array]:
        return np.array(corners[:3]), np.array(corners[3:])

    around_duck = box(-1.1, -0.7, -0.6, 1.2, 0.7, 1.2)
    yield "knot.ply", ply(*sample(knot(), 10_000, *box(-1.3, -1.3, -0.7, 1.3, 1.3, 0.7), seed=1))
    yield "bracket.ply", ply(*sample(bracket, 12_000, *box(-4, -29, -4, 84, 29, 64), seed=2))
    yield "goblet.ply", ply(*sample(goblet(), 14_000, *box(-0.8, -0.8, -0.1, 0.8, 0.8, 1.95), seed=3))
    yield "lattice.ply", ply(*sample(lattice, 20_000, *box(-1.2, -1.2, -1.2, 1.2, 1.2, 1.2), seed=4))
    points, normals = sample(terrain, 8_000, *box(0, 0, -20, 120, 80, 60), seed=5)
    yield "terrain.ply", ply(points + np.array([431_200.0, 5_312_600.0, 640.0]), normals, "double")
    points, normals = sample(duck, 12_000, *around_duck, seed=6)
    yield "noisy.ply", ply(*disturb(points, normals, 0.01, 0.1, seed=7))
    yield "sparse.ply", ply(*thin(points, normals, 500))
    points, _ = sample(duck, 6_000, *around_duck, seed=8)
    yield "bare.ply", ply(points, None)


def main() -> None:
    """Writes every cloud into the folder given, or into this one."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    for name, content in make():
        (folder / name).write_bytes(content)
        print(f"{folder / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
