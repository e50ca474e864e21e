"""The winding number: inside, outside, holes, and the patches against the full sum."""

import numpy as np
import pytest
import torch
from shapes import bowl, directions, sphere, torus
from torch import Tensor

from sdfserver.cloud import PointCloud
from sdfserver.neighbours import neighbours_of
from sdfserver.winding import DipoleTree, blurred_distance, point_areas, winding_number


def areas_of(cloud: PointCloud) -> np.ndarray:
    return point_areas(cloud.points, neighbours_of(cloud.points, "cpu"))


def winding_at(cloud: PointCloud, queries: np.ndarray) -> Tensor:
    assert cloud.normals is not None
    return winding_number(torch.tensor(queries).float(), DipoleTree(cloud.points, cloud.normals, areas_of(cloud)))


def full_sum(cloud: PointCloud, queries: np.ndarray) -> np.ndarray:
    """The slow reference: equation 5 of Barill et al. 2018, every point on its own."""
    assert cloud.normals is not None
    areas = areas_of(cloud)
    offsets = cloud.points[None] - queries[:, None]
    flux = (offsets * (areas[:, None] * cloud.normals)).sum(-1)
    return (flux / (4 * np.pi * np.linalg.norm(offsets, axis=-1) ** 3)).sum(1)


def test_point_areas_add_up_to_the_surface() -> None:
    cloud = sphere(20_000)
    assert point_areas(cloud.points, neighbours_of(cloud.points, "cpu")).sum() == pytest.approx(4 * np.pi, rel=0.15)


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


@pytest.mark.parametrize("n", [3, 60, 500, 20_000])
def test_the_tree_agrees_with_the_full_sum(n: int) -> None:
    cloud = torus(n)
    queries = np.random.default_rng(1).random((500, 3)) * 1.8 - 0.9
    error = np.abs(winding_at(cloud, queries).numpy() - full_sum(cloud, queries))
    away = neighbours_of(cloud.points, "cpu").query(queries, 1)[0][:, 0] > blurred_distance(areas_of(cloud))
    assert error[away].max(initial=0) < 0.06
    assert error.mean() < 0.015


def test_few_signs_differ_from_those_of_the_full_sum_even_among_the_points() -> None:
    cloud = torus(20_000)
    queries = cloud.points[:2000] + np.random.default_rng(2).normal(scale=0.02, size=(2000, 3))
    assert ((winding_at(cloud, queries).numpy() > 0.5) != (full_sum(cloud, queries) > 0.5)).mean() < 0.005


def test_each_query_keeps_its_place() -> None:
    cloud, queries = torus(5000), np.random.default_rng(3).random((333, 3)) * 2 - 1
    whole = winding_at(cloud, queries)
    assert winding_at(cloud, queries[:0]).shape == (0,)
    # In other company a node may be opened that was not before: the sums agree as far as they are accurate.
    np.testing.assert_allclose(winding_at(cloud, queries[::7]), whole[::7], atol=0.06)


def test_duplicate_points_stand_for_no_area() -> None:
    points = np.zeros((100, 3))
    assert (point_areas(points, neighbours_of(points, "cpu")) == 0).all()
