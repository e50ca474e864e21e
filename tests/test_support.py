"""What points support of a surface, and where it is cut open."""

from dataclasses import replace

import hard_shapes as hard
import numpy as np
import pytest
from shapes import directions, sphere, torus
from test_mesh import spheres

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh, face_areas, face_components, vertex_normals
from sdfserver.metrics import mesh_health
from sdfserver.support import BORDER, DEEP, as_asked, cut_below, support_of

BALL = spheres(1.0, n=90)


def part(cloud: PointCloud, keep: np.ndarray) -> PointCloud:
    assert cloud.normals is not None
    return PointCloud(points=cloud.points[keep], normals=cloud.normals[keep])


def spacing(cloud: PointCloud, area: float) -> float:
    return float(np.sqrt(area / len(cloud.points)))


def with_normals(mesh: TriangleMesh) -> TriangleMesh:
    return replace(mesh, normals=vertex_normals(mesh.vertices, mesh.faces))


def measured(mesh: TriangleMesh, cloud: PointCloud) -> TriangleMesh:
    return replace(mesh, confidence=support_of(mesh, cloud).astype(np.float32))


def border_rows(mesh: TriangleMesh) -> np.ndarray:
    edges = np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1)
    found, count = np.unique(edges, axis=0, return_counts=True)
    return np.unique(found[count == 1])


@pytest.mark.parametrize("n", [300, 5000, 40_000])
def test_points_all_over_a_surface_support_all_of_it(n: int) -> None:
    cloud = sphere(n)
    support = support_of(BALL, cloud)
    assert support.shape == (len(BALL.vertices),)
    assert support.mean() > 0.95
    assert support.min() > 0.6
    mesh, report = as_asked(measured(BALL, cloud), cloud, "open")
    assert (report.kind, report.holes, report.unsupported) == ("closed", 0, 0.0)
    assert mesh.faces is BALL.faces
    assert mesh.confidence is not None


def test_noise_does_not_look_like_a_hole() -> None:
    cloud = sphere(20_000)
    noisy = PointCloud(points=cloud.points + 0.035 * directions(20_000, 1), normals=cloud.normals)  # 1% of the diagonal
    assert support_of(BALL, noisy).min() > 0.6


def test_support_falls_with_the_distance_from_the_last_points() -> None:
    cloud = part(sphere(10_000), sphere(10_000).points[:, 2] < 0)
    support, height = support_of(BALL, cloud), BALL.vertices[:, 2]
    assert support[height < -0.1].min() > 0.6
    assert support[height > 0.3].max() < 0.2
    band = np.abs(height) < 2 * spacing(cloud, 2 * np.pi)
    assert 0.2 < support[band].mean() < 0.9


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_support_does_not_depend_on_units_or_position(scale: float) -> None:
    cloud = part(sphere(4000), sphere(4000).points[:, 2] < 0)
    expected = support_of(BALL, cloud)
    moved = PointCloud(points=scale * (cloud.points + 40.0), normals=cloud.normals)
    mesh = replace(BALL, vertices=scale * (BALL.vertices + 40.0))
    np.testing.assert_allclose(support_of(mesh, moved), expected, atol=0.05)


def test_one_side_of_a_thin_wall_does_not_support_the_other() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([2 * rng.random((5000, 2)) - 1, np.full(5000, 0.01)])
    top = PointCloud(points=points, normals=np.tile([0.0, 0.0, 1.0], (5000, 1)))
    a = np.linspace(-0.9, 0.9, 60)
    x, y = np.meshgrid(a, a, indexing="ij")
    upper = hard.grid_mesh(np.stack([x, y, np.full_like(x, 0.01)], axis=-1))
    lower = hard.grid_mesh(np.stack([x, y, np.full_like(x, -0.01)], axis=-1), flip=True)
    wall = with_normals(hard.joined(upper, lower))
    support = support_of(wall, top)
    assert support[: len(upper.vertices)].min() > 0.6
    assert support[len(upper.vertices) :].max() < 0.05


@pytest.mark.parametrize(("ratio", "strip"), [(10, 0.0), (100, 0.05)])
def test_sparse_points_beside_dense_ones_support_as_well(ratio: int, strip: float) -> None:
    """But for a strip along a border at which the density jumps a hundredfold."""
    dense, sparse = sphere(60_000, seed=1), sphere(60_000 // ratio, seed=2)
    cloud = hard.together(part(dense, dense.points[:, 2] > 0), part(sparse, sparse.points[:, 2] <= 0))
    support = support_of(BALL, cloud)
    assert (support < DEEP).mean() <= strip
    assert as_asked(measured(BALL, cloud), cloud, "auto")[1].kind == "closed"


@pytest.mark.parametrize("asked", ["auto", "open"])
def test_an_open_surface_ends_where_its_points_end_along_a_smooth_border(asked: str) -> None:
    cloud = part(sphere(20_000), sphere(20_000).points[:, 2] < 0)
    mesh, report = as_asked(measured(BALL, cloud), cloud, asked)  # type: ignore[arg-type]
    assert (report.asked, report.kind, report.holes, report.cut) == (asked, "open", 1, 1)
    assert report.unsupported == pytest.approx(0.5, abs=0.03)
    assert ("is an open one" in report.why) == (asked == "auto")
    gap = spacing(cloud, 2 * np.pi)
    rim = mesh.vertices[border_rows(mesh), 2]
    assert -0.5 * gap < rim.mean() < 2.5 * gap
    assert rim.std() < 0.6 * gap
    # A border of N grid edges that wandered would be longer: one around the equator is 2 pi.
    health = mesh_health(mesh)
    assert (health.components, health.non_manifold_edges) == (1, 0)
    edges = border_rows(mesh)
    assert len(edges) < 2.2 * 2 * np.pi / (2.4 / 89)
    assert mesh.confidence is not None
    assert mesh.confidence.min() > BORDER - 0.1
    assert mesh.normals is not None
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)
    assert (face_areas(mesh.vertices, mesh.faces) > 0).all()


def test_closed_is_closed_and_still_says_what_was_measured() -> None:
    cloud = part(sphere(5000), sphere(5000).points[:, 2] < 0)
    mesh, report = as_asked(measured(BALL, cloud), cloud, "closed")
    assert (report.kind, report.holes, report.cut) == ("closed", 1, 0)
    assert mesh_health(mesh).watertight
    assert mesh.confidence is not None
    assert mesh.confidence[mesh.vertices[:, 2] > 0.5].max() < 0.1
    assert mesh.confidence[mesh.vertices[:, 2] < -0.5].min() > 0.6


def test_a_narrow_hole_is_bridged_and_a_wide_one_cut_if_asked() -> None:
    whole = sphere(40_000)
    gap = spacing(whole, 4 * np.pi)
    for across, holes in ((8 * gap, 0), (20 * gap, 1)):
        away = np.linalg.norm(whole.points - [1.0, 0, 0], axis=1)
        cloud = part(whole, away > across / 2)
        _, report = as_asked(measured(BALL, cloud), cloud, "open")
        assert report.holes == holes


def test_auto_opens_the_end_of_a_scan_but_not_a_hole_within() -> None:
    """A cap that is missing is an end; a hole of the same size inside of a ring has points beyond its rim."""
    ball, ring = sphere(30_000), torus(30_000)
    tip = part(ball, ball.points[:, 2] < 0.93)
    mesh, report = as_asked(measured(BALL, tip), tip, "auto")
    assert report.kind == "open"
    assert "scan ends at 1 of the holes" in report.why
    assert mesh.vertices[:, 2].max() == pytest.approx(0.93, abs=0.05)
    inner = part(ring, np.linalg.norm(ring.points - [0.4, 0, 0], axis=1) > 0.13)
    doughnut = with_normals(hard.torus_mesh())
    mesh, report = as_asked(measured(doughnut, inner), inner, "auto")
    assert (report.kind, report.holes) == ("closed", 1)
    assert "in holes within the scan" in report.why
    assert mesh_health(mesh).watertight


def test_a_mesh_without_any_support_is_left_whole() -> None:
    far = PointCloud(points=sphere(500).points + 100.0, normals=-sphere(500).points)
    mesh, report = as_asked(measured(BALL, far), far, "open")
    assert (report.kind, report.cut) == ("closed", 0)
    assert "no points support" in report.why
    assert len(mesh.faces) == len(BALL.faces)


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_leaves_what_is_above_and_a_clean_border(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tilt = directions(1, seed)[0]
    values = BALL.vertices @ tilt
    level = rng.uniform(-0.6, 0.6)
    colors = np.tile(np.array([200, 100, 0], np.uint8), (len(values), 1))
    mesh = cut_below(replace(BALL, colors=colors, confidence=values.astype(np.float32)), values, level)
    height = mesh.vertices @ tilt
    assert height.min() > level - 0.3 * 2.4 / 89  # a vertex that was all but passed through may be below
    np.testing.assert_allclose(height[border_rows(mesh)], level, atol=0.3 * 2.4 / 89)
    assert mesh.confidence is not None
    np.testing.assert_allclose(mesh.confidence, height, atol=1e-5)
    assert mesh.colors is not None
    assert (mesh.colors == [200, 100, 0]).all()
    area = face_areas(mesh.vertices, mesh.faces).sum()
    assert area == pytest.approx(2 * np.pi * (1 - level), rel=0.01)
    assert face_components(mesh.faces, len(mesh.vertices)).max() == 0
    health = mesh_health(mesh)
    assert health.non_manifold_edges == 0
    assert health.boundary_edges == len(border_rows(mesh))  # one loop, pinched nowhere


def test_a_cut_at_exact_vertices_needs_no_new_ones() -> None:
    flat = with_normals(
        hard.grid_mesh(np.stack(np.meshgrid(range(9), range(9), [0.0], indexing="ij"), axis=-1)[:, :, 0])
    )
    mesh = cut_below(flat, flat.vertices[:, 0], 4.0)
    assert len(mesh.vertices) == 5 * 9
    assert mesh.vertices[:, 0].min() == 4.0
