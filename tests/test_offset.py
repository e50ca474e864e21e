"""Offsets are as far off as they say, and walls as thick: against formulas, on fields that are no distances."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_fields import CENTER, SCALE, Distance, ExactField, ball, box, cloud_of, ring, to_unit
from numpy.typing import NDArray
from shapes import directions, even_sphere, sphere, torus

from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, MeshConfig, NetworkConfig, PoolConfig
from sdfserver.errors import ConfigError, NoSurfaceError
from sdfserver.extract import extract
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import closest_on_mesh, mesh_health, sample_surface
from sdfserver.offset import SurfaceDistance, thickness, wall
from sdfserver.reconstruct import MESH_STAGES, Clock, MeshedField, Progress, fit_field, mesh_field

Floats = NDArray[np.float64]
BAR = 0.02
SHAPES = {
    "ball": (ball(0.7), 1.4 * 3**0.5, cloud_of(0.7 * directions(3000), directions(3000))),
    "ring": (ring(), 2.33, cloud_of(torus(3000, major=0.55).points, torus(3000, major=0.55).normals)),  # type: ignore[arg-type]
}


def meshed(shape: str, **asked: Any) -> MeshedField:
    phi, _, cloud = SHAPES[shape]
    return mesh_field(ExactField(phi), cloud, MeshConfig(**{"resolution": 48} | asked))  # type: ignore[arg-type]


def extracted(phi: Distance, resolution: int = 64) -> SurfaceDistance:
    surface = extract(ExactField(phi), resolution=resolution)
    return SurfaceDistance(surface.vertices_unit, surface.faces)


def box_cloud(n: int = 3000) -> PointCloud:
    rng, half = np.random.default_rng(0), np.array([0.6, 0.4, 0.3])
    points, axis = rng.uniform(-1, 1, (n, 3)) * half, rng.integers(3, size=n)
    normals = np.eye(3)[axis] * rng.choice([-1.0, 1.0], n)[:, None]
    return cloud_of(np.where(normals != 0, normals * half, points), normals)


@pytest.mark.parametrize("phi", [ball(0.7), ring(), box(0.6, 0.4, 0.3)])
def test_distances_from_a_mesh_are_those_of_the_shape_inside_and_far_outside(phi: Distance) -> None:
    x = np.random.default_rng(1).uniform(-2, 2, (4000, 3))
    foot, distance, way = extracted(phi).closest(x)
    truth = phi(torch.from_numpy(x)).numpy()
    assert np.abs(distance - truth).max() < 0.7 * 2 / 64  # of a voxel: triangles cut the box's edges off
    assert ((distance < 0) == (truth < 0))[np.abs(truth) > 0.02].all()
    np.testing.assert_allclose(foot + distance[:, None] * way, x, atol=1e-12)


def test_distances_from_a_mesh_are_those_of_an_exact_search() -> None:
    surface = extracted(ring())
    mesh = TriangleMesh(vertices=surface.vertices, faces=surface.faces)
    x = np.random.default_rng(2).uniform(-1.5, 1.5, (3000, 3))
    exact = closest_on_mesh(x, mesh).distance
    found = np.abs(surface.closest(x)[1])
    assert (found >= exact - 1e-12).all()
    assert np.median(found - exact) < 1e-12
    assert (found / exact - 1).max() < 0.01


@pytest.mark.parametrize(
    ("shape", "share"),
    [("ball", -0.1), ("ball", -0.01), ("ball", 0.01), ("ball", 0.1), ("ring", -0.08), ("ring", -0.03), ("ring", 0.1)],
)
def test_an_offset_is_as_far_off_as_asked_though_the_field_is_no_distance(shape: str, share: float) -> None:
    phi, diagonal, _ = SHAPES[shape]
    level = share * diagonal
    found = meshed(shape, level_world=level / SCALE)
    off = np.abs(phi(to_unit(found.mesh.vertices)).numpy() / level - 1)
    assert off.max() < BAR
    raw = ExactField(phi).value(to_unit(found.mesh.vertices)).numpy()
    assert np.abs(raw / level - 1).max() > 0.4  # where the level set of the field itself would be
    (about,) = found.report["mesh"]["offset"]["levels"]
    assert about["level"] == level / SCALE
    # What the report says of it is so, between its vertices as well.
    rng, vertices = np.random.default_rng(3), found.mesh.vertices
    x = np.concatenate([sample_surface(found.mesh, 5000, rng)[0], vertices[rng.integers(len(vertices), size=5000)]])
    error = np.abs(phi(to_unit(x)).numpy() / SCALE - about["level"])
    assert about["error"]["mean"] == pytest.approx(error.mean(), rel=0.15)
    assert about["error"]["p95"] == pytest.approx(np.percentile(error, 95), rel=0.15)
    assert found.report["mesh"]["watertight"]
    assert found.report["mesh"]["components"] == 1


@pytest.mark.parametrize(("level", "resolution"), [(0.05, 64), (0.2, 96)])
def test_the_outer_offset_of_a_box_is_rounded(level: float, resolution: int) -> None:
    phi = box(0.6, 0.4, 0.3)
    found = mesh_field(ExactField(phi, 0.2), box_cloud(), MeshConfig(resolution=resolution, level_world=level / SCALE))
    off = np.abs(phi(to_unit(found.mesh.vertices)).numpy() / level - 1)
    # A vertex stays where its triangle would turn over.
    assert (off > BAR).mean() < 1e-3
    assert off.max() < 3 * BAR
    half = np.array([0.6, 0.4, 0.3])
    # Steiner: a box, a slab on each face, a quarter of a cylinder on each edge, an eighth of a ball on each corner.
    volume = 8 * half.prod() + level * 8 * (half[0] * half[1] + half[1] * half[2] + half[0] * half[2])
    volume += np.pi * level**2 * 2 * half.sum() + 4 / 3 * np.pi * level**3
    report = found.report["mesh"]
    assert report["volume"] * SCALE**3 == pytest.approx(volume, rel=5e-3)
    assert abs(report["volume"] * SCALE**3 - volume) < report["volume_tolerance"] * SCALE**3


def test_an_offset_may_leave_the_cube_that_the_field_was_fitted_in() -> None:
    found = meshed("ball", level_world=1.5 / SCALE)
    assert np.abs(np.linalg.norm((found.mesh.vertices - CENTER) * SCALE, axis=1) / 2.2 - 1).max() < 0.005
    assert found.report["mesh"]["watertight"]
    assert found.report["mesh"]["volume"] * SCALE**3 == pytest.approx(4 / 3 * np.pi * 2.2**3, rel=0.01)


def test_parts_of_an_offset_meet_where_the_shape_leaves_too_little_room() -> None:
    """In the hole of a ring, 0.3 in radius."""
    assert meshed("ring", level_world=0.27 / SCALE, resolution=64).report["mesh"]["genus"] == 1
    assert meshed("ring", level_world=0.33 / SCALE).report["mesh"]["genus"] == 0


@pytest.mark.parametrize(("level", "lowest", "highest"), [(-0.3, -0.25, 2.33), (3.0, -0.25, 2.33), (1e6, -0.25, 2.33)])
def test_what_cannot_be_reached_is_refused_with_what_can(level: float, lowest: float, highest: float) -> None:
    with pytest.raises(NoSurfaceError, match=r"no surface at level \S+: offsets of its surface reach from") as raised:
        meshed("ring", level_world=level / SCALE)
    assert raised.value.level == pytest.approx(level / SCALE)
    assert raised.value.lowest == pytest.approx(lowest / SCALE, rel=0.1)
    assert raised.value.highest == pytest.approx(highest / SCALE, rel=0.01)


def test_around_a_room_the_solid_is_outside_and_walls_grow_into_it() -> None:
    room = ExactField(lambda x: 0.7 - x.norm(dim=1))
    cloud = cloud_of(0.7 * directions(3000), -directions(3000))
    deeper = mesh_field(room, cloud, MeshConfig(resolution=64, level_world=-0.5 / SCALE))  # type: ignore[arg-type]
    radius = np.linalg.norm((deeper.mesh.vertices - CENTER) * SCALE, axis=1)
    assert np.abs(radius / 1.2 - 1).max() < 0.01
    with pytest.raises(NoSurfaceError) as raised:
        mesh_field(room, cloud, MeshConfig(resolution=64, level_world=0.8 / SCALE))  # type: ignore[arg-type]
    assert raised.value.highest == pytest.approx(0.7 / SCALE, rel=0.05)
    walled = mesh_field(room, cloud, MeshConfig(resolution=64, shell_world=0.1 / SCALE)).report["mesh"]  # type: ignore[arg-type]
    assert walled["volume"] * SCALE**3 == pytest.approx(4 / 3 * np.pi * (0.8**3 - 0.7**3), rel=0.01)


@pytest.mark.parametrize(("shape", "level", "thick"), [("ball", 0.0, 0.1), ("ball", 0.2, 0.3), ("ring", -0.02, 0.15)])
def test_a_shell_is_a_closed_wall_of_the_thickness_and_volume_asked_for(shape: str, level: float, thick: float) -> None:
    found = meshed(shape, level_world=level / SCALE, shell_world=thick / SCALE)
    report = found.report["mesh"]
    assert (report["watertight"], report["components"], report["non_manifold_edges"]) == (True, 2, 0)
    if shape == "ball":
        volume = 4 / 3 * np.pi * ((0.7 + level) ** 3 - (0.7 + level - thick) ** 3)
    else:
        volume = 2 * np.pi**2 * 0.55 * ((0.25 + level) ** 2 - (0.25 + level - thick) ** 2)
    assert report["volume"] * SCALE**3 == pytest.approx(volume, rel=0.02)
    assert abs(report["volume"] * SCALE**3 - volume) < report["volume_tolerance"] * SCALE**3
    shell = report["offset"]["shell"]
    assert shell["asked"] == thick / SCALE
    assert shell["thinnest"] == pytest.approx(thick / SCALE, rel=BAR)
    phi = SHAPES[shape][0](to_unit(found.mesh.vertices)).numpy()
    assert found.mesh.normals is not None
    outward = np.abs(phi - level) < thick / 2
    direction = found.mesh.vertices - CENTER if shape == "ball" else None
    if direction is not None:
        assert ((direction * found.mesh.normals).sum(axis=1) > 0).tolist() == outward.tolist()
    assert found.report["warnings"] == []


def test_a_shell_can_be_simplified_and_stays_closed() -> None:
    found = meshed("ring", shell_world=0.1 / SCALE, target_faces=3000)
    report = found.report["mesh"]
    assert (report["watertight"], report["components"], report["genus"]) == (True, 2, 2)
    assert report["faces"] == pytest.approx(3000, rel=0.05)
    volume = 2 * np.pi**2 * 0.55 * (0.25**2 - 0.15**2)
    assert abs(report["volume"] * SCALE**3 - volume) < report["volume_tolerance"] * SCALE**3
    assert found.report["warnings"] == []
    crude = meshed("ring", shell_world=0.02 / SCALE, target_faces=120)
    (warning,) = crude.report["warnings"]
    assert warning.startswith("shell_thin: the wall of 0.04 is")


def test_a_shell_that_would_be_solid_is_refused_with_how_deep_it_is() -> None:
    with pytest.raises(NoSurfaceError, match=r"level -0\.6: offsets of its surface reach from -0\.4"):
        meshed("ring", shell_world=0.3 / SCALE)


def test_settings_of_shells_that_make_no_sense_are_refused() -> None:
    for thick in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"shell is {thick}; it must be a positive thickness"):
            MeshConfig(shell_world=thick)
    with pytest.raises(ConfigError, match=r"a shell of 2\.0 is closed, and a trim distance of 1\.0 would cut it open"):
        MeshConfig(shell_world=2.0, trim_distance_world=1.0)


def test_what_no_point_supports_is_gone_before_it_could_grow_into_the_rest() -> None:
    """A bubble beside a ball, which an offset would join to it."""

    def both(x: torch.Tensor) -> torch.Tensor:
        bubble = (x - x.new_tensor([0.75, 0, 0])).norm(dim=1) - 0.05
        return torch.minimum(ball(0.5)(x), bubble)

    cloud = cloud_of(0.5 * directions(3000), directions(3000))
    config = MeshConfig(resolution=64, level_world=0.25 / SCALE, surface="closed")
    kept = mesh_field(ExactField(both, 0.0), cloud, replace(config, drop_unsupported=False))  # type: ignore[arg-type]
    dropped = mesh_field(ExactField(both, 0.0), cloud, config)  # type: ignore[arg-type]
    radius = [np.linalg.norm((found.mesh.vertices - CENTER) * SCALE, axis=1).max() for found in (kept, dropped)]
    assert radius[0] > 0.9
    assert radius[1] == pytest.approx(0.75, rel=0.01)


def test_a_surface_that_is_closed_along_walls_is_offset_with_them() -> None:
    """A floor, solid below: its block ends half a voxel within the cube."""
    floor = ExactField(lambda x: x[:, 2])
    points = np.random.default_rng(0).uniform(-0.9, 0.9, (3000, 3)) * [1, 1, 0]
    cloud = cloud_of(points, np.tile([0.0, 0, 1], (3000, 1)))
    found = mesh_field(floor, cloud, MeshConfig(resolution=32, level_world=0.2 / SCALE, surface="closed"))  # type: ignore[arg-type]
    report, x = found.report["mesh"], (found.mesh.vertices - CENTER) * SCALE
    assert (report["watertight"], report["cut_by_frame"]) == (True, True)
    np.testing.assert_allclose(x.max(axis=0), [1.2 - 1 / 32, 1.2 - 1 / 32, 0.2], atol=0.01)
    assert report["offset"]["levels"][0]["error"]["p95"] < BAR * 0.2 / SCALE  # of the floor, not of the walls


def test_progress_of_an_offset_rises_to_the_end() -> None:
    phi, _, cloud = SHAPES["ball"]
    seen: list[Progress] = []
    config = MeshConfig(resolution=32, level_world=0.2, shell_world=0.3)
    mesh_field(ExactField(phi), cloud, config, clock=Clock(seen.append, MESH_STAGES))  # type: ignore[arg-type]
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert max(p.fraction for p in seen if p.stage == "mesh") > 0.7


def test_walls_are_measured_where_they_are_thin_and_where_they_cross() -> None:
    outer, inner, beyond = (extracted(ball(r)) for r in (0.7, 0.6, 0.75))
    meshes = [TriangleMesh(vertices=s.vertices, faces=s.faces) for s in (outer, inner, beyond)]
    assert thickness(meshes[0], meshes[1])["thinnest"] == pytest.approx(0.1, rel=0.02)
    assert thickness(meshes[0], meshes[2])["thinnest"] == pytest.approx(-0.05, rel=0.05)
    health = mesh_health(wall(meshes[0], meshes[1]))
    assert health.watertight
    assert health.volume == pytest.approx(4 / 3 * np.pi * (0.7**3 - 0.6**3), rel=0.02)


def test_the_offset_of_a_fitted_ball_is_one() -> None:
    cloud = even_sphere(2000)
    quick = FitConfig(steps=300, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=8000))
    small = NetworkConfig(hidden=64, layers=3, omega=10.0)
    fitted = fit_field(cloud, network=small, fit_config=quick, device="cpu")
    surface = mesh_field(fitted.field, fitted.cloud, MeshConfig(resolution=48)).mesh
    radius = np.linalg.norm(surface.vertices, axis=1)
    for level in (-0.34, 0.34):  # a tenth of the diagonal
        found = mesh_field(fitted.field, fitted.cloud, MeshConfig(resolution=48, level_world=level))
        off = np.linalg.norm(found.mesh.vertices, axis=1) - level
        assert off.min() > radius.min() - BAR * abs(level)
        assert off.max() < radius.max() + BAR * abs(level)
        raw = fitted.field.evaluate(found.mesh.vertices)
        assert np.abs(raw - level).max() > BAR * abs(level)


def test_a_cloud_of_a_ball_is_offset_in_its_own_units_by_both_halves() -> None:
    thousand = sphere(3000, radius=700.0)
    field = ExactField(ball(0.7))
    field.frame = type(field.frame)(center=np.zeros(3), scale=1e-3)
    found = mesh_field(field, thousand, MeshConfig(resolution=48, level_world=50.0, shell_world=100.0))  # type: ignore[arg-type]
    radius = np.linalg.norm(found.mesh.vertices, axis=1)
    assert np.abs(np.minimum(np.abs(radius - 750), np.abs(radius - 650))).max() < 1
    assert found.report["input_to_mesh"]["mean"] == pytest.approx(50, rel=0.02)
