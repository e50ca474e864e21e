"""The winding number: inside, outside, holes, and the patches against the full sum."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from shapes import bowl, directions, sphere, torus
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.winding import Dipoles, dipole_levels, point_areas, winding_number


def levels_of(cloud: PointCloud) -> list[Dipoles]:
    assert cloud.normals is not None
    return dipole_levels(cloud.points, cloud.normals, point_areas(cloud.points, cKDTree(cloud.points)))


def winding_at(cloud: PointCloud, queries: np.ndarray) -> Tensor:
    distances = cKDTree(cloud.points).query(queries)[0]
    return winding_number(torch.tensor(queries).float(), torch.tensor(distances).float(), levels_of(cloud))


def full_sum(cloud: PointCloud, queries: np.ndarray) -> np.ndarray:
    """The slow reference: equation 5 of Barill et al. 2018, every point on its own."""
    assert cloud.normals is not None
    areas = point_areas(cloud.points, cKDTree(cloud.points))
    offsets = cloud.points[None] - queries[:, None]
    flux = (offsets * (areas[:, None] * cloud.normals)).sum(-1)
    return (flux / (4 * np.pi * np.linalg.norm(offsets, axis=-1) ** 3)).sum(1)


def test_point_areas_add_up_to_the_surface() -> None:
    cloud = sphere(20_000)
    assert point_areas(cloud.points, cKDTree(cloud.points)).sum() == pytest.approx(4 * np.pi, rel=0.15)


def test_inside_is_one_and_outside_is_zero() -> None:
    cloud = sphere(20_000)
    inside, outside = winding_at(cloud, 0.8 * directions(200, 1)), winding_at(cloud, 1.2 * directions(200, 2))
    assert ((inside - 1).abs() < 0.15).all()
    assert (outside.abs() < 0.15).all()


def test_reversed_normals_turn_the_sign() -> None:
    cloud = torus()
    assert cloud.normals is not None
    queries = np.random.default_rng(0).random((100, 3)) * 2 - 1
    turned = PointCloud(points=cloud.points, normals=-cloud.normals)
    torch.testing.assert_close(winding_at(turned, queries), -winding_at(cloud, queries))


def test_half_a_sphere_is_undecided_on_its_open_side() -> None:
    w = winding_at(bowl(20_000), np.array([[0.0, 0.0, 0.0]]))
    assert w.item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("n", [60, 500, 20_000])
def test_patches_agree_with_the_full_sum_beyond_their_width(n: int) -> None:
    cloud = torus(n)
    queries = np.random.default_rng(1).random((500, 3)) * 1.8 - 0.9
    queries = queries[cKDTree(cloud.points).query(queries)[0] > levels_of(cloud)[-1].spacing]
    assert len(queries) > 50
    error = np.abs(winding_at(cloud, queries).numpy() - full_sum(cloud, queries))
    assert error.max() < 0.12
    assert error.mean() < 0.02


def test_duplicate_points_stand_for_no_area() -> None:
    points = np.zeros((100, 3))
    assert (point_areas(points, cKDTree(points)) == 0).all()
