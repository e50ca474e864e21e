"""The true area and volume are within the tolerances told, which are not much wider than they need be."""

from collections.abc import Callable

import numpy as np
import pytest
from exact_fields import CENTER, SCALE, ExactField, ball, cloud_of, ring
from numpy.typing import NDArray
from shapes import directions, even_sphere, torus

from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, MeshConfig, NetworkConfig, PoolConfig
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import closest_on_mesh, mesh_health
from sdfserver.reconstruct import mesh_field, reconstruct
from sdfserver.tolerance import Displacement, displacement, tolerance

Floats = NDArray[np.float64]
CLOUD = cloud_of(0.7 * directions(3000), directions(3000))
BALL = 4 / 3 * np.pi, 4 * np.pi
RING = 2 * np.pi**2 * 0.65 * 0.25**2, 4 * np.pi**2 * 0.65 * 0.25
QUICK = FitConfig(steps=300, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=8000))
SMALL = NetworkConfig(hidden=64, layers=3, omega=10.0)


def off_of(cloud: PointCloud, mesh: TriangleMesh) -> Displacement:
    return displacement(cloud, np.arange(len(cloud.points)), closest_on_mesh(cloud.points, mesh), mesh)


def noisy(cloud: PointCloud, sigma: float) -> PointCloud:
    return PointCloud(
        points=cloud.points + sigma * np.random.default_rng(5).normal(size=cloud.points.shape), normals=cloud.normals
    )


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_what_triangles_cut_off_is_known_from_their_normals(resolution: int) -> None:
    """Of a ball whose mesh has its corners on it, and no other error."""
    mesh = mesh_field(ExactField(ball(0.7)), CLOUD, MeshConfig(resolution=resolution)).mesh  # type: ignore[arg-type]
    health, told = mesh_health(mesh), tolerance(mesh, Displacement(length=0.0, turn=0.0))
    radius = 0.7 / SCALE
    missing = BALL[0] * radius**3 - health.volume, BALL[1] * radius**2 - health.area
    assert told.volume == pytest.approx(missing[0], rel=0.1)
    assert told.area == pytest.approx(missing[1], rel=0.15)


@pytest.mark.parametrize("moved", [-0.01, 0.0, 0.02])
def test_a_mesh_beside_its_points_is_told_to_be_off_by_as_much(moved: float) -> None:
    mesh = mesh_field(ExactField(ball(0.7 + moved)), CLOUD, MeshConfig(resolution=64)).mesh  # type: ignore[arg-type]
    off = off_of(CLOUD, mesh)
    assert off.length == pytest.approx(abs(moved) / SCALE, rel=0.05, abs=3e-3)
    health, told, radius = mesh_health(mesh), tolerance(mesh, off), 0.7 / SCALE
    assert abs(health.volume - BALL[0] * radius**3) < told.volume
    assert abs(health.area - BALL[1] * radius**2) < told.area


def test_noise_averages_out_over_patches() -> None:
    cloud = even_sphere(20_000)
    mesh = mesh_field(ExactField(ball(0.5)), CLOUD, MeshConfig(resolution=64)).mesh  # type: ignore[arg-type]
    unit = TriangleMesh(vertices=mesh.vertices - CENTER, faces=mesh.faces, normals=mesh.normals)
    clean, rough = (off_of(noisy(cloud, sigma), unit).length for sigma in (0.0, 0.02))
    assert clean < 0.002
    assert clean < rough < 0.02 / 4


def test_a_hole_in_the_cloud_makes_the_tolerance_wide_enough_for_a_flat_lid() -> None:
    cloud = even_sphere(8000)
    assert cloud.normals is not None
    there = cloud.points[:, 2] < 0.9
    part = PointCloud(points=cloud.points[there], normals=cloud.normals[there])
    mesh = mesh_field(ExactField(ball(0.5)), CLOUD, MeshConfig(resolution=64)).mesh  # type: ignore[arg-type]
    whole = TriangleMesh(vertices=mesh.vertices - CENTER, faces=mesh.faces, normals=mesh.normals)
    vertices = np.minimum(whole.vertices, [np.inf, np.inf, 0.9])
    lid = TriangleMesh(vertices=vertices, faces=mesh.faces)
    missing = np.pi * 0.1**2 * (3 - 0.1) / 3
    assert mesh_health(whole).volume - mesh_health(lid).volume == pytest.approx(missing, rel=0.1)
    told = tolerance(lid, off_of(part, lid)).volume
    assert missing < told < 4 * missing
    assert told > 2 * tolerance(whole, off_of(cloud, whole)).volume


@pytest.mark.parametrize(
    ("make", "truth", "widest"),
    [
        (lambda: even_sphere(2000), BALL, 0.02),
        (lambda: even_sphere(100), BALL, 0.2),
        (lambda: noisy(even_sphere(5000), 0.02), BALL, 0.05),
        (lambda: noisy(even_sphere(10_000), 0.035), BALL, 0.05),  # one percent of the diagonal
        (lambda: torus(5000), RING, 0.05),
        (lambda: noisy(torus(5000), 0.01), RING, 0.1),
    ],
)
def test_the_truth_is_within_the_tolerances_of_a_fit(
    make: Callable[[], PointCloud], truth: tuple[float, float], widest: float
) -> None:
    found = reconstruct(make(), network=SMALL, fit_config=QUICK, mesh=MeshConfig(resolution=64), device="cpu").report[
        "mesh"
    ]
    assert abs(found["volume"] - truth[0]) < found["volume_tolerance"] < widest * truth[0]
    assert abs(found["area"] - truth[1]) < found["area_tolerance"] < widest * truth[1]


def test_an_open_mesh_has_no_volume_and_no_tolerance() -> None:
    found = mesh_field(
        ExactField(ring()),  # type: ignore[arg-type]
        cloud_of(torus(3000, major=0.55).points[:1500], torus(3000, major=0.55).normals[:1500]),  # type: ignore[index]
        MeshConfig(resolution=32, trim_distance_world=0.05),
    ).report["mesh"]
    assert not found["watertight"]
    assert (found["volume_tolerance"], found["area_tolerance"]) == (None, None)
