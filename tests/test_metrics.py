"""Distances against a slow reference and analytic truth; soundness of meshes that are known."""

import math

import numpy as np
import pytest
from skimage.measure import marching_cubes

from sdfserver.cloud import PointCloud
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import closest_on_mesh, cloud_to_mesh, compare_meshes, mesh_health, sample_surface

CUBE_FACES = np.array(
    [0, 1, 3, 0, 3, 2, 4, 6, 7, 4, 7, 5, 0, 4, 5, 0, 5, 1, 2, 3, 7, 2, 7, 6, 0, 2, 6, 0, 6, 4, 1, 5, 7, 1, 7, 3]
).reshape(-1, 3)


def cube(half: float = 1.0, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> TriangleMesh:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    return TriangleMesh(vertices=corners * half + center, faces=CUBE_FACES.copy())


def level_set(values: np.ndarray) -> TriangleMesh:
    """Marching cubes on values over [-1, 1]^3."""
    vertices, faces, _, _ = marching_cubes(values, 0.0)
    return TriangleMesh(vertices=vertices.astype(np.float64) * 2 / (len(values) - 1) - 1, faces=faces.astype(np.int64))


def grid(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axis = np.linspace(-1, 1, n)
    return tuple(np.meshgrid(axis, axis, axis, indexing="ij"))


def sphere(radius: float = 0.71, n: int = 33) -> TriangleMesh:
    x, y, z = grid(n)
    return level_set(np.sqrt(x**2 + y**2 + z**2) - radius)


def torus(n: int = 40) -> TriangleMesh:
    x, y, z = grid(n)
    return level_set(np.hypot(np.hypot(x, y) - 0.55, z) - 0.2)


def joined(*meshes: TriangleMesh) -> TriangleMesh:
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    faces = [mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=True)]
    return TriangleMesh(vertices=np.concatenate([mesh.vertices for mesh in meshes]), faces=np.concatenate(faces))


def soup(rng: np.random.Generator, n: int, size: float) -> TriangleMesh:
    """Loose triangles of every shape and size, some without area."""
    corners = rng.normal(size=(n, 1, 3)) + rng.normal(size=(n, 3, 3)) * size * rng.exponential(size=(n, 1, 1)) ** 2
    corners[::7, 2] = (corners[::7, 0] + corners[::7, 1]) / 2
    corners[::11, 1] = corners[::11, 2] = corners[::11, 0]
    return TriangleMesh(vertices=corners.reshape(-1, 3), faces=np.arange(3 * n).reshape(-1, 3))


def slow_distance(p: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Region by region, after Ericson, Real-Time Collision Detection, section 5.1.5."""
    ab, ac, ap, bp, cp = b - a, c - a, p - a, p - b, p - c
    d1, d2, d3, d4, d5, d6 = ab @ ap, ac @ ap, ab @ bp, ac @ bp, ab @ cp, ac @ cp
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    if d1 <= 0 and d2 <= 0:
        q = a
    elif d3 >= 0 and d4 <= d3:
        q = b
    elif vc <= 0 and d1 >= 0 and d3 <= 0 and d1 > d3:
        q = a + d1 / (d1 - d3) * ab
    elif d6 >= 0 and d5 <= d6:
        q = c
    elif vb <= 0 and d2 >= 0 and d6 <= 0 and d2 > d6:
        q = a + d2 / (d2 - d6) * ac
    elif va <= 0 and d4 - d3 >= 0 and d5 - d6 >= 0 and d4 - d3 + d5 - d6 > 0:
        q = b + (d4 - d3) / (d4 - d3 + d5 - d6) * (c - b)
    else:
        q = a + (vb * ab + vc * ac) / (va + vb + vc)
    return float(np.linalg.norm(p - q))


@pytest.mark.parametrize(("n", "size"), [(1, 1.0), (5, 0.3), (40, 0.02), (40, 0.2), (150, 0.1)])
def test_distances_equal_a_slow_reference_on_loose_triangles(n: int, size: float) -> None:
    rng = np.random.default_rng(n)
    mesh, points = soup(rng, n, size), rng.normal(size=(60, 3)) * 1.5
    expected = [min(slow_distance(p, *mesh.vertices[face]) for face in mesh.faces) for p in points]
    closest = closest_on_mesh(points, mesh)
    np.testing.assert_allclose(closest.distance, expected, rtol=1e-9, atol=1e-12)
    on_face = [
        slow_distance(q, *mesh.vertices[mesh.faces[f]]) for q, f in zip(closest.point, closest.face, strict=True)
    ]
    np.testing.assert_allclose(on_face, 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(closest.point - points, axis=1), closest.distance)


@pytest.mark.parametrize("reach", [0.01, 0.1, 2.0])
def test_distances_equal_every_face_tried_near_and_far(reach: float) -> None:
    """Points near an even mesh are settled by their neighbourhood, those far from it by the cylinders."""
    rng, mesh = np.random.default_rng(0), torus(24)
    points = sample_surface(mesh, 300, rng)[0] + rng.normal(size=(300, 3)) * reach
    one_face = [TriangleMesh(vertices=mesh.vertices, faces=face[None]) for face in mesh.faces]
    expected = np.min([closest_on_mesh(points, single).distance for single in one_face], axis=0)
    np.testing.assert_allclose(closest_on_mesh(points, mesh).distance, expected, rtol=1e-12, atol=1e-15)


def test_distances_equal_open3d_s() -> None:
    o3d = pytest.importorskip("open3d", exc_type=ImportError)  # or a system library of it is missing
    mesh, rng = torus(), np.random.default_rng(0)
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    points = rng.uniform(-1, 1, size=(3000, 3)).astype(np.float32)
    expected = scene.compute_distance(points).numpy()
    np.testing.assert_allclose(closest_on_mesh(points.astype(float), mesh).distance, expected, atol=1e-6)


def test_few_large_faces_beside_many_small_ones_are_found() -> None:
    rng = np.random.default_rng(0)
    mesh = joined(sphere(0.3), cube(3.0))
    points = rng.uniform(-2.9, 2.9, size=(500, 3))
    to_cube = 3 - np.abs(points).max(axis=1)
    to_sphere = closest_on_mesh(points, sphere(0.3)).distance
    np.testing.assert_allclose(closest_on_mesh(points, mesh).distance, np.minimum(to_cube, to_sphere), rtol=1e-9)


def test_distances_from_a_cube_are_those_of_the_formula_far_from_the_origin() -> None:
    center, rng = (4.5e5, 5.4e6, 120.0), np.random.default_rng(0)
    offset = rng.uniform(-3, 3, size=(400, 3))
    outside = np.linalg.norm(np.maximum(np.abs(offset) - 1, 0), axis=1)
    inside = np.maximum(1 - np.abs(offset).max(axis=1), 0)
    closest = closest_on_mesh(offset + center, cube(center=center))
    np.testing.assert_allclose(closest.distance, outside + inside, atol=1e-8)


def test_cloud_at_a_known_distance_from_a_sphere() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(2000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    mesh = sphere(0.71, 65)
    outer = cloud_to_mesh(PointCloud(points=normals * 0.76, normals=normals * 3), mesh)
    assert outer.mean == pytest.approx(0.05, abs=5e-4)
    assert outer.mean <= outer.p95 <= outer.max < 0.052
    assert outer.normal_agreement == pytest.approx(1, abs=2e-3)
    inward = cloud_to_mesh(PointCloud(points=normals * 0.76, normals=-normals), mesh)
    assert inward.normal_agreement == pytest.approx(-1, abs=2e-3)
    assert cloud_to_mesh(PointCloud(points=normals), mesh).normal_agreement is None


def test_a_subsample_is_the_same_every_time() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, size=(1000, 3))
    once = cloud_to_mesh(PointCloud(points=points), cube(), max_points=100)
    assert once == cloud_to_mesh(PointCloud(points=points), cube(), max_points=100)
    assert once == cloud_to_mesh(PointCloud(points=points[::10]), cube())


def test_mesh_has_no_distance_from_itself() -> None:
    distances = compare_meshes(torus(), torus(), samples=2000)
    assert distances.hausdorff < 1e-12
    assert distances.normal_consistency == pytest.approx(1, abs=1e-2)


def test_concentric_spheres_are_as_far_apart_as_their_radii() -> None:
    distances = compare_meshes(sphere(0.6, 65), sphere(0.7, 65), samples=5000)
    assert distances.accuracy == pytest.approx(0.1, abs=1e-3)
    assert distances.completeness == pytest.approx(0.1, abs=1e-3)
    assert distances.chamfer == pytest.approx((distances.accuracy + distances.completeness) / 2)
    assert 0.1 < distances.hausdorff < 0.102
    assert distances.normal_consistency == pytest.approx(1, abs=2e-3)


def test_mesh_turned_inside_out_has_opposite_normals() -> None:
    mesh = sphere()
    turned = TriangleMesh(vertices=mesh.vertices, faces=mesh.faces[:, ::-1])
    assert compare_meshes(mesh, turned, samples=2000).normal_consistency < -0.98


def test_what_one_mesh_lacks_counts_in_one_direction_only() -> None:
    both = joined(cube(0.2), cube(0.2, (2.0, 0, 0)))
    distances = compare_meshes(cube(0.2), both, samples=4000)
    assert distances.accuracy < 1e-9
    assert distances.completeness == pytest.approx(0.9, abs=0.1)
    assert distances.hausdorff == pytest.approx(2.0, abs=0.1)


def test_samples_are_uniform_over_the_area() -> None:
    mesh = joined(cube(1.0), cube(0.5, (5.0, 0, 0)))
    points, normals = sample_surface(mesh, 20_000, np.random.default_rng(0))
    assert (points[:, 0] > 3).mean() == pytest.approx(1 / 5, abs=0.01)
    large = points[:, 0] < 3
    np.testing.assert_allclose(np.abs(points[large]).max(axis=1), 1)
    np.testing.assert_allclose((points[large] * normals[large]).sum(axis=1), 1)
    np.testing.assert_allclose((points[large] ** 2).mean(axis=0), (1 + 2 / 3) / 3 * np.ones(3), atol=0.02)


def test_health_of_a_cube() -> None:
    health = mesh_health(cube())
    assert health.watertight
    assert (health.vertices, health.faces, health.components, health.genus) == (8, 12, 1, 0)
    assert (health.boundary_edges, health.non_manifold_edges) == (0, 0)
    assert health.area == pytest.approx(24)
    assert health.volume == pytest.approx(8)


def test_volume_keeps_its_digits_far_from_the_origin() -> None:
    assert mesh_health(cube(0.5, (4.5e5, 5.4e6, 120.0))).volume == pytest.approx(1, rel=1e-8)


def test_genus_and_components_are_counted_together() -> None:
    health = mesh_health(joined(torus(), torus(), sphere()))
    assert (health.components, health.genus, health.watertight) == (3, 2, True)
    assert health.volume == pytest.approx(2 * 2 * math.pi**2 * 0.55 * 0.04 + 4 / 3 * math.pi * 0.71**3, rel=0.02)


def test_open_mesh_has_a_border_and_no_genus() -> None:
    closed = torus()
    opened = TriangleMesh(vertices=closed.vertices, faces=closed.faces[1:])
    health = mesh_health(joined(opened, sphere()))
    assert not health.watertight
    assert (health.boundary_edges, health.non_manifold_edges) == (3, 0)
    assert (health.components, health.genus) == (2, 0)


def test_edge_in_three_faces_is_not_manifold() -> None:
    fins = TriangleMesh(
        vertices=np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [-1, 1, 0], [-1, -1, 0]], float),
        faces=np.array([[0, 1, 2], [1, 0, 3], [0, 1, 4]]),
    )
    health = mesh_health(fins)
    assert (health.boundary_edges, health.non_manifold_edges, health.watertight) == (6, 1, False)


def test_a_face_turned_over_is_not_manifold() -> None:
    mesh = cube()
    mesh.faces[0] = mesh.faces[0, ::-1]
    health = mesh_health(mesh)
    assert (health.boundary_edges, health.non_manifold_edges, health.watertight) == (0, 3, False)


def test_turned_inside_out_the_volume_is_negative() -> None:
    mesh = cube()
    health = mesh_health(TriangleMesh(vertices=mesh.vertices, faces=mesh.faces[:, ::-1]))
    assert health.watertight
    assert health.volume == pytest.approx(-8)


def test_mesh_without_faces_is_not_watertight() -> None:
    health = mesh_health(TriangleMesh(vertices=np.zeros((0, 3)), faces=np.zeros((0, 3), np.int64)))
    assert (health.watertight, health.components, health.genus, health.area, health.volume) == (False, 0, 0, 0, 0)
