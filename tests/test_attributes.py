"""What vertices have from the points around them."""

from dataclasses import replace

import numpy as np
import pytest
from shapes import sphere
from skimage.measure import marching_cubes

from sdfserver.attributes import AROUND, attributes_from, colors_of
from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, MeshConfig, NetworkConfig, PoolConfig
from sdfserver.mesh import TriangleMesh
from sdfserver.reconstruct import fit_field, mesh_field

RED, BLUE = np.array([220, 30, 20], np.uint8), np.array([10, 40, 200], np.uint8)


def ball(resolution: int = 40) -> TriangleMesh:
    """The unit sphere, without normals."""
    x = np.linspace(-1.3, 1.3, resolution)
    distance = np.linalg.norm(np.stack(np.meshgrid(x, x, x, indexing="ij")), axis=0) - 1
    vertices, faces, _, _ = marching_cubes(distance, 0.0, spacing=3 * [x[1] - x[0]])
    return TriangleMesh(vertices=vertices.astype(np.float64) - 1.3, faces=faces.astype(np.int64)[:, ::-1])


def two_colored(n: int = 4000) -> PointCloud:
    """A sphere, red above and blue below."""
    cloud = sphere(n)
    return replace(cloud, colors=np.where(cloud.points[:, 2:] > 0, RED, BLUE).astype(np.uint8))


def spacing(n: int) -> float:
    """The side of the square that each of n points on the unit sphere stands for."""
    return float(np.sqrt(4 * np.pi / n))


def halves_agree(mesh: TriangleMesh, reach: float) -> None:
    """Every vertex farther than `reach` from the equator has the colour of its half, and others one between."""
    assert mesh.colors is not None
    assert mesh.colors.dtype == np.uint8
    above, below = mesh.vertices[:, 2] > reach, mesh.vertices[:, 2] < -reach
    np.testing.assert_array_equal(mesh.colors[above], np.broadcast_to(RED, (above.sum(), 3)))
    np.testing.assert_array_equal(mesh.colors[below], np.broadcast_to(BLUE, (below.sum(), 3)))
    low, high = np.minimum(RED, BLUE), np.maximum(RED, BLUE)
    assert np.all((mesh.colors >= low) & (mesh.colors <= high))


def test_two_colours_of_a_sphere_do_not_run_into_each_other_farther_than_two_spacings() -> None:
    cloud = two_colored()
    for where in (np.zeros(3), np.array([400_000.0, 5_500_000.0, 100.0])):
        mesh = ball()
        moved = replace(cloud, points=cloud.points + where)
        found = colors_of(replace(mesh, vertices=mesh.vertices + where), moved)
        halves_agree(replace(mesh, colors=found), 2 * spacing(4000))


def test_a_vertex_at_a_point_has_its_colour_and_one_between_has_the_mean() -> None:
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 50.0, 0], [50.0, 50, 0]])
    colors = np.array([[0, 10, 100], [100, 30, 0], [255, 255, 255], [255, 255, 255]], np.uint8)
    cloud = PointCloud(points=points, normals=np.tile([0, 0, 1.0], (4, 1)), colors=colors)
    mesh = TriangleMesh(
        vertices=np.array([[0, 0, 0], [1, 0, 0], [0.5, 0, 0.0]]),
        faces=np.array([[0, 1, 2]]),
        normals=np.tile(np.array([0, 0, 1], np.float32), (3, 1)),
    )
    found = colors_of(mesh, cloud)
    np.testing.assert_array_equal(found[:2], colors[:2])
    np.testing.assert_allclose(found[2], [50, 20, 50], atol=1)


@pytest.mark.parametrize("thickness", [0.02, 0.002])
def test_the_two_faces_of_a_wall_thinner_than_a_spacing_keep_their_colours(thickness: float) -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(-1, 1, (2000, 2))  # about 0.04 apart
    side = np.repeat([1.0, -1.0], 1000)
    points = np.column_stack([xy, side * thickness / 2])
    normals = np.column_stack([np.zeros((2000, 2)), side])
    cloud = PointCloud(points=points, normals=normals, colors=np.where(side[:, None] > 0, RED, BLUE).astype(np.uint8))
    grid = np.stack(np.meshgrid(np.linspace(-0.95, 0.95, 60), np.linspace(-0.95, 0.95, 60)), axis=-1).reshape(-1, 2)
    for sign, color in ((1, RED), (-1, BLUE)):
        vertices = np.column_stack([grid, np.full(len(grid), sign * thickness / 2)])
        normal = np.tile(np.array([0, 0, sign], np.float32), (len(grid), 1))
        mesh = TriangleMesh(vertices=vertices, faces=np.array([[0, 1, 2]]), normals=normal)
        np.testing.assert_array_equal(colors_of(mesh, cloud), np.broadcast_to(color, (len(grid), 3)))
        # What has no normals is what is nearest, whatever it faces.
        assert len(np.unique(colors_of(mesh, replace(cloud, normals=None)), axis=0)) > 1


def test_where_no_point_faces_that_side_the_nearest_stand_in() -> None:
    cloud = two_colored(500)
    mesh = ball()
    outward = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    inward = replace(mesh, normals=-outward.astype(np.float32))
    halves_agree(replace(mesh, colors=colors_of(inward, cloud)), 2 * spacing(500))
    few = cloud.take(slice(0, AROUND // 8))
    assert colors_of(mesh, few).shape == mesh.vertices.shape


def test_a_cloud_without_colours_gives_none() -> None:
    assert colors_of(ball(), sphere(100)) is None


def test_a_simpler_mesh_has_what_the_nearest_vertices_have() -> None:
    fine, coarse = ball(40), ball(20)
    assert attributes_from(fine, coarse) is coarse
    colors = np.where(fine.vertices[:, 2:] > 0, RED, BLUE).astype(np.uint8)
    confidence = (fine.vertices[:, 2] > 0).astype(np.float32)
    found = attributes_from(replace(fine, colors=colors, confidence=confidence), coarse)
    halves_agree(found, 0.1)
    away = np.abs(coarse.vertices[:, 2]) > 0.1
    np.testing.assert_array_equal(found.confidence[away], coarse.vertices[away, 2] > 0)


def test_a_reconstruction_has_the_colours_of_its_cloud_whatever_is_done_to_both() -> None:
    cloud = two_colored(1500)
    whole = PointCloud(
        points=np.concatenate([cloud.points, [[0, 0, 60.0]], cloud.points[:10]]),
        normals=np.concatenate([cloud.normals, [[0, 0, 1.0]], cloud.normals[:10]]),
        colors=np.concatenate([cloud.colors, [BLUE], cloud.colors[:10]]),
    )
    network = NetworkConfig(hidden=64, layers=3, omega=10.0)
    settings = FitConfig(steps=250, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=5000))
    fitted = fit_field(whole, network=network, fit_config=settings, device="cpu")
    assert fitted.report["cloud"]["strays_dropped"] == 1
    assert fitted.cloud.points.shape == cloud.points.shape
    for faces in (None, 2000):
        made = mesh_field(fitted.field, fitted.cloud, MeshConfig(resolution=48, target_faces=faces)).mesh
        halves_agree(made, 2 * spacing(1500))
    bare = replace(fitted.cloud, colors=None)
    assert mesh_field(fitted.field, bare, MeshConfig(resolution=32)).mesh.colors is None
