"""How far off the area and the volume of a mesh may be, from what its cloud and the mesh itself show.

World units; normals point outward. Three things are known of the true surface:

- the points: over a patch of neighbours noise averages out, so that their mean signed distance from the mesh is about
  how far the mesh is off there;
- between points, how far the surface would run off if it turned as much as the normals do from the point to there:
  half the distance times the angle. It is small where the cloud is dense, and large over a hole;
- the mesh's own triangles, which are chords of the surface: by how much follows, to second order, from the normals at
  their corners.

A displacement e of a surface changes its volume by the integral of e over it, and its area by that of 2 H e, H being
the mean curvature; where the normals are off by an angle t the area is off by a share of 1 - cos t.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh, face_areas, face_normals, unit_vectors, vertex_normals
from sdfserver.metrics import ClosestPoints
from sdfserver.neighbours import along_a_curve, neighbours_of

Floats = NDArray[np.float64]
PATCH = 64
"""Points over which noise is averaged."""
LOOKED_AT = 200_000
"""Faces that are asked for the nearest point, at most."""
CHUNK = 1 << 17
"""Faces that are seen to at a time."""


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """How far a mesh may be from the true surface, on average over its area.

    length: of the signed distances of patches, of the gaps between points, and of the scatter that is left.
    turn: 1 - cos of the angle between the mesh's normals and the points', on average.
    variance: of the points about the mesh. Noise that moves points along a curved surface as well leaves them off it,
    on the outer side of its bend, by the variance times the mean curvature.
    """

    length: float
    turn: float
    variance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far off the volume and the area of a closed mesh may be."""

    volume: float
    area: float


def displacement(
    cloud: PointCloud, rows: NDArray[np.int64], closest: ClosestPoints, mesh: TriangleMesh, *, device: str = "cpu"
) -> Displacement:
    """How far `mesh` may be from the surface of `cloud`, whose points in `rows` (n,) are `closest` to it there."""
    if cloud.normals is None:
        raise ValueError("the cloud has no normals; estimate them first")
    points, point_normals = cloud.points[rows], unit_vectors(cloud.normals[rows])
    facing = unit_vectors(face_normals(mesh.vertices, mesh.faces[closest.face]))
    off = ((points - closest.point) * facing).sum(axis=1)
    agreement = (point_normals * facing).sum(axis=1)
    # How much of the area is nearest to which point, and how far from it the surface may run.
    some = mesh.faces[:: -(-len(mesh.faces) // LOOKED_AT)]
    areas, centers = face_areas(mesh.vertices, some), mesh.vertices[some].mean(axis=1)
    far, near = (found[:, 0] for found in neighbours_of(points, device).query(centers, 1))
    cosine = (unit_vectors(face_normals(mesh.vertices, some)) * point_normals[near]).sum(axis=1)
    gap = float((areas * far * np.arccos(np.clip(cosine, -1, 1))).sum()) / 2
    share = np.bincount(near, areas, minlength=len(points))
    order = along_a_curve(torch.from_numpy(points)).numpy()
    patches = np.abs(np.bincount(np.arange(len(points)) // PATCH, (share * off)[order])).sum()
    scatter = 2 * float(np.sqrt((off**2).mean() / len(off)))
    total = max(float(areas.sum()), np.finfo(float).tiny)
    return Displacement(
        length=float(patches + gap) / total + scatter,
        turn=max(0.0, 1 - float(agreement.mean())),
        variance=float((off**2).mean()),
    )


def tolerance(mesh: TriangleMesh, off: Displacement) -> Tolerance:
    """How far off the volume and the area of a closed `mesh` may be that is `off` so much."""
    normals = mesh.normals if mesh.normals is not None else vertex_normals(mesh.vertices, mesh.faces)
    parts = [
        _chords(mesh.vertices[faces], normals[faces].astype(np.float64))
        for faces in np.split(mesh.faces, range(CHUNK, len(mesh.faces), CHUNK))
    ]
    area, below, steep, growth = (float(sum(values)) for values in zip(*parts, strict=True))
    length = off.length + off.variance * growth / (2 * max(area, np.finfo(float).tiny))
    return Tolerance(volume=length * area + below, area=length * growth + off.turn * area + steep)


def _chords(corners: Floats, n: Floats) -> tuple[float, float, float, float]:
    """Of triangles with `corners` (f, 3, 3) on a surface and its normals n (f, 3, 3) there.

    Their area; the volume between them and the surface, and how much larger its area is, to second order; and by how
    much their areas change, each without its sign, for a unit length that the corners move along the normals.
    """
    b, c = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    flat = np.cross(b, c)
    areas = np.linalg.norm(flat, axis=1) / 2
    flat = unit_vectors(flat)
    # The mean height of a quadratic surface over the plane through three of its points is a 24th of the sum of its
    # second differences along the edges.
    edges, ahead = np.roll(corners, -1, axis=1) - corners, np.roll(n, -1, axis=1)
    bends = ((ahead - n) * edges).sum(axis=2)
    bend = np.abs(bends.sum(axis=1)) / 24
    # The surface is larger by half the mean square of its slope, which is linear over the triangle, and by the wedges
    # between the triangles' normals: each edge's height under the surface, a 12th of its second difference, times the
    # angle across it.
    across = ((n + ahead) / 2 * np.cross(edges, flat[:, None])).sum(axis=2)
    wedges = np.abs((bends * across).sum(axis=1)) / 12
    slopes = n - (n * flat[:, None]).sum(axis=2, keepdims=True) * flat[:, None]
    steep = ((slopes**2).sum(axis=(1, 2)) + (slopes.sum(axis=1) ** 2).sum(axis=1)) / 12
    swept = np.cross(n[:, 1] - n[:, 0], c) + np.cross(b, n[:, 2] - n[:, 0])
    growth = np.abs((flat * swept).sum(axis=1)) / 2
    larger = areas @ steep / 2 + wedges.sum()
    return float(areas.sum()), float(areas @ bend), float(larger), float(growth.sum())
