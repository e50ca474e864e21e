"""What is light enough to be looked at: points, coarse and simplified surfaces, pictures."""

from dataclasses import replace
from pathlib import Path

import hard_shapes as hard
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree
from shapes import sphere, torus
from skimage.measure import marching_cubes

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import NetworkConfig
from sdfserver.errors import ExtractionError
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.io import read_cloud, read_mesh, write_ply
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import mesh_health
from sdfserver.preview import (
    COARSE_RESOLUTION,
    MAX_FACES,
    MAX_POINTS,
    PICTURE_PX,
    REACH,
    coarse_surface,
    picture,
    some_points,
    write_picture,
    write_surface,
)
from sdfserver.siren import Siren


def ball(resolution: int, radius: float = 1.0) -> TriangleMesh:
    x = np.linspace(-1.5, 1.5, resolution)
    distance = np.linalg.norm(np.stack(np.meshgrid(x, x, x, indexing="ij")), axis=0) - radius
    vertices, faces, normals, _ = marching_cubes(distance, 0.0, spacing=3 * [x[1] - x[0]])
    return TriangleMesh(vertices=vertices - 1.5, faces=faces.astype(np.int64), normals=normals.astype(np.float32))


def test_a_small_cloud_is_shown_whole_and_a_large_one_in_part() -> None:
    for n in (1000, MAX_POINTS + 7):
        cloud = sphere(n)
        shown = some_points(cloud)
        assert len(shown.points) == min(n, MAX_POINTS)
        np.testing.assert_allclose(shown.points[[0, -1]], cloud.points[[0, -1]], atol=1e-6)
        assert shown.normals is not None
        np.testing.assert_allclose(shown.normals, shown.points, atol=1e-5)


def test_points_at_map_coordinates_keep_their_place(tmp_path: Path) -> None:
    cloud = sphere(500)
    far = PointCloud(points=cloud.points + np.array([500_000, 5_400_000, 300]), normals=cloud.normals)
    write_ply(tmp_path / "points.ply", far.points, normals=far.normals)
    np.testing.assert_allclose(read_cloud(tmp_path / "points.ply").points, far.points, rtol=0, atol=1e-6)


def test_a_large_mesh_is_simplified_and_knows_its_distance_from_the_points(tmp_path: Path) -> None:
    mesh = ball(250)
    assert len(mesh.faces) > MAX_FACES
    write_surface(mesh, PointCloud(points=np.array([[0.0, 0.0, 0.0]]), normals=None), tmp_path / "preview.ply")
    shown = read_mesh(tmp_path / "preview.ply")
    assert 0.8 * MAX_FACES < len(shown.faces) <= MAX_FACES
    assert mesh_health(shown).watertight
    header, _, rows = (tmp_path / "preview.ply").read_bytes().partition(b"end_header\n")
    assert header.endswith(
        b"property float distance\nelement face %d\nproperty list uchar int vertex_indices\n" % len(shown.faces)
    )
    table = np.frombuffer(rows, "<f4", 7 * len(shown.vertices)).reshape(-1, 7)
    np.testing.assert_allclose(table[:, 6], 1.0, atol=0.01)


def test_a_small_mesh_is_shown_as_it_is(tmp_path: Path) -> None:
    mesh = ball(20)
    write_surface(mesh, sphere(100), tmp_path / "preview.ply")
    shown = read_mesh(tmp_path / "preview.ply")
    np.testing.assert_array_equal(shown.faces, mesh.faces)
    assert shown.normals is not None


def test_a_preview_keeps_colours_and_confidence_also_where_it_is_simplified(tmp_path: Path) -> None:
    for mesh in (ball(20), ball(250)):
        upper = mesh.vertices[:, 2] > 0
        colors = np.where(upper[:, None], [200, 10, 20], [30, 40, 250]).astype(np.uint8)
        write_surface(
            replace(mesh, colors=colors, confidence=upper.astype(np.float32)), sphere(100), tmp_path / "preview.ply"
        )
        shown = read_mesh(tmp_path / "preview.ply")
        for half, color in (
            (shown.vertices[:, 2] > 0.02, [200, 10, 20]),
            (shown.vertices[:, 2] < -0.02, [30, 40, 250]),
        ):
            np.testing.assert_array_equal(shown.colors[half], np.broadcast_to(color, (half.sum(), 3)))
        np.testing.assert_array_equal(shown.confidence > 0.5, (shown.colors == [200, 10, 20]).all(axis=1))


def plane(offset: float = 0.0) -> Siren:
    """phi = sin(z) + offset."""
    siren = Siren(NetworkConfig(hidden=8, layers=1, omega=1.0))
    with torch.no_grad():
        for parameter in siren.parameters():
            parameter.zero_()
        siren.weights[0][0, 2] = siren.weights[1][0, 0] = 1.0
        siren.biases[1].fill_(offset)
    return siren


def test_a_field_that_is_still_forming_has_a_coarse_surface_near_its_points() -> None:
    points = torus().points * 10 + np.array([100, 200, 300])
    frame = Frame.around(points)
    mesh = coarse_surface(SignedDistanceField(plane(), frame), points)
    np.testing.assert_allclose(mesh.vertices[:, 2], 300, atol=1e-2)
    assert mesh.normals is not None
    np.testing.assert_allclose(mesh.normals, np.broadcast_to([0, 0, 1], mesh.normals.shape), atol=1e-5)
    distance, _ = cKDTree(points).query(mesh.vertices)
    cell = 2 / COARSE_RESOLUTION / frame.scale
    assert distance.max() < (REACH + 1) * np.sqrt(3) * cell
    hole = np.linalg.norm(mesh.vertices[:, :2] - [100, 200], axis=1) < 1
    assert not hole.any(), "far from all points it is not looked for"
    with pytest.raises(ExtractionError):
        coarse_surface(SignedDistanceField(plane(5.0), frame), points)


def test_a_coarse_surface_is_that_of_the_whole_grid_where_it_is_near_the_points() -> None:
    cloud = sphere(5000, radius=3.0)
    frame = Frame.around(cloud.points)
    siren = Siren(NetworkConfig(hidden=16, layers=2, omega=3.0), generator=torch.Generator().manual_seed(0))
    field = SignedDistanceField(siren, frame)
    whole = extract(field, resolution=COARSE_RESOLUTION, projection_steps=0)
    every, _ = cKDTree(frame.to_world(whole.vertices_unit)).query(coarse_surface(field, cloud.points).vertices)
    assert every.max() < 1e-3 / frame.scale


def test_a_picture_shows_the_shape_on_nothing() -> None:
    image = picture(ball(40))
    assert image.shape == (PICTURE_PX, PICTURE_PX, 4)
    alpha = image[..., 3].astype(float)
    middle = PICTURE_PX // 2
    assert alpha[middle, middle] == 255
    assert alpha[0, 0] == alpha[-1, -1] == 0
    # A disc that fills 0.94 of the width.
    assert (alpha > 127).sum() == pytest.approx(np.pi / 4 * (0.94 * PICTURE_PX) ** 2, rel=0.03)
    assert image[int(0.3 * PICTURE_PX), middle, :3].mean() > image[int(0.9 * PICTURE_PX), middle, :3].mean(), (
        "lit from above"
    )


def test_the_back_of_an_open_surface_can_be_told_from_its_front() -> None:
    a = np.linspace(-1, 1, 20)
    x, z = np.meshgrid(a, a, indexing="ij")
    wall = hard.grid_mesh(np.stack([x, np.zeros_like(x), z], axis=-1))
    front, back = (picture(side, up=2) for side in (wall, replace(wall, faces=wall.faces[:, ::-1])))
    brightness = sorted(float(image[..., :3][image[..., 3] == 255].mean()) for image in (front, back))
    assert brightness[0] == pytest.approx(0.7 * brightness[1], rel=0.02)


def test_a_picture_is_in_the_colours_of_the_mesh() -> None:
    mesh = ball(40)
    plain = picture(mesh, up=2)
    colors = np.where(mesh.vertices[:, 2:] > 0, [255, 0, 0], [0, 0, 255]).astype(np.uint8)
    image = picture(replace(mesh, colors=colors), up=2).astype(int)
    np.testing.assert_array_equal(image[..., 3], plain[..., 3])
    upper, lower = image[PICTURE_PX // 5, PICTURE_PX // 2], image[-PICTURE_PX // 8, PICTURE_PX // 2]
    assert upper[0] > 80 > 5 > upper[2]
    assert lower[2] > 80 > 5 > lower[0]


@pytest.mark.parametrize("up", [1, 2])
def test_what_can_stand_stands(up: int) -> None:
    """A cone on its base: narrow above, wherever its file has it point."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    rim = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    vertices = np.concatenate([rim, [[0, 0, 2.0]], [[0, 0, 0]]])
    i, j = np.arange(60), (np.arange(60) + 1) % 60
    faces = np.concatenate([np.stack([i, j, 0 * i + 60], axis=1), np.stack([j, i, 0 * i + 61], axis=1)])
    if up == 1:
        vertices = vertices[:, [0, 2, 1]] * [1, 1, -1]
    widths = (picture(TriangleMesh(vertices=vertices, faces=faces))[..., 3] > 127).sum(axis=1)
    rows = np.flatnonzero(widths)
    assert widths[rows[len(rows) // 5]] < 0.5 * widths[rows[4 * len(rows) // 5]]


def test_a_picture_is_written_as_png(tmp_path: Path) -> None:
    write_picture(ball(20), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (PICTURE_PX, PICTURE_PX)
