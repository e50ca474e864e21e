"""What is light enough to be looked at: points, coarse and simplified surfaces, pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import sphere, torus
from skimage.measure import marching_cubes

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import NetworkConfig
from sdfserver.errors import ExtractionError
from sdfserver.field import SignedDistanceField
from sdfserver.io import read_cloud, read_mesh
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import mesh_health
from sdfserver.preview import (
    MAX_FACES,
    MAX_POINTS,
    PICTURE_PX,
    coarse_surface,
    picture,
    write_picture,
    write_points,
    write_surface,
)
from sdfserver.siren import Siren


def ball(resolution: int, radius: float = 1.0) -> TriangleMesh:
    x = np.linspace(-1.5, 1.5, resolution)
    distance = np.linalg.norm(np.stack(np.meshgrid(x, x, x, indexing="ij")), axis=0) - radius
    vertices, faces, normals, _ = marching_cubes(distance, 0.0, spacing=3 * [x[1] - x[0]])
    return TriangleMesh(vertices=vertices - 1.5, faces=faces.astype(np.int64), normals=normals.astype(np.float32))


def test_a_small_cloud_is_shown_whole_and_a_large_one_in_part(tmp_path: Path) -> None:
    for n in (1000, MAX_POINTS + 7):
        cloud = sphere(n)
        write_points(cloud, tmp_path / "points.ply")
        shown = read_cloud(tmp_path / "points.ply")
        assert len(shown.points) == min(n, MAX_POINTS)
        np.testing.assert_allclose(shown.points[[0, -1]], cloud.points[[0, -1]], atol=1e-6)
        assert shown.normals is not None
        np.testing.assert_allclose(shown.normals, shown.points, atol=1e-5)


def test_points_at_map_coordinates_keep_their_place(tmp_path: Path) -> None:
    cloud = sphere(500)
    far = PointCloud(points=cloud.points + np.array([500_000, 5_400_000, 300]), normals=cloud.normals)
    write_points(far, tmp_path / "points.ply")
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


def test_a_field_that_is_still_forming_has_a_coarse_surface_in_world_units() -> None:
    siren = Siren(NetworkConfig(hidden=8, layers=1, omega=1.0))
    with torch.no_grad():  # phi = sin(z): a plane, which the cube's border leaves open
        siren.weights[0].zero_()
        siren.weights[0][0, 2] = 1.0
        siren.biases[0].zero_()
        siren.weights[1].zero_()
        siren.weights[1][0, 0] = 1.0
        siren.biases[1].zero_()
    frame = Frame.around(torus().points + np.array([10, 20, 30]))
    mesh = coarse_surface(SignedDistanceField(siren, frame))
    np.testing.assert_allclose(mesh.vertices[:, 2], frame.center[2], atol=1e-3)
    with torch.no_grad():
        siren.biases[1].fill_(5.0)
    with pytest.raises(ExtractionError):
        coarse_surface(SignedDistanceField(siren, frame))


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


def test_a_picture_is_written_as_png() -> None:
    stream = io.BytesIO()
    write_picture(ball(20), stream)
    assert stream.getvalue().startswith(b"\x89PNG")
    assert Image.open(stream).size == (PICTURE_PX, PICTURE_PX)
