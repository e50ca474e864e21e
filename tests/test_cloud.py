from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfserver.cloud import (
    UNIT_EXTENT,
    Frame,
    PointCloud,
    distinct_rows,
    drop_strays,
    orientation_disagreement,
    validate,
)
from sdfserver.errors import CloudError
from sdfserver.io import read_cloud

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
UTM = np.array([412345.678, 5512345.678, 123.456])

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ball_surface(n: int, radius: float = 1.0, seed: int = 0) -> np.ndarray:
    points = rng(seed).normal(size=(n, 3))
    return radius * points / np.linalg.norm(points, axis=1, keepdims=True)


def sphere(n: int = 2000, seed: int = 0) -> PointCloud:
    points = ball_surface(n, seed=seed)
    return PointCloud(points=points, normals=points.copy())


def box(n: int = 6000, size: tuple[float, float, float] = (1, 1, 1), seed: int = 0) -> PointCloud:
    """A box's surface, sampled evenly."""
    random, size_ = rng(seed), np.array(size)
    areas = np.repeat([size_[1] * size_[2], size_[0] * size_[2], size_[0] * size_[1]], 2)
    face = random.choice(6, size=n, p=areas / areas.sum())
    axis, side = face // 2, face % 2
    points, normals = random.random((n, 3)), np.zeros((n, 3))
    points[np.arange(n), axis] = side
    normals[np.arange(n), axis] = 2 * side - 1
    return PointCloud(points=points * size_, normals=normals)


def refusal(cloud: PointCloud, **options: bool) -> str:
    with pytest.raises(CloudError) as caught:
        validate(cloud, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def replaced(array: np.ndarray, row: int | slice, value: object) -> np.ndarray:
    array = array.copy()
    array[row] = value
    return array


# Frame


def test_the_frame_puts_the_cloud_into_the_unit_box_and_back():
    points = sphere().points * [3, 2, 1] + UTM
    frame = Frame.around(points)
    unit = frame.to_unit(points)
    assert np.abs(unit).max() == pytest.approx(UNIT_EXTENT)
    np.testing.assert_allclose(frame.to_world(unit), points, rtol=0, atol=2e-9)


def test_the_frame_keeps_a_margin_around_a_cloud_of_few_points():
    points = sphere().points * [3, 2, 1]
    assert Frame.around(points, margin=0.1).scale == Frame.around(points).scale
    wide = Frame.around(points, margin=1.5)
    assert (wide.to_unit(points).max(axis=0) + 1.5 * wide.scale).max() == pytest.approx(1, abs=1e-3)


# Validation


def test_an_oriented_cloud_passes_unchanged():
    cloud = sphere()
    checked = validate(cloud)
    assert checked.points is cloud.points
    np.testing.assert_allclose(checked.normals, cloud.normals, atol=1e-15)


def test_normals_of_any_length_become_unit_vectors():
    lengths = 10.0 ** rng().uniform(-300, 300, (2000, 1))
    checked = validate(PointCloud(points=sphere().points, normals=sphere().normals * lengths))
    np.testing.assert_allclose(checked.normals, sphere().normals, rtol=1e-12, atol=1e-12)


def test_fewer_than_fifty_points_are_refused():
    assert "49 points; at least 50" in refusal(sphere(49))
    validate(sphere(50))


def test_not_finite_points_are_counted_and_the_first_is_quoted():
    points = sphere().points
    points[[7, 9]] = [[1, np.nan, 2], [np.inf, 0, 0]]
    message = refusal(PointCloud(points=points, normals=sphere().normals))
    assert "2 of 2000 points" in message
    assert "first point 7 at (1, nan, 2)" in message


def test_missing_normals_offer_the_estimate():
    cloud = PointCloud(points=sphere().points)
    assert "--normals estimate" in refusal(cloud)
    assert validate(cloud, require_normals=False).normals is None


def test_useless_normals_are_counted():
    cloud = sphere()
    zero = PointCloud(points=cloud.points, normals=replaced(cloud.normals, slice(3, 8), 0.0))
    assert "5 of 2000 normals have zero length, first normal 3" in refusal(zero)
    assert "--normals estimate" in refusal(zero)
    nan = PointCloud(points=cloud.points, normals=replaced(cloud.normals, 5, np.nan))
    assert "1 of 2000 normals have NaN" in refusal(nan)
    short = PointCloud(points=cloud.points, normals=cloud.normals[:-1])
    assert "2000 points, but the normals have shape (1999, 3)" in refusal(short)


def test_wrong_shapes_are_refused():
    assert "(2000, 2)" in refusal(PointCloud(points=sphere().points[:, :2]))


@pytest.mark.parametrize("offset", [0.0, UTM])
def test_equal_points_are_refused(offset):
    points = np.zeros((100, 3)) + offset
    assert "only 1 different position" in refusal(PointCloud(points=points, normals=sphere(100).normals))


@pytest.mark.parametrize("offset", [0.0, UTM])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points_on_a_line_are_refused(offset, dtype):
    direction = np.array([3.0, -2.0, 1.0])
    points = (rng().random((200, 1)) * direction).astype(dtype).astype(np.float64) + offset
    assert "one line" in refusal(PointCloud(points=points), require_normals=False)


def test_a_planar_cloud_and_a_thin_needle_pass():
    flat = np.c_[rng().random((200, 2)), np.zeros(200)]
    validate(PointCloud(points=flat, normals=np.tile([0.0, 0, 1], (200, 1))))
    validate(PointCloud(points=sphere().points * [1, 1e-3, 1e-3], normals=sphere().normals))


@pytest.mark.parametrize("scale", [1e-90, 1e-6, 1e6, 1e90])
def test_any_unit_of_length_passes(scale):
    validate(PointCloud(points=sphere().points * scale, normals=sphere().normals))


@pytest.mark.parametrize(("scale", "said"), [(1e-200, "within"), (1e200, "largest coordinate"), (1e308, "largest")])
def test_extents_beyond_arithmetic_are_refused(scale, said):
    assert said in refusal(PointCloud(points=sphere().points * scale, normals=sphere().normals))


def test_points_that_an_offset_has_rounded_together_are_refused():
    points = sphere().points * 1e-8 + 1e6
    assert "subtract an offset" in refusal(PointCloud(points=points, normals=sphere().normals))


def test_duplicates_become_one_point_with_the_mean_normal():
    cloud = sphere(500)
    tilted = cloud.normals + np.array([0, 0, 0.1])
    twice = PointCloud(points=np.vstack([cloud.points, cloud.points]), normals=np.vstack([cloud.normals, tilted]))
    merged = validate(twice)
    np.testing.assert_array_equal(merged.points, cloud.points)
    unit = tilted / np.linalg.norm(tilted, axis=1, keepdims=True)
    mean = cloud.normals + unit
    np.testing.assert_allclose(merged.normals, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-12)


def test_fifty_copies_of_ten_points_are_ten_points():
    points = np.tile(sphere(10).points, (50, 1))
    assert "only 10 different positions among 500 points" in refusal(PointCloud(points=points, normals=points))


def test_opposite_normals_at_one_position_leave_the_first():
    cloud = sphere(100)
    both = PointCloud(
        points=np.vstack([cloud.points, cloud.points[:1]]), normals=np.vstack([cloud.normals, -cloud.normals[:1]])
    )
    np.testing.assert_allclose(validate(both).normals, cloud.normals, atol=1e-12)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.5, -1e300])] * 3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=100, database=None)
def test_distinct_rows_agree_with_a_dictionary(rows):
    points = np.array(rows, dtype=np.float64).reshape(-1, 3)
    first, position = distinct_rows(points)
    seen: dict[tuple[float, ...], int] = {}
    expected = [seen.setdefault(tuple(row), len(seen)) for row in points.tolist()]
    assert position.tolist() == expected
    np.testing.assert_array_equal(points[first], np.array(list(seen)))


# Strays


@pytest.mark.parametrize("n", [200, 3000, 100_000])
@pytest.mark.parametrize("offset", [0.0, UTM])
@pytest.mark.parametrize(
    "strays",
    [
        1000 + 0.01 * ball_surface(5, seed=1),
        ball_surface(5, 2000.0, seed=2),
        np.array([[1e30, 0, 0]]),
        np.array([[1e300, 0, 0], [-1e12, 3, 3], [12, 0, 0], [0, 0, -9]]),
    ],
    ids=["a clump", "on all sides", "1e30", "at all distances"],
)
def test_a_few_far_strays_are_dropped_and_nothing_else(n, offset, strays):
    points = np.vstack([ball_surface(n), strays]) + offset
    order = rng(3).permutation(len(points))
    normals = np.tile([0.0, 0, 1], (len(points), 1))
    kept, dropped = drop_strays(PointCloud(points=points[order], normals=normals))
    assert dropped == len(strays)
    assert len(kept.normals) == len(kept.points)
    np.testing.assert_array_equal(kept.points, points[order][order < n])


def antenna(n: int) -> np.ndarray:
    return np.vstack([ball_surface(n), np.c_[np.linspace(1, 8, max(8, n // 1000)), np.zeros((max(8, n // 1000), 2))]])


def two_shapes(n: int) -> np.ndarray:
    return np.vstack([ball_surface(n), 0.3 * ball_surface(max(n // 40, 20), seed=1) + [500, 0, 0]])


def dense_core_in_a_sparse_shell(n: int) -> np.ndarray:
    return np.vstack([ball_surface(n), 60 * ball_surface(max(n // 9, 60), seed=1)])


def gaussian(n: int) -> np.ndarray:
    return rng().normal(size=(n, 3))


def ground_around_a_scanner(n: int) -> np.ndarray:
    """Density falls with the cube of the distance, from 1.5 to 100 metres."""
    radius = 1.5 / (1 - rng().random(n) * (1 - 1.5 / 100))
    angle = rng(1).random(n) * 2 * np.pi
    return np.c_[radius * np.cos(angle), radius * np.sin(angle), np.zeros(n)]


@pytest.mark.parametrize("n", [3000, 30_000])
@pytest.mark.parametrize(
    "shape", [antenna, two_shapes, dense_core_in_a_sparse_shell, gaussian, ground_around_a_scanner]
)
def test_shapes_that_only_look_like_strays_lose_no_point(shape, n):
    cloud = PointCloud(points=shape(n))
    kept, dropped = drop_strays(cloud)
    assert dropped == 0
    assert kept is cloud


@needs_shared
@pytest.mark.parametrize("folder", ["clouds", "meshes"])
def test_real_clouds_lose_no_point(folder):
    for path in sorted((SHARED / folder).iterdir()):
        assert drop_strays(read_cloud(path))[1] == 0, path.name


def test_clouds_that_validation_refuses_pass_the_stray_filter_untouched():
    for points in (np.empty((0, 3)), np.zeros((100, 3)), replaced(sphere(100).points, 3, np.nan), np.zeros((100, 2))):
        assert drop_strays(PointCloud(points=points))[1] == 0


# Orientation


def test_outward_normals_do_not_disagree_wherever_the_cloud_lies():
    for cloud in (sphere(), box(), box(size=(1, 1, 0.001))):
        for offset in (0.0, UTM):
            assert orientation_disagreement(PointCloud(points=cloud.points + offset, normals=cloud.normals)) < 0.01


@pytest.mark.parametrize("offset", [0.0, UTM])
def test_random_signs_disagree_by_half(offset):
    for cloud in (sphere(), box(), box(size=(1, 1, 0.001))):
        signs = rng(5).choice([-1.0, 1.0], (len(cloud.points), 1))
        random = PointCloud(points=cloud.points + offset, normals=cloud.normals * signs)
        assert orientation_disagreement(random) == pytest.approx(0.5, abs=0.05)
        assert "carry no orientation" in refusal(random)
        validate(random, require_normals=False)


def test_a_tenth_of_flipped_normals_is_seen_and_tolerated():
    for cloud in (sphere(), box(), box(size=(1, 1, 0.001))):
        signs = np.where(rng(5).random((len(cloud.points), 1)) < 0.1, -1.0, 1.0)
        flipped = PointCloud(points=cloud.points, normals=cloud.normals * signs)
        assert 0.08 < orientation_disagreement(flipped) < 0.22
        validate(flipped)


def test_patches_that_contradict_each_other_are_seen():
    """Every normal with a positive largest component: smooth almost everywhere, and outward on half of the shape."""
    cloud = sphere(20_000)
    largest = np.abs(cloud.normals).argmax(axis=1)[:, None]
    signs = np.sign(np.take_along_axis(cloud.normals, largest, axis=1))
    assert orientation_disagreement(PointCloud(points=cloud.points, normals=cloud.normals * signs)) > 0.4


def test_inward_normals_agree_with_each_other():
    assert orientation_disagreement(PointCloud(points=sphere().points, normals=-sphere().normals)) == 0


def test_the_judgement_is_the_same_every_time():
    cloud = sphere(30_000)
    signs = rng(5).choice([-1.0, 1.0], (30_000, 1))
    random = PointCloud(points=cloud.points, normals=cloud.normals * signs)
    assert orientation_disagreement(random) == orientation_disagreement(random)


@needs_shared
def test_of_the_real_clouds_only_the_one_without_orientation_is_refused():
    for path in sorted((SHARED / "clouds").iterdir()):
        cloud = read_cloud(path)
        if cloud.normals is None:
            assert "--normals estimate" in refusal(cloud)
        elif path.name == "cgal_cube_csg.ply":
            assert "carry no orientation" in refusal(cloud)
        else:
            validate(cloud)


@needs_shared
@pytest.mark.parametrize("name", ["fixed_top.ply", "scorpion_low_resolution.obj", "srb_daratech_gt.ply"])
@pytest.mark.parametrize("n", [1500, 25_000])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_noise_on_thin_walls_is_not_taken_for_a_lack_of_orientation(name, n, noise):
    trimesh = pytest.importorskip("trimesh")
    surface = trimesh.load_mesh(SHARED / "meshes" / name, process=False)
    surface.merge_vertices()
    points, faces = trimesh.sample.sample_surface(surface, n, seed=1)
    random = rng(4)
    points = points + random.normal(size=points.shape) * noise * np.linalg.norm(surface.extents)
    tilt = np.tan(np.radians(30)) / np.sqrt(2)
    normals = surface.face_normals[faces] + random.normal(size=points.shape) * tilt
    validate(PointCloud(points=points, normals=normals))
