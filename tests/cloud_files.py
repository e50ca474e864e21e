"""Small files of every format, built as other programs write them; what they hold is POINTS, NORMALS or a surface."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(60, 3))
NORMALS = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
BOTH = np.hstack([POINTS, NORMALS])
COLORS = np.random.default_rng(1).integers(0, 256, (60, 3), dtype=np.uint8)
ROWS = b"".join(b"%r %r %r %r %r %r\n" % tuple(row) for row in BOTH.tolist())
UTM = np.array([412345.678, 5512345.678, 123.456])


def ply_header(encoding: str, *lines: str) -> bytes:
    return "\n".join(["ply", f"format {encoding} 1.0", *lines, "end_header", ""]).encode()


def vertex(kind: str, names: str, count: int = 60) -> list[str]:
    return [f"element vertex {count}", *(f"property {kind} {name}" for name in names.split())]


def binary_ply(order: str = "<", kind: str = "double", table: np.ndarray = BOTH) -> bytes:
    encoding = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    code = {"double": "f8", "float": "f4", "int": "i4"}[kind]
    names = "x y z" if table.shape[1] == 3 else "x y z nx ny nz"
    return ply_header(encoding, *vertex(kind, names, len(table))) + table.astype(order + code).tobytes()


def list_ply(order: str = ">") -> bytes:
    """Faces of three and four corners before the vertices, and vertices with lists of their own."""
    encoding = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    faces = ["element face 5", "property list uchar int vertex_indices"]
    lists = [*vertex("double", "x y z nx ny nz"), "property list uchar float q"]
    data = ply_header(encoding, *faces, *lists)
    for i in range(5):
        data += struct.pack(f"{order}B{3 + i % 2}i", 3 + i % 2, *range(3 + i % 2))
    for i, row in enumerate(BOTH):
        data += struct.pack(f"{order}6dB{i % 3}f", *row, i % 3, *range(i % 3))
    return data


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def lzf_packed(data: bytes) -> bytes:
    """Literal runs, and a copy wherever the last eight bytes repeat."""
    out, at, literal = bytearray(), 0, bytearray()

    def flush() -> None:
        for start in range(0, len(literal), 32):
            run = literal[start : start + 32]
            out.append(len(run) - 1)
            out.extend(run)
        literal.clear()

    while at < len(data):
        if at >= 8 and data[at : at + 8] == data[at - 8 : at]:
            flush()
            out.extend([(6 << 5) | 0, 7])
            at += 8
        else:
            literal.append(data[at])
            at += 1
    flush()
    return bytes(out)


PCD = (
    b"# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb normal_x normal_y normal_z\nSIZE 8 8 8 4 8 8 8\nTYPE F F F U F F F\n"
    b"COUNT 1 1 1 1 1 1 1\nWIDTH 60\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 60\nDATA "
)


def pcd(encoding: str) -> bytes:
    if encoding == "ascii":
        rows = (b"%r %r %r 255 %r %r %r\n" % tuple(row) for row in BOTH.tolist())
        return PCD + b"ascii\n" + b"".join(rows)
    colours = np.full(60, 255, dtype="<u4")
    if encoding == "binary":
        rows = b"".join(struct.pack("<3dI3d", *row[:3], 255, *row[3:]) for row in BOTH)
        return PCD + b"binary\n" + rows
    columns = [BOTH[:, 0], BOTH[:, 1], BOTH[:, 2], colours, BOTH[:, 3], BOTH[:, 4], BOTH[:, 5]]
    plain = b"".join(column.tobytes() for column in columns)
    packed = lzf_packed(plain)
    return PCD + b"binary_compressed\n" + struct.pack("<II", len(packed), len(plain)) + packed


def octahedron() -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float64)
    faces = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    return vertices, np.array(faces)


def binary_stl() -> bytes:
    vertices, faces = octahedron()
    return (
        bytes(80)
        + struct.pack("<I", 8)
        + b"".join(struct.pack("<12fH", 0, 0, 0, *vertices[f].ravel(), 0) for f in faces)
    )


def text_stl() -> bytes:
    vertices, faces = octahedron()
    facet = "facet normal 0 0 0\nouter loop\n" + "vertex %r %r %r\n" * 3 + "endloop\nendfacet\n"
    return ("solid o\n" + "".join(facet % tuple(vertices[f].ravel().tolist()) for f in faces) + "endsolid o\n").encode()


def obj(normals: str = "//") -> bytes:
    rows = (b"v %r %r %r\nvn %r %r %r\n" % tuple(row) for row in BOTH.tolist())
    faces = b"".join(b"f %d//%d %d//%d %d//%d\n" % (i, i, i + 1, i + 1, i + 2, i + 2) for i in range(1, 59))
    return b"# a comment\n" + b"".join(rows) + (faces if normals else b"")


NOFF = b"NOFF # normals\n60 1 0\n" + ROWS + b"3 0 1 2\n"
CSV = b"nx,id,Y,X,nz,Z,ny\n" + b"".join(
    b"%r,7,%r,%r,%r,%r,%r\n" % (q, y, x, s, z, r) for x, y, z, q, r, s in BOTH.tolist()
)

FILES: dict[str, bytes] = {
    "little.ply": binary_ply("<"),
    "big.ply": binary_ply(">"),
    "text.ply": ply_header("ascii", *vertex("double", "x y z nx ny nz")) + ROWS,
    "lists.ply": list_ply(),
    "plain.xyz": ROWS,
    "count.pts": b"60\n" + ROWS,
    "tabs.txt": b"# x y z nx ny nz\n\n" + ROWS.replace(b" ", b"\t"),
    "names.csv": CSV,
    "semicolons.csv": b"x;y;z;nx;ny;nz\n" + ROWS.replace(b" ", b";").replace(b".", b","),
    "table.npy": npy(BOTH),
    "named.npz": npz(points=POINTS, normals=NORMALS),
    "ascii.pcd": pcd("ascii"),
    "binary.pcd": pcd("binary"),
    "compressed.pcd": pcd("binary_compressed"),
    "paired.obj": obj(),
    "normals.off": NOFF,
}


def rows_of(*columns: np.ndarray) -> bytes:
    """A line for each row of the columns side by side, in as many digits as it takes."""
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return b"".join(b" ".join(b"%r" % value for part in row for value in part) + b"\n" for row in rows)


def colored_ply(kind: str, code: str, colors: np.ndarray) -> bytes:
    """Points, colours of a type, and normals behind them."""
    names = [*vertex("double", "x y z"), *vertex(kind, "red green blue")[1:], *vertex("float", "nx ny nz")[1:]]
    row = np.dtype([("p", "<f8", 3), ("c", code, 3), ("n", "<f4", 3)])
    table = np.zeros(60, row)
    table["p"], table["c"], table["n"] = POINTS, colors, NORMALS
    return ply_header("binary_little_endian", *names) + table.tobytes()


def colored_pcd(encoding: str, kind: str) -> bytes:
    """The PCD above with colours packed into a field of that type, as PCL does."""
    header = PCD.replace(b"TYPE F F F U", b"TYPE F F F " + kind.encode())
    wide = COLORS.astype("<u4")
    bits = wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2]
    if encoding == "ascii":
        numbers = bits.view("<f4") if kind == "F" else bits
        rows = zip(POINTS.tolist(), numbers.tolist(), NORMALS.tolist(), strict=True)
        return header + b"ascii\n" + b"".join(b"%r %r %r %r %r %r %r\n" % (*p, c, *n) for p, c, n in rows)
    plain = b"".join(column.tobytes() for column in (*POINTS.T, bits, *NORMALS.T))
    packed = lzf_packed(plain)
    if encoding == "binary_compressed":
        return header + b"binary_compressed\n" + struct.pack("<II", len(packed), len(plain)) + packed
    rows = zip(POINTS.tolist(), bits.tolist(), NORMALS.tolist(), strict=True)
    return header + b"binary\n" + b"".join(struct.pack("<3dI3d", *p, c, *n) for p, c, n in rows)


SHARES = np.round(COLORS / 255, 6)
PTS = np.linspace(-2000, 2000, 60).round()[:, None]
"""Intensities as PTS has them."""
NAMED = np.zeros(60, [*((name, "f8") for name in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))])
for _names, _values in (("xyz", POINTS), (("red", "green", "blue"), COLORS)):
    for _i, _name in enumerate(_names):
        NAMED[_name] = _values[:, _i]

COLORED: dict[str, bytes] = {
    "bytes.ply": colored_ply("uchar", "u1", COLORS),
    "words.ply": colored_ply("ushort", "<u2", COLORS * np.uint16(257)),
    "bytes_in_words.ply": colored_ply("ushort", "<u2", COLORS),
    "shares.ply": colored_ply("float", "<f4", SHARES),
    "floats.ply": colored_ply("double", "<f8", COLORS),
    "diffuse.ply": colored_ply("uchar", "u1", COLORS).replace(b"uchar ", b"uchar diffuse_"),
    "text.ply": ply_header("ascii", *vertex("double", "x y z"), *vertex("uchar", "red green blue alpha")[1:])
    + rows_of(POINTS, COLORS, np.full((60, 1), 255)),
    "float.pcd": colored_pcd("ascii", "F"),
    "whole.pcd": colored_pcd("ascii", "U"),
    "binary.pcd": colored_pcd("binary", "F"),
    "compressed.pcd": colored_pcd("binary_compressed", "U"),
    "rgba.pcd": colored_pcd("binary", "U").replace(b" rgb ", b" rgba "),
    "six.xyz": rows_of(POINTS, COLORS),
    "shares.xyz": rows_of(POINTS, SHARES),
    "nine.txt": rows_of(POINTS, COLORS, NORMALS),
    "behind.txt": rows_of(POINTS, NORMALS, COLORS),
    "seven.pts": b"60\n" + rows_of(POINTS, PTS, COLORS),
    "ten.pts": b"60\n" + rows_of(POINTS, PTS, COLORS, NORMALS),
    "names.csv": b"X,Y,Z,R,G,B,scalar\n" + rows_of(POINTS, COLORS, PTS).replace(b" ", b","),
    "words.csv": b"x,y,z,nx,ny,nz,red,green,blue\n"
    + rows_of(POINTS, NORMALS, COLORS * np.uint16(256)).replace(b" ", b","),
    "colors.npz": npz(points=POINTS, normals=NORMALS, colors=COLORS),
    "rgba.npz": npz(points=POINTS, rgb=np.hstack([SHARES, np.ones((60, 1))])),
    "six.npy": npy(np.hstack([POINTS, COLORS])),
    "named.npy": npy(NAMED),
    "colors.obj": b"".join(b"v " + line + b"\n" for line in rows_of(POINTS, SHARES).splitlines()) + b"f 1 2 3\n",
    "bytes.obj": b"".join(b"v " + line + b"\n" for line in rows_of(POINTS, COLORS).splitlines()),
    "colors.off": b"COFF\n60 1 0\n" + rows_of(POINTS, COLORS, np.full((60, 1), 255)) + b"3 0 1 2\n",
    "normals.off": b"CNOFF\n60 1 0\n" + rows_of(POINTS, NORMALS, SHARES, np.ones((60, 1))) + b"3 0 1 2\n",
}
"""Files that hold POINTS and COLORS, the latter however their format has them; some hold NORMALS."""
SURFACES = {
    "binary.stl": binary_stl(),
    "text.stl": text_stl(),
    "plain.off": b"OFF\n6 8 0\n"
    + b"".join(b"%r %r %r\n" % tuple(v) for v in octahedron()[0].tolist())
    + b"".join(b"3 %d %d %d\n" % tuple(f) for f in octahedron()[1].tolist()),
    "plain.obj": b"".join(b"v %r %r %r\n" % tuple(v) for v in octahedron()[0].tolist())
    + b"".join(b"f %d/1 %d/1 %d/1\n" % tuple(f) for f in (octahedron()[1] + 1).tolist()),
    "backwards.obj": b"".join(b"v %r %r %r\n" % tuple(v) for v in octahedron()[0].tolist())
    + b"".join(b"f %d %d %d\n" % tuple(f) for f in (octahedron()[1] - 6).tolist()),
    "faces.ply": ply_header(
        "ascii", *vertex("float", "x y z", 6), "element face 8", "property list uchar int vertex_index"
    )
    + b"".join(b"%r %r %r\n" % tuple(v) for v in octahedron()[0].tolist())
    + b"".join(b"3 %d %d %d\n" % tuple(f) for f in octahedron()[1].tolist()),
}


def las_file(path: Path, points: np.ndarray = POINTS, colors: np.ndarray | None = None) -> Path:
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = [1e-4] * 3, np.floor(points.min(axis=0))
    names = ("NormalX", "NormalY", "NormalZ")
    header.add_extra_dims([laspy.ExtraBytesParams(name, np.float64) for name in names])
    las = laspy.LasData(header)
    las.x, las.y, las.z = points.T
    for i, name in enumerate(names):
        las[name] = NORMALS[:, i]
    if colors is not None:
        las.red, las.green, las.blue = colors.T
    las.write(str(path))
    return path


def e57_file(path: Path) -> Path:
    pye57 = pytest.importorskip("pye57")
    with pye57.E57(str(path), mode="w") as file:
        turn = np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])  # a quarter about z
        for translation in (np.zeros(3), UTM):
            data = {f"cartesian{axis}": POINTS[:, i].copy() for i, axis in enumerate("XYZ")}
            file.write_scan_raw(data, rotation=turn, translation=translation)
    return path


def e57_files(folder: Path) -> list[bytes]:
    """Positions as floats, doubles, scaled integers and angles; with states, normals and intensities."""
    pye57 = pytest.importorskip("pye57")
    lib = pye57.libe57
    radius = np.linalg.norm(POINTS, axis=1)
    spherical = [radius, np.arctan2(POINTS[:, 1], POINTS[:, 0]), np.arcsin(POINTS[:, 2] / radius)]
    cartesian = ["cartesianX", "cartesianY", "cartesianZ"]
    single, double, scaled = (
        lambda f: lib.FloatNode(f, 0.0, lib.E57_SINGLE),
        lambda f: lib.FloatNode(f, 0.0, lib.E57_DOUBLE),
        lambda f: lib.ScaledIntegerNode(f, 0, -(10**7), 10**7, 1e-6, 0.0),
    )
    layouts = [
        [*((name, double, column) for name, column in zip(cartesian, POINTS.T, strict=True)),
         *((f"nor:normal{axis}", single, column) for axis, column in zip("XYZ", NORMALS.T, strict=True))],
        [*((name, scaled, column) for name, column in zip(cartesian, POINTS.T, strict=True)),
         ("cartesianInvalidState", lambda f: lib.IntegerNode(f, 0, 0, 2), np.arange(60) % 3 // 2)],
        [*((f"spherical{name}", double, column)
           for name, column in zip(("Range", "Azimuth", "Elevation"), spherical, strict=True)),
         ("intensity", single, radius)],
        colored_layout(),
    ]  # fmt: skip
    return [e57_file(folder / "whole.e57").read_bytes(), *(e57_of(folder / "layout.e57", one) for one in layouts)]


def colored_layout() -> list:
    """Positions, colours of 8 bits and states."""
    lib = pytest.importorskip("pye57").libe57
    cartesian = zip(("cartesianX", "cartesianY", "cartesianZ"), POINTS.T, strict=True)
    colors = zip(("colorRed", "colorGreen", "colorBlue"), COLORS.T, strict=True)
    return [
        *((name, lambda f: lib.FloatNode(f, 0.0, lib.E57_DOUBLE), column) for name, column in cartesian),
        *((name, lambda f: lib.IntegerNode(f, 0, 0, 255), column) for name, column in colors),
    ]


def e57_of(path: Path, layout: list, count: int = 60) -> bytes:
    """One scan of the fields of a layout: their names, their nodes, and their values (count,)."""
    pye57 = pytest.importorskip("pye57")
    lib = pye57.libe57
    with pye57.E57(str(path), mode="w") as file:
        image = file.image_file
        if any(name.startswith("nor:") for name, _, _ in layout):
            image.extensionsAdd("nor", "http://www.libe57.org/E57_NOR_surface_normals.txt")
        prototype = lib.StructureNode(image)
        buffers = lib.VectorSourceDestBuffer()
        columns = [np.ascontiguousarray(values, dtype=np.float64) for _, _, values in layout]
        for (name, node, _), column in zip(layout, columns, strict=True):
            prototype.set(name, node(image))
            buffers.append(lib.SourceDestBuffer(image, name, column, count, True, True))
        scan = lib.StructureNode(image)
        file.data3d.append(scan)
        scan.set("guid", lib.StringNode(image, "{0}"))
        points = lib.CompressedVectorNode(image, prototype, lib.VectorNode(image, True))
        scan.set("points", points)
        writer = points.writer(buffers)
        writer.write(count)
        writer.close()
    return path.read_bytes()
