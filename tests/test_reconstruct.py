"""Cloud to mesh in one call: in the cloud's own units, reproducible, and reported."""

import json
from dataclasses import replace

import numpy as np
import pytest
from shapes import directions, even_sphere, sphere, torus

from sdfserver.cloud import PointCloud
from sdfserver.config import FitConfig, MeshConfig, NetworkConfig, PoolConfig
from sdfserver.errors import CloudError, ConfigError, DeviceError, DivergenceError, NoSurfaceError, Stopped
from sdfserver.reconstruct import (
    FIT_STAGES,
    MESH_STAGES,
    STAGES,
    Clock,
    FieldJob,
    FittedField,
    Progress,
    Reconstruction,
    choose_device,
    fit_field,
    fit_fields,
    join_reports,
    mesh_field,
    reconstruct,
)

SMALL = NetworkConfig(hidden=64, layers=3, omega=10.0)
QUICK = FitConfig(steps=250, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=5000))
COARSE = MeshConfig(resolution=48)


def quick(cloud: PointCloud, *, mesh: MeshConfig = COARSE, **options: object) -> Reconstruction:
    return reconstruct(cloud, network=SMALL, fit_config=QUICK, mesh=mesh, device="cpu", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def torus_job() -> Reconstruction:
    return quick(torus(3000))


def torus_distance(x: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(np.hypot(x[:, 0], x[:, 1]) - 0.65, x[:, 2]) - 0.25)


def test_a_torus_comes_back_closed_with_one_hole_and_outward_faces(torus_job: Reconstruction) -> None:
    report = torus_job.report["mesh"]
    assert (report["watertight"], report["components"], report["genus"]) == (True, 1, 1)
    assert report["volume"] == pytest.approx(2 * np.pi**2 * 0.65 * 0.25**2, rel=0.1)
    assert torus_distance(torus_job.mesh.vertices).max() < 0.05


def test_vertices_lie_on_the_zero_set_of_the_field(torus_job: Reconstruction) -> None:
    assert np.abs(torus_job.field.evaluate(torus_job.mesh.vertices)).max() < 1e-4


def test_the_report_is_plain_json_and_says_what_was_done(torus_job: Reconstruction) -> None:
    report = json.loads(json.dumps(torus_job.report, allow_nan=False))
    assert set(STAGES) | {"pool", "total"} == set(report["seconds"])
    assert report["config"]["fit"]["steps"] == QUICK.steps
    assert report["fit"]["held_out"]["surface_distance"] < 0.02
    assert report["input_to_mesh"]["mean"] < 0.02
    assert {"sdfserver", "python", "torch", "numpy"} <= set(report["versions"])


def test_the_same_seed_gives_the_same_mesh_to_the_bit() -> None:
    first, again = (quick(sphere(800), seed=3).mesh for _ in range(2))
    assert np.array_equal(first.vertices, again.vertices)
    assert np.array_equal(first.faces, again.faces)


def test_a_cloud_at_utm_coordinates_comes_back_where_it_was(torus_job: Reconstruction) -> None:
    offset, size = np.array([432_100.25, 5_411_200.5, 312.125]), 20.0
    cloud = torus(3000)
    far = quick(PointCloud(points=cloud.points * size + offset, normals=cloud.normals))
    assert torus_distance((far.mesh.vertices - offset) / size).max() < 0.05
    expected = size * torus_job.report["input_to_mesh"]["mean"]
    assert far.report["input_to_mesh"]["mean"] == pytest.approx(expected, rel=0.5)


def test_an_offset_level_is_in_world_units() -> None:
    cloud = sphere(2000, radius=50.0)
    inner = quick(cloud, mesh=replace(COARSE, level_world=-2.0))
    assert np.linalg.norm(inner.mesh.vertices, axis=1).mean() == pytest.approx(48, abs=0.8)


def test_far_strays_do_not_shrink_the_shape() -> None:
    cloud = torus(3000)
    strays = np.array([[500.0, 0, 0], [0, -800.0, 0], [0, 0, 1e6]])
    assert cloud.normals is not None
    job = quick(PointCloud(points=np.vstack([cloud.points, strays]), normals=np.vstack([cloud.normals, np.eye(3)])))
    assert job.report["cloud"]["strays_dropped"] == 3
    assert torus_distance(job.mesh.vertices).max() < 0.05


def test_a_cloud_of_few_points_is_closed_with_a_spacing_of_room_around_it() -> None:
    job = quick(even_sphere(60))
    assert (job.report["mesh"]["watertight"], job.report["mesh"]["genus"]) == (True, 0)
    assert np.abs(np.linalg.norm(job.mesh.vertices, axis=1) - 1).max() < 0.1
    spacing = np.sqrt(4 * np.pi / 60)
    assert 1 / job.field.frame.scale == pytest.approx(1 + spacing, rel=0.1)


def test_progress_runs_through_the_stages_from_zero_to_one() -> None:
    seen: list[Progress] = []
    quick(sphere(800), on_progress=seen.append)
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert 0 == fractions[0] < fractions[-1] <= 1
    assert list(dict.fromkeys(p.stage for p in seen)) == list(STAGES)
    assert any(p.eta_s and p.losses for p in seen)


@pytest.mark.parametrize("stage", ["fit", "mesh"])
def test_a_stop_is_heard_in_every_long_stage(stage: str) -> None:
    now = {"stage": ""}
    with pytest.raises(Stopped):
        quick(sphere(800), on_progress=lambda p: now.update(stage=p.stage), should_stop=lambda: now["stage"] == stage)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="no preset 'best'; use one of draft, standard, fine, paper"):
        reconstruct(sphere(), preset="best")
    with pytest.raises(DeviceError, match="'tpu' is not a device"):
        choose_device("tpu")
    with pytest.raises(DeviceError, match="not supported"):
        choose_device("meta")
    with pytest.raises(CloudError):
        reconstruct(sphere(20))


def test_the_two_halves_make_what_the_whole_makes(torus_job: Reconstruction) -> None:
    seen: list[Progress] = []
    fitted = fit_field(torus(3000), network=SMALL, fit_config=QUICK, device="cpu", clock=Clock(seen.append, FIT_STAGES))
    meshed = mesh_field(fitted.field, fitted.cloud, COARSE, clock=Clock(seen.append, MESH_STAGES))
    assert np.array_equal(meshed.mesh.vertices, torus_job.mesh.vertices)
    report = join_reports(fitted.report, meshed.report)
    assert set(report) == set(torus_job.report)
    assert report["seconds"].keys() == torus_job.report["seconds"].keys()
    assert [p.stage for p in seen if p.fraction == 0.0] == ["prepare", "mesh"]


def test_a_level_without_a_surface_is_told_in_the_clouds_own_units() -> None:
    cloud = sphere(800)
    thousand = PointCloud(points=1000 * cloud.points, normals=cloud.normals)
    with pytest.raises(NoSurfaceError, match="no surface at level 9000:") as raised:
        quick(thousand, mesh=MeshConfig(resolution=24, level_world=9000.0))
    assert 100 < raised.value.highest < 5000


def test_a_room_is_a_hollow_in_what_is_around_it() -> None:
    room = sphere(3000, radius=2.0)
    job = quick(PointCloud(points=room.points, normals=-room.normals))
    assert job.report["mesh"]["watertight"]
    assert job.report["mesh"]["volume"] == pytest.approx(-4 / 3 * np.pi * 8, rel=0.02)
    assert job.report["input_to_mesh"]["normal_agreement"] > 0.99
    assert (job.field.evaluate(np.array([[0.0, 0, 0], [0, 1.8, 0]])) > 0).all()
    assert (job.field.evaluate(np.array([[2.2, 0, 0], [2.1, 2.1, 2.1]])) < 0).all()


def test_fields_of_several_clouds_are_those_of_each_alone_and_one_failure_is_one() -> None:
    clouds = [torus(1500), PointCloud(points=np.zeros((100, 3)), normals=np.ones((100, 3))), sphere(700)]
    seen: list[list[Progress]] = [[], [], []]
    jobs = [FieldJob(cloud=cloud, seed=i, clock=Clock(seen[i].append, FIT_STAGES)) for i, cloud in enumerate(clouds)]
    found = fit_fields(jobs, network=SMALL, fit_config=QUICK, device="cpu")
    assert isinstance(found[1], CloudError)
    for i in (0, 2):
        fitted = found[i]
        assert isinstance(fitted, FittedField)
        alone = fit_field(clouds[i], network=SMALL, fit_config=QUICK, device="cpu", seed=i)
        assert fitted.report["cloud"] == alone.report["cloud"]
        assert fitted.report["seed"] == i
        assert fitted.report["fit"]["held_out"] == pytest.approx(alone.report["fit"]["held_out"], rel=0.1, abs=1e-3)
        assert [progress.step for progress in seen[i] if progress.step] == [*range(25, 251, 25)]
        assert np.allclose(fitted.field.evaluate(clouds[i].points), alone.field.evaluate(clouds[i].points), atol=5e-3)


def test_of_a_sound_cloud_the_report_has_figures_and_no_warnings(torus_job: Reconstruction) -> None:
    assert torus_job.report["warnings"] == []
    assert torus_job.report["assumptions"]["normals_inconsistent"] == 0
    assert torus_job.report["assumptions"]["open_surface"] < 0.1
    assert torus_job.report["mesh"]["cut_by_frame"] is False


def test_turned_normals_are_turned_back_before_the_fit_and_the_report_says_so() -> None:
    cloud = torus(3000)
    assert cloud.normals is not None
    turned = np.arange(3000) % 10 == 0
    job = quick(PointCloud(points=cloud.points, normals=np.where(turned[:, None], -cloud.normals, cloud.normals)))
    (warning,) = job.report["warnings"]
    assert warning.startswith("normals_inconsistent: 10% of the normals")
    assert "300 were turned to agree" in warning
    assert job.report["mesh"]["genus"] == 1
    assert torus_distance(job.mesh.vertices).max() < 0.05


def test_outliers_are_left_out_and_the_frame_is_that_of_the_rest() -> None:
    cloud, rng = torus(3000), np.random.default_rng(1)
    strange = PointCloud(points=rng.random((150, 3)) * 2.4 - 1.2, normals=directions(150))
    assert cloud.normals is not None
    both = PointCloud(
        points=np.concatenate([cloud.points, strange.points]), normals=np.concatenate([cloud.normals, strange.normals])
    )
    fitted = fit_field(both, network=SMALL, fit_config=QUICK, device="cpu")
    off = torus_distance(fitted.cloud.points)
    assert (off < 1e-9).sum() == 3000
    assert off.max() < 0.25  # three times as far as the eighth neighbour usually is: what is nearer stays
    assert 100 < 3150 - len(fitted.cloud.points) < 150
    assert fitted.report["cloud"]["points"] == 3150
    assert fitted.report["cloud"]["used"] == len(fitted.cloud.points)
    assert fitted.report["warnings"][0].startswith("outliers: ")
    assert f"{3150 - len(fitted.cloud.points)} were left out" in fitted.report["warnings"][0]


def test_a_fit_that_comes_to_nothing_says_what_is_wrong_with_the_cloud() -> None:
    cloud, hopeless = sphere(800), replace(QUICK, steps=50, learning_rate=1e30)
    assert cloud.normals is not None
    inward = PointCloud(points=cloud.points, normals=-cloud.normals)
    with pytest.raises(DivergenceError, match="normals_inward: 100% of the normals"):
        fit_field(inward, network=SMALL, fit_config=hopeless, device="cpu")


def test_an_open_room_gives_a_closed_mesh_that_is_cut_by_its_frame() -> None:
    room = sphere(4000)
    assert room.normals is not None
    lower = room.points[:, 2] < 0.3
    cloud = PointCloud(points=room.points[lower], normals=-room.normals[lower])
    job = quick(cloud, mesh=replace(COARSE, surface="closed"))
    assert job.report["mesh"]["watertight"]
    assert job.report["mesh"]["non_manifold_edges"] == 0
    said = {warning.split(":")[0] for warning in job.report["warnings"]}
    assert ("cut_by_frame" in said) == job.report["mesh"]["cut_by_frame"]
    assert "open_surface" in said
    opened = mesh_field(job.field, cloud, COARSE)
    assert opened.report["surface"]["kind"] == "open"
    assert not opened.report["mesh"]["cut_by_frame"]
    assert opened.report["mesh"]["area"] < 0.8 * job.report["mesh"]["area"]
    trimmed = mesh_field(job.field, cloud, replace(COARSE, trim_distance_world=0.4))
    assert trimmed.report["surface"]["asked"] == "closed", "a distance to trim at says where it is open"


def test_a_mesh_says_how_far_it_is_supported_simplified_or_not(torus_job: Reconstruction) -> None:
    cloud = torus(4000)
    for faces in (None, 500):
        mesh = mesh_field(torus_job.field, cloud, replace(COARSE, target_faces=faces)).mesh
        assert mesh.confidence is not None
        assert mesh.confidence.shape == (len(mesh.vertices),)
        assert mesh.confidence.dtype == np.float32
        assert mesh.confidence.min() > 0.5
    assert 0.8 < torus_job.report["surface"]["confidence"] <= 1
