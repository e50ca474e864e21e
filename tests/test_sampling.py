"""What the fit draws from: signs, distances, what is held out, and the estimate of the noise."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from shapes import bowl, rippled_sphere, sphere, torus

from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS, PoolConfig
from sdfserver.errors import CloudError
from sdfserver.neighbours import neighbours_of
from sdfserver.sampling import draw_samples, estimate_noise

SMALL_POOL = PoolConfig(size=5000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_trusted_signs_are_the_sphere_s() -> None:
    pool = draw_samples(sphere(20_000, radius=0.8), SMALL_POOL, rng()).pool
    exact = pool.points.norm(dim=1) - 0.8
    trusted = pool.trusted
    assert trusted[exact.abs() > 0.03].all()
    assert (exact.sign() == pool.signed_distance.sign())[trusted].all()


def test_around_a_room_all_is_solid() -> None:
    room = sphere(20_000, radius=0.8)
    pool = draw_samples(PointCloud(points=room.points, normals=-room.normals), SMALL_POOL, rng()).pool
    exact = 0.8 - pool.points.norm(dim=1)
    assert pool.trusted[exact.abs() > 0.03].all()
    assert (exact.sign() == pool.signed_distance.sign())[pool.trusted].all()


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_an_open_sheet_is_no_room(side: float) -> None:
    flat = rng(1).random((20_000, 3)) * 1.6 - 0.8
    flat[:, 2] = 0.05 * np.sin(9 * flat[:, 0])
    slope = 0.45 * np.cos(9 * flat[:, 0])
    normals = np.column_stack([-slope, np.zeros(len(flat)), np.ones(len(flat))]) / np.sqrt(1 + slope**2)[:, None]
    pool = draw_samples(PointCloud(points=flat, normals=side * normals), SMALL_POOL, rng()).pool
    above = side * (pool.points[:, 2] - 0.05 * torch.sin(9 * pool.points[:, 0])) > 0
    assert (pool.signed_distance[pool.trusted & above] > 0).all()


def test_far_distances_are_those_to_the_surface() -> None:
    samples = draw_samples(sphere(5000, radius=0.8), SMALL_POOL, rng())
    exact = samples.pool.points.norm(dim=1) - 0.8
    assert samples.pool.far.any()
    assert (exact - samples.pool.signed_distance)[samples.pool.far].abs().max() < samples.spacing


def test_no_sign_is_trusted_in_the_mouth_of_a_bowl() -> None:
    cloud = bowl(5000)
    pool = draw_samples(PointCloud(points=0.9 * cloud.points, normals=cloud.normals), SMALL_POOL, rng()).pool
    mouth = (pool.points[:, 2].abs() < 0.1) & (pool.points[:, :2].norm(dim=1) < 0.5)
    assert mouth.any()
    assert not pool.trusted[mouth].any()


def test_over_a_hole_outside_is_trusted_sooner_than_inside() -> None:
    # On its axis, at z over the mouth of a hemisphere of radius r, w = (1 - z / (z^2 + r^2)^(1/2)) / 2.
    cloud = bowl(5000)
    radius = 0.9
    pool = draw_samples(PointCloud(points=radius * cloud.points, normals=cloud.normals), SMALL_POOL, rng()).pool
    axis, z = pool.points[:, :2].norm(dim=1) < 0.2, pool.points[:, 2]
    above, below = axis & (z > 0.55 * radius), axis & (z < -0.2 * radius) & (z > -0.8 * radius)
    assert above.any()
    assert pool.trusted[above].all()
    assert (pool.signed_distance[above] > 0).all()
    assert below.any()
    assert not pool.trusted[below].any()


def test_the_published_pool_is_uniform_and_trusts_no_sign() -> None:
    pool = draw_samples(sphere(1000), PRESETS["paper"].fit.pool, rng()).pool
    assert not pool.trusted.any()
    assert pool.points.mean(dim=0).abs().max() < 0.05
    assert pool.points.var(dim=0).tolist() == pytest.approx([1 / 3] * 3, rel=0.1)


def test_held_out_points_are_not_fitted() -> None:
    cloud = torus(1000)
    samples = draw_samples(cloud, SMALL_POOL, rng())
    assert len(samples.held_points) == 20
    assert len(samples.points) + len(samples.held_points) == 1000
    assert cKDTree(samples.points.numpy()).query(samples.held_points.numpy())[0].min() > 0


def test_the_same_seed_draws_the_same_samples() -> None:
    a, b = (draw_samples(torus(1000), SMALL_POOL, rng(5)) for _ in range(2))
    assert (a.pool.points == b.pool.points).all()
    assert (a.points == b.points).all()


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_noise_is_estimated_within_a_fifth(noise: float) -> None:
    cloud = torus(20_000)
    assert cloud.normals is not None
    points = cloud.points + rng().normal(size=cloud.points.shape) * noise
    found = estimate_noise(points, cloud.normals, neighbours_of(points, "cpu"), rng())
    assert found.by_quadrics == pytest.approx(noise, rel=0.2)
    assert found.least == pytest.approx(noise, rel=0.3)


def test_a_clean_cloud_has_next_to_no_noise() -> None:
    cloud = torus(20_000)
    assert cloud.normals is not None
    assert estimate_noise(cloud.points, cloud.normals, neighbours_of(cloud.points, "cpu"), rng()).least < 1e-4


def test_waves_are_not_taken_for_noise() -> None:
    """Ripples hardly longer than the way to two dozen neighbours."""
    cloud = rippled_sphere(20_000, height=0.01, waves=40.0)
    assert cloud.normals is not None
    found = estimate_noise(cloud.points, cloud.normals, neighbours_of(cloud.points, "cpu"), rng())
    assert found.by_quadrics > 1e-3
    assert found.least < 0.5 * found.by_quadrics


def test_a_cloud_without_normals_is_refused() -> None:
    with pytest.raises(CloudError, match="no normals"):
        draw_samples(PointCloud(points=sphere().points), SMALL_POOL, rng())
