"""What the vertices of a mesh have from the points around them: colours.

World units. Neighbours are looked for on the device that is named.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh, vertex_normals
from sdfserver.neighbours import Neighbours, neighbours_of

NEAREST = 4
"""Points whose colours are mixed at a vertex."""
AROUND = 32
"""Points among which those are looked for where some of the nearest lie on another side."""
_AT_A_TIME = 1 << 16
"""Vertices that are looked at together: about 100 MB where all of them have to look AROUND."""


def colors_of(mesh: TriangleMesh, cloud: PointCloud, device: str = "cpu") -> NDArray[np.uint8] | None:
    """Colours (v, 3) for the vertices of `mesh`, from those of the `cloud`; None where it has none.

    The mean of the NEAREST points on the vertex's side, weighted by the inverse square of their distance (Shepard, A
    two-dimensional interpolation function for irregularly-spaced data, 1968). On its side are points whose normals
    turn less than a quarter from the vertex's, so that the two faces of a thin wall keep their colours; where there are
    none among the AROUND nearest, the nearest points stand in. What is averaged are the bytes as they are: sRGB is
    spaced about as evenly as the eye tells colours apart, and no mean of light is meant.
    """
    if cloud.colors is None:
        return None
    normals = vertex_normals(mesh.vertices, mesh.faces) if mesh.normals is None else mesh.normals
    points = neighbours_of(cloud.points, device)
    colors = np.empty((len(mesh.vertices), 3), np.uint8)
    for start in range(0, len(colors), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        colors[part] = _mixed(points, cloud, cloud.colors, mesh.vertices[part], normals[part])
    return colors


def _mixed(
    points: Neighbours,
    cloud: PointCloud,
    colors: NDArray[np.uint8],
    vertices: NDArray[np.float64],
    normals: NDArray[np.float32],
) -> NDArray[np.uint8]:
    distance, rows = points.query(vertices, min(NEAREST, len(cloud.points)))
    weight = _weights(distance)
    if cloud.normals is not None:
        beside = _beside(cloud.normals[rows], normals)
        odd = np.flatnonzero(~beside.all(axis=1))
        if odd.size:
            far, far_rows = points.query(vertices[odd], min(AROUND, len(cloud.points)))
            beside = _beside(cloud.normals[far_rows], normals[odd])
            # Those on the vertex's side first, the nearest of them first.
            order = np.argsort(~beside, axis=1, kind="stable")[:, : rows.shape[1]]
            beside = np.take_along_axis(beside, order, axis=1)
            beside |= ~beside.any(axis=1, keepdims=True)
            rows[odd] = np.take_along_axis(far_rows, order, axis=1)
            weight[odd] = _weights(np.take_along_axis(far, order, axis=1)) * beside
    mean = np.einsum("nk,nki->ni", weight, colors[rows]) / weight.sum(axis=1, keepdims=True)
    mixed: NDArray[np.uint8] = np.rint(mean).astype(np.uint8)
    return mixed


def _beside(point_normals: NDArray[np.float64], normals: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points (n, k) face the side that the vertices (n,) do."""
    beside: NDArray[np.bool_] = np.einsum("nki,ni->nk", point_normals, normals) > 0
    return beside


def _weights(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse squares of distances (n, k), up to a factor for each row; a point at distance zero weighs all."""
    reach = np.maximum(distance.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    weights: NDArray[np.float64] = 1 / ((distance / reach) ** 2 + 1e-6)
    return weights


def attributes_from(mesh: TriangleMesh, simpler: TriangleMesh) -> TriangleMesh:
    """`simpler`, a mesh of the same surface, with colours and confidence of the nearest vertices of `mesh`."""
    if mesh.colors is None and mesh.confidence is None:
        return simpler
    _, nearest = cKDTree(mesh.vertices).query(simpler.vertices)
    return replace(
        simpler,
        colors=None if mesh.colors is None else mesh.colors[nearest],
        confidence=None if mesh.confidence is None else mesh.confidence[nearest],
    )
