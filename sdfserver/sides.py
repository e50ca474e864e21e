"""The smooth sides of a surface with creases, as quadrics that a cloud's points and normals tell.

Close to a crease a fitted field is round, but the points and normals of a good cloud are not. Beside each point, those
neighbours that have its normal, or nearly, are on its side of any crease; the height of the surface over the point's
tangent plane is a quadratic fitted to their heights and slopes (a jet). Such a jet goes on smoothly beyond the crease,
and where two jets meet, the crease is.

Lengths are those of the points. Distances are positive where normals point.

Jets: Cazals and Pouget, Estimating differential quantities using polynomial fitting of osculating jets, SGP 2003; their
weights over place and normal are those of bilateral filters: Jones, Durand and Desbrun, Non-iterative,
feature-preserving mesh smoothing, SIGGRAPH 2003.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sdfserver.mesh import unit_vectors

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

SAME = math.radians(12.0)
"""Standard deviation of the weight that normals get by their angle: on one side they differ by little more."""
WIDE = 1.5
"""Standard deviation, in spacings, of the weight that neighbours of a point get by their distance."""
SETTLING = 4
"""Means of normals that a point's own is replaced by, one after the other."""
STIFF = 0.3
"""Weight of a flat surface in the fit, in points: curvature is not made out of noise."""
STEEP = 0.3
"""A neighbour with less than this for the cosine between its normal and the point's tells no slope."""


def dot(a: Floats, b: Floats) -> Floats:
    """Products (...,) of vectors (..., n)."""
    products: Floats = np.einsum("...i,...i->...", a, b)
    return products


def angle(a: Floats, b: Floats) -> Floats:
    """Angles (...,), radians, between unit vectors (..., 3); by the chord, which tells small ones as well."""
    angles: Floats = 2 * np.arcsin(np.minimum(np.linalg.norm(a - b, axis=-1) / 2, 1))
    return angles


@dataclass(frozen=True, eq=False)
class Jets:
    """For each of m points of a cloud the surface on its side, as z = h(x, y) in a frame of its own, in spacings.

    places, spacings: (m, 3) and (m,), of the points. normals: (m, 3), the mean normal on the point's side. support:
    (m,), the weight of all neighbours on it, in points. frames: (m, 3, 3), axes in rows. coefficients: (m, 6).
    """

    places: Floats
    spacings: Floats
    normals: Floats
    support: Floats
    frames: Floats
    coefficients: Floats

    @classmethod
    def fitted(
        cls, places: Floats, normals: Floats, near_places: Floats, near_normals: Floats, spacings: Floats
    ) -> "Jets":
        """At `places` (m, 3) with `normals`, from neighbours (m, k, 3), themselves among them, for `spacings` (m,)."""
        offset = (near_places - places[:, None]) / spacings[:, None, None]
        by_place = np.exp(-dot(offset, offset) / (2 * WIDE**2))
        for _ in range(SETTLING):
            weights = by_place * _alike(angle(normals[:, None], near_normals))
            normals = unit_vectors(np.einsum("mk,mki->mi", weights, near_normals))
        weights = by_place * _alike(angle(normals[:, None], near_normals))
        across = unit_vectors(np.cross(normals, np.eye(3)[np.abs(normals).argmin(axis=1)]))
        frames = np.stack([across, np.cross(normals, across), normals], axis=1)
        return cls(
            places=places,
            spacings=spacings,
            normals=normals,
            support=weights.sum(axis=1),
            frames=frames,
            coefficients=_jets(offset @ frames.mT, near_normals @ frames.mT, weights),
        )

    @classmethod
    def joined(cls, parts: "list[Jets]") -> "Jets":
        """One after the other."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _names(cls)})

    def at(self, rows: Rows, x: Floats) -> tuple[Floats, Floats]:
        """Distances (...,) from the jets `rows` (...,) to x (..., 3), and the jets' unit normals (..., 3) beside it."""
        h, spacing, frame = self.coefficients[rows], self.spacings[rows], self.frames[rows]
        local = np.einsum("...ai,...i->...a", frame, x - self.places[rows]) / spacing[..., None]
        along, over, height = local[..., 0], local[..., 1], local[..., 2]
        slope_x = h[..., 1] + h[..., 3] * along + h[..., 4] * over
        slope_y = h[..., 2] + h[..., 4] * along + h[..., 5] * over
        surface = h[..., 0] + (h[..., 1] + slope_x) * along / 2 + (h[..., 2] + slope_y) * over / 2
        gradient = np.stack([-slope_x, -slope_y, np.ones_like(height)], axis=-1)
        length = np.linalg.norm(gradient, axis=-1)
        normals = np.einsum("...ai,...a->...i", frame, gradient / length[..., None])
        return (height - surface) / length * spacing, normals

    def bends(self) -> Floats:
        """Second derivatives (m, 3, 3) of the heights, as forms on space."""
        bend = self.coefficients[:, [[3, 4], [4, 5]]] / self.spacings[:, None, None]
        tangents = self.frames[:, :2]
        return tangents.mT @ bend @ tangents


def _alike(angles: Floats) -> Floats:
    return np.exp(-(angles**2) / (2 * SAME**2))


def _jets(local: Floats, normals: Floats, weights: Floats) -> Floats:
    """Coefficients (m, 6) of h = c0 + c1 x + c2 y + (c3 x^2 + 2 c4 x y + c5 y^2) / 2: weighted least squares.

    Each neighbour, `local` (m, k, 3) with `normals` (m, k, 3), tells a height and two slopes, in spacings.
    """
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    weights = np.where(normals[..., 2] < STEEP, 0, weights)
    upward = np.maximum(normals[..., 2], STEEP)
    zero, one = np.zeros_like(x), np.ones_like(x)
    terms = np.concatenate(
        [
            np.stack([one, x, y, x * x / 2, x * y, y * y / 2], axis=-1),
            np.stack([zero, one, zero, x, y, zero], axis=-1),
            np.stack([zero, zero, one, zero, x, y], axis=-1),
        ],
        axis=1,
    )
    values = np.concatenate([z, -normals[..., 0] / upward, -normals[..., 1] / upward], axis=1)
    weighted = terms * np.concatenate([weights] * 3, axis=1)[..., None]
    system = weighted.mT @ terms + np.diag([1e-6, 1e-6, 1e-6, STIFF, STIFF, STIFF])
    found: Floats = np.linalg.solve(system, weighted.mT @ values[..., None])[..., 0]
    return found


@dataclass(eq=False)
class Sides:
    """Quadrics n.(x - p) - (x - p)' B (x - p) / 2: for each of c vertices, the side of the surface that it is on.

    places p: (c, 3). normals n: (c, 3). bends B: (c, 3, 3).
    """

    places: Floats
    normals: Floats
    bends: Floats

    @classmethod
    def joined(cls, parts: "list[Sides]") -> "Sides":
        """One after the other."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _names(cls)})

    def at(self, rows: Rows | slice, x: Floats) -> tuple[Floats, Floats]:
        """Distances (r,) from the sides `rows` (r,) to x (r, 3), and their unit normals (r, 3) beside it."""
        offset = x - self.places[rows]
        bent = (self.bends[rows] @ offset[..., None])[..., 0]
        gradient = self.normals[rows] - bent
        length = np.linalg.norm(gradient, axis=1)
        return (dot(self.normals[rows], offset) - dot(offset, bent) / 2) / length, gradient / length[:, None]

    def take(self, rows: Rows, of: Rows, x: Floats) -> None:
        """Puts the vertices `rows` (r,), which are at x (r, 3), on the sides of the vertices `of` (r,)."""
        distances, normals = self.at(of, x)
        self.bends[rows] = self.bends[of]
        self.places[rows], self.normals[rows] = x - distances[:, None] * normals, normals


def _names(kind: type[Jets] | type[Sides]) -> list[str]:
    return [entry.name for entry in fields(kind)]


def blended(jets: Jets, rows: Rows, weights: Floats, x: Floats, distances: Floats, normals: Floats) -> Sides:
    """The mean of jets `rows` (c, k) by `weights` (c, k) at x (c, 3), given their `distances` and `normals` there."""
    mean = unit_vectors(np.einsum("ck,cki->ci", weights, normals))
    bends = np.einsum("ck,ckij->cij", weights, jets.bends()[rows])
    return Sides(places=x - dot(weights, distances)[:, None] * mean, normals=mean, bends=bends)
