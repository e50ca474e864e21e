"""What is said of clouds that are not what is assumed of them, and what is mended; nothing is said of sound ones."""

import math
from pathlib import Path

import hard_shapes as hard
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import bowl, even_sphere, sphere, torus

from sdfserver.assumptions import Assumptions, Mending, measure, mended, warnings_of
from sdfserver.cloud import PointCloud, drop_strays, validate
from sdfserver.io import read_cloud
from sdfserver.normals import estimate_normals
from sdfserver.orientation import agreement_of

SAID = {
    "plane": {"open_surface"},
    "sphere_inward": {"normals_inward"},
    "shell": set(),
    "nested_outward": {"bodies_nested"},
    "far_apart": {"parts_apart"},
    "flipped": {"normals_inconsistent"},
    "flipped_patch": {"normals_inconsistent"},
    "noisy_normals": {"normals_noisy"},
    "uneven": {"density_varies"},
    "outliers": {"outliers"},
    "room": {"normals_inward"},
    "open_room": {"normals_inward", "open_surface"},
    "wire": set(),
    "hair": {"thin"},
    "moebius": {"one_sided", "open_surface"},
}


def names(warnings: list[str]) -> set[str]:
    return {warning.split(":")[0] for warning in warnings}


def found_in(cloud: PointCloud) -> Assumptions:
    return measure(validate(drop_strays(cloud)[0]))


@pytest.mark.parametrize("name", hard.HARD)
def test_of_a_hard_cloud_the_report_says_which_assumption_fails(name: str) -> None:
    assert names(warnings_of(found_in(hard.HARD[name]().cloud))) == SAID[name]


@pytest.mark.parametrize("name", ["bare", "bracket", "goblet", "knot", "lattice", "noisy", "sparse"])
def test_of_a_sound_cloud_nothing_is_said_and_nothing_is_changed(name: str, data: Path) -> None:
    cloud = validate(read_cloud(data / f"{name}.ply"), require_normals=False)
    cloud = estimate_normals(cloud) if cloud.normals is None else cloud
    found = measure(cloud)
    assert warnings_of(found) == []
    same, mending = mended(cloud, found)
    assert same is cloud
    assert mending == Mending()


def test_terrain_is_open_and_nothing_else(data: Path) -> None:
    assert names(warnings_of(found_in(read_cloud(data / "terrain.ply")))) == {"open_surface"}


@pytest.mark.parametrize("cloud", [sphere(60), even_sphere(60), torus(80)], ids=["sphere", "even", "torus"])
def test_a_few_dozen_points_are_judged_without_a_fault(cloud: PointCloud) -> None:
    assert all(math.isfinite(value) for value in vars(found_in(cloud)).values())


@settings(max_examples=4, deadline=None, database=None)
@given(share=st.sampled_from([0.02, 0.05, 0.1, 0.15]), seed=st.integers(0, 1000))
def test_the_share_of_turned_normals_is_the_true_one_and_all_are_turned_back(share: float, seed: int) -> None:
    given_cloud, truth = hard.flipped(seed, share).cloud, torus(hard.N, seed=seed).normals
    assert given_cloud.normals is not None
    assert truth is not None
    found = measure(given_cloud)
    assert found.normals_inconsistent == pytest.approx(share, abs=0.015)
    better, mending = mended(given_cloud, found)
    assert better.normals is not None
    assert ((better.normals * truth).sum(axis=1) > 0).mean() > 0.999
    assert mending.turned == pytest.approx(share * hard.N, rel=0.15)


def test_a_patch_that_was_turned_is_turned_back() -> None:
    cloud, truth = hard.flipped_patch().cloud, torus(hard.N).normals
    assert truth is not None
    found = measure(cloud)
    assert found.normals_inconsistent == pytest.approx(1 / 6, abs=0.01)
    better = mended(cloud, found)[0].normals
    assert better is not None
    assert ((better * truth).sum(axis=1) > 0).all()


def test_a_warning_says_what_was_done_or_what_to_do() -> None:
    found = measure(hard.flipped().cloud)
    (done,), (to_do,) = warnings_of(found, Mending(turned=2042)), warnings_of(found)
    assert done.startswith("normals_inconsistent: 10% of the normals point to the other side")
    assert "2,042 were turned" in done
    assert "left as they are" in to_do


def test_outliers_go_and_hardly_a_point_of_the_surface_with_them() -> None:
    cloud, count = hard.outliers().cloud, round(0.05 * hard.N)
    better, mending = mended(cloud, measure(cloud))
    left = np.hypot(np.hypot(better.points[:, 0], better.points[:, 1]) - 0.65, better.points[:, 2]) - 0.25
    on_surface = (np.abs(left) < 1e-9).sum()
    assert on_surface > 0.999 * (hard.N - count)
    assert mending.outliers > 0.75 * count
    assert len(better.points) == hard.N - mending.outliers


def test_a_scan_that_thins_out_towards_its_end_has_no_outliers() -> None:
    assert measure(hard.uneven().cloud).outliers < 0.001


@pytest.mark.parametrize("degrees", [10.0, 30.0])
def test_noise_of_normals_is_told_in_degrees_and_averaged_where_it_is_large(degrees: float) -> None:
    cloud, truth = hard.noisy_normals(degrees=degrees).cloud, torus(hard.N).normals
    assert truth is not None
    found = measure(cloud)
    assert found.normals_noisy == pytest.approx(degrees, rel=0.15)
    better, mending = mended(cloud, found)
    assert better.normals is not None
    assert mending.averaged == (degrees > 20)
    angles = np.degrees(np.arccos(np.clip((better.normals * truth).sum(axis=1), -1, 1)))
    assert np.sqrt((angles**2).mean()) < (1.01 if degrees < 20 else 0.36) * degrees


def test_openness_grows_with_what_is_missing() -> None:
    whole, half, sheet = (found_in(cloud).open_surface for cloud in (sphere(8000), bowl(8000), hard.plane().cloud))
    assert whole < 0.02
    assert 0.25 < half < 0.6
    assert sheet > 0.95


def test_a_moebius_strip_has_a_seam_and_a_band_with_two_sides_has_none() -> None:
    strip = hard.moebius().cloud
    ring = sphere(40_000)
    assert ring.normals is not None
    band = np.abs(ring.points[:, 2]) < 0.3
    two_sided = PointCloud(points=ring.points[band], normals=ring.normals[band])
    assert measure(strip).one_sided > 0.6
    assert measure(two_sided).one_sided == 0


@pytest.mark.parametrize(("gap", "thin"), [(0.3, True), (1.0, True), (5.0, False)])
def test_a_thin_wall_is_told_and_its_normals_are_left_alone(gap: float, thin: bool) -> None:
    """`gap` in spacings of one side; a normal across a thin wall contradicts its neighbours, and is right."""
    spacing = math.sqrt(2 * 1.4 / (hard.N / 2))
    top, bottom = hard.plane(0).cloud, hard.plane(1).cloud
    assert top.normals is not None
    raised = PointCloud(points=top.points + gap * spacing * top.normals, normals=top.normals)
    both = hard.together(raised, hard.inverted(bottom))
    assert both.normals is not None
    found = measure(PointCloud(points=both.points[::2], normals=both.normals[::2]))
    assert (found.thin > 0.9) == thin
    assert (found.thin < 0.01) != thin
    assert found.normals_inconsistent == 0
    assert found.one_sided == 0


def test_the_smallest_of_parts_is_told_by_its_share_of_the_extent() -> None:
    found = measure(hard.far_apart().cloud)
    assert found.parts == 2
    assert found.smallest_part == pytest.approx(1.8 / 29.9, abs=0.005)


def test_the_spacing_is_that_of_all_points_and_not_of_those_judged() -> None:
    assert measure(sphere(80_000)).spacing == pytest.approx(math.sqrt(4 * math.pi / 80_000), rel=0.1)


@settings(max_examples=4, deadline=None, database=None)
@given(
    turn=st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 0.01),
    scale=st.sampled_from([1e-4, 0.3, 1.0, 5000.0]),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_figures_do_not_depend_on_place_size_or_attitude(turn: list[float], scale: float, offset: float) -> None:
    from scipy.spatial.transform import Rotation

    cloud = bowl(6000)
    assert cloud.normals is not None
    matrix = Rotation.from_quat(turn).as_matrix()
    points = scale * (cloud.points @ matrix.T + offset * np.array([1.0, -2.0, 0.5]))
    before, after = vars(measure(cloud)), vars(measure(PointCloud(points=points, normals=cloud.normals @ matrix.T)))
    assert after.pop("spacing") == pytest.approx(scale * before.pop("spacing"), rel=1e-3)
    assert after.pop("smallest_part") == pytest.approx(before.pop("smallest_part"), rel=0.1)
    assert after == pytest.approx(before, rel=0.02, abs=2e-3)


def test_neighbours_agree_about_single_normals_where_a_wire_leaves_them_no_say() -> None:
    cloud = hard.hair().cloud
    assert cloud.normals is not None
    assert agreement_of(cloud.points, cloud.normals).flipped < 0.01


def test_points_that_noise_spreads_around_the_surface_are_brought_back_to_it() -> None:
    cloud, rng = sphere(40_000), np.random.default_rng(1)
    noisy = validate(PointCloud(points=cloud.points + 0.06 * rng.normal(size=(40_000, 3)), normals=cloud.normals))
    found = measure(noisy)
    assert found.noise_thick > 1 / 3
    better, what = mended(noisy, found)
    assert what.flattened == pytest.approx(0.06, rel=0.15)
    off = [np.abs(np.linalg.norm(some.points, axis=1) - 1).mean() for some in (noisy, better)]
    assert off[1] < 0.5 * off[0]
    assert names(warnings_of(found, what)) >= {"noise_thick"}
    assert "was moved" in " ".join(warnings_of(found, what))
    moved = mended(PointCloud(points=noisy.points + 1e6, normals=noisy.normals), found)[0]
    np.testing.assert_allclose(moved.points - 1e6, better.points, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_points_on_their_surface_stay_where_they_are(noise: float) -> None:
    cloud, rng = sphere(20_000), np.random.default_rng(1)
    noisy = PointCloud(points=cloud.points + noise * rng.normal(size=(20_000, 3)), normals=cloud.normals)
    found = measure(noisy)
    assert found.noise_thick < 0.25
    assert mended(noisy, found)[0].points is noisy.points
