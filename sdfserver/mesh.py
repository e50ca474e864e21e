"""TriangleMesh: what comes out, as plain arrays in world units; and what is done to a mesh without its field.

Faces are wound counter-clockwise seen from outside. Nothing here merges vertices: a closed mesh stays closed unless
something is cut off it on purpose.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from sdfserver.errors import ExtractionError, MissingDependencyError

_PATIENCE = 5.0
"""How fast fast-simplification raises its threshold, 0 to 10: lower is slower and truer."""

SUPPORT_POINTS = 500_000
"""Of a larger cloud, points at even steps are looked at to see which components are supported."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TriangleMesh:
    """Triangles in world units, wound counter-clockwise seen from outside.

    vertices: (v, 3) float64.
    faces: (f, 3) int64 rows of `vertices`.
    normals: (v, 3) float32 unit vectors that point outward, or None where they were not computed.
    colors: (v, 3) uint8 red, green and blue, or None where the cloud had none.
    confidence: (v,) float32, how far measured points support the surface there, from 0 (imagined) to 1, or None.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    normals: NDArray[np.float32] | None = None
    colors: NDArray[np.uint8] | None = None
    confidence: NDArray[np.float32] | None = None


def half_edges(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Starts and ends (3f, 2) of the edges of faces (f, 3), as they run round each: those of one face together."""
    return np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1).reshape(-1, 2)


def unit_vectors(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (..., 3) of length one; those without length stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.where(length > 0, length, 1)
    return unit


def face_normals(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    """Area vectors (f, 3): twice the area long, pointing outward."""
    a, b, c = vertices[faces[:, 0]], vertices[faces[:, 1]], vertices[faces[:, 2]]
    return np.cross(b - a, c - a)


def face_areas(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    """Areas (f,)."""
    areas: NDArray[np.float64] = np.linalg.norm(face_normals(vertices, faces), axis=1) / 2
    return areas


def vertex_normals(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit normals (v, 3) outward: the mean of the adjacent faces' by area; (0, 0, 1) where that vanishes."""
    area_vectors = face_normals(vertices, faces)
    total = np.stack(
        [np.bincount(faces.ravel(), np.repeat(area_vectors[:, axis], 3), minlength=len(vertices)) for axis in range(3)],
        axis=1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normals = np.where(length > 0, total / np.where(length > 0, length, 1), (0.0, 0.0, 1.0))
    return normals.astype(np.float32)


def face_components(faces: NDArray[np.int64], n_vertices: int) -> NDArray[np.int64]:
    """Labels (f,), 0 and up: faces with one label are connected through shared vertices."""
    pairs = np.concatenate([faces[:, :2], faces[:, 1:]])
    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(n_vertices, n_vertices))
    _, labels = connected_components(graph, directed=False)
    _, dense = np.unique(labels[faces[:, 0]], return_inverse=True)
    return dense.astype(np.int64)


def keep_faces(mesh: TriangleMesh, keep: NDArray[np.bool_]) -> TriangleMesh:
    """The mesh of the faces where `keep` (f,) is true, without the vertices that no face uses any more."""
    faces = mesh.faces[keep]
    used = np.zeros(len(mesh.vertices), bool)
    used[faces] = True
    row = np.cumsum(used, dtype=np.int64) - 1
    return replace(
        mesh,
        vertices=mesh.vertices[used],
        faces=row[faces],
        normals=None if mesh.normals is None else mesh.normals[used],
        colors=None if mesh.colors is None else mesh.colors[used],
        confidence=None if mesh.confidence is None else mesh.confidence[used],
    )


def drop_small_components(mesh: TriangleMesh, min_share: float) -> TriangleMesh:
    """`mesh` without the connected components that have less than `min_share` (0..1) of the largest one's area."""
    if min_share <= 0:
        return mesh
    labels = face_components(mesh.faces, len(mesh.vertices))
    areas = np.bincount(labels, face_areas(mesh.vertices, mesh.faces))
    return keep_faces(mesh, (areas >= min_share * areas.max())[labels])


def drop_unsupported_components(
    mesh: TriangleMesh, points: NDArray[np.float64], *, min_points: int = 8, device: str = "cpu"
) -> TriangleMesh:
    """`mesh` without the connected components that fewer than `min_points` of `points` (n, 3) are nearest to.

    A sheet that the fit left in empty space, or a bubble beside the surface, has no measurement of its own. The
    component with the most points stays in any case. The nearest vertices are looked for on `device`.
    """
    labels = face_components(mesh.faces, len(mesh.vertices))
    if labels.max(initial=0) == 0:
        return mesh
    component = np.zeros(len(mesh.vertices), np.int64)
    component[mesh.faces] = labels[:, None]
    step = -(-len(points) // SUPPORT_POINTS)
    from sdfserver.neighbours import neighbours_of  # here: it needs torch, and what else is in this module does not

    _, nearest = neighbours_of(mesh.vertices, device).query(points[::step], 1)
    support = np.bincount(component[nearest[:, 0]], minlength=labels.max() + 1)
    keep = support >= min(-(-min_points // step), support.max())
    return mesh if keep.all() else keep_faces(mesh, keep[labels])


def trim_to_points(mesh: TriangleMesh, points: NDArray[np.float64], max_distance: float) -> TriangleMesh:
    """`mesh` without the faces that have a vertex farther than `max_distance` from every one of `points` (n, 3).

    For surfaces that are open in truth: a signed distance field draws a lid over each opening. The new border runs
    along edges of the mesh. Mesh, points and distance share their frame. Raises ExtractionError if nothing is left.
    """
    tree = cKDTree(points)
    distance, _ = tree.query(mesh.vertices, distance_upper_bound=np.nextafter(max_distance, np.inf))
    near = np.isfinite(distance)
    trimmed = keep_faces(mesh, near[mesh.faces].all(axis=1))
    if not len(trimmed.faces):
        closest, _ = tree.query(mesh.vertices)
        raise ExtractionError(
            f"trimming at {max_distance:g} leaves nothing: "
            f"the vertices lie {closest.min():.4g} to {closest.max():.4g} from the points"
        )
    return trimmed


def simplify(mesh: TriangleMesh, target_faces: int) -> TriangleMesh:
    """`mesh` with about `target_faces` faces, by collapsing the edges that change its shape least.

    Garland and Heckbert, Surface simplification using quadric error metrics, SIGGRAPH 1997; collapses that would turn a
    face over or pinch the surface are refused, so a closed mesh stays closed. Normals become those of the new faces.
    A mesh that has no more faces than that is returned as it is.

    Not for two threads at once: the library keeps its mesh in a global. Raises MissingDependencyError where
    `fast-simplification` is not installed.
    """
    if len(mesh.faces) <= target_faces:
        return mesh
    try:
        import fast_simplification
    except ImportError as error:
        raise MissingDependencyError(
            "a target number of faces needs fast-simplification: pip install fast-simplification"
        ) from error
    # Its threshold on the error is absolute, and quadrics of far-off coordinates lose their digits.
    center = (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0)) / 2
    scale = float(np.ptp(mesh.vertices, axis=0).max()) or 1.0
    vertices, faces = fast_simplification.simplify(
        (mesh.vertices - center) / scale, mesh.faces.astype(np.int32), target_count=target_faces, agg=_PATIENCE
    )
    vertices, faces = vertices * scale + center, faces.astype(np.int64)
    return TriangleMesh(vertices=vertices, faces=faces, normals=vertex_normals(vertices, faces))
