"""Offsets of a field's surface that are as far off as they say, and the walls between two of them.

A fitted field is a distance near its surface only: its level set at d is not d away from the surface, the less so the
farther out. Here the surface phi = 0 is taken out of the field once, as a closed mesh. Distances to that mesh, signed
by the side that it faces, are a field as well, and the level sets of this one are the offsets. A point whose closest
point of the mesh is c is corrected by how far c is off phi = 0, so that it does not matter that triangles are flat.

Unit frame of the field; sdf < 0 inside; normals point outward. An outward offset may leave the cube [-1, 1]^3: it is
extracted from a larger one around it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.config import MeshConfig
from sdfserver.errors import ExtractionError, NoSurfaceError
from sdfserver.extract import ExtractedSurface, ScalarField, extract
from sdfserver.field import SignedDistanceField
from sdfserver.mesh import TriangleMesh, face_normals, half_edges, unit_vectors
from sdfserver.metrics import Triangles, closest_on_mesh, sample_surface
from sdfserver.neighbours import neighbours_of
from sdfserver.queries import FieldQueries

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MARGIN_VOXELS = 3
"""Between an offset and the faces of the cube that it is extracted from."""
RINGS = 12
"""How many rings of triangles are looked at, at most, each around a corner of the best triangle before."""
THINNED = 2.5
"""Edges between the vertices that are looked at first."""
FAR = 6
"""What is this many times as far off needs no others: one of them is as near as any to within a hundredth, mostly to
far less, and the triangles lead on from it."""
ON_EDGE = 1e-9
"""Barycentric weights below this are none: the closest point is on an edge, or a corner."""
CREASED = 0.005
"""Of the level: how far the mesh may be off phi = 0 where first order is enough."""
ON_SURFACE = 0.01
"""How far the mesh and phi = 0 are from each other where they are the same."""
SAMPLES = 4096
"""Points of an offset whose distance from the surface is measured."""
THIN = 0.8
"""Below this share of what was asked for a wall is thinner than that."""
_TOO_THIN = (
    "shell_thin: the wall of {:.4g} is {:.3g} thick where it is thinnest; a finer --resolution, or more faces where "
    "--faces is given, bring it nearer"
)
DEEPEST_CELLS = 24
"""Cells along each side of the box in which the deepest point is looked for, at first."""


class SurfaceDistance:
    """Signed distances from a closed mesh of small triangles, negative inside.

    The closest point is looked for on the triangles around the nearest vertex, and around a corner of the best of these
    as long as that brings it nearer: exact for triangles that are small beside the distance to other parts. The sign is
    that of the face's normal there, on an edge of the sum of two, on a corner of the sum by angles (Baerentzen and
    Aanaes, Signed distance computation using the angle weighted pseudonormal, 2005).
    """

    def __init__(self, vertices: Floats, faces: Ints, device: torch.device | str = "cpu") -> None:
        self.vertices, self.faces = vertices, faces
        self._triangles = Triangles(vertices, faces, device)
        self._near = neighbours_of(vertices, device)
        a, b, _ = (vertices[faces[:, corner]] for corner in range(3))
        self._spacing = THINNED * float(np.linalg.norm(b - a, axis=1).mean())
        _, self._some = np.unique(np.floor(vertices / self._spacing), axis=0, return_index=True)
        self._near_some = neighbours_of(vertices[self._some], device)
        corners = faces.ravel()
        self._around = np.argsort(corners, kind="stable") // 3
        self._count = np.bincount(corners, minlength=len(vertices))
        self._first = np.cumsum(self._count) - self._count
        self._face_normals = unit_vectors(face_normals(vertices, faces))
        self._edge_normals = _edge_normals(faces, self._face_normals)
        self._vertex_normals = _corner_normals(vertices, faces, self._face_normals)

    def closest(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """The closest points (n, 3), signed distances (n,), and the unit vectors (n, 3) along which these grow."""
        return self.on_faces(points, self._closest_faces(points))

    def on_faces(self, points: Floats, face: Ints) -> tuple[Floats, Floats, Floats]:
        """As `closest`, where the faces (n,) are known that the closest points are on."""
        weights = self._triangles.barycentric(points, face)
        foot = np.einsum("nk,nkj->nj", weights, self.vertices[self.faces[face]])
        normal = self._pseudonormals(face, weights)
        off = points - foot
        length = np.linalg.norm(off, axis=1)
        side = np.where((off * normal).sum(axis=1) < 0, -1.0, 1.0)
        near = length < 1e-9
        way = np.where(near[:, None], unit_vectors(normal), off * (side / np.where(near, 1, length))[:, None])
        return foot, side * length, way

    @cached_property
    def outside_far_off(self) -> bool:
        """Whether what is far from the mesh is outside of it; around a room it is not."""
        far = self.vertices.max(axis=0, keepdims=True) + np.ptp(self.vertices, axis=0).max()
        return bool(self.closest(far)[1][0] > 0)

    def deepest(self) -> float:
        """The least signed distance, of the deepest point inside, to within about a hundredth of the mesh's size."""
        low, high = self.vertices.min(axis=0), self.vertices.max(axis=0)
        half = (high - low) / (2 * DEEPEST_CELLS)
        centers, least = low + half * (2 * _lattice(DEEPEST_CELLS) + 1), np.inf
        for _ in range(3):
            depth = self.closest(centers)[1]
            least = min(least, float(depth.min()))
            centers = centers[np.argsort(depth, kind="stable")[:64]]
            half = half / 2
            centers = (centers[:, None] + half * (2 * _lattice(2) - 1)).reshape(-1, 3)
        return least

    def _closest_faces(self, points: Floats) -> Ints:
        far, row = (found[:, 0] for found in self._near_some.query(points, 1))
        vertex, near = self._some[row], far < FAR * self._spacing
        vertex[near] = self._near.query(points[near], 1)[1][:, 0]
        face, best = np.zeros(len(points), np.int64), np.full(len(points), np.inf)
        going = np.arange(len(points))
        for _ in range(RINGS):
            if not len(going):
                break
            around, count = self._first[vertex], self._count[vertex]
            starts = np.cumsum(count) - count
            row = np.repeat(np.arange(len(going)), count)
            candidate = self._around[np.arange(len(row)) + (around - starts)[row]]
            squared = self._triangles.distance_squared(points[going[row]], candidate)
            least = np.minimum.reduceat(squared, starts)
            first = np.flatnonzero(squared == least[row])
            winner = first[np.r_[True, row[first][1:] != row[first][:-1]]]
            better = least < best[going]
            face[going[better]], best[going[better]] = candidate[winner[better]], least[better]
            # Where it is on the rim of what was looked at, there may be a closer one beyond.
            weights = self._triangles.barycentric(points[going[better]], candidate[winner[better]])
            own = (self.faces[candidate[winner[better]]] == vertex[better, None]).argmax(axis=1)
            rim = np.take_along_axis(weights, own[:, None], axis=1)[:, 0] <= ON_EDGE
            corner = self.faces[candidate[winner[better]], weights.argmax(axis=1)]
            going, vertex = going[better][rim], corner[rim]
        return face

    def _pseudonormals(self, face: Ints, weights: Floats) -> Floats:
        """Normals (n, 3), of any length, at points with barycentric `weights` (n, 3) of faces (n,)."""
        normal = self._face_normals[face]
        none = weights <= ON_EDGE
        for corner in range(3):
            others = [(corner + 1) % 3, (corner + 2) % 3]
            on_edge = none[:, corner] & ~none[:, others].any(axis=1)
            normal[on_edge] = self._edge_normals[face[on_edge], others[0]]
            on_corner = none[:, others].all(axis=1)
            normal[on_corner] = self._vertex_normals[self.faces[face[on_corner], corner]]
        return normal


class OffsetField:
    """Signed distances from a surface as a field (extract.ScalarField), in a cube that holds its offset at `level`.

    With `queries`, the same field, closest points are looked for anew where the mesh is off phi = 0.

    `center` and half the side, `size`, place the cube in the unit frame. Here it is [-1, 1]^3, and values are divided
    by `size`, so that the slope is 1.
    """

    def __init__(
        self,
        field: ScalarField,
        surface: SurfaceDistance,
        level: float,
        resolution: int,
        queries: FieldQueries | None = None,
    ) -> None:
        self._field, self._surface, self._level, self._queries = field, surface, level, queries
        low, high = surface.vertices.min(axis=0), surface.vertices.max(axis=0)
        grown = max(0.0, level if surface.outside_far_off else -level)
        room = 1 - 2 * MARGIN_VOXELS / resolution
        self.center, self.size = np.zeros(3), 1.0
        if max(high.max(), -low.min()) + grown > room:
            self.center = (low + high) / 2
            self.size = max(1.0, (float((high - low).max()) / 2 + grown) / room)
        self._step = 2 / resolution * self.size

    @property
    def device(self) -> torch.device:
        """As the field's."""
        return self._field.device

    def value(self, x: Tensor) -> Tensor:
        """The distance (n,) from the mesh at x (n, 3)."""
        return self._there(self._surface.closest(self._unit(x))[1] / self.size, x)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The distance (n,) from phi = 0, and the direction (n, 3) in which it grows."""
        p = self._unit(x)
        foot, distance, way = self._surface.closest(p)
        phi, g = (values.cpu().double().numpy() for values in self._field.value_and_gradient(self._there(foot, x)))
        slope = np.maximum(np.linalg.norm(g, axis=1), 1e-6)
        # How high the foot is over phi = 0, along the way to x.
        cosine = (g * way).sum(axis=1) / slope
        distance += np.clip(phi / slope, -self._step, self._step) * cosine
        # Along a crease, which triangles cut off, phi = 0 is farther from the foot, or faces elsewhere.
        far = np.flatnonzero((np.abs(phi) > CREASED * abs(self._level) * slope) | (cosine < 1 - CREASED))
        if self._queries is not None and len(far):
            off = p[far] - self._queries.closest_from(p[far], foot[far])[0]
            length = np.linalg.norm(off, axis=1)
            true = np.copysign(length, distance[far])
            good = np.abs(true - distance[far]) < self._step
            distance[far[good]] = true[good]
            way[far[good]] = off[good] / true[good, None]
        return self._there(distance / self.size, x), self._there(way, x)

    def unit(self, surface: ExtractedSurface) -> ExtractedSurface:
        """What was extracted from this field, in the unit frame of the one it is an offset of."""
        return ExtractedSurface(**vars(surface) | {"vertices_unit": surface.vertices_unit * self.size + self.center})

    def _unit(self, x: Tensor) -> Floats:
        unit: Floats = x.cpu().double().numpy() * self.size + self.center
        return unit

    def _there(self, values: Floats, like: Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, kw_only=True)
class OffsetError:
    """How far the points of a mesh are from being as far from phi = 0 as they should.

    mean, p95, max: of | distance - |level| | at `samples` points, half of them vertices and half anywhere on the faces.
    """

    mean: float
    p95: float
    max: float
    samples: int


def extract_offset(
    field: ScalarField,
    surface: SurfaceDistance,
    level: float,
    *,
    resolution: int,
    reach: float,
    queries: FieldQueries | None = None,
    projection_steps: int = 2,
    on_progress: Callable[[float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ExtractedSurface:
    """What is at signed distance `level` from `surface`, the phi = 0 of `field`, as triangles in the unit frame.

    As `extract`, on a grid of `resolution`^3 cells in [-1, 1]^3, or in a larger cube where the offset leaves that. With
    `queries`, the same field, closest points along creases are looked for anew.
    Raises NoSurfaceError where `level` is more than `reach` outside, or deeper than the deepest point.
    """
    outward = level if surface.outside_far_off else -level
    if outward > reach:
        raise _out_of_reach(surface, level, reach)
    offset = OffsetField(field, surface, level, resolution, queries)
    settings: dict[str, Any] = {"on_progress": on_progress, "should_stop": should_stop}
    try:
        found = extract(
            offset,
            resolution=resolution,
            level=level / offset.size,
            projection_steps=projection_steps,
            **settings,
        )
    except NoSurfaceError:
        raise _out_of_reach(surface, level, reach) from None
    return offset.unit(found)


def _out_of_reach(surface: SurfaceDistance, level: float, reach: float) -> NoSurfaceError:
    inward = surface.deepest() if surface.outside_far_off else -reach
    outward = reach if surface.outside_far_off else -_reversed(surface).deepest()
    return NoSurfaceError(level, inward, outward, "offsets of its surface reach")


def _reversed(surface: SurfaceDistance) -> SurfaceDistance:
    return SurfaceDistance(surface.vertices, surface.faces[:, ::-1])


def offset_error(
    field: FieldQueries, surface: SurfaceDistance, mesh: TriangleMesh, level: float, *, seed: int = 0
) -> OffsetError:
    """How far `mesh` is from being |level| away from phi = 0 of `field`, all in world units but for `surface`.

    The closest points of phi = 0 are found from those of `surface` by Newton steps with the field's own derivatives.
    Raises ExtractionError where the mesh is not an offset of anything that the field has.
    """
    rng = np.random.default_rng(seed)
    on_faces, _ = sample_surface(mesh, SAMPLES // 2, rng)
    vertices = mesh.vertices[rng.integers(len(mesh.vertices), size=SAMPLES // 2)]
    x = field.frame.to_unit(np.concatenate([vertices, on_faces]))
    foot = surface.closest(x)[0]
    c = field.closest_from(x, foot)[0]
    # Where the surface was closed along walls, the mesh is no phi = 0, or phi = 0 goes on without it.
    on = (np.abs(field.at(foot, 0)[0]) < ON_SURFACE) & (np.abs(surface.closest(c)[1]) < ON_SURFACE)
    if not on.any():
        raise ExtractionError("the surface is nowhere that of the field; fit it again")
    error = np.abs(np.linalg.norm(x - c, axis=1)[on] / field.frame.scale - abs(level))
    return OffsetError(
        mean=float(error.mean()), p95=float(np.percentile(error, 95)), max=float(error.max()), samples=len(error)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class OffsetMesh:
    """An offset, or the wall between two, in world units, and what is known of it.

    error: how far it is off on average. about: what a report says of it.
    """

    mesh: TriangleMesh
    error: float
    about: dict[str, Any]
    warnings: list[str]
    evaluations: int
    gradient_evaluations: int


def offset_mesh(
    field: SignedDistanceField,
    base: TriangleMesh,
    config: MeshConfig,
    *,
    capped: ScalarField,
    resolution: int,
    finish: Callable[[TriangleMesh, MeshConfig], TriangleMesh],
    on_progress: Callable[[float], None],
    should_stop: Callable[[], bool] | None = None,
) -> OffsetMesh:
    """The offset that `config` asks for, or the wall from there inward, as a mesh in world units.

    `base` is the surface of `field`, closed, in world units; `capped` the field that it was taken from, which may be
    closed along walls. `finish` does to each surface what `config` asks for after the extraction. An offset outward
    reaches as far as the surface is large. Raises NoSurfaceError, in world units, where there is nothing at a level.
    """
    frame, spent = field.frame, [0, 0]
    surface = SurfaceDistance(frame.to_unit(base.vertices), base.faces, field.device)
    reach = float(np.linalg.norm(np.ptp(surface.vertices, axis=0)))
    thick = config.shell_world
    levels = [config.level_world] if thick is None else [config.level_world, config.level_world - thick]
    meshes = []
    for i, level in enumerate(levels):
        if not level:
            meshes.append(base)
            continue

        def tell(share: float, done: int = i) -> None:
            on_progress((done + share) / len(levels))

        try:
            found = extract_offset(
                capped,
                surface,
                level * frame.scale,
                resolution=resolution,
                reach=reach,
                queries=field if capped is field else None,
                projection_steps=config.projection_steps,
                on_progress=tell,
                should_stop=should_stop,
            )
        except NoSurfaceError as error:
            raise error.scaled(1 / frame.scale) from None
        vertices = frame.to_world(found.vertices_unit)
        meshes.append(TriangleMesh(vertices=vertices, faces=found.faces, normals=found.normals))
        spent = [spent[0] + found.evaluations, spent[1] + found.gradient_evaluations]
    meshes = _finished(meshes, config, finish)
    errors = [offset_error(field, surface, mesh, level) for mesh, level in zip(meshes, levels, strict=True)]
    about: dict[str, Any] = {
        "by": "distances from the surface at level 0",
        "levels": [{"level": level, "error": asdict(error)} for level, error in zip(levels, errors, strict=True)],
    }
    mesh, warnings = meshes[0], []
    if thick is not None:
        mesh, shell = wall(*meshes), thickness(*meshes)
        about["shell"] = {"asked": thick, **shell}
        if shell["thinnest"] < THIN * thick:
            warnings = [_TOO_THIN.format(thick, shell["thinnest"])]
    return OffsetMesh(
        mesh=mesh,
        error=max(error.mean for error in errors),
        about=about,
        warnings=warnings,
        evaluations=spent[0],
        gradient_evaluations=spent[1],
    )


def _finished(
    meshes: list[TriangleMesh], config: MeshConfig, finish: Callable[[TriangleMesh, MeshConfig], TriangleMesh]
) -> list[TriangleMesh]:
    """Each of the surfaces as `config` wants it; a number of faces is shared out by how many they have."""
    if config.target_faces is None:
        return [finish(mesh, config) for mesh in meshes]
    total = sum(len(mesh.faces) for mesh in meshes)
    targets = [max(4, round(config.target_faces * len(mesh.faces) / total)) for mesh in meshes]
    return [finish(mesh, replace(config, target_faces=n)) for mesh, n in zip(meshes, targets, strict=True)]


def thickness(outer: TriangleMesh, inner: TriangleMesh, *, samples: int = 4096) -> dict[str, float]:
    """How thick the wall between two closed meshes is, at samples of their vertices; below 0 where they cross."""
    found = []
    for mesh, other, side in ((inner, outer, -1), (outer, inner, 1)):
        some = mesh.vertices[np.unique(np.linspace(0, len(mesh.vertices) - 1, samples).astype(np.int64))]
        face = closest_on_mesh(some, other).face
        found.append(side * SurfaceDistance(other.vertices, other.faces).on_faces(some, face)[1])
    both = np.concatenate(found)
    return {"mean": float(both.mean()), "thinnest": float(both.min())}


def wall(outer: TriangleMesh, inner: TriangleMesh) -> TriangleMesh:
    """The closed mesh of what is inside `outer` and outside `inner`: both, the inner one turned over."""
    normals = None
    if outer.normals is not None and inner.normals is not None:
        normals = np.concatenate([outer.normals, -inner.normals])
    return TriangleMesh(
        vertices=np.concatenate([outer.vertices, inner.vertices]),
        faces=np.concatenate([outer.faces, inner.faces[:, ::-1] + len(outer.vertices)]),
        normals=normals,
    )


def _edge_normals(faces: Ints, normals: Floats) -> NDArray[np.float32]:
    """Sums (f, 3, 3) of the normals on both sides of each face's edges, from corner k to corner k + 1."""
    start, end = half_edges(faces).T
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    _, edge = np.unique(key, return_inverse=True)
    owner = np.repeat(np.arange(len(faces)), 3)
    total: Floats = np.stack([np.bincount(edge, normals[owner, axis]) for axis in range(3)], axis=1)
    sums: NDArray[np.float32] = total.astype(np.float32)[edge].reshape(len(faces), 3, 3)
    return sums


def _corner_normals(vertices: Floats, faces: Ints, normals: Floats) -> Floats:
    """Sums (v, 3) of the normals of the faces around each vertex, weighted by their angles there."""
    total = np.zeros_like(vertices)
    for corner in range(3):
        at, ahead, behind = (vertices[faces[:, (corner + k) % 3]] for k in range(3))
        cosine = (unit_vectors(ahead - at) * unit_vectors(behind - at)).sum(axis=1)
        weighted = np.arccos(np.clip(cosine, -1, 1))[:, None] * normals
        for axis in range(3):
            total[:, axis] += np.bincount(faces[:, corner], weighted[:, axis], minlength=len(vertices))
    return total


def _lattice(side: int) -> Floats:
    """The whole numbers (side^3, 3) from 0 on."""
    axis = np.arange(side, dtype=np.float64)
    nodes: Floats = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    return nodes
