import json
import os
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cloud_files import (
    BOTH,
    FILES,
    NORMALS,
    POINTS,
    RNG,
    ROWS,
    SURFACES,
    UTM,
    binary_ply,
    binary_stl,
    e57_file,
    las_file,
    npy,
    npz,
    octahedron,
    ply_header,
    vertex,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudError, CloudFormatError, MissingDependencyError, OutputError
from sdfserver.files import MESH_FORMATS, check_writable, replacing
from sdfserver.formats.pcd import _lzf_unpacked
from sdfserver.io import CLOUD_FORMATS, read_cloud, read_mesh, write_mesh
from sdfserver.mesh import TriangleMesh

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


def refusal(path: Path, kind: type[Exception] = CloudFormatError) -> str:
    with pytest.raises(kind) as caught:
        read_cloud(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


# Reading clouds


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_back_exactly_the_points_and_normals_in_the_file(name, save):
    cloud = read_cloud(save(name, FILES[name]))
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_allclose(cloud.normals, NORMALS, rtol=0, atol=1e-15)
    assert cloud.points.dtype == cloud.normals.dtype == np.float64
    assert cloud.points.flags.writeable


@pytest.mark.parametrize("name", SURFACES)
def test_a_surface_without_vertex_normals_gets_those_of_its_faces(name, save):
    cloud = read_cloud(save(name, SURFACES[name]))
    assert len(cloud.points) == 6
    unit = cloud.normals / np.linalg.norm(cloud.normals, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, cloud.points, atol=1e-12)


@pytest.mark.parametrize("kind", ["float", "int"])
def test_ply_coordinates_of_other_types_become_the_float64_of_the_same_value(kind, save):
    table = np.round(POINTS * 100)
    cloud = read_cloud(save("c.ply", binary_ply("<", kind, table)))
    np.testing.assert_array_equal(cloud.points, table)
    assert cloud.normals is None


def test_utm_coordinates_survive_to_the_last_bit(save):
    points = POINTS + UTM
    for name, data in {
        "a.ply": binary_ply("<", "double", points),
        "a.xyz": b"".join(b"%r %r %r\n" % tuple(p) for p in points.tolist()),
        "a.npy": npy(points),
    }.items():
        np.testing.assert_array_equal(read_cloud(save(name, data)).points, points)


def test_windows_line_ends_and_a_byte_order_mark_are_no_obstacle(save):
    data = b"\xef\xbb\xbf" + b"x y z nx ny nz\n" + ROWS
    np.testing.assert_array_equal(read_cloud(save("a.txt", data.replace(b"\n", b"\r\n"))).points, POINTS)
    header = ply_header("binary_little_endian", *vertex("double", "x y z nx ny nz")).replace(b"\n", b"\r\n")
    np.testing.assert_array_equal(read_cloud(save("a.ply", header + BOTH.tobytes())).points, POINTS)


def test_a_commented_header_names_the_columns(save):
    rows = b"".join(b"%r %r %r\n" % (z, y, x) for x, y, z in POINTS.tolist())
    np.testing.assert_array_equal(read_cloud(save("a.txt", b"//Z Y X\n" + rows)).points, POINTS)


def test_six_columns_that_look_like_colours_are_not_taken_for_normals(save):
    for colours in (RNG.integers(0, 256, (60, 3)), RNG.random((60, 3))):
        cloud = read_cloud(save("a.npy", npy(np.hstack([POINTS, colours]))))
        assert cloud.normals is None


def test_normals_behind_intensity_and_colours_are_found(save):
    colours = RNG.integers(0, 256, (60, 3))
    for extra in (np.full((60, 1), -1200.0), colours, np.hstack([colours, np.full((60, 1), 0.5)])):
        cloud = read_cloud(save("a.npy", npy(np.hstack([POINTS, extra, NORMALS]))))
        np.testing.assert_array_equal(cloud.normals, NORMALS)


def test_text_columns_that_are_not_numbers_are_left_out_behind_the_numbers(save):
    rows = b"".join(b"%r,%r,%r,wall\n" % tuple(p) for p in POINTS.tolist())
    np.testing.assert_array_equal(read_cloud(save("a.csv", rows)).points, POINTS)


def test_structured_and_fortran_arrays_are_read(save):
    table = np.zeros(60, dtype=[("z", "f4"), ("x", "f8"), ("y", "f8"), ("label", "i4")])
    table["x"], table["y"], table["z"] = POINTS.T
    np.testing.assert_array_equal(read_cloud(save("a.npy", npy(table))).points[:, 0], POINTS[:, 0])
    np.testing.assert_array_equal(read_cloud(save("b.npy", npy(np.asfortranarray(POINTS)))).points, POINTS)


def test_rows_of_a_pcd_that_were_not_measured_are_left_out(save):
    rows = FILES["ascii.pcd"].split(b"\n")
    rows[20] = b"nan nan nan 0 nan nan nan"
    assert len(read_cloud(save("a.pcd", b"\n".join(rows))).points) == 59


def test_a_cloud_with_a_few_faces_keeps_all_its_points(save):
    faces = ["element face 1", "property list uchar int vertex_indices"]
    data = ply_header("ascii", *vertex("double", "x y z"), *faces)
    data += b"".join(b"%r %r %r\n" % tuple(p) for p in POINTS.tolist()) + b"3 0 1 2\n"
    cloud = read_cloud(save("a.ply", data))
    assert len(cloud.points) == 60
    assert cloud.normals is None


def test_lzf_copies_that_overlap_themselves_repeat():
    assert _lzf_unpacked(bytes([0, 65, (7 << 5) | 0, 3, 0, 1, 66, 67]), 15) == b"A" * 13 + b"BC"


def test_pcd_as_open3d_writes_it_is_read(tmp_path):
    open3d = pytest.importorskip("open3d", exc_type=ImportError)  # or a system library of it is missing
    body = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(POINTS))
    body.normals = open3d.utility.Vector3dVector(NORMALS)
    for options in ({}, {"write_ascii": True}, {"compressed": True}):
        open3d.io.write_point_cloud(str(tmp_path / "a.pcd"), body, **options)
        cloud = read_cloud(tmp_path / "a.pcd")
        np.testing.assert_allclose(cloud.points, POINTS, atol=1e-6)
        np.testing.assert_allclose(cloud.normals, NORMALS, atol=1e-6)


@needs_shared
def test_real_files_are_read():
    for path in sorted((SHARED / "clouds").iterdir()):
        cloud = read_cloud(path)
        assert len(cloud.points) > 1000
        if cloud.normals is not None:
            np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=1), 1, atol=1e-5)
    assert read_cloud(SHARED / "clouds" / "open3d_fragment.pcd").points.shape == (113662, 3)


# Optional formats


@pytest.mark.parametrize("extension", ["las", "laz"])
def test_las_and_laz_are_read_with_their_scale_offset_and_normals(extension, tmp_path):
    cloud = read_cloud(las_file(tmp_path / f"a.{extension}", POINTS + UTM))
    np.testing.assert_allclose(cloud.points, POINTS + UTM, atol=1e-4)
    np.testing.assert_array_equal(cloud.normals, NORMALS)


def test_the_scans_of_an_e57_come_together_in_their_poses(tmp_path):
    cloud = read_cloud(e57_file(tmp_path / "a.e57"))
    turned = POINTS[:, [1, 0, 2]] * [-1, 1, 1]
    np.testing.assert_allclose(cloud.points, np.vstack([turned, turned + UTM]), atol=1e-6)
    assert cloud.normals is None


@pytest.mark.parametrize(
    ("extension", "package", "extra"), [("las", "laspy", "las"), ("laz", "laspy", "las"), ("e57", "pye57", "e57")]
)
def test_a_missing_package_names_the_extra_that_brings_it(extension, package, extra, save, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    path = save(f"a.{extension}", b"LASF" if extra == "las" else b"ASTM-E57")
    assert f"pip install 'sdfserver[{extra}]'" in refusal(path, MissingDependencyError)


# Refusing what is no cloud


TRILLION = 10**12
PROMISES = {
    "a.ply": ply_header("binary_little_endian", *vertex("float", "x y z", TRILLION)) + bytes(120),
    "b.ply": ply_header("ascii", *vertex("float", "x y z", TRILLION)) + b"1 2 3\n" * 10,
    "c.ply": ply_header("ascii", f"element face {TRILLION}", "property list uchar int v", *vertex("float", "x y z")),
    "d.ply": ply_header("binary_big_endian", *vertex("float", "x y z", TRILLION), "property list int float q"),
    "a.pts": b"%d\n1 2 3\n" % TRILLION,
    "a.npy": npy(POINTS).replace(b"(60, 3), }            ", b"(%d, 3), }" % TRILLION),
    "a.pcd": FILES["ascii.pcd"].replace(b"POINTS 60", b"POINTS %d" % TRILLION),
    "b.pcd": FILES["binary.pcd"].replace(b"POINTS 60", b"POINTS %d" % TRILLION),
    "c.pcd": FILES["compressed.pcd"].replace(b"POINTS 60", b"POINTS %d" % TRILLION),
    "a.off": b"OFF\n%d 0 0\n1 2 3\n" % TRILLION,
}


@pytest.mark.parametrize("name", PROMISES)
def test_a_header_that_promises_a_trillion_points_is_refused_without_allocating(name, save):
    path = save(name, PROMISES[name])
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(TRILLION) in message or str(3 * TRILLION) in message
    assert len(re.findall(r"\d+", message)) >= 2
    assert peak < 10e6


def test_a_binary_stl_is_refused_for_a_promise_of_four_billion_triangles(save):
    data = binary_stl()
    message = refusal(save("a.stl", data[:80] + b"\xff\xff\xff\xff" + data[84:]))
    assert "4294967295" in message
    assert "room for 8" in message


@pytest.mark.parametrize("name", [name for name in [*FILES, *SURFACES] if not name.endswith("obj")])
def test_a_truncated_file_is_refused(name, save):
    data = {**FILES, **SURFACES}[name]
    refusal(save(name, data[: int(len(data) * 0.6)].rstrip(b"0123456789.-e ,;\t") + b"\n1"))


@pytest.mark.parametrize("extension", CLOUD_FORMATS)
def test_an_empty_file_says_so(extension, save):
    assert "the file is empty" in refusal(save(f"a.{extension}", b""))


@pytest.mark.parametrize("extension", [name for name in CLOUD_FORMATS if name not in ("las", "laz", "e57")])
def test_bytes_of_no_format_are_refused(extension, save):
    for data in (bytes(100), b"\xff\xfea\0b\0", RNG.bytes(5000), b"hello world\n" * 10, b"1 " * 2_000_000):
        refusal(save(f"a.{extension}", data))


@pytest.mark.parametrize(
    ("name", "other", "hint"),
    [("little.ply", "a.xyz", ".ply"), ("table.npy", "a.ply", ".npy"), ("named.npz", "a.npy", ".npz"),
     ("binary.pcd", "a.csv", ".pcd"), ("normals.off", "a.obj", ".off"), ("plain.xyz", "a.ply", "extension")],
)  # fmt: skip
def test_content_that_disagrees_with_the_extension_is_named(name, other, hint, save):
    assert hint in refusal(save(other, FILES[name]))


def test_a_web_page_and_an_archive_are_named(save):
    assert "web page" in refusal(save("a.ply", b"<!DOCTYPE html><html>"))
    assert "gzip" in refusal(save("a.xyz", b"\x1f\x8b\x08\x00"))


def test_the_offending_line_is_quoted(save):
    rows = ROWS.split(b"\n")
    rows[16] = b"1 2 three 4 5 6"
    message = refusal(save("a.xyz", b"# made by hand\n" + b"\n".join(rows)))
    assert "line 18 has 'three' where" in message
    rows[16] = b"1 2"
    assert "line 17 has 2 values, not 6: '1 2'" in refusal(save("a.xyz", b"\n".join(rows)))


def test_pickled_arrays_are_refused(save):
    assert "never loaded" in refusal(save("a.npy", npy(np.array([{}, {}], dtype=object))))


def test_an_archive_that_expands_without_bound_is_refused(save):
    bomb = np.zeros((12_000_000, 3))
    assert "expand" in refusal(save("a.npz", npz(points=bomb)))


def test_a_face_that_refers_to_no_vertex_is_refused(save):
    assert "161" in refusal(save("a.off", SURFACES["plain.off"].replace(b"3 0 2 4", b"3 0 2 161")))
    assert "161" in refusal(save("a.obj", SURFACES["plain.obj"].replace(b"f 1/1 3/1 5/1", b"f 1/1 3/1 161/1")))


def test_missing_files_folders_and_unknown_extensions_are_one_line_errors(tmp_path):
    assert "does not exist" in refusal(tmp_path / "a.ply", CloudError)
    (tmp_path / "folder.ply").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.ply", CloudError)
    (tmp_path / "a.docx").write_bytes(b"x")
    message = refusal(tmp_path / "a.docx")
    assert {"'.docx'", "ply,", "e57"} <= set(message.split())
    refusal(tmp_path / ("x" * 300 + ".ply"), CloudError)
    refusal(tmp_path / "a\0b.ply", CloudError)
    os.mkfifo(tmp_path / "pipe.ply")
    assert "ordinary file" in refusal(tmp_path / "pipe.ply", CloudError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error(save):
    path = save("a.ply", FILES["little.ply"])
    path.chmod(0)
    assert "ermission" in refusal(path, CloudError)


TOKENS = [b"0", b"-1", b"nan", b"inf", b"1e400", b"999999999999", b"9" * 30, b"1_0", b"\0", b"\xff" * 4, b"\n", b" ",
          b"\r", b",", b";", b"#", b"//", b'"', b"x", b"/", b"\0" * 4, b"\x7f\xff\xff\xff"]  # fmt: skip
EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "overwrite", "end", "copy"]),
    st.one_of(st.integers(0, 400), st.integers(0, 10**6)),
    st.sampled_from(TOKENS),
    st.integers(1, 60),
)


def edited(data: bytes, edits: list[tuple[str, int, bytes, int]]) -> bytes:
    for kind, where, token, length in edits:
        at = where % max(len(data), 1)
        replacement = {
            "flip": bytes([data[at] ^ (1 << length % 8)]) + data[at + 1 :] if data else b"",
            "cut": data[at + length :],
            "insert": token + data[at:],
            "overwrite": token + data[at + len(token) :],
            "end": b"",
            "copy": data[at : at + length] + data[at:],
        }[kind]
        data = data[:at] + replacement
    return data


FUZZED = {**FILES, **SURFACES}


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_damaged_file_is_a_cloud_or_a_cloud_error_and_nothing_else(name, tmp_path, edits):
    accepts_only_a_cloud_or_a_cloud_error(tmp_path / name, edited(FUZZED[name], edits))


@pytest.mark.parametrize("name", ["a.las", "a.laz", "a.e57"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=2))
def test_a_damaged_scan_is_a_cloud_or_a_cloud_error_and_nothing_else(name, tmp_path, edits):
    whole = tmp_path / f"whole_{name}"
    if not whole.exists():
        (e57_file if name.endswith("e57") else las_file)(whole)
    accepts_only_a_cloud_or_a_cloud_error(tmp_path / name, edited(whole.read_bytes(), edits))


def accepts_only_a_cloud_or_a_cloud_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    message, cloud = "", PointCloud(points=np.empty((0, 3)))
    try:
        cloud = read_cloud(path)
    except CloudError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 500
    assert (not message) == (len(cloud.points) > 0)
    assert cloud.points.shape == (len(cloud.points), 3)
    assert cloud.normals is None or cloud.normals.shape == cloud.points.shape


# Writing meshes


def mesh(offset: np.ndarray | float = 0.0) -> TriangleMesh:
    vertices, faces = octahedron()
    return TriangleMesh(vertices=vertices + offset, faces=faces, normals=vertices.astype(np.float32))


@pytest.mark.parametrize("extension", MESH_FORMATS)
def test_a_mesh_comes_back_as_it_was_written(extension, tmp_path):
    path = tmp_path / f"mesh.{extension}"
    write_mesh(mesh(), path)
    back = read_mesh(path)
    np.testing.assert_allclose(back.vertices[back.faces], mesh().vertices[mesh().faces], atol=1e-7)
    if extension != "stl":
        np.testing.assert_array_equal(back.faces, mesh().faces)
    if extension in ("ply", "glb"):
        np.testing.assert_allclose(back.normals, mesh().normals, atol=1e-7)


@pytest.mark.parametrize("extension", [name for name in MESH_FORMATS if name != "stl"])
def test_a_mesh_at_utm_coordinates_stays_where_it_is(extension, tmp_path):
    far = mesh(UTM)
    write_mesh(far, tmp_path / f"mesh.{extension}")
    np.testing.assert_allclose(read_mesh(tmp_path / f"mesh.{extension}").vertices, far.vertices, rtol=0, atol=2e-7)


def test_ply_uses_float64_only_where_float32_loses_the_position(tmp_path):
    for offset, kind in ((0.0, b"property float x"), (1000.1, b"property double x"), (UTM, b"property double x")):
        write_mesh(mesh(offset), tmp_path / "mesh.ply")
        assert kind in (tmp_path / "mesh.ply").read_bytes()


def test_ply_is_also_a_cloud_with_the_same_normals(tmp_path):
    write_mesh(mesh(UTM), tmp_path / "mesh.ply")
    cloud = read_cloud(tmp_path / "mesh.ply")
    np.testing.assert_array_equal(cloud.points, mesh(UTM).vertices)
    np.testing.assert_array_equal(cloud.normals, mesh().normals)


def test_glb_puts_a_far_position_into_the_node(tmp_path):
    write_mesh(mesh(UTM), tmp_path / "mesh.glb")
    data = (tmp_path / "mesh.glb").read_bytes()
    scene = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    assert np.reshape(scene["nodes"][0]["matrix"], (4, 4))[3, :3] == pytest.approx(UTM, abs=1e-9)
    attributes = scene["meshes"][0]["primitives"][0]["attributes"]
    assert {"POSITION", "NORMAL"} <= attributes.keys()
    assert scene["accessors"][attributes["POSITION"]]["max"] == pytest.approx([1, 1, 1])


def test_a_mesh_without_normals_and_an_empty_one_can_be_written(tmp_path):
    vertices, faces = octahedron()
    for extension in MESH_FORMATS:
        write_mesh(TriangleMesh(vertices=vertices, faces=faces), tmp_path / f"a.{extension}")
        assert read_mesh(tmp_path / f"a.{extension}").faces.shape == (8, 3)
    empty = TriangleMesh(vertices=np.empty((0, 3)), faces=np.empty((0, 3), np.int64))
    for extension in ("ply", "obj", "stl", "off"):
        write_mesh(empty, tmp_path / f"b.{extension}")


def test_the_same_mesh_gives_the_same_bytes(tmp_path):
    for extension in MESH_FORMATS:
        write_mesh(mesh(), tmp_path / f"a.{extension}")
        write_mesh(mesh(), tmp_path / f"b.{extension}")
        assert (tmp_path / f"a.{extension}").read_bytes() == (tmp_path / f"b.{extension}").read_bytes()


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "mesh.ply"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_mesh(mesh(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.ply"]
    assert path.read_bytes() == b"old"


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.ply").symlink_to(tmp_path / "real" / "mesh.ply")
    write_mesh(mesh(), tmp_path / "link.ply")
    assert (tmp_path / "link.ply").is_symlink()
    assert (tmp_path / "real" / "mesh.ply").is_file()


def test_a_written_mesh_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_mesh(mesh(), tmp_path / "mesh.ply")
    assert (tmp_path / "mesh.ply").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "said"),
    [("no/such/folder/a.ply", "no folder"), (".", "is a folder"), ("a.docx", "ply, .obj, .stl, .glb, .off"),
     ("a", "not a known format"), ("x" * 300 + ".ply", "too long"), ("a\0.ply", "null")],
)  # fmt: skip
def test_a_path_that_cannot_be_written_is_refused_early_and_on_one_line(name, said, tmp_path):
    for check in (check_writable, lambda path: write_mesh(mesh(), path)):
        with pytest.raises(OutputError) as caught:
            check(tmp_path / name)
        assert str(caught.value).isprintable()
    with pytest.raises(OutputError, match=said):
        check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_nothing_behind_and_spares_what_is_there(tmp_path):
    check_writable(tmp_path / "mesh.ply")
    check_writable(tmp_path / "report.json", ["json"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mesh.ply").write_bytes(b"old")
    check_writable(tmp_path / "mesh.ply")
    assert (tmp_path / "mesh.ply").read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_early(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="ermission"):
        check_writable(tmp_path / "mesh.ply")


def test_glb_without_trimesh_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(MissingDependencyError, match="pip install trimesh"):
        write_mesh(mesh(), tmp_path / "mesh.glb")
    write_mesh(mesh(), tmp_path / "mesh.ply")
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.ply"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_no_part_of_the_new(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fill_the_disk():
        with replacing(path) as stream:
            stream.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.safetensors cannot be written: No space left"):
        fill_the_disk()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
