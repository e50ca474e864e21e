"""Clouds that are legal and hard, each with the surface that it was taken from.

Clouds of about 20,000 points in units of their own; `HARD` has them by name, made anew with each call, the same for the
same seed. The reference is a fine triangle mesh of the true surface, wound so that its normals are the cloud's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shapes import directions, sphere, torus

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh

N = 20_000
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HardCloud:
    """A cloud, its true surface, and what kind of surface that is.

    parts: of a mesh that is right. closed: whether the true surface is; an open one gets a lid or a second side.
    sided: whether the normals of the reference mean anything.
    """

    cloud: PointCloud
    reference: TriangleMesh
    parts: int = 1
    genus: int = 0
    closed: bool = True
    sided: bool = True


def tilted(vectors: Array) -> Array:
    """Vectors (n, 3) turned about an axis that is none of the frame's."""
    a, b = 0.4, 0.7
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    turned: Array = vectors @ (about_z @ about_x).T
    return turned


def grid_mesh(vertices: Array, *, wrap: tuple[bool, bool] = (False, False), flip: bool = False) -> TriangleMesh:
    """The mesh of a grid of vertices (rows, columns, 3), joined to its start where `wrap` says so."""
    rows, columns = vertices.shape[:2]
    i, j = np.meshgrid(np.arange(rows - (not wrap[0])), np.arange(columns - (not wrap[1])), indexing="ij")
    i2, j2 = (i + 1) % rows, (j + 1) % columns
    a, b, c, d = (p * columns + q for p, q in ((i, j), (i2, j), (i2, j2), (i, j2)))
    faces = np.concatenate([np.stack([a, b, c], axis=-1), np.stack([a, c, d], axis=-1)]).reshape(-1, 3)
    if flip:
        faces = faces[:, ::-1]
    return TriangleMesh(vertices=vertices.reshape(-1, 3), faces=faces.astype(np.int64))


def joined(*meshes: TriangleMesh) -> TriangleMesh:
    """Several meshes as one."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return TriangleMesh(vertices=np.concatenate([mesh.vertices for mesh in meshes]), faces=np.concatenate(faces))


def together(*clouds: PointCloud) -> PointCloud:
    """Several clouds as one."""
    return PointCloud(
        points=np.concatenate([cloud.points for cloud in clouds]),
        normals=np.concatenate([cloud.normals for cloud in clouds if cloud.normals is not None]),
    )


def inverted(cloud: PointCloud) -> PointCloud:
    """The cloud with its normals turned."""
    assert cloud.normals is not None
    return PointCloud(points=cloud.points, normals=-cloud.normals)


def moved(cloud: PointCloud, by: tuple[float, float, float]) -> PointCloud:
    """The cloud somewhere else."""
    return PointCloud(points=cloud.points + np.array(by), normals=cloud.normals)


def sphere_mesh(radius: float = 1.0, *, inward: bool = False) -> TriangleMesh:
    """The sphere that `sphere` samples; its poles are pinched quadrilaterals."""
    u, v = np.meshgrid(np.linspace(0, np.pi, 257), 2 * np.pi * np.arange(512) / 512, indexing="ij")
    grid = radius * np.stack([np.sin(u) * np.cos(v), np.sin(u) * np.sin(v), np.cos(u)], axis=-1)
    return grid_mesh(grid, wrap=(False, True), flip=inward)


def torus_mesh(major: float = 0.65, minor: float = 0.25) -> TriangleMesh:
    """The torus that `torus` samples."""
    u, v = np.meshgrid(2 * np.pi * np.arange(512) / 512, 2 * np.pi * np.arange(256) / 256, indexing="ij")
    radius = major + minor * np.cos(v)
    return grid_mesh(np.stack([radius * np.cos(u), radius * np.sin(u), minor * np.sin(v)], axis=-1), wrap=(True, True))


def plane(seed: int = 0, noise: float = 0.0) -> HardCloud:
    """A tilted rectangle of 2 by 1.4; `noise` is that across it."""
    rng = np.random.default_rng(seed)
    flat = (rng.random((N, 3)) - 0.5) * [2.0, 1.4, 0.0]
    flat[:, 2] = noise * rng.normal(size=N)
    corners = np.array([[[-1, -0.7, 0], [-1, 0.7, 0]], [[1, -0.7, 0], [1, 0.7, 0]]], dtype=float)
    normals = np.broadcast_to([0.0, 0.0, 1.0], (N, 3))
    cloud = PointCloud(points=tilted(flat), normals=tilted(normals))
    return HardCloud(cloud=cloud, reference=grid_mesh(tilted(corners)), closed=False)


def sphere_inward(seed: int = 0) -> HardCloud:
    """A sphere whose normals point to its centre."""
    return HardCloud(cloud=inverted(sphere(N, seed=seed)), reference=sphere_mesh(inward=True))


def shell(seed: int = 0) -> HardCloud:
    """A ball with a hollow in it: two nested spheres, the normals of the inner one facing the hollow."""
    inner = inverted(sphere(N // 5, radius=0.5, seed=seed + 1))
    cloud = together(sphere(N - N // 5, seed=seed), inner)
    return HardCloud(cloud=cloud, reference=joined(sphere_mesh(), sphere_mesh(0.5, inward=True)), parts=2)


def nested_outward(seed: int = 0) -> HardCloud:
    """Two nested spheres, both with outward normals: a body within a body."""
    cloud = together(sphere(N - N // 5, seed=seed), sphere(N // 5, radius=0.5, seed=seed + 1))
    return HardCloud(cloud=cloud, reference=joined(sphere_mesh(), sphere_mesh(0.5)), parts=2)


def far_apart(seed: int = 0) -> HardCloud:
    """A sphere and a torus of about the same size, twenty of them apart."""
    away = (28.0, 28.0, 8.0)
    ring = torus_mesh()
    ring = TriangleMesh(vertices=ring.vertices + np.array(away), faces=ring.faces)
    cloud = together(sphere(N // 2, seed=seed), moved(torus(N // 2, seed=seed + 1), away))
    return HardCloud(cloud=cloud, reference=joined(sphere_mesh(), ring), parts=2, genus=1)


def flipped(seed: int = 0, share: float = 0.1) -> HardCloud:
    """A torus with a share of its normals turned, one here and one there."""
    cloud = torus(N, seed=seed)
    assert cloud.normals is not None
    turned = np.random.default_rng(seed + 1).random(N) < share
    normals = np.where(turned[:, None], -cloud.normals, cloud.normals)
    return HardCloud(cloud=PointCloud(points=cloud.points, normals=normals), reference=torus_mesh(), genus=1)


def flipped_patch(seed: int = 0) -> HardCloud:
    """A torus with the normals of one sector, a sixth of it, turned: one scan of several was exported wrongly."""
    cloud = torus(N, seed=seed)
    assert cloud.normals is not None
    turned = np.abs(np.arctan2(cloud.points[:, 1], cloud.points[:, 0])) < np.pi / 6
    normals = np.where(turned[:, None], -cloud.normals, cloud.normals)
    return HardCloud(cloud=PointCloud(points=cloud.points, normals=normals), reference=torus_mesh(), genus=1)


def tilted_normals(normals: Array, degrees: float, rng: np.random.Generator) -> Array:
    """Unit normals (n, 3) turned by angles of that root mean square, both components normally distributed."""
    aside = rng.normal(size=normals.shape)
    aside -= (aside * normals).sum(axis=1, keepdims=True) * normals
    length = np.linalg.norm(aside, axis=1, keepdims=True)
    aside, angle = aside / length, np.radians(degrees) / math.sqrt(2) * length
    turned: Array = np.cos(angle) * normals + np.sin(angle) * aside
    return turned


def noisy_normals(seed: int = 0, degrees: float = 30.0) -> HardCloud:
    """A torus with normals that are off by 30 degrees, root mean square."""
    cloud = torus(N, seed=seed)
    assert cloud.normals is not None
    normals = tilted_normals(cloud.normals, degrees, np.random.default_rng(seed + 1))
    return HardCloud(cloud=PointCloud(points=cloud.points, normals=normals), reference=torus_mesh(), genus=1)


def uneven(seed: int = 0, ratio: float = 1000.0) -> HardCloud:
    """A torus a thousand times as dense at one end as at the other."""
    cloud = torus(60 * N, seed=seed)
    assert cloud.normals is not None
    x = cloud.points[:, 0]
    density = ratio ** ((x - x.min()) / np.ptp(x) - 1)
    chosen = np.random.default_rng(seed + 1).choice(len(x), N, replace=False, p=density / density.sum())
    thinned = PointCloud(points=cloud.points[chosen], normals=cloud.normals[chosen])
    return HardCloud(cloud=thinned, reference=torus_mesh(), genus=1)


def outliers(seed: int = 0, share: float = 0.05) -> HardCloud:
    """A torus and, all over a box around it, outliers with normals that mean nothing."""
    rng = np.random.default_rng(seed + 1)
    count = round(N * share)
    strange = PointCloud(points=(rng.random((count, 3)) * 2 - 1) * [1.1, 1.1, 0.6], normals=directions(count, seed + 2))
    return HardCloud(cloud=together(torus(N - count, seed=seed), strange), reference=torus_mesh(), genus=1)


def box_mesh(low: Array, high: Array, *, inward: bool = False) -> TriangleMesh:
    """An axis-aligned box of twelve triangles."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))], dtype=np.int64)
    return TriangleMesh(vertices=low + corners * (high - low), faces=faces[:, ::-1] if inward else faces)


def room_mesh() -> TriangleMesh:
    """A room of 4 by 3 by 2.5 metres with a chest in its air, wound towards the air."""
    walls = box_mesh(np.zeros(3), np.array([4.0, 3.0, 2.5]), inward=True)
    return joined(walls, box_mesh(np.array([1.2, 1.0, 0.8]), np.array([2.2, 1.6, 1.4])))


def sampled(mesh: TriangleMesh, n: int, seed: int) -> PointCloud:
    """Points all over a mesh."""
    from sdfserver.metrics import sample_surface

    points, normals = sample_surface(mesh, n, np.random.default_rng(seed))
    return PointCloud(points=points, normals=normals)


def room(seed: int = 0) -> HardCloud:
    """A closed room, seen from inside."""
    return HardCloud(cloud=sampled(room_mesh(), N, seed), reference=room_mesh(), parts=2)


def open_room(seed: int = 0) -> HardCloud:
    """The same room without ceiling and one wall, as a scanner leaves it."""
    whole = room_mesh()
    corners = whole.vertices[whole.faces]
    gone = (corners[:, :, 2] == 2.5).all(axis=1) | (corners[:, :, 0] == 4.0).all(axis=1)
    mesh = TriangleMesh(vertices=whole.vertices, faces=whole.faces[~gone])
    return HardCloud(cloud=sampled(mesh, N, seed), reference=mesh, parts=2, closed=False)


def tube(radius: float, seed: int) -> HardCloud:
    """A closed wire that coils around a ring."""

    def centre(t: Array) -> Array:
        ring = 1 + 0.25 * np.cos(8 * t)
        return np.stack([ring * np.cos(t), ring * np.sin(t), 0.25 * np.sin(8 * t)], axis=-1)

    def frame(t: Array) -> tuple[Array, Array, Array]:
        along = centre(t + 1e-5) - centre(t - 1e-5)
        length = np.linalg.norm(along, axis=-1)
        along = along / length[..., None]
        side = np.cross(along, [0.0, 0.0, 1.0])
        side /= np.linalg.norm(side, axis=-1, keepdims=True)
        return side, np.cross(along, side), length

    rng = np.random.default_rng(seed)
    t = 2 * np.pi * rng.random(4 * N)
    length = frame(t)[2]
    t = t[rng.random(4 * N) * length.max() < length][:N]
    around = 2 * np.pi * rng.random((len(t), 1))
    side, up, _ = frame(t)
    normals = np.cos(around) * side + np.sin(around) * up
    cloud = PointCloud(points=centre(t) + radius * normals, normals=normals)
    u, v = np.meshgrid(2 * np.pi * np.arange(2048) / 2048, 2 * np.pi * np.arange(24) / 24, indexing="ij")
    side, up, _ = frame(u)
    grid = centre(u) + radius * (np.cos(v)[..., None] * side + np.sin(v)[..., None] * up)
    return HardCloud(cloud=cloud, reference=grid_mesh(grid, wrap=(True, True), flip=True), genus=1)


def wire(seed: int = 0) -> HardCloud:
    """A wire four spacings thick."""
    return tube(0.02, seed)


def hair(seed: int = 0) -> HardCloud:
    """A wire one and a half spacings thick: opposite sides are neighbours."""
    return tube(0.002, seed)


def moebius_points(u: Array, v: Array) -> Array:
    """The strip at angles u, and v across it."""
    radius = 1 + v * np.cos(u / 2)
    return np.stack([radius * np.cos(u), radius * np.sin(u), v * np.sin(u / 2)], axis=-1)


def moebius(seed: int = 0) -> HardCloud:
    """A Moebius strip: its normals are continuous but for one seam, which no choice of signs removes."""
    rng = np.random.default_rng(seed)
    u, v = 2 * np.pi * rng.random(2 * N), 0.6 * (rng.random(2 * N) - 0.5)
    along = moebius_points(u + 1e-5, v) - moebius_points(u - 1e-5, v)
    normals = np.cross(along, moebius_points(u, v + 1e-5) - moebius_points(u, v - 1e-5))
    area = np.linalg.norm(normals, axis=1)
    kept = np.flatnonzero(rng.random(2 * N) * area.max() < area)[:N]
    cloud = PointCloud(points=moebius_points(u, v)[kept], normals=(normals / area[:, None])[kept])
    gu, gv = np.meshgrid(np.linspace(0, 2 * np.pi, 513), np.linspace(-0.3, 0.3, 65), indexing="ij")
    return HardCloud(cloud=cloud, reference=grid_mesh(moebius_points(gu, gv)), closed=False, sided=False)


HARD: dict[str, Callable[[], HardCloud]] = {
    "plane": plane,
    "sphere_inward": sphere_inward,
    "shell": shell,
    "nested_outward": nested_outward,
    "far_apart": far_apart,
    "flipped": flipped,
    "flipped_patch": flipped_patch,
    "noisy_normals": noisy_normals,
    "uneven": uneven,
    "outliers": outliers,
    "room": room,
    "open_room": open_room,
    "wire": wire,
    "hair": hair,
    "moebius": moebius,
}
