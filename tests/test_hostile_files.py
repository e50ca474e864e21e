"""Files that are made to hurt, or that come from elsewhere: a cloud that is right, or one line that says what is wrong.

What the fuzzer once found is built here again, as small as it can be; faults/fuzz_readers.py is the fuzzer.
"""

import io
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cloud_files import (
    BOTH,
    FILES,
    NORMALS,
    POINTS,
    ROWS,
    SURFACES,
    binary_ply,
    e57_file,
    e57_of,
    las_file,
    npy,
    npz,
    octahedron,
    pcd,
    ply_header,
    vertex,
)
from faults.fuzz_readers import KINDS, Wrong, look, made, seeds
from faults.mutations import e57_paged, e57_unpaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import even_sphere, sphere

from sdfserver.cloud import Frame, PointCloud, drop_strays, validate
from sdfserver.errors import CloudError, CloudFormatError
from sdfserver.io import read_cloud, read_mesh, write_mesh, write_ply
from sdfserver.mesh import TriangleMesh
from sdfserver.normals import prepare
from sdfserver.reconstruct import reconstruct

MIB = 1 << 20


def refusal(path: Path, *, mib: float = 8, seconds: float = 2, read: Callable = read_cloud) -> str:
    """What is said of a file that is refused, within seconds of processor time and numpy's and Python's own memory."""
    start = time.process_time()
    with pytest.raises(CloudFormatError):
        read(path)
    assert time.process_time() - start < seconds
    tracemalloc.start()
    try:
        with pytest.raises(CloudFormatError) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size + mib * MIB
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return str(caught.value)


# Every format, made wrong in ways that its own structure allows


@cache
def sources(kind: str) -> list[bytes]:
    return seeds(kind, others=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(number=st.integers(0, 2**40))
def test_a_file_made_wrong_is_a_valid_cloud_or_one_line(kind: str, number: int, tmp_path: Path) -> None:
    extension, data = made(kind, sources(kind), 1, number)
    path = tmp_path / f"a.{extension}"
    path.write_bytes(data)
    try:
        look(kind, path, thoroughly=number % 10 == 0)
    except Wrong as wrong:
        pytest.fail(f"{wrong.kind}: {wrong.detail} (input {number})")


def test_the_mutations_are_the_same_each_time_and_leave_some_files_sound() -> None:
    for kind in ("ply", "laz", "e57", "npz"):
        assert made(kind, sources(kind), 0, 7) == made(kind, sources(kind), 0, 7)
    whole = sources("e57")[0]
    assert e57_paged(e57_unpaged(whole)) == whole


# Files that would become more than there is room for


def test_an_npz_that_becomes_half_a_gigabyte_of_numbers_is_refused_before_it_is_unpacked(save) -> None:
    path = save("a.npz", npz(points=np.zeros((12_000_000, 6), dtype=np.uint8)))
    assert path.stat().st_size < 100_000
    assert f"would expand to {8 * 72_000_000}" in refusal(path, mib=4)


def test_an_npz_that_says_it_is_small_and_is_not_is_refused(save) -> None:
    data = bytearray(npz(points=np.zeros((12_000_000, 3))))
    for signature, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        start = data.find(signature)
        data[start + at : start + at + 4] = struct.pack("<I", 1000)
    refusal(save("a.npz", bytes(data)), mib=4)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_packed_as_numpy_never_packs_is_refused(method, save) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("points.npy", npy(POINTS))
    assert "deflated" in refusal(save("a.npz", stream.getvalue()))


def laz(points: np.ndarray, *, point_format: int, path: Path) -> bytes:
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=point_format, version="1.4" if point_format > 5 else "1.2")
    header.scales = [1e-3] * 3
    las = laspy.LasData(header)
    las.x, las.y, las.z = points.T
    las.write(str(path))
    return path.read_bytes()


def test_a_laz_of_three_million_times_the_same_point_is_refused_before_it_is_unpacked(tmp_path, save) -> None:
    data = laz(np.ones((3_000_000, 3)), point_format=0, path=tmp_path / "whole.laz")
    assert len(data) < 100_000
    assert "would expand to 72000000" in refusal(save("a.laz", data), mib=4)


@pytest.mark.parametrize(("point_format", "at", "size"), [(0, 107, 4), (6, 247, 8)])
def test_a_laz_that_promises_a_billion_points_is_refused(point_format, at, size, tmp_path, save) -> None:
    data = laz(POINTS, point_format=point_format, path=tmp_path / "whole.laz")
    data = data[:at] + (10**9).to_bytes(size, "little") + data[at + size :]
    assert "would expand" in refusal(save("a.laz", data))


def test_layers_of_a_laz_that_are_not_there_are_refused(tmp_path, save) -> None:
    """lazrs makes room for what a chunk says that its layers have: a kilobyte took a gigabyte, or ended the process."""
    data = laz(POINTS, point_format=7, path=tmp_path / "whole.laz")
    sizes = int.from_bytes(data[96:100], "little") + 8 + 36 + 4
    for layer in range(10):
        at = sizes + 4 * layer
        said = refusal(save("a.laz", data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]))
        assert re.search(r"chunk 1 would end at byte 42949\d+", said)


def test_layers_of_a_laz_that_says_it_has_none_are_refused(tmp_path, save) -> None:
    data = laz(POINTS, point_format=8, path=tmp_path / "whole.laz")
    record = data.index(b"laszip encoded") - 2 + 54
    assert data[record : record + 2] == b"\x03\x00"
    assert "not packed together" in refusal(save("a.laz", data[:record] + b"\x02\x00" + data[record + 2 :]))


def test_layered_laz_of_several_chunks_is_read(tmp_path) -> None:
    points = np.round(np.random.default_rng(1).normal(size=(120_000, 3)), 3)
    for point_format in (6, 7, 8):
        laz(points, point_format=point_format, path=tmp_path / "a.laz")
        np.testing.assert_allclose(read_cloud(tmp_path / "a.laz").points, points, atol=1e-9)


def test_a_laz_whose_packed_points_are_of_another_size_is_refused(tmp_path, save) -> None:
    data = laz(POINTS, point_format=0, path=tmp_path / "whole.laz")
    record = data.index(b"laszip encoded") - 2 + 54
    for size in (0, 65535):
        wrong = data[: record + 36] + struct.pack("<H", size) + data[record + 38 :]
        assert f"but {size} are packed" in refusal(save("a.laz", wrong))


def with_xml(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An E57 whose XML is changed, with lengths and checksums that fit."""
    logical = e57_unpaged(data)
    offset, length = struct.unpack("<QQ", logical[24:40])
    at = offset // 1024 * 1020 + offset % 1024
    changed = change(logical[at : at + length])
    assert changed != logical[at : at + length]
    return e57_paged(logical[:24] + struct.pack("<QQ", offset, len(changed)) + logical[40:at] + changed)


def test_an_e57_of_points_without_any_bits_is_refused_before_it_is_unpacked(tmp_path, save) -> None:
    pye57 = pytest.importorskip("pye57")
    layout = [
        (f"cartesian{axis}", lambda image: pye57.libe57.IntegerNode(image, 7, 7, 7), np.full(60, 7)) for axis in "XYZ"
    ]
    whole = e57_of(tmp_path / "whole.e57", layout)
    many = with_xml(whole, lambda xml: xml.replace(b'recordCount="60"', b'recordCount="99000000000"'))
    assert "would expand to 2376000000000" in refusal(save("a.e57", many))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda xml: xml.replace(b'recordCount="60"', b'recordCount="9999999999"'), "promises 19999999998 points"),
        (lambda xml: xml.replace(b'recordCount="60"', b'recordCount="-1"'), "promises -1 points"),
        (lambda xml: xml.replace(b"<data3D", b"<a>" * 5000 + b"<data3D"), "within each other"),
        (lambda xml: xml.replace(b"UTF-8", b"UTF-16"), "not in UTF-8"),
        (lambda xml: xml.replace(b"<e57Root", b'<!DOCTYPE e57Root SYSTEM "file:///etc/passwd"><e57Root'), "document"),
        (
            lambda xml: xml.replace(
                b"<e57Root", b'<!DOCTYPE e57Root [<!ENTITY a "aaaaaaaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><e57Root'
            ).replace(b"Scan 0", b"]]>&b;<![CDATA["),
            "document type",
        ),
        (
            lambda xml: xml.replace(
                b'type="Structure"',
                b'type="Structure" xmlns:s="http://www.w3.org/2001/XMLSchema-instance" s:schemaLocation="a http://x/"',
                1,
            ),
            "place of a schema",
        ),
    ],
    ids=["points", "negative", "depth", "encoding", "document", "entities", "schema"],
)
def test_the_xml_of_an_e57_describes_and_does_nothing_else(change, said, tmp_path, save) -> None:
    pytest.importorskip("pye57")
    assert said in refusal(save("a.e57", with_xml(e57_file(tmp_path / "whole.e57").read_bytes(), change)))


def test_a_compressed_pcd_cannot_become_more_than_it_says(save) -> None:
    data = pcd("binary_compressed")
    at = data.index(b"binary_compressed\n") + 18
    for sizes in ((0xFFFFFFFF, 60 * 52), (1000, 0xFFFFFFFF)):
        refusal(save("a.pcd", data[:at] + struct.pack("<II", *sizes) + data[at + 8 :]))


# Headers that promise what cannot be


def test_a_ply_with_thirty_thousand_properties_takes_no_time(save) -> None:
    names = "".join(f"property char p{i}\n" for i in range(30_000))
    data = f"ply\nformat ascii 1.0\nelement vertex 1\n{names}end_header\n1\n".encode()
    assert "no column is named x" in refusal(save("a.ply", data))


def test_blank_lines_between_and_behind_the_rows_of_a_ply_take_no_time(save) -> None:
    rows = b"\n".join([b"1 2 3"] * 20_000) + b"\n\n" + b"\n" * 200_000
    data = ply_header("ascii", *vertex("float", "x y z", 20_001)) + rows
    assert "20001" in refusal(save("a.ply", data), seconds=1)
    even = ply_header("ascii", *vertex("double", "x y z nx ny nz")) + ROWS.replace(b"\n", b"\n\n \n")
    np.testing.assert_array_equal(read_cloud(save("b.ply", even)).points, POINTS)


@pytest.mark.parametrize(
    "shape", ["(-5, 3)", "(-1, 3)", "(0, 999999999999999999999, 3)", f"({'1, ' * 70})", "(99, 10**30)"]
)
def test_shapes_that_numpy_does_not_have_are_refused(shape, save) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    refusal(save("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + POINTS.tobytes()))


@pytest.mark.parametrize("dtype", ["'(3,)<f8'", "'(1000000000,)<f8'", "'|V0'", "'<c16'", "'|O'"])
def test_types_that_are_no_numbers_are_refused(dtype, save) -> None:
    header = f"{{'descr': {dtype}, 'fortran_order': True, 'shape': (60, 3), }}".encode()
    refusal(save("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + POINTS.tobytes()))


def test_a_pcd_whose_rows_are_longer_than_numbers_go_is_refused(save) -> None:
    head = FILES["binary.pcd"].replace(b"COUNT 1 1 1 1 1 1 1", b"COUNT 1 1 1 999999999999999999 1 1 1")
    for points in (b"60", b"0"):
        for encoding in (b"binary", b"ascii"):
            data = head.replace(b"POINTS 60", b"POINTS " + points).replace(b"DATA binary", b"DATA " + encoding)
            refusal(save("a.pcd", data.replace(b"\0", b"1") if encoding == b"ascii" else data))


@pytest.mark.parametrize("name", ["a.xyz", "a.obj", "a.off", "a.ply", "a.stl"])
def test_a_quarter_of_a_megabyte_of_line_ends_is_refused_in_little_memory(name, save) -> None:
    for end in (b"\n", b"\r", b"\r\n", b" \n"):
        start = {"a.ply": ply_header("ascii", *vertex("float", "x y z")), "a.off": b"OFF\n", "a.stl": b"solid\n"}
        refusal(save(name, start.get(name, b"") + end * (MIB // 4)))


def test_lines_of_nothing_but_a_letter_and_lines_of_half_a_million_columns_take_little_memory(save) -> None:
    tracemalloc.start()
    try:
        cloud = read_cloud(save("a.obj", SURFACES["plain.obj"] + b"f \n" * (MIB // 3)))
        assert tracemalloc.get_traced_memory()[1] < 14 * MIB
    finally:
        tracemalloc.stop()
    assert len(cloud.points) == 6
    for name in ("a.xyz", "a.csv", "a.obj", "a.off"):
        start = {"a.obj": b"v ", "a.off": b"OFF\n1 0 0\n"}.get(name, b"")
        assert "characters" in refusal(save(name, start + b"0 " * (MIB // 2)), mib=1)


def test_an_off_that_promises_a_vertex_for_each_empty_line_is_refused(save) -> None:
    lines = 2_000_000
    assert f"promises {lines} vertices" in refusal(save("a.off", b"CNOFF\n%d 0 0\n" % lines + b"\n" * lines), mib=4)


def test_colours_of_a_packed_file_count_for_what_it_becomes(save) -> None:
    path = save("a.npz", npz(points=np.zeros((100, 3)), colors=np.zeros((100, 3), np.uint8)))
    assert read_cloud(path).colors is not None
    many = np.zeros((20_000_000, 3), np.uint8)
    # With as many points as colours they are looked at, and else left alone.
    both = save("b.npz", npz(points=many[:2_000_000], colors=many[:2_000_000]))
    assert f"would expand to {8 * 12_000_000}" in refusal(both, mib=4)
    assert read_cloud(save("c.npz", npz(points=np.zeros((100, 3)), colors=many))).colors is None


@pytest.mark.parametrize("extension", ["ply", "obj", "off"])
def test_a_mesh_that_refers_to_a_vertex_far_out_is_refused(extension, tmp_path) -> None:
    """What reads such a file by making room for as many vertices takes 32 GiB for it."""
    vertices, faces = octahedron()
    write_mesh(TriangleMesh(vertices=vertices, faces=faces), tmp_path / f"a.{extension}")
    data = (tmp_path / f"a.{extension}").read_bytes()
    if extension == "ply":
        (tmp_path / "a.ply").write_bytes(data[:-4] + struct.pack("<i", 2**31 - 1))
    else:
        far = data.rstrip().rsplit(b" ", 1)[0] + b" 4294967296\n"
        (tmp_path / f"a.{extension}").write_bytes(far)
    for read in (read_cloud, read_mesh):
        assert re.search("2147483647|4294967296", refusal(tmp_path / f"a.{extension}", read=read))


def glb(change: Callable[[bytes], bytes], path: Path) -> Path:
    vertices, faces = octahedron()
    write_mesh(TriangleMesh(vertices=vertices, faces=faces), path)
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    scene = change(data[20 : 20 + length])
    scene += b" " * (-len(scene) % 4)
    rest = data[20 + length :]
    path.write_bytes(data[:8] + struct.pack("<II", 20 + len(scene) + len(rest), len(scene)) + b"JSON" + scene + rest)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scene: re.sub(rb'"count": ?24', b'"count":4000000000', scene), "4000000000"),
        (lambda scene: re.sub(rb'"buffers": ?\[\{', b'"buffers":[{"uri":"/dev/zero",', scene), "other files"),
        (lambda scene: re.sub(rb'"byteLength": ?72', b'"byteLength":1e400', scene), "scene"),
        (lambda scene: b"[" * 100_000, "scene"),
        (lambda scene: re.sub(rb'"nodes": ?\[\{', b'"nodes":[{"children":[0],', scene), "within each other"),
    ],
    ids=["count", "uri", "infinite", "depth", "tree"],
)
def test_a_glb_of_more_than_its_bytes_is_refused(change, said, tmp_path) -> None:
    unchanged: list[bytes] = []
    glb(lambda scene: unchanged.append(scene) or scene, tmp_path / "whole.glb")
    assert change(unchanged[0]) != unchanged[0]
    assert said in refusal(glb(change, tmp_path / "a.glb"), read=read_mesh)


def test_a_mesh_without_faces_says_so(save) -> None:
    for name in ("little.ply", "normals.off", "plain.obj"):
        data = {**FILES, **SURFACES}[name]
        data = data.replace(b"60 1 0", b"60 0 0") if name.endswith("off") else re.sub(rb"f [^\n]*\n", b"", data)
        assert "no faces" in refusal(save(name, data), read=read_mesh)


# Files of other systems and other countries


@pytest.mark.parametrize(
    "name", ["plain.xyz", "names.csv", "count.pts", "paired.obj", "normals.off", "text.ply", "ascii.pcd"]
)
def test_line_ends_may_be_mixed(name, save) -> None:
    lines = FILES[name].split(b"\n")
    last = len(lines) // 2
    mixed = b"\r\n".join(lines[:last]) + b"\n" + b"\n".join(lines[last:])
    if name not in ("text.ply", "ascii.pcd"):  # their headers and rows are parted by their own line ends
        mixed = b"\r".join(mixed.split(b"\n", 9))
    np.testing.assert_array_equal(read_cloud(save(name, mixed)).points, POINTS)


@pytest.mark.parametrize(
    "rows",
    [
        "1,5 2,5 3,5",
        "1,5\t2,5\t3,5",
        "1,5, 2,5, 3,5",
        "x y z\n1,5 2,5 3,5",
        "x,y,z\n1,5,2,5,3,5",
        "-1,5 2 3,5e-3 0 0 1",
    ],
)
def test_decimal_commas_are_refused_where_they_could_be_taken_for_separators(rows, save) -> None:
    assert "decimal commas" in refusal(save("a.csv", "\n".join([rows, *rows.split("\n")[-1:] * 60]).encode()))


@pytest.mark.parametrize("rows", ["1.5,2.5,3.5", "1.5, 2.5, 3.5", "1,5;2,5;3,5", "1.5;2.5;3.5", '"1,5";"2,5";"3,5"'])
def test_commas_that_can_mean_one_thing_alone_are_read(rows, save) -> None:
    cloud = read_cloud(save("a.csv", "\n".join([rows] * 60).encode()))
    np.testing.assert_array_equal(cloud.points, np.tile([1.5, 2.5, 3.5], (60, 1)))


def test_integers_between_commas_are_coordinates(save) -> None:
    for row in ("1,2,3", "1, 2, 3"):
        np.testing.assert_array_equal(read_cloud(save("a.xyz", "\n".join([row] * 60).encode())).points[7], [1, 2, 3])


@pytest.mark.parametrize("name", ["plain.xyz", "names.csv", "semicolons.csv", "paired.obj", "normals.off"])
def test_a_byte_order_mark_is_no_obstacle(name, save) -> None:
    np.testing.assert_array_equal(read_cloud(save(name, b"\xef\xbb\xbf" + FILES[name])).points, POINTS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "name", ["plain.xyz", "names.csv", "paired.obj", "normals.off", "text.ply", "ascii.pcd", "text.stl"]
)
def test_text_in_sixteen_bits_is_refused_on_one_line(name, encoding, save) -> None:
    data = {**FILES, **SURFACES}[name]
    said = refusal(save(name, data.decode().encode(encoding)))
    if encoding == "utf-16" and name.endswith(("xyz", "csv", "obj", "off")):
        assert "UTF-16; save it as UTF-8" in said


# Numbers that are unusual


def whole(kind: type) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 100, (300, 3)).astype(kind)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_integer_coordinates_are_the_same_numbers(kind, save) -> None:
    table = whole(kind)
    files = {"a.npy": npy(table), "a.npz": npz(points=table, normals=table), "a.xyz": rows_of(table)}
    if kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32):
        name = {"i": "", "u": "u"}[table.dtype.kind] + {1: "char", 2: "short", 4: "int"}[table.itemsize]
        head = ply_header("binary_little_endian", *vertex(name, "x y z", 300))
        files["a.ply"] = head + table.astype(table.dtype.newbyteorder("<")).tobytes()
    letter, size = table.dtype.kind.upper(), table.itemsize
    files["a.pcd"] = (
        f"FIELDS x y z\nSIZE {size} {size} {size}\nTYPE {letter} {letter} {letter}\nPOINTS 300\nDATA binary\n".encode()
        + table.tobytes()
    )
    for name, data in files.items():
        cloud = read_cloud(save(name, data))
        np.testing.assert_array_equal(cloud.points, table)
        assert cloud.points.dtype == np.float64


def rows_of(table: np.ndarray) -> bytes:
    return b"".join(b"%d %d %d\n" % tuple(row) for row in table.tolist())


def test_a_million_points_at_two_thousand_places_are_two_thousand_points(save) -> None:
    few = sphere(2000)
    table = np.hstack([few.points, few.normals])[np.random.default_rng(0).integers(0, 2000, 1_000_000)]
    start = time.process_time()
    cloud, strays, outliers = prepare(read_cloud(save("a.npy", npy(table))))
    assert time.process_time() - start < 10
    assert (strays, outliers) == (0, 0)
    good = validate(cloud)
    assert len(good.points) == 2000
    np.testing.assert_allclose(good.normals, good.points, atol=1e-12)


def test_a_million_times_the_same_point_is_refused(save) -> None:
    cloud = read_cloud(save("a.npy", npy(np.tile([1.0, 2.0, 3.0, 0.0, 0.0, 1.0], (1_000_000, 1)))))
    with pytest.raises(CloudError, match="only 1 different positions among 1000000 points"):
        validate(prepare(cloud)[0])


@pytest.mark.parametrize("name", ["a.ply", "a.xyz", "a.npy"])
def test_one_stray_at_1e30_is_left_out(name, save) -> None:
    ball = sphere(2000)
    table = np.vstack([np.hstack([ball.points, ball.normals]), [1e30, 0, 0, 1, 0, 0]])
    files = {
        "a.ply": lambda: binary_ply(table=table),
        "a.xyz": lambda: b"".join(b"%r %r %r %r %r %r\n" % tuple(row) for row in table.tolist()),
        "a.npy": lambda: npy(table),
    }
    cloud, strays = drop_strays(read_cloud(save(name, files[name]())))
    assert strays == 1
    np.testing.assert_array_equal(validate(cloud).points, ball.points)
    assert Frame.around(cloud.points).scale == pytest.approx(0.9, rel=0.01)


def test_denormal_normals_become_unit_vectors_and_denormal_coordinates_are_refused(save) -> None:
    tiny = 5e-324
    signs = np.sign(NORMALS)
    cloud = validate(read_cloud(save("a.npy", npy(np.hstack([POINTS, tiny * signs])))))
    np.testing.assert_allclose(cloud.normals, signs / np.sqrt(3), rtol=1e-12)
    small = np.hstack([POINTS * 1e-310, NORMALS])
    for name, data in {
        "b.npy": npy(small),
        "b.xyz": b"".join(b"%r %r %r %r %r %r\n" % tuple(row) for row in small.tolist()),
        "b.ply": binary_ply(table=small),
    }.items():
        read = read_cloud(save(name, data))
        np.testing.assert_array_equal(read.points, POINTS * 1e-310)
        with pytest.raises(CloudError, match="all points lie within"):
            validate(prepare(read)[0])


def test_denormals_among_ordinary_coordinates_are_zeros_to_the_frame(save) -> None:
    table = np.vstack([BOTH, [5e-324, -5e-324, 1e-310, 0, 0, 1]])
    cloud = validate(prepare(read_cloud(save("a.npy", npy(table))))[0])
    unit = Frame.around(cloud.points).to_unit(cloud.points)
    assert np.isfinite(unit).all()


FAR = np.array([1e7, -1e7, 1e7])
"""Ten thousand kilometres: float32 has steps of a metre there."""


def far_files(cloud: PointCloud, folder: Path) -> dict[str, Path]:
    """A cloud at FAR in every way in which a file can keep its millimetres."""
    table = np.hstack([cloud.points + FAR, cloud.normals])
    text = b"".join(b"%.6f %.6f %.6f %.6f %.6f %.6f\n" % tuple(row) for row in table.tolist())
    files = {
        "a.ply": binary_ply(table=table),
        "b.ply": ply_header("ascii", *vertex("double", "x y z nx ny nz", len(table))) + text,
        "a.xyz": text,
        "a.csv": b"x;y;z;nx;ny;nz\n" + text.replace(b" ", b";").replace(b".", b","),
        "a.npy": npy(table),
        "a.npz": npz(points=table[:, :3], normals=table[:, 3:]),
        "a.pcd": b"FIELDS x y z normal_x normal_y normal_z\nSIZE 8 8 8 8 8 8\nTYPE F F F F F F\n"
        + b"POINTS %d\nDATA binary\n" % len(table)
        + table.tobytes(),
    }
    paths = {name: folder / name for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    if len(table) == 60:
        paths["a.las"] = las_file(folder / "a.las", table[:, :3])
    return paths


def test_millimetres_at_ten_thousand_kilometres_come_through_every_reader_and_into_the_frame(tmp_path) -> None:
    near = validate(PointCloud(points=POINTS, normals=NORMALS))
    expected = Frame.around(near.points).to_unit(near.points)
    for name, path in far_files(near, tmp_path).items():
        cloud = validate(prepare(read_cloud(path))[0])
        step = 1e-4 if name == "a.las" else 2e-6
        np.testing.assert_allclose(cloud.points - FAR, POINTS, rtol=0, atol=step, err_msg=name)
        unit = Frame.around(cloud.points).to_unit(cloud.points).astype(np.float32)
        np.testing.assert_allclose(unit, expected, rtol=0, atol=step, err_msg=name)


@pytest.mark.slow
def test_a_mesh_at_ten_thousand_kilometres_is_as_exact_as_one_at_the_origin(tmp_path) -> None:
    """A ball of half a metre, from its file to the file of its mesh, by way of the draft preset."""
    ball = even_sphere(4000)
    near = PointCloud(points=0.5 * ball.points, normals=ball.normals)
    errors = {}
    for where in (np.zeros(3), FAR):
        write_ply(tmp_path / "a.ply", near.points + where, normals=near.normals)
        cloud, _, _ = prepare(read_cloud(tmp_path / "a.ply"))
        np.testing.assert_allclose(cloud.points - where, near.points, rtol=0, atol=5e-8)
        made = reconstruct(cloud, preset="draft", device="cpu")
        for extension in ("ply", "obj", "off"):
            write_mesh(made.mesh, tmp_path / f"mesh.{extension}")
            mesh = read_mesh(tmp_path / f"mesh.{extension}")
            off = np.abs(np.linalg.norm(mesh.vertices - where, axis=1) - 0.5)
            errors[extension, bool(where.any())] = float(off.max())
    assert max(errors.values()) < 1e-3
    for extension in ("ply", "obj", "off"):
        assert errors[extension, True] < 2 * errors[extension, False] + 1e-6
