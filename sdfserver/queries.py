"""What can be asked of a field, in world units: closest points, distances that are true, curvature, rays; numpy alone.

The same for the field of the core and for the one that the API evaluates without torch: all that they give is their
value and its derivatives at points in the unit frame.

Unit frame: the cube [-1, 1]^3, which the surface lies in; sdf < 0 inside, normals point outward. The field was fitted
within the cube, so that a point outside is on the side on which the nearest point of the cube is.

Symbols: phi the field, g its gradient, B its Hessian, n = g / |g|; p a point asked about, c one on the surface phi = 0.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from sdfserver.cloud import Frame
from sdfserver.errors import NoSurfaceError

Floats = NDArray[np.float64]

CHUNK = 1 << 16
"""Points that are seen to at a time: what a call holds besides its answer does not grow with it."""
SKETCH = 32
"""Cells along each side of the cube that are looked at first for the surface; each may be halved FINER times."""
FINER = 2
ON_SURFACE = 1e-6
"""A point with |phi| below this is on the surface: half a millionth of the cube, about what float32 can tell."""
ROUNDS = 24
SHORTEST_G = 0.2
"""Newton steps are as if |g| were no less, and no longer than LONGEST_STEP."""
LONGEST_STEP = 0.25
SIDEWAYS = 8
"""Steps along the surface, at most, to where its normal points at p."""
ALIGNED = 1e-4
"""The sine of the angle between p - c and n below which it does."""
SLOPE_SAFETY = 1.25
"""The bound on |g| is this much larger than the steepest that was seen."""
SHORTEST_RAY_STEP = 1e-3
"""A ray goes no shorter way: what it is in for less, it may miss."""
BAND = 0.02
"""Near the surface is what is within this share of the cube's half side."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Closest:
    """The closest points of the surface, in world units.

    points: (n, 3). distances: (n,) signed, from these: true ones. residuals: (n,) |phi| at `points`, about how far off
    the surface they are. sines: (n,) of the angle between the way to the point asked about and the normal; 0 where the
    point is the closest one around.
    """

    points: Floats
    distances: Floats
    residuals: Floats
    sines: Floats


@dataclass(frozen=True, eq=False, kw_only=True)
class Curvature:
    """Curvatures (n,) of the level sets through points: that of the surface for points on it.

    mean: half the sum of the principal curvatures, 1 / length, positive where the inside is convex: 1 / r on a sphere.
    gaussian: their product, 1 / length^2. NaN where the field has no gradient.
    """

    mean: Floats
    gaussian: Floats


@dataclass(frozen=True, eq=False, kw_only=True)
class RayHits:
    """Where rays first cross the surface, from outside or from inside, in world units.

    hit: (n,) bool. t: (n,) the distance from the origin; points, normals: (n, 3), normals outward; NaN without a hit.
    """

    hit: NDArray[np.bool_]
    t: Floats
    points: Floats
    normals: Floats


@dataclass(frozen=True, kw_only=True)
class DistanceError:
    """How far the field is from being a distance near the surface: | |grad phi| - 1 |, which is 0 for a distance.

    band: how near, in world units, on either side. samples: how many points were looked at.
    """

    mean: float
    p95: float
    max: float
    band: float
    samples: int


class FieldQueries:
    """What a field in a frame can be asked, given `at`."""

    frame: Frame

    def at(self, x: Floats, order: int) -> tuple[Floats, ...]:
        """At unit points x (n, 3): phi (n,); from order 1 on g (n, 3) as well; for order 2 also B (n, 3, 3)."""
        raise NotImplementedError

    def inside(self, points: ArrayLike) -> NDArray[np.bool_]:
        """Whether `points` (n, 3) are inside, (n,)."""
        unit = self._unit(points)
        out = np.empty(len(unit), bool)
        for part in _parts(len(unit)):
            out[part] = self.at(np.clip(unit[part], -1, 1), 0)[0] < 0
        return out

    def curvature(self, points: ArrayLike) -> Curvature:
        """Mean and Gaussian curvature of the level sets through `points` (n, 3)."""
        unit = self._unit(points)
        mean, gaussian = np.empty(len(unit)), np.empty(len(unit))
        for part in _parts(len(unit)):
            mean[part], gaussian[part] = curvatures(*self.at(unit[part], 2)[1:])
        return Curvature(mean=mean * self.frame.scale, gaussian=gaussian * self.frame.scale**2)

    def closest(self, points: ArrayLike) -> Closest:
        """The closest points of the surface to `points` (n, 3), and the distances from them.

        From the foot of Newton steps along g, or from the nearest of many points spread over the surface where that is
        nearer, c moves along the surface until its normal points at p. Where two parts of the surface are about equally
        far it may be on either. Raises NoSurfaceError where there is none.
        """
        unit = self._unit(points)
        out = Closest(
            points=np.empty((len(unit), 3)),
            distances=np.empty(len(unit)),
            residuals=np.empty(len(unit)),
            sines=np.empty(len(unit)),
        )
        for part in _parts(len(unit)):
            p = unit[part]
            c, residual, sine = self._closest(p)
            side = np.where(self.at(np.clip(p, -1, 1), 0)[0] < 0, -1, 1)
            out.points[part] = self.frame.to_world(c)
            out.distances[part] = side * np.linalg.norm(p - c, axis=1) / self.frame.scale
            out.residuals[part], out.sines[part] = residual / self.frame.scale, sine
        return out

    def distance(self, points: ArrayLike) -> Floats:
        """The true signed distance (n,) of `points` (n, 3) from the surface phi = 0, however far off.

        Where phi itself is not a distance, far out and deep inside, this still is: the sign is that of phi, the length
        that of the way to the closest point.
        """
        return self.closest(points).distances

    def cast(self, origins: ArrayLike, directions: ArrayLike, *, max_distance: float | None = None) -> RayHits:
        """Where rays from `origins` (n, 3) along `directions` (n, 3), of any length but zero, first cross the surface.

        Sphere tracing (Hart 1996): a ray may go |phi| / L without a crossing, L being a bound on |g| that is measured
        within the cube and enlarged. What a ray is in for less than a thousandth of the cube's half side may be missed.
        Crossings farther than `max_distance` do not count.
        """
        start, way = self._unit(origins), _vectors(directions)
        if len(start) != len(way):
            raise ValueError(f"there are {len(start)} origins and {len(way)} directions; give as many")
        length = np.linalg.norm(way, axis=1, keepdims=True)
        if not (length > 0).all():
            raise ValueError(
                f"{int((length <= 0).sum())} directions have zero length; give vectors that point somewhere"
            )
        limit = np.inf if max_distance is None else max_distance * self.frame.scale
        way = way / length
        t, normals = np.full(len(start), np.nan), np.full((len(start), 3), np.nan)
        for part in _parts(len(start)):
            t[part], normals[part] = self._cast(start[part], way[part], limit)
        hit = np.isfinite(t)
        return RayHits(
            hit=hit,
            t=t / self.frame.scale,
            points=self.frame.to_world(start + t[:, None] * way),
            normals=normals,
        )

    @cached_property
    def distance_error(self) -> DistanceError:
        """How far the field is from a distance near its surface. Raises NoSurfaceError where there is none."""
        feet, rng = self._sketch, np.random.default_rng(0)
        feet = feet[rng.permutation(len(feet))[: 1 << 14]]
        g = self.at(feet, 1)[1]
        offsets = rng.uniform(-BAND, BAND, (len(feet), 1))
        x = feet + offsets * g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), SHORTEST_G)
        error = np.abs(np.linalg.norm(self.at(x, 1)[1], axis=1) - 1)
        return DistanceError(
            mean=float(error.mean()),
            p95=float(np.percentile(error, 95)),
            max=float(error.max()),
            band=BAND / self.frame.scale,
            samples=len(x),
        )

    # In the unit frame

    def closest_from(self, p: Floats, start: Floats) -> tuple[Floats, Floats, Floats]:
        """The points c (n, 3) of the surface closest to unit points p (n, 3) around `start` (n, 3), which is near it.

        With |phi| there (n,), and the sines (n,) of the angle between p - c and the normal.
        """
        return self._settled(p, self._project(start)[0])

    @cached_property
    def slope_bound(self) -> float:
        """A bound on |g| within the cube, from samples all over it and near the surface."""
        side = (np.arange(24) + 0.5) / 12 - 1
        x = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
        with suppress(NoSurfaceError):
            x = np.concatenate([x, self._sketch])
        return SLOPE_SAFETY * max(
            float(np.linalg.norm(self.at(x[part], 1)[1], axis=1).max()) for part in _parts(len(x))
        )

    @cached_property
    def _coarse_cells(self) -> tuple[Floats, Floats]:
        """Centres of the cells of the first grid, and phi there."""
        side = (np.arange(SKETCH) + 0.5) * (2 / SKETCH) - 1
        x = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
        return x, np.concatenate([self.at(x[part], 0)[0] for part in _parts(len(x))])

    @cached_property
    def _sketch(self) -> Floats:
        """Points (m, 3) of the surface, some thousand."""
        x, phi = self._coarse_cells
        return self._feet(x[np.abs(phi) < 2 / SKETCH], phi)

    @cached_property
    def _surface(self) -> tuple[Floats, cKDTree]:
        """Points (m, 3) of the surface, closer to each other, and a tree of them."""
        x, phi = self._coarse_cells
        everything, half = phi, 1 / SKETCH
        corners = np.stack(np.meshgrid(*3 * [[-0.5, 0.5]], indexing="ij"), axis=-1).reshape(-1, 3)
        for _ in range(FINER):
            near = np.abs(phi) < self.slope_bound * np.sqrt(3) * half
            x = (x[near][:, None] + half * corners).reshape(-1, 3)
            phi = np.concatenate([self.at(x[part], 0)[0] for part in _parts(len(x))] or [np.empty(0)])
            half /= 2
        feet = self._feet(x[np.abs(phi) < 1.2 * half], everything)
        return feet, cKDTree(feet)

    def _feet(self, x: Floats, phi: Floats) -> Floats:
        found = [self._project(x[part]) for part in _parts(len(x))]
        feet: Floats = np.concatenate([c[np.abs(residual) < 5 * ON_SURFACE] for c, residual, _ in found] or [x])
        feet = feet[(np.abs(feet) <= 1).all(axis=1)]
        if not len(feet):
            raise NoSurfaceError(0.0, float(phi.min()) / self.frame.scale, float(phi.max()) / self.frame.scale)
        return feet

    def _project(self, x: Floats, rounds: int = ROUNDS) -> tuple[Floats, Floats, Floats]:
        """x (n, 3) moved onto the surface, phi (n,) and g (n, 3) there, by Newton steps -phi g / |g|^2.

        A step that does not bring |phi| down is halved; a point leaves the cube by no more than a tenth.
        """
        x = np.clip(x, -1, 1)
        phi, g = self.at(x, 1)
        going, share = np.flatnonzero(np.abs(phi) > ON_SURFACE), np.ones(len(x))
        for _ in range(rounds):
            if not len(going):
                break
            slope = np.linalg.norm(g[going], axis=1)
            unit = g[going] / np.maximum(slope, 1e-12)[:, None]
            length = np.minimum(np.abs(phi[going]) / np.maximum(slope, SHORTEST_G), LONGEST_STEP) * share[going]
            target = np.clip(x[going] - (np.sign(phi[going]) * length)[:, None] * unit, -1.1, 1.1)
            new_phi, new_g = self.at(target, 1)
            better = np.abs(new_phi) < np.abs(phi[going])
            rows = going[better]
            x[rows], phi[rows], g[rows], share[rows] = target[better], new_phi[better], new_g[better], 1.0
            share[going[~better]] /= 2
            going = going[(np.abs(phi[going]) > ON_SURFACE) & (share[going] > 1 / 64)]
        return x, phi, g

    def _closest(self, p: Floats) -> tuple[Floats, Floats, Floats]:
        """The closest points c (n, 3) to p (n, 3), |phi| there (n,), and the sines (n,) of the angle to the normal."""
        seeds, tree = self._surface
        far, row = tree.query(p, workers=-1)
        c = seeds[row]
        # Near the surface the foot of p itself is likely to be nearer than any seed.
        near = np.flatnonzero(far < 8 / (SKETCH * 2**FINER))
        foot, phi, _ = self._project(p[near])
        better = (np.abs(phi) < 10 * ON_SURFACE) & (np.linalg.norm(p[near] - foot, axis=1) < far[near])
        c[near[better]] = foot[better]
        return self._settled(p, c)

    def _settled(self, p: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        """As _closest, from points c (n, 3) of the surface on: the closest ones around them."""
        going, share = np.arange(len(p)), np.ones(len(p))
        phi, g, hessian = self.at(c, 2)
        for _ in range(SIDEWAYS):
            step, sine = _sideways(p[going] - c[going], g[going], hessian[going])
            on = (sine > ALIGNED) & (share[going] > 1 / 16)
            going, step = going[on], step[on]
            if not len(going):
                break
            target, _, _ = self._project(c[going] + share[going, None] * step, 4)
            new_phi, new_g, new_hessian = self.at(target, 2)
            better = (np.abs(new_phi) < 10 * ON_SURFACE) & (
                np.linalg.norm(p[going] - target, axis=1) < np.linalg.norm(p[going] - c[going], axis=1)
            )
            rows = going[better]
            c[rows], phi[rows], g[rows], hessian[rows] = (
                target[better],
                new_phi[better],
                new_g[better],
                new_hessian[better],
            )
            share[rows] = 1.0
            share[going[~better]] /= 4
        return c, np.abs(phi), _sideways(p - c, g, hessian)[1]

    def _cast(self, start: Floats, way: Floats, limit: float) -> tuple[Floats, Floats]:
        """The distances (n,) at which unit rays first cross the surface, or NaN, and the normals (n, 3) there."""
        with np.errstate(divide="ignore", invalid="ignore"):
            walls = np.stack([(-1 - start) / way, (1 - start) / way])
        # Parallel to a pair of walls: always between them, or never.
        never = ((way == 0) & (np.abs(start) > 1)).any(axis=1)
        first, last = (np.where(way == 0, -np.inf, walls.min(axis=0)), np.where(way == 0, np.inf, walls.max(axis=0)))
        t, end = np.maximum(first.max(axis=1), 0), np.minimum(last.min(axis=1), limit)
        out, normals = np.full(len(start), np.nan), np.full((len(start), 3), np.nan)
        going = np.flatnonzero((t < end) & ~never)
        phi = np.empty(len(start))
        phi[going] = self.at(start[going] + t[going, None] * way[going], 0)[0]
        before, ahead = t.copy(), phi.copy()
        crossed: list[NDArray[np.int64]] = []
        while len(going):
            before[going], phi[going] = t[going], ahead[going]
            t[going] += np.maximum(np.abs(phi[going]) / self.slope_bound, SHORTEST_RAY_STEP)
            t[going] = np.minimum(t[going], end[going])
            ahead[going] = self.at(start[going] + t[going, None] * way[going], 0)[0]
            changed = (ahead[going] < 0) != (phi[going] < 0)
            crossed.append(going[changed])
            going = going[~changed & (t[going] < end[going])]
        rows = np.concatenate(crossed) if crossed else np.empty(0, np.int64)
        out[rows] = self.between(start[rows], way[rows], before[rows], t[rows], phi[rows], ahead[rows])
        if len(rows):
            g = self.at(start[rows] + out[rows, None] * way[rows], 1)[1]
            normals[rows] = g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-12)
        return out, normals

    def between(
        self, start: Floats, way: Floats, low: Floats, high: Floats, phi_low: Floats, phi_high: Floats
    ) -> Floats:
        """Where phi changes sign between `low` and `high` (n,): the Illinois method, which keeps it between the two."""
        low, high, phi_low, phi_high = low.copy(), high.copy(), phi_low.copy(), phi_high.copy()
        for _ in range(12):
            gap = phi_high - phi_low
            middle = np.clip(low - phi_low * (high - low) / np.where(gap == 0, 1, gap), low, high)
            phi = self.at(start + middle[:, None] * way, 0)[0] if len(start) else phi_low
            same = (phi < 0) == (phi_low < 0)
            low, high = np.where(same, middle, low), np.where(same, high, middle)
            phi_low, phi_high = np.where(same, phi, phi_low / 2), np.where(same, phi_high / 2, phi)
            if not len(start) or np.abs(phi).max() < ON_SURFACE / 4:
                return middle
        nearer: Floats = np.where(np.abs(phi_low) < np.abs(phi_high), low, high)
        return nearer

    def _unit(self, points: ArrayLike) -> Floats:
        return self.frame.to_unit(_vectors(points))


def curvatures(g: Floats, hessian: Floats) -> tuple[Floats, Floats]:
    """Mean and Gaussian curvature (n,) of level sets, from g (n, 3) and the Hessian B (n, 3, 3).

    Goldman, Curvature formulas for implicit curves and surfaces, 2005: K = g adj(B) g / |g|^4, and the mean is
    (|g|^2 tr B - g B g) / (2 |g|^3), here with the sign that a ball has a positive one.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.linalg.norm(g, axis=1)
        along = np.einsum("ni,nij,nj->n", g, hessian, g)
        mean = (slope**2 * np.trace(hessian, axis1=1, axis2=2) - along) / (2 * slope**3)
        a, b, c = hessian[:, 0], hessian[:, 1], hessian[:, 2]
        adjugate = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
        gaussian = np.einsum("ni,nij,nj->n", g, adjugate, g) / slope**4
    return mean, gaussian


def _sideways(off: Floats, g: Floats, hessian: Floats) -> tuple[Floats, Floats]:
    """The step (n, 3) along the surface at c towards where p = c + off is straight above; the sine (n,) of the angle.

    Newton's for the distance from p along the surface: (1 + h S) s = t, with t the part of `off` along the surface, h
    the height above it and S the shape operator. Where that matrix is not positive, beyond a focus, s is t itself: it
    leads nearer as well.
    """
    slope = np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-12)
    n = g / slope
    height = (off * n).sum(axis=1)
    along = off - height[:, None] * n
    flat = np.eye(3) - n[:, :, None] * n[:, None, :]
    shape = flat @ (hessian / slope[:, :, None]) @ flat
    mean, gaussian = curvatures(g, hessian)
    spread = np.sqrt(np.maximum(mean**2 - gaussian, 0))
    least = 1 + np.minimum(height * (mean - spread), height * (mean + spread))
    matrix = np.where((least > 0.1)[:, None, None], np.eye(3) + height[:, None, None] * shape, np.eye(3))
    step = np.linalg.solve(matrix, along[:, :, None])[:, :, 0]
    length, distance = np.linalg.norm(step, axis=1), np.linalg.norm(off, axis=1)
    step *= np.minimum(1, LONGEST_STEP / np.maximum(length, 1e-12))[:, None]
    # Nearer than what float32 tells apart there is no angle to speak of.
    sine = np.where(distance > 100 * ON_SURFACE, np.linalg.norm(along, axis=1) / np.maximum(distance, 1e-12), 0.0)
    return step, sine


def _vectors(values: ArrayLike) -> Floats:
    vectors = np.asarray(values, dtype=np.float64)
    if vectors.ndim != 2 or vectors.shape[1] != 3:
        raise ValueError(f"the vectors have shape {vectors.shape}; they must be (n, 3)")
    return vectors


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))
