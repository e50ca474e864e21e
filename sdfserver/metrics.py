"""How far meshes and clouds are from each other, and whether a mesh is sound.

Everything is in the frame and units of what is passed in, float64. Normals are compared with
their sign: agreement is 1 where they are the same, -1 where one side is inside out. Randomness comes from a seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh, face_areas, face_components, face_normals, half_edges, unit_vectors
from sdfserver.neighbours import Neighbours, along_a_curve, neighbours_of

Vectors = TypeVar("Vectors", NDArray[np.float64], Tensor)

_CHUNK, _DEVICE_CHUNK = 4096, 65_536
"""Points that are looked at together on a CPU, where what is computed for them stays in cache, and elsewhere."""
_NEAREST = (24, 192)
"""How many faces are tried for a point, first and where that does not settle it."""
_BRANCH = 8
"""Groups of faces that make up the next larger group."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClosestPoints:
    """For n points, where a mesh is closest.

    distance: (n,) float64. face: (n,) int64, the face it is on (one of them, on a shared edge). point: (n, 3) float64.
    """

    distance: NDArray[np.float64]
    face: NDArray[np.int64]
    point: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CloudDistances:
    """From the points of a cloud to a mesh: mean, 95th percentile and largest distance.

    normal_agreement: the mean cosine between a point's normal and its closest face's; None for a cloud without normals.
    """

    mean: float
    p95: float
    max: float
    normal_agreement: float | None


@dataclass(frozen=True, kw_only=True)
class MeshDistances:
    """Between a mesh and a reference, from samples spread evenly over both.

    accuracy: mean distance from the mesh to the reference. completeness: mean distance from the reference to the mesh.
    chamfer: half the sum of the two. hausdorff: the largest distance either way.
    normal_consistency: the mean cosine between the normals at a sample and where the other is closest, over both ways.
    """

    accuracy: float
    completeness: float
    chamfer: float
    hausdorff: float
    normal_consistency: float


@dataclass(frozen=True, kw_only=True)
class MeshHealth:
    """What a mesh is as a surface.

    watertight: each edge lies in two faces that run along it in opposite directions.
    components: parts that share no vertex.
    genus: handles, summed over the components that are watertight: 1 - (V - E + F) / 2 each.
    boundary_edges: edges in one face. non_manifold_edges: edges in three or more, or in two that run the same way.
    volume: signed, by the divergence theorem; positive where faces are wound outward; means little unless watertight.
    """

    vertices: int
    faces: int
    watertight: bool
    components: int
    genus: int
    area: float
    volume: float
    boundary_edges: int
    non_manifold_edges: int


def cloud_to_mesh(
    cloud: PointCloud,
    mesh: TriangleMesh,
    *,
    max_points: int | None = None,
    closest: ClosestPoints | None = None,
    device: torch.device | str = "cpu",
) -> CloudDistances:
    """Distances and normal agreement from `cloud` to `mesh`, in their common frame.

    Of more than `max_points` points, that many are taken at even steps through the cloud: always the same. `closest` is
    where the mesh is closest to these, if it is known.
    """
    some = evenly(len(cloud.points), max_points)
    if closest is None:
        closest = closest_on_mesh(cloud.points[some], mesh, device=device)
    agreement = None
    if cloud.normals is not None:
        normals = unit_vectors(face_normals(mesh.vertices, mesh.faces)[closest.face])
        agreement = float((unit_vectors(cloud.normals[some]) * normals).sum(axis=1).mean())
    return CloudDistances(
        mean=float(closest.distance.mean()),
        p95=float(np.percentile(closest.distance, 95)),
        max=float(closest.distance.max()),
        normal_agreement=agreement,
    )


def compare_meshes(
    mesh: TriangleMesh, reference: TriangleMesh, *, samples: int = 100_000, seed: int = 0
) -> MeshDistances:
    """Chamfer and Hausdorff distance and normal consistency, from `samples` points on each of the two meshes."""
    rng = np.random.default_rng(seed)
    points, normals = sample_surface(mesh, samples, rng)
    reference_points, reference_normals = sample_surface(reference, samples, rng)
    to_reference, to_mesh = closest_on_mesh(points, reference), closest_on_mesh(reference_points, mesh)
    at_reference = unit_vectors(face_normals(reference.vertices, reference.faces)[to_reference.face])
    at_mesh = unit_vectors(face_normals(mesh.vertices, mesh.faces)[to_mesh.face])
    accuracy, completeness = float(to_reference.distance.mean()), float(to_mesh.distance.mean())
    cosines = (normals * at_reference).sum(axis=1), (reference_normals * at_mesh).sum(axis=1)
    return MeshDistances(
        accuracy=accuracy,
        completeness=completeness,
        chamfer=(accuracy + completeness) / 2,
        hausdorff=float(max(to_reference.distance.max(), to_mesh.distance.max())),
        normal_consistency=float((cosines[0].mean() + cosines[1].mean()) / 2),
    )


def mesh_health(mesh: TriangleMesh, *, device: torch.device | str = "cpu") -> MeshHealth:
    """Whether `mesh` is closed and manifold, its parts and genus, its area and volume."""
    halves = half_edges(mesh.faces)
    low, high = np.sort(halves, axis=1).T
    forward = halves[:, 0] == low
    # PyTorch's is several times faster than NumPy's.
    keys = torch.from_numpy(low * len(mesh.vertices) + high).to(device)
    key, edge, count = (found.cpu().numpy() for found in torch.unique(keys, return_inverse=True, return_counts=True))
    balanced = np.bincount(edge, np.where(forward, 1, -1), minlength=len(key)) == 0
    sound = (count == 2) & balanced
    label = face_components(mesh.faces, len(mesh.vertices))
    return MeshHealth(
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        watertight=bool(len(key) and sound.all()),
        components=int(label.max(initial=-1)) + 1,
        genus=_genus(mesh.faces, label, edge, sound),
        area=float(face_areas(mesh.vertices, mesh.faces).sum()),
        volume=_volume(mesh),
        boundary_edges=int((count == 1).sum()),
        non_manifold_edges=int((~sound & (count > 1)).sum()),
    )


def closest_on_mesh(
    points: NDArray[np.float64], mesh: TriangleMesh, *, device: torch.device | str = "cpu"
) -> ClosestPoints:
    """The exact closest points of `mesh` to `points` (n, 3); most of it is computed on `device`.

    First the faces with the nearest centres are tried. The best of them is the answer if the next centre is farther
    than it by more than the largest radius of a face, as it is on an even mesh for points near it. For the other
    points, whatever lies in a cylinder farther off than the best so far is left out, from a few large groups of faces
    down to single ones, and the distance to those that remain is computed.
    """
    corners = mesh.vertices[mesh.faces]
    centers = corners.mean(axis=1)
    radii = np.sqrt(((corners - centers[:, None]) ** 2).sum(axis=2).max(axis=1))
    triangles, near = Triangles(mesh.vertices, mesh.faces, device), neighbours_of(centers, device)
    chunk = _CHUNK if torch.device(device).type == "cpu" else _DEVICE_CHUNK
    face = np.zeros(len(points), np.int64)
    rest = _along_a_curve(points)  # neighbours one after another: half the time of a random order
    for k in _NEAREST:
        if not 0 < len(rest) * k <= len(points) * _NEAREST[0]:
            break  # none are left, or so many are far from the mesh that only the cylinders will do
        unfinished = []
        for part in _chunks(rest, chunk * _NEAREST[0] // k):
            face[part], finished = _among_nearest(points[part], min(k, len(radii)), triangles, near, radii)
            unfinished.append(part[~finished])
        rest = np.concatenate(unfinished)
    if len(rest):
        order = _along_a_curve(centers)
        levels = _cylinders(corners[order])
        for part in _chunks(rest, _CHUNK):
            face[part] = _among_all(points[part], face[part], triangles, levels, order)
    point = np.empty((len(points), 3))
    for part in _chunks(np.arange(len(points)), chunk):
        point[part] = triangles.closest(points[part], face[part])
    return ClosestPoints(distance=np.linalg.norm(point - points, axis=1), face=face, point=point)


def sample_surface(
    mesh: TriangleMesh, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points (n, 3) uniform over the area of `mesh`, and the normals (n, 3) of their faces.

    Within a triangle: Turk, Generating random points in triangles, Graphics Gems 1990.
    """
    area_vectors = face_normals(mesh.vertices, mesh.faces)
    total = np.cumsum(np.linalg.norm(area_vectors, axis=1))
    face = np.minimum(np.searchsorted(total, rng.random(n) * total[-1], side="right"), len(total) - 1)
    s, t = np.sqrt(rng.random((n, 1))), rng.random((n, 1))
    a, b, c = (mesh.vertices[mesh.faces[face, i]] for i in range(3))
    return (1 - s) * a + s * (1 - t) * b + s * t * c, unit_vectors(area_vectors[face])


def crease_points(mesh: TriangleMesh, *, degrees: float = 30.0, step: float | None = None) -> NDArray[np.float64]:
    """Points (n, 3) at even steps along the edges of `mesh` whose two faces turn by more than `degrees`.

    `step` defaults to a 2000th of the diagonal. Edges with one face, or more than two, are no creases.
    """
    face = np.repeat(np.arange(len(mesh.faces)), 3)
    edges, edge, count = np.unique(
        np.sort(half_edges(mesh.faces), axis=1), axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(edge.ravel(), kind="stable")
    first = (np.cumsum(count) - count)[count == 2]
    normals = unit_vectors(face_normals(mesh.vertices, mesh.faces))
    cosine = (normals[face[order[first]]] * normals[face[order[first + 1]]]).sum(axis=1)
    return _along(mesh, edges[count == 2][cosine < np.cos(np.radians(degrees))], step)


def border_points(mesh: TriangleMesh, *, step: float | None = None) -> NDArray[np.float64]:
    """Points (n, 3) at even steps along the edges of `mesh` that have one face; `step` as of crease_points."""
    edges, count = np.unique(np.sort(half_edges(mesh.faces), axis=1), axis=0, return_counts=True)
    return _along(mesh, edges[count == 1], step)


def _along(mesh: TriangleMesh, edges: NDArray[np.int64], step: float | None) -> NDArray[np.float64]:
    a, b = mesh.vertices[edges].swapaxes(0, 1)
    step = step or float(np.linalg.norm(np.ptp(mesh.vertices, axis=0))) / 2000
    parts = np.maximum(1, np.ceil(np.linalg.norm(b - a, axis=1) / step).astype(np.int64))
    row = np.repeat(np.arange(len(a)), parts)
    share = (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts) + 0.5) / parts[row]
    points: NDArray[np.float64] = a[row] + share[:, None] * (b - a)[row]
    return points


class Triangles:
    """Faces prepared on `device` for distances: closest points of many pairs of a point and a face.

    Vectors are columns, (3, n), so that each sum over coordinates is two additions of whole rows.
    """

    def __init__(
        self, vertices: NDArray[np.float64], faces: NDArray[np.int64], device: torch.device | str = "cpu"
    ) -> None:
        self._device = torch.device(device)
        corners = self._there(vertices)[self._there(faces)]
        a, b, c = (corners[:, i].T.contiguous() for i in range(3))
        self._a, self._ab, self._ac = a, b - a, c - a
        # s = ap . dual_b and t = ap . dual_c at the foot a + s ab + t ac of p: from the cross product, because the
        # Gram determinant of a thin triangle loses twice as many digits. NaN for triangles without area.
        normal = torch.linalg.cross(self._ab, self._ac, dim=0)
        self._dual_b = torch.linalg.cross(self._ac, normal, dim=0) / _dot(normal, normal)
        self._dual_c = torch.linalg.cross(normal, self._ab, dim=0) / _dot(normal, normal)

    def _there(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def distance_squared(self, points: NDArray[np.float64], face: NDArray[np.int64]) -> NDArray[np.float64]:
        """Squared distances (n,) of points (n, 3) from faces (n,)."""
        squared: NDArray[np.float64] = self._foot(self._there(points), self._there(face))[0].cpu().numpy()
        return squared

    def barycentric(self, points: NDArray[np.float64], face: NDArray[np.int64]) -> NDArray[np.float64]:
        """The weights (n, 3) of the corners of faces (n,) at their points closest to points (n, 3)."""
        _, s, t = self._foot(self._there(points), self._there(face))
        weights: NDArray[np.float64] = torch.stack([1 - s - t, s, t], dim=1).cpu().numpy()
        return weights

    def closest(self, points: NDArray[np.float64], face: NDArray[np.int64]) -> NDArray[np.float64]:
        """The points (n, 3) of faces (n,) closest to points (n, 3)."""
        on = self._there(face)
        _, s, t = self._foot(self._there(points), on)
        place: NDArray[np.float64] = (self._a[:, on] + s * self._ab[:, on] + t * self._ac[:, on]).T.cpu().numpy()
        return np.ascontiguousarray(place)

    def _foot(self, points: Tensor, face: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distance (n,), and s, t (n,): the closest point is a + s ab + t ac.

        The foot of the perpendicular if it lies within the triangle, else the best of the three edges. Ericson,
        Real-Time Collision Detection, section 5.1. Faces without area have edges alone.
        """
        ab, ac = self._ab[:, face], self._ac[:, face]
        ap = points.T - self._a[:, face]
        bb, bc, cc = _dot(ab, ab), _dot(ab, ac), _dot(ac, ac)
        pb, pc, pp = _dot(ap, ab), _dot(ap, ac), _dot(ap, ap)
        s, t = _dot(ap, self._dual_b[:, face]), _dot(ap, self._dual_c[:, face])
        along_b = (pb / bb).nan_to_num_().clamp_(0, 1)
        along_c = (pc / cc).nan_to_num_().clamp_(0, 1)
        across = ((bb - bc + pc - pb) / (bb - 2 * bc + cc)).nan_to_num_().clamp_(0, 1)
        outside = ~((s >= 0) & (t >= 0) & (s + t <= 1))
        zero = torch.zeros_like(along_b)

        def squared(s: Tensor, t: Tensor) -> Tensor:
            return pp - 2 * (s * pb + t * pc) + s * s * bb + 2 * s * t * bc + t * t * cc

        best = torch.where(outside, torch.inf, zero)
        s, t = torch.where(outside, zero, s), torch.where(outside, zero, t)
        for edge_s, edge_t in ((along_b, zero), (zero, along_c), (1 - across, across)):
            there = torch.where(outside, squared(edge_s, edge_t), torch.inf)
            closer = there < best
            best, s, t = (
                torch.where(closer, there, best),
                torch.where(closer, edge_s, s),
                torch.where(closer, edge_t, t),
            )
        # Once more from the point itself: expanding the square cancels where the distance is small.
        gap = ap - s * ab - t * ac
        return _dot(gap, gap), s, t


def _among_nearest(
    points: NDArray[np.float64], k: int, triangles: Triangles, centers: Neighbours, radii: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The closest (n,) of the k faces with the nearest centres, and whether it must be the closest of all."""
    distance, near = centers.query(points, k)
    best = triangles.distance_squared(points, near[:, 0])
    row, column = np.nonzero(distance[:, 1:] - radii[near[:, 1:]] < np.sqrt(best)[:, None])
    face, best = _improve(points, triangles, row, near[row, column + 1], near[:, 0].copy(), best)
    return face, (k == len(radii)) | (distance[:, -1] - radii.max() > np.sqrt(best))


def _improve(
    points: NDArray[np.float64],
    triangles: Triangles,
    row: NDArray[np.int64],
    candidate: NDArray[np.int64],
    face: NDArray[np.int64],
    best: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """`face` (n,) and the squared distance `best` (n,), or the closer of candidates (m,) for points `row` (m,), rising.

    Of two that are equally close, the one that was there, or else the first.
    """
    if not len(row):
        return face, best
    distance = triangles.distance_squared(points[row], candidate)
    starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    least = np.minimum.reduceat(distance, starts)
    winner = np.flatnonzero(distance == np.repeat(least, np.diff(np.r_[starts, len(row)])))
    winner = winner[np.r_[True, row[winner][1:] != row[winner][:-1]]]
    winner = winner[distance[winner] < best[row[winner]]]
    face[row[winner]], best[row[winner]] = candidate[winner], distance[winner]
    return face, best


@dataclass(frozen=True, eq=False, kw_only=True)
class _Cylinders:
    """Cylinders (m,) that hold groups of faces: a patch of a surface is flat, so they are tight where balls are not.

    center, axis: (3, m), the axis a unit vector, or zero where the patch has no side. radius, half_height: (m,).
    """

    center: NDArray[np.float64]
    axis: NDArray[np.float64]
    radius: NDArray[np.float64]
    half_height: NDArray[np.float64]

    def distance_squared(self, points: NDArray[np.float64], which: NDArray[np.int64]) -> NDArray[np.float64]:
        """At most the squared distance (n,) of points (3, n) from what cylinders (n,) hold."""
        height, across = _along_and_across(points - self.center[:, which], self.axis[:, which])
        height = np.maximum(height - self.half_height[which], 0)
        across = np.maximum(across - self.radius[which], 0)
        squared: NDArray[np.float64] = height * height + across * across
        return squared


def _cylinders(corners: NDArray[np.float64]) -> list[_Cylinders]:
    """Around triangles (f, 3, 3) in an order of neighbours: around each, around each _BRANCH of them, and so on up."""
    a, b, c = (np.ascontiguousarray(corners[:, i].T) for i in range(3))
    middle = (a + b + c) / 3
    side = np.ascontiguousarray(np.cross(b - a, c - a, axis=0))
    levels, size = [], 1
    while True:
        starts = np.arange(0, len(corners), size)
        count = np.diff(np.r_[starts, len(corners)])
        center = np.add.reduceat(middle, starts, axis=1) / count
        axis = np.ascontiguousarray(unit_vectors(np.add.reduceat(side, starts, axis=1).T).T)
        centers, axes = np.repeat(center, count, axis=1), np.repeat(axis, count, axis=1)
        height, across = np.zeros(len(corners)), np.zeros(len(corners))
        for corner in (a, b, c):
            up, out = _along_and_across(corner - centers, axes)
            np.maximum(height, up, out=height)
            np.maximum(across, out, out=across)
        radius, half_height = np.maximum.reduceat(across, starts), np.maximum.reduceat(height, starts)
        levels.append(_Cylinders(center=center, axis=axis, radius=radius, half_height=half_height))
        if len(starts) <= 2 * _BRANCH:
            return levels
        size *= _BRANCH


def _along_and_across(
    offset: NDArray[np.float64], axis: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far offsets (3, n) reach along unit axes (3, n), without sign, and away from them: (n,) and (n,)."""
    along = np.abs(_dot(offset, axis))
    return along, np.sqrt(np.maximum(_dot(offset, offset) - along * along, 0))


def _among_all(
    points: NDArray[np.float64],
    face: NDArray[np.int64],
    triangles: Triangles,
    levels: list[_Cylinders],
    order: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The closest of all faces (n,), given some `face` (n,) for each point and cylinders around faces in `order`."""
    best, columns = triangles.distance_squared(points, face), np.ascontiguousarray(points.T)
    top = len(levels[-1].radius)
    row, group = np.repeat(np.arange(len(points)), top), np.tile(np.arange(top), len(points))
    for depth in range(len(levels) - 1, -1, -1):
        if depth < len(levels) - 1:
            row, group = np.repeat(row, _BRANCH), (group[:, None] * _BRANCH + np.arange(_BRANCH)).ravel()
            there = group < len(levels[depth].radius)
            row, group = row[there], group[there]
        near = levels[depth].distance_squared(columns[:, row], group) < best[row]
        row, group = row[near], group[near]
    return _improve(points, triangles, row, order[group], face.copy(), best)[0]


def _genus(
    faces: NDArray[np.int64], label: NDArray[np.int64], edge: NDArray[np.int64], sound: NDArray[np.bool_]
) -> int:
    """Handles of the watertight components: each face's part (f,), each half-edge's edge (3f,), each edge's state."""
    if not len(faces):
        return 0
    n = int(label.max()) + 1
    part_of_edge = np.zeros(len(sound), np.int64)
    part_of_edge[edge] = np.repeat(label, 3)
    part_of_vertex = np.full(int(faces.max()) + 1, -1)
    part_of_vertex[faces] = label[:, None]
    vertices = np.bincount(part_of_vertex[part_of_vertex >= 0], minlength=n)
    edges = np.bincount(part_of_edge, minlength=n)
    closed = np.bincount(part_of_edge, ~sound, minlength=n) == 0
    euler = vertices - edges + np.bincount(label, minlength=n)
    return int(((2 - euler[closed]) // 2).sum())


def _volume(mesh: TriangleMesh) -> float:
    """A sixth of the sum of a . (b x c) over faces, from the middle of the mesh, so that far-off frames keep digits."""
    if not len(mesh.faces):
        return 0.0
    middle = (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0)) / 2
    a, b, c = (mesh.vertices[mesh.faces[:, i]] - middle for i in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def evenly(n: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of 0..n-1, at even steps."""
    if limit is None or n <= limit:
        return np.arange(n)
    return np.arange(limit) * n // limit


def _chunks(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _along_a_curve(points: NDArray[np.float64]) -> NDArray[np.int64]:
    order: NDArray[np.int64] = along_a_curve(torch.from_numpy(points)).numpy() if len(points) else np.arange(0)
    return order


def _dot(a: Vectors, b: Vectors) -> Vectors:
    product: Vectors = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product
