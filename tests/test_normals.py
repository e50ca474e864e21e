from pathlib import Path

import numpy as np
import pytest

from sdfserver.cloud import PointCloud, orientation_disagreement, validate
from sdfserver.errors import CloudError, ConfigError
from sdfserver.io import read_cloud
from sdfserver.normals import estimate_normals, remove_outliers

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
UTM = np.array([412345.678, 5512345.678, 123.456])

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


def ball_surface(n: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(n, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, UTM])
def test_normals_of_a_sphere_are_its_directions_at_any_scale(scale, offset):
    if scale < 1e-3 and np.any(offset):
        pytest.skip("float64 does not resolve that")
    directions = ball_surface(3000)
    cloud = estimate_normals(PointCloud(points=directions * scale + offset))
    assert cosines(cloud.normals, directions).min() > 0.97
    np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=1), 1, atol=1e-12)


def test_each_of_several_shapes_is_turned_outward():
    directions = [ball_surface(2000, seed) for seed in range(3)]
    cloud = estimate_normals(
        PointCloud(points=np.vstack([d + np.array([4.0 * i, 0, 0]) for i, d in enumerate(directions)]))
    )
    assert cosines(cloud.normals, np.vstack(directions)).min() > 0.9


def test_with_a_viewpoint_all_normals_face_it():
    points = ball_surface(2000)
    inside = estimate_normals(PointCloud(points=points + UTM), viewpoint=UTM)
    assert cosines(inside.normals, points).max() < -0.9
    above = estimate_normals(PointCloud(points=points), viewpoint=[0, 0, 10])
    assert cosines(above.normals, [0, 0, 10] - points).min() >= 0


def test_a_plane_is_turned_upward():
    points = np.c_[np.random.default_rng(0).random((300, 2)), np.zeros(300)]
    np.testing.assert_allclose(estimate_normals(PointCloud(points=points)).normals, [[0, 0, 1]] * 300, atol=1e-6)


def test_a_regular_grid_on_a_box_is_no_degenerate_case():
    axis = np.linspace(-1, 1, 21)
    grid = np.array(np.meshgrid(axis, axis, [-1.0, 1.0])).reshape(3, -1).T
    points = np.unique(np.vstack([grid, grid[:, [2, 0, 1]], grid[:, [1, 2, 0]]]), axis=0)
    cloud = estimate_normals(PointCloud(points=points))
    assert (cosines(cloud.normals, cloud.points) > 0).all()


def test_existing_normals_do_not_matter_and_duplicates_become_one():
    points = ball_surface(500)
    plain = estimate_normals(PointCloud(points=points))
    twice = estimate_normals(PointCloud(points=np.vstack([points, points]), normals=np.full((1000, 3), np.nan)))
    np.testing.assert_array_equal(plain.normals, twice.normals)
    np.testing.assert_array_equal(plain.points, twice.points)


@pytest.mark.parametrize(
    "points", [np.zeros((100, 3)), np.outer(np.arange(100.0), [1, 2, 3]), ball_surface(20), np.full((60, 3), np.nan)]
)
def test_degenerate_clouds_are_refused(points):
    with pytest.raises(CloudError):
        estimate_normals(PointCloud(points=points))


def test_settings_out_of_range_are_refused():
    cloud = PointCloud(points=ball_surface(100))
    for options in ({"neighbours": 2}, {"viewpoint": [0, 0]}, {"viewpoint": [0, 0, np.nan]}):
        with pytest.raises(ConfigError):
            estimate_normals(cloud, **options)
    for options in ({"neighbours": 0}, {"deviations": 0.0}, {"deviations": np.nan}):
        with pytest.raises(ConfigError):
            remove_outliers(cloud, **options)


@needs_shared
@pytest.mark.parametrize(
    ("name", "share"),
    [("srb_daratech", 0.99), ("srb_lord_quas", 0.99), ("cgal_kitten", 1.0), ("cgal_hippo1", 0.99)],
)
def test_estimates_agree_with_the_normals_of_real_scans(name, share):
    given = validate(read_cloud(SHARED / "clouds" / f"{name}.ply"))
    estimated = estimate_normals(PointCloud(points=given.points))
    assert (cosines(given.normals, estimated.normals) > 0).mean() >= share


@needs_shared
@pytest.mark.parametrize("name", ["selfsample_scanned_leg", "kinect_milk", "cgal_cube_csg"])
def test_scans_without_usable_normals_get_some_that_agree(name):
    cloud = estimate_normals(read_cloud(SHARED / "clouds" / f"{name}.ply"))
    assert orientation_disagreement(cloud) < 0.01
    validate(cloud)


def test_outliers_go_and_the_surface_stays():
    random = np.random.default_rng(1)
    points = np.vstack([ball_surface(3000), random.uniform(-2, 2, (60, 3))]) + UTM
    cloud, removed = remove_outliers(PointCloud(points=points, normals=points))
    radius = np.linalg.norm(cloud.points - UTM, axis=1)
    assert (np.abs(radius - 1) > 0.3).sum() == 0
    assert (np.abs(radius - 1) < 1e-6).sum() > 2900
    assert removed == 3060 - len(cloud.points)
    assert cloud.normals.shape == cloud.points.shape


def test_a_cloud_without_outliers_is_returned_as_it_is():
    cloud = PointCloud(points=np.array(np.meshgrid(*[np.arange(2.0)] * 3)).reshape(3, -1).T)
    assert remove_outliers(cloud, neighbours=3) == (cloud, 0)
    assert remove_outliers(PointCloud(points=np.zeros((1, 3))))[1] == 0
