"""Creases against shapes whose faces are known, extracted from fields that round them as a network does."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_fields import Field
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from shapes import sphere, torus
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.config import MeshConfig
from sdfserver.extract import extract
from sdfserver.io import read_mesh
from sdfserver.mesh import TriangleMesh, face_normals, keep_faces, unit_vectors
from sdfserver.metrics import closest_on_mesh, compare_meshes, crease_points, mesh_health, sample_surface
from sdfserver.reconstruct import fit_field, mesh_field
from sdfserver.sharp import SharpReport, sharpen

SHARED = Path(__file__).resolve().parents[2] / "shared"
ROUND = 0.012
"""How much the fields round: sharp edges lie up to this times ln 2 over the sine of half their angle outside."""
POINTS, CELLS = 6000, 64


@dataclass(frozen=True, eq=False)
class Solid:
    """What lies behind all planes n.x = d, but for what lies before all planes of `without`."""

    normals: NDArray[np.float64]
    depths: NDArray[np.float64]
    without: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def rounded(self) -> Field:
        """Its field, round at the edges."""
        n, d = torch.tensor(self.normals), torch.tensor(self.depths)

        def value(x: Tensor) -> Tensor:
            x = x.double()
            outer = ROUND * torch.logsumexp((x @ n.T - d) / ROUND, dim=1)
            if self.without is None:
                return outer
            m, e = (torch.tensor(part) for part in self.without)
            inner = -ROUND * torch.logsumexp((x @ m.T - e) / ROUND, dim=1)
            return ROUND * torch.logsumexp(torch.stack([outer, inner], dim=1) / ROUND, dim=1)

        return Field(value)

    def planes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The planes of its faces, normals outward."""
        if self.without is None:
            return self.normals, self.depths
        return np.concatenate([self.normals, -self.without[0]]), np.concatenate([self.depths, -self.without[1]])

    def within(self, x: NDArray[np.float64], slack: float = 1e-9) -> NDArray[np.bool_]:
        """Which of x (n, 3) belong to it or its surface."""
        inside = (x @ self.normals.T - self.depths <= slack).all(axis=1)
        if self.without is None:
            return inside
        return inside & ~(x @ self.without[0].T - self.without[1] < -slack).all(axis=1)

    def cloud(self, n: int = POINTS, *, noise: float = 0.0, normal_noise: float = 0.0, seed: int = 0) -> PointCloud:
        """n points spread over its faces."""
        rng = np.random.default_rng(seed)
        points, normals = [], []
        for normal, depth in zip(*self.planes(), strict=True):
            x = rng.uniform(-1.3, 1.3, (20_000, 3))
            x -= (x @ normal - depth)[:, None] * normal
            # Projected draws are denser on slanted planes: a cube's shadow is not even. Near enough for a test.
            off = x + 1e-6 * normal
            x = x[self.within(x) & ~self.within(off)]
            points.append(x)
            normals.append(np.broadcast_to(normal, x.shape))
        at, up = np.concatenate(points), np.concatenate(normals)
        rows = rng.permutation(len(at))[:n]
        at, up = at[rows] + noise * rng.normal(size=(n, 3)), up[rows] + normal_noise * rng.normal(size=(n, 3))
        return PointCloud(points=at, normals=unit_vectors(up))

    def edges(self) -> NDArray[np.float64]:
        """Points (n, 3) along its edges."""
        found = []
        for (a, p), (b, q) in itertools.combinations(list(zip(*self.planes(), strict=True)), 2):
            along = np.cross(a, b)
            if np.linalg.norm(along) < 1e-6:
                continue
            middle = np.linalg.pinv(np.stack([a, b])) @ [p, q]
            x = middle + np.linspace(-2, 2, 801)[:, None] * unit_vectors(along)
            # On the edge two of the four ways across change sides: of planes that only cross within, none does.
            ways = [i * a + j * b for i, j in itertools.product((-1, 1), repeat=2)]
            count = sum(self.within(x + 1e-5 * way + 1e-7 * (a + b)).astype(int) for way in ways)
            found.append(x[(count == 1) | (count == 3)])
        return np.concatenate(found)

    def face_errors(self, mesh: TriangleMesh) -> NDArray[np.float64]:
        """Angles (f,), degrees, between the mesh's faces and the plane nearest to each."""
        normals, depths = self.planes()
        nearest = np.abs(mesh.vertices[mesh.faces].mean(axis=1) @ normals.T - depths).argmin(axis=1)
        cosine = (unit_vectors(face_normals(mesh.vertices, mesh.faces)) * normals[nearest]).sum(axis=1)
        return np.degrees(np.arccos(cosine.clip(-1, 1)))


def box(half: float = 0.6) -> Solid:
    return Solid(np.concatenate([np.eye(3), -np.eye(3)]), np.full(6, half))


def wedge(degrees: float = 30.0) -> Solid:
    """A bar with an edge of that angle along z at x = 0.7."""
    lean = math.radians(degrees / 2)
    slopes = np.array([[math.sin(lean), math.cos(lean), 0], [math.sin(lean), -math.cos(lean), 0]])
    ends = np.array([[-1.0, 0, 0], [0, 0, 1], [0, 0, -1]])
    return Solid(np.concatenate([slopes, ends]), np.array([0.7 * math.sin(lean)] * 2 + [0.6, 0.6, 0.6]))


def notched() -> Solid:
    """A box without a quarter: with an edge that is hollow."""
    return replace(box(), without=(np.array([[-1.0, 0, 0], [0, -1.0, 0]]), np.array([-0.1, -0.05])))


def turned(solid: Solid) -> Solid:
    """Askew to the grid."""
    way, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    without = None if solid.without is None else (solid.without[0] @ way.T, solid.without[1])
    return Solid(solid.normals @ way.T, solid.depths, without)


SOLIDS = {"box": box(), "wedge": wedge(), "notched": notched(), "askew": turned(notched())}


def extracted(field: Field, cells: int = CELLS) -> TriangleMesh:
    found = extract(field, resolution=cells, dtype=torch.float64)
    return TriangleMesh(vertices=found.vertices_unit, faces=found.faces, normals=found.normals)


def is_manifold(mesh: TriangleMesh) -> bool:
    """Whether every edge is in two faces, once each way, and the faces around every vertex form one fan."""
    ways = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    once = {(int(a), int(b)) for a, b in ways}
    if len(once) != len(ways) or any((b, a) not in once for a, b in once):
        return False
    following: dict[tuple[int, int], int] = {}
    for a, b, c in mesh.faces.tolist():
        following[a, b], following[b, c], following[c, a] = c, a, b
    size = np.bincount(mesh.faces.ravel())
    for vertex, start in dict(once).items():
        at, steps = following[vertex, start], 1
        while at != start:
            at, steps = following[vertex, at], steps + 1
        if steps != size[vertex]:
            return False
    return True


def same(a: TriangleMesh, b: TriangleMesh) -> bool:
    assert a.normals is not None
    assert b.normals is not None
    return all(np.array_equal(x, y) for x, y in ((a.vertices, b.vertices), (a.faces, b.faces), (a.normals, b.normals)))


@pytest.mark.parametrize("name", SOLIDS)
def test_creases_run_along_the_edges_of_a_solid(name: str) -> None:
    solid = SOLIDS[name]
    before = extracted(solid.rounded())
    after, report = sharpen(before, solid.cloud())
    edges = solid.edges()
    away, rounded_away = (closest_on_mesh(edges, mesh).distance for mesh in (after, before))
    assert rounded_away.mean() > 0.01
    assert np.quantile(away, 0.95) < 0.002
    assert away.mean() < 0.05 * rounded_away.mean()
    assert solid.face_errors(after).mean() < 0.1 * solid.face_errors(before).mean()
    assert report.crease_vertices == len(after.vertices) - len(before.vertices) > 100
    assert is_manifold(after)
    assert mesh_health(after).genus == mesh_health(before).genus == 0


def test_a_box_gets_its_corners_and_its_volume() -> None:
    after, report = sharpen(extracted(box().rounded()), box().cloud())
    corners = np.array(list(itertools.product((-0.6, 0.6), repeat=3)))
    apart = np.linalg.norm(after.vertices[None] - corners[:, None], axis=2).min(axis=1)
    assert apart.max() < 0.002
    assert report.corners >= 8
    assert report.length == pytest.approx(12 * 1.2, rel=0.01)
    assert mesh_health(after).volume == pytest.approx(1.2**3, rel=1e-3)


def test_no_face_is_turned_over() -> None:
    for solid in SOLIDS.values():
        after, _ = sharpen(extracted(solid.rounded()), solid.cloud())
        assert solid.face_errors(after).max() < 90


def test_what_is_smooth_is_returned_as_it_is() -> None:
    ball = extracted(Field(lambda x: x.norm(dim=1) - 0.7))
    after, report = sharpen(ball, sphere(1500, radius=0.7))
    assert after is ball
    assert report == SharpReport()
    ring = extracted(Field(lambda x: torch.hypot(torch.hypot(x[:, 0], x[:, 1]) - 0.65, x[:, 2]) - 0.25))
    few, told = sharpen(ring, torus(700))
    assert same(few, ring)
    assert told.crease_vertices == 0
    assert told.round > 0
    assert "no_creases" in told.warnings()[0]


def test_a_cone_gets_its_rim_and_keeps_its_tip() -> None:
    lean = math.radians(30)

    def cone(x: Tensor) -> Tensor:
        radius = torch.sqrt((x[:, :2] ** 2).sum(dim=1) + ROUND**2)
        side = radius * math.cos(lean) + (x[:, 2] - 0.6) * math.sin(lean)
        return ROUND * torch.logsumexp(torch.stack([side, -x[:, 2] - 0.5], dim=1) / ROUND, dim=1)

    rng = np.random.default_rng(0)
    turn, share, radius = rng.uniform(0, 2 * np.pi, 6000), np.sqrt(rng.uniform(0, 1, 6000)), 1.1 * math.tan(lean)
    ring = np.stack([np.cos(turn), np.sin(turn), np.zeros(6000)], axis=1)
    points, normals = share[:, None] * radius * ring, ring * math.cos(lean)
    points[:, 2], normals[:, 2] = 0.6 - 1.1 * share, math.sin(lean)
    base = rng.random(6000) < math.sin(lean) / (1 + math.sin(lean))
    points[base, 2], normals[base] = -0.5, (0, 0, -1)
    before = extracted(Field(cone))
    after, report = sharpen(before, PointCloud(points=points, normals=normals))
    rim = np.stack([radius * np.cos(turn), radius * np.sin(turn), np.full(6000, -0.5)], axis=1)
    assert closest_on_mesh(rim, after).distance.mean() < 0.003 < closest_on_mesh(rim, before).distance.mean()
    assert report.length == pytest.approx(2 * np.pi * radius, rel=0.05)
    tip = after.vertices[after.vertices[:, 2] > 0.4]
    assert np.array_equal(tip, before.vertices[before.vertices[:, 2] > 0.4])
    assert is_manifold(after)


def test_noise_leaves_creases_blunter_or_forbids_them() -> None:
    before, edges = extracted(box().rounded()), box().edges()
    noisy, report = sharpen(before, box().cloud(noise=0.002, normal_noise=0.1))
    away, rounded_away = (closest_on_mesh(edges, mesh).distance.mean() for mesh in (noisy, before))
    assert away < 0.3 * rounded_away
    assert is_manifold(noisy)
    assert report.crease_vertices > 100
    refused, report = sharpen(before, box().cloud(noise=0.002, normal_noise=0.6))
    assert same(refused, before)
    assert report.crease_vertices == 0 < report.round


def test_the_frame_and_the_order_of_calls_change_nothing() -> None:
    solid = SOLIDS["askew"]
    before, cloud = extracted(solid.rounded()), solid.cloud()
    after, report = sharpen(before, cloud)
    again, _ = sharpen(before, cloud)
    assert same(after, again)
    far = replace(before, vertices=before.vertices * 1000 + 1e6)
    elsewhere, told = sharpen(far, PointCloud(points=cloud.points * 1000 + 1e6, normals=cloud.normals))
    old = slice(len(before.vertices))
    assert np.quantile(np.abs((elsewhere.vertices[old] - 1e6) / 1000 - after.vertices[old]), 0.99) < 1e-6
    assert told.length == pytest.approx(1000 * report.length, rel=1e-3)


def test_an_open_mesh_keeps_its_border() -> None:
    whole = extracted(box().rounded())
    before = keep_faces(whole, whole.vertices[whole.faces][:, :, 2].max(axis=1) < 0.2)
    after, report = sharpen(before, box().cloud())
    assert report.crease_vertices > 50
    assert mesh_health(after).non_manifold_edges == 0
    rim, rim_before = (border(mesh) for mesh in (after, before))
    assert set(rim_before) <= set(rim)
    assert all(z > 0.1 for _, _, z in rim)


def border(mesh: TriangleMesh) -> list[tuple[float, ...]]:
    """Where the vertices on the mesh's border are, but those on creases."""
    ends = np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1)
    edges, count = np.unique(ends, axis=0, return_counts=True)
    rows = np.unique(edges[count == 1])
    inner = np.abs(np.abs(mesh.vertices[rows][:, :2]).min(axis=1)) < 0.4
    return [tuple(row) for row in mesh.vertices[rows[inner]].round(6).tolist()]


def test_what_cannot_be_sharpened_is_refused_or_left() -> None:
    mesh = extracted(box().rounded(), 16)
    few = PointCloud(points=mesh.vertices[:5], normals=np.eye(3)[[0, 1, 2, 0, 1]])
    assert sharpen(mesh, few)[0] is mesh
    with pytest.raises(ValueError, match="no normals"):
        sharpen(replace(mesh, normals=None), few)


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(("noise", "normal_noise", "share"), [(0.0, 0.0, 0.1), (0.001, 0.1, 0.6)])
def test_a_machined_part_keeps_its_creases(noise: float, normal_noise: float, share: float) -> None:
    """The normals' error within 0.5% of the diagonal of a crease falls to `share` of what it was."""

    reference = read_mesh(SHARED / "data" / "meshes" / "fandisk.obj")
    diagonal = float(np.linalg.norm(np.ptp(reference.vertices, axis=0)))
    rng = np.random.default_rng(0)
    points, normals = sample_surface(reference, 50_000, rng)
    cloud = PointCloud(
        points=points + noise * diagonal * rng.normal(size=points.shape),
        normals=unit_vectors(normals + normal_noise * rng.normal(size=points.shape)),
    )
    fitted = fit_field(cloud, preset="standard", device="cpu")
    plain = mesh_field(fitted.field, fitted.cloud, MeshConfig())
    sharp = mesh_field(fitted.field, fitted.cloud, MeshConfig(sharp=True))
    told = sharp.report["mesh"]
    assert json.loads(json.dumps(told["sharp"]))["crease_vertices"] > 1000
    assert told["watertight"]
    assert told["genus"] == 0
    assert is_manifold(sharp.mesh)
    assert crease_error(sharp.mesh, reference) < share * crease_error(plain.mesh, reference)
    near, far = (compare_meshes(mesh, reference, samples=50_000) for mesh in (sharp.mesh, plain.mesh))
    assert near.chamfer < far.chamfer
    assert near.normal_consistency > far.normal_consistency


def crease_error(mesh: TriangleMesh, reference: TriangleMesh) -> float:
    """Mean angle, degrees, between normals of reference and mesh within 0.5% of the diagonal of a crease."""

    points, normals = sample_surface(reference, 100_000, np.random.default_rng(1))
    distance, _ = cKDTree(crease_points(reference)).query(points)
    some = distance < 0.005 * np.linalg.norm(np.ptp(reference.vertices, axis=0))
    found = unit_vectors(face_normals(mesh.vertices, mesh.faces))[closest_on_mesh(points[some], mesh).face]
    return float(np.degrees(np.arccos((found * normals[some]).sum(axis=1).clip(-1, 1))).mean())
