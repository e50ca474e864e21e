"""Colours and confidence through files and through what is done to a cloud."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cloud_files import (
    COLORED,
    COLORS,
    FILES,
    NORMALS,
    POINTS,
    SHARES,
    SURFACES,
    colored_layout,
    e57_of,
    las_file,
    npz,
    octahedron,
    ply_header,
    rows_of,
    vertex,
)
from shapes import sphere

from sdfserver.assumptions import measure, mended
from sdfserver.cloud import PointCloud, checked, drop_strays, validate
from sdfserver.errors import CloudError
from sdfserver.files import MESH_FORMATS
from sdfserver.formats.glb import light_of, screen_colors
from sdfserver.io import read_cloud, read_mesh, stream_cloud, write_mesh, write_ply
from sdfserver.mesh import TriangleMesh
from sdfserver.normals import estimate_normals, remove_outliers

# Files


@pytest.mark.parametrize("name", COLORED)
def test_the_colours_of_a_file_are_read_as_bytes_however_it_has_them(name, save):
    cloud = read_cloud(save(name, COLORED[name]))
    mine = cloud.colors[: len(COLORS)] if len(cloud.points) == 60 else cloud.colors
    rows = [int(np.flatnonzero((point == POINTS).all(axis=1))[0]) for point in cloud.points]
    np.testing.assert_array_equal(mine, COLORS[rows])
    assert cloud.colors.dtype == np.uint8
    if cloud.normals is not None and name != "colors.obj":  # of that the faces give a few
        np.testing.assert_allclose(cloud.normals, NORMALS[rows], atol=1e-6)


def test_files_without_colours_have_none(save):
    for name, data in {**FILES, **SURFACES}.items():
        if not name.endswith(".pcd"):
            assert read_cloud(save(name, data)).colors is None, name


def test_the_blue_of_a_pcd_is_its_lowest_byte(save):
    for name in ("ascii.pcd", "binary.pcd", "compressed.pcd"):
        np.testing.assert_array_equal(read_cloud(save(name, FILES[name])).colors, [[0, 0, 255]] * 60)


def test_rows_of_a_pcd_that_were_not_measured_take_their_colours_with_them(save):
    rows = COLORED["whole.pcd"].split(b"\n")
    rows[20] = b"nan nan nan 0 nan nan nan"
    cloud = read_cloud(save("a.pcd", b"\n".join(rows)))
    gone = 20 - COLORED["whole.pcd"][: COLORED["whole.pcd"].index(b"DATA ascii\n")].count(b"\n") - 1
    np.testing.assert_array_equal(cloud.colors, np.delete(COLORS, gone, axis=0))


@pytest.mark.parametrize("extension", ["las", "laz"])
@pytest.mark.parametrize("factor", [1, 256, 257])
def test_las_holds_8_bits_in_16_in_one_way_or_another(extension, factor, tmp_path):
    cloud = read_cloud(las_file(tmp_path / f"a.{extension}", colors=COLORS * np.uint16(factor)))
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_array_equal(cloud.normals, NORMALS)


def test_a_las_that_leaves_its_colours_at_zero_has_none(tmp_path):
    assert read_cloud(las_file(tmp_path / "a.las")).colors is None


def test_e57_has_colours_where_all_its_scans_have_them(save, tmp_path):
    cloud = read_cloud(save("a.e57", e57_of(tmp_path / "whole.e57", colored_layout())))
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_allclose(cloud.points, POINTS)
    black = [(name, node, 0 * values if "color" in name else values) for name, node, values in colored_layout()]
    assert read_cloud(save("b.e57", e57_of(tmp_path / "black.e57", black))).colors is None


def test_what_is_out_of_range_or_missing_is_no_colour_and_no_reason_to_refuse_a_file(save):
    for wrong in (-1.0, 70000.0, np.nan):
        colors = COLORS.astype(np.float64)
        colors[7, 1] = wrong
        header = b"x y z r g b\n"
        cloud = read_cloud(save("a.txt", header + rows_of(POINTS, colors)))
        np.testing.assert_array_equal(cloud.points, POINTS)
        assert cloud.colors is None
        assert read_cloud(save("a.npz", npz(points=POINTS, colors=colors))).colors is None
    for lines in (b"x,y,z,r,g,b\n1,2,3,4,5,6\n1,2,4,,,\n", b"x,y,z,r,g,b\n1,2,3,red,green,blue\n1,2,4,a,b,c\n"):
        cloud = read_cloud(save("b.csv", lines))
        np.testing.assert_array_equal(cloud.points, [[1, 2, 3], [1, 2, 4]])
        assert cloud.colors is None
    cloud = read_cloud(save("c.obj", b"v 1 2 3 0 0.5 1\nv 1 2 4\nv 1 2 5 0 0 0\n"))
    assert cloud.points.shape == (3, 3)
    assert cloud.colors is None
    assert read_cloud(save("d.off", b"COFF\n2 0 0\n0 0 0 1 1 1 1\n1 1 1\n")).colors is None
    for odd in (COLORS[:-1], COLORS[:, :2], COLORS.astype("U3"), np.array([object()] * 60)):
        stream = npz(points=POINTS, normals=NORMALS, colors=odd)
        cloud = read_cloud(save("e.npz", stream))
        np.testing.assert_array_equal(cloud.normals, NORMALS)
        assert cloud.colors is None


def test_a_share_that_rounding_has_put_above_one_is_still_a_share(save):
    full = COLORS.max() <= COLORS
    shares, wanted = np.where(full, 1.0000001, SHARES), np.where(full, 255, COLORS)
    for name in ("a.txt", "a.xyz"):
        rows = rows_of(POINTS, shares)
        cloud = read_cloud(save(name, (b"x y z r g b\n" if name == "a.txt" else b"") + rows))
        np.testing.assert_array_equal(cloud.colors, wanted)


def test_unnamed_columns_that_are_no_colours_are_not_taken_for_them(save):
    echoes = np.stack([np.arange(60) % 3 + 1, np.full(60, 3), np.arange(60) % 20], axis=1)
    for more in (echoes, COLORS * 300.0, COLORS + 0.25, np.hstack([PTS_LIKE, echoes]), NORMALS):
        assert read_cloud(save("a.xyz", rows_of(POINTS, more))).colors is None


PTS_LIKE = np.linspace(-2000, 2000, 60)[:, None]


def test_text_of_a_ply_says_by_its_types_whether_a_one_is_a_byte(save):
    ones = np.ones((60, 3), dtype=int)
    for kind, value in (("uchar", 1), ("float", 255)):
        header = ply_header("ascii", *vertex("double", "x y z"), *vertex(kind, "red green blue")[1:])
        assert np.all(read_cloud(save("a.ply", header + rows_of(POINTS, ones))).colors == value)


def test_a_cloud_in_pieces_has_the_colours_of_the_whole(save):
    for name in ("bytes.ply", "six.xyz"):
        path = save(name, COLORED[name])
        np.testing.assert_array_equal(np.concatenate([part.colors for part in stream_cloud(path, rows=25)]), COLORS)
    # What a number stands for, only the whole file tells.
    assert next(stream_cloud(save("words.ply", COLORED["words.ply"]), rows=25)).colors is None


def colored_mesh() -> TriangleMesh:
    vertices, faces = octahedron()
    colors = np.array([[0, 0, 0], [255, 255, 255], [1, 2, 3], [200, 100, 50], [12, 254, 128], [7, 9, 11]], np.uint8)
    confidence = np.array([0, 0.125, 0.5, 1 / 3, 0.9, 1], np.float32)
    return TriangleMesh(
        vertices=vertices, faces=faces, normals=vertices.astype(np.float32), colors=colors, confidence=confidence
    )


@pytest.mark.parametrize("extension", MESH_FORMATS)
@pytest.mark.parametrize("normals", [True, False])
def test_a_mesh_comes_back_with_its_colours_and_its_confidence(extension, normals, tmp_path):
    mesh, path = colored_mesh(), tmp_path / f"a.{extension}"
    write_mesh(mesh if normals else replace(mesh, normals=None), path)
    back = read_mesh(path)
    np.testing.assert_allclose(back.vertices[back.faces], mesh.vertices[mesh.faces], atol=1e-7)
    if extension == "stl":
        assert back.colors is None
    else:
        np.testing.assert_array_equal(back.colors, mesh.colors)
    if extension in ("ply", "glb"):
        np.testing.assert_array_equal(back.confidence, mesh.confidence)
    else:
        assert back.confidence is None
    if normals and extension in ("ply", "glb", "obj"):
        np.testing.assert_allclose(back.normals, mesh.normals, atol=1e-6)


def test_a_mesh_without_colours_is_written_as_ever(tmp_path):
    for extension in MESH_FORMATS:
        path = tmp_path / f"a.{extension}"
        write_mesh(replace(colored_mesh(), colors=None, confidence=None), path)
        for word in (b"red", b"COFF", b"COLOR", b"onfidence", b"CONFIDENCE"):
            assert word not in path.read_bytes()
        back = read_mesh(path)
        assert back.colors is back.confidence is None


def test_glb_holds_shares_of_light_as_its_standard_asks(tmp_path):
    write_mesh(colored_mesh(), tmp_path / "a.glb")
    data = (tmp_path / "a.glb").read_bytes()
    scene = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    attributes = scene["meshes"][0]["primitives"][0]["attributes"]
    color = scene["accessors"][attributes["COLOR_0"]]
    assert (color["componentType"], color["type"]) == (5126, "VEC3")
    assert "_CONFIDENCE" in attributes
    np.testing.assert_array_equal(screen_colors(light_of(np.arange(256, dtype=np.uint8))), np.arange(256))
    np.testing.assert_allclose(light_of(np.array([0, 128, 255], np.uint8)), [0, 0.2159, 1], atol=1e-4)


def test_ply_with_a_confidence_of_another_kind_has_none(tmp_path):
    vertices, faces = octahedron()
    for wrong in (2.0, -0.5, np.nan):
        write_ply(tmp_path / "a.ply", vertices, faces=faces, confidence=np.full(6, wrong))
        assert read_mesh(tmp_path / "a.ply").confidence is None


def test_other_programs_find_the_colours_of_our_files(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh = colored_mesh()
    for extension in ("ply", "obj", "glb"):
        write_mesh(mesh, tmp_path / f"a.{extension}")
        found = trimesh.load_mesh(tmp_path / f"a.{extension}", process=False)
        wanted = 255 * light_of(mesh.colors) if extension == "glb" else mesh.colors  # glTF's light, as it is
        np.testing.assert_allclose(found.visual.vertex_colors[:, :3], wanted, atol=0.51)
    open3d = pytest.importorskip("open3d", exc_type=ImportError)
    write_mesh(mesh, tmp_path / "a.off")
    found = open3d.io.read_triangle_mesh(str(tmp_path / "a.off"))
    np.testing.assert_allclose(np.asarray(found.vertex_colors) * 255, mesh.colors, atol=0.01)


def test_a_mesh_of_trimesh_with_bytes_as_light_is_read(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh = colored_mesh()
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=mesh.colors, process=False)
    body.export(tmp_path / "a.glb")
    np.testing.assert_array_equal(read_mesh(tmp_path / "a.glb").colors, screen_colors(mesh.colors / 255))


# Clouds


def colored(n: int = 2000) -> PointCloud:
    cloud = sphere(n)
    return replace(cloud, colors=np.random.default_rng(2).integers(0, 256, (n, 3), dtype=np.uint8))


def color_at(cloud: PointCloud) -> dict[bytes, bytes]:
    assert cloud.colors is not None
    return {p.tobytes(): c.tobytes() for p, c in zip(cloud.points, cloud.colors, strict=True)}


def test_points_at_one_position_become_one_of_their_mean_colour():
    cloud = colored()
    colors = np.concatenate([cloud.colors, 255 - cloud.colors])
    twice = PointCloud(points=np.tile(cloud.points, (2, 1)), normals=np.tile(cloud.normals, (2, 1)), colors=colors)
    for whole in (twice, replace(twice, normals=None)):
        merged = validate(whole, require_normals=False)
        assert len(merged.points) == len(cloud.points)
        assert set(np.unique(merged.colors)) <= {127, 128}
        assert merged.colors.dtype == np.uint8


def test_what_drops_or_turns_points_leaves_each_its_colour():
    cloud = colored()
    known = color_at(cloud)
    far = PointCloud(
        points=np.concatenate([[[0, 0, 50.0]], cloud.points, [[0, 90.0, 0]]]),
        normals=np.concatenate([[[0, 0, 1.0]], cloud.normals, [[0, 1.0, 0]]]),
        colors=np.concatenate([[[1, 1, 1]], cloud.colors, [[2, 2, 2]]]).astype(np.uint8),
    )
    kept, dropped = drop_strays(far)
    assert dropped == 2
    turned = replace(cloud, normals=np.where(np.arange(2000)[:, None] % 20 == 0, -cloud.normals, cloud.normals))
    found = [kept, remove_outliers(kept)[0], estimate_normals(cloud), estimate_normals(cloud, viewpoint=[0, 0, 5])]
    found += [checked(cloud), validate(cloud), mended(turned, measure(turned))[0]]
    for one in found:
        assert len(one.points) > 1500
        assert color_at(one).items() <= known.items()


def test_outliers_that_are_mended_away_take_their_colours_along():
    cloud, rng = colored(3000), np.random.default_rng(5)
    odd = PointCloud(points=rng.uniform(-1.4, 1.4, (200, 3)), normals=rng.normal(size=(200, 3)))
    known = color_at(cloud)
    whole = validate(
        PointCloud(
            points=np.concatenate([cloud.points, odd.points]),
            normals=np.concatenate([cloud.normals, odd.normals]),
            colors=np.concatenate([cloud.colors, np.full((200, 3), 9, np.uint8)]),
        )
    )
    better, what = mended(whole, measure(whole))
    assert what.outliers > 100
    inliers = {point: color for point, color in color_at(better).items() if point in known}
    assert len(inliers) > 2500
    assert inliers.items() <= known.items()


def test_colours_of_another_number_or_type_are_refused():
    cloud = colored()
    for wrong in (cloud.colors[:-1], cloud.colors / 255, cloud.colors[:, :2]):
        with pytest.raises(CloudError, match="colours have shape"):
            validate(drop_strays(replace(cloud, colors=wrong))[0])


def test_real_names_of_colours_in_any_case(save: "object", tmp_path: Path):
    for names in ("X Y Z R G B", "x y z Red Green Blue", "//X Y Z Rf Gf Bf"):
        (tmp_path / "a.txt").write_bytes(names.encode() + b"\n" + rows_of(POINTS, SHARES))
        np.testing.assert_array_equal(read_cloud(tmp_path / "a.txt").colors, COLORS)
