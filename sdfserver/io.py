"""Cloud and mesh files <-> arrays.

World frame throughout: coordinates are kept as float64 exactly as the file has them; nothing is centred or scaled.
The extension decides the format. A file is never trusted: what its header promises is compared with the bytes that
are there before anything is allocated for it. Whatever is wrong with a cloud's file is one line of CloudFormatError.
A surface given as a cloud (PLY, OBJ, OFF or STL with faces) whose vertices carry no normals gets the area-weighted
normals of its faces. Meshes are written to a temporary file beside the target, which then takes its place.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudError, CloudFormatError
from sdfserver.files import MESH_FORMATS as MESH_FORMATS
from sdfserver.files import known_extension, open_cloud, printable, reason, replacing
from sdfserver.formats.arrays import read_npy, read_npz
from sdfserver.formats.common import Colors, Floats
from sdfserver.formats.glb import CONFIDENCE, light_of, read_glb, trimesh_package
from sdfserver.formats.pcd import read_pcd
from sdfserver.formats.ply import ply_chunks, ply_surface, read_ply
from sdfserver.formats.scans import read_e57, read_las
from sdfserver.formats.surfaces import (
    Surface,
    area_normals,
    obj_surface,
    off_surface,
    read_obj,
    read_off,
    read_stl,
    stl_size,
    stl_surface,
)
from sdfserver.formats.text import read_text
from sdfserver.mesh import TriangleMesh

_ROWS_PER_WRITE = 100_000
_FLOAT32_LOSS = 1e-6
"""The rounding, as a share of the diagonal, above which a mesh is written with float64 coordinates."""


def read_cloud(path: str | os.PathLike[str]) -> PointCloud:
    """The points of a cloud's file, their normals and their colours; normals or colors are None where it has none.

    Coordinates and normals are as the file has them, colours as `formats.common.byte_colors` makes bytes of them.
    Every format of CLOUD_FORMATS; LAS, LAZ and E57 need an extra. Rows of a PCD whose x, y and z are all NaN, and
    points that an E57 marks invalid, are the format's way to say that nothing was measured: they are left out.

    Raises CloudError where the file cannot be opened, CloudFormatError where it is not what it says it is, and
    MissingDependencyError where its format needs a package that is not installed.
    """
    path = Path(path)
    extension = path.suffix[1:].lower()
    name = printable(path.name)
    if extension not in CLOUD_FORMATS:
        known = ", ".join(CLOUD_FORMATS)
        raise CloudFormatError(f"{name}: '.{printable(extension)}' is not a known cloud format; use one of {known}")
    data = _file_bytes(path)
    try:
        _refuse_other_kind(data, extension)
        with np.errstate(all="ignore"):  # a damaged file's numbers may be anything; validate looks at them
            cloud = read_e57(data, path) if extension == "e57" else _READERS[extension](data)
        if not len(cloud.points):
            raise CloudFormatError("it holds no points; export the cloud again")
        return cloud
    except CloudFormatError as error:
        raise CloudFormatError(f"{name}: {error}") from None


def stream_cloud(path: str | os.PathLike[str], rows: int = 1_000_000) -> Iterator[PointCloud]:
    """The cloud of a file, `rows` points at a time: of a binary PLY without the whole of it ever in memory.

    Other formats are read as a whole and then parted. Raises as read_cloud does.
    """
    path = Path(path)
    chunks = None
    if path.suffix.lower() == ".ply":
        open_cloud(path).close()
        try:
            chunks = ply_chunks(path, rows)
        except CloudFormatError as error:
            raise CloudFormatError(f"{printable(path.name)}: {error}") from None
    if chunks is None:
        cloud = read_cloud(path)
        for start in range(0, len(cloud.points), rows):
            yield cloud.take(slice(start, start + rows))
    else:
        yield from chunks


def read_mesh(path: str | os.PathLike[str]) -> TriangleMesh:
    """The mesh of a file in one of MESH_FORMATS, vertices in file order and world units; polygons become triangles.

    Normals are those that the file has for all vertices, as long as they are there, or None; so are colours, and the
    confidence of PLY and GLB. STL has three vertices for each triangle. GLB is read through trimesh, alone: what it
    refers to outside of the file is not looked at.

    Raises as read_cloud does.
    """
    path = Path(path)
    extension, name = path.suffix[1:].lower(), printable(path.name)
    if extension not in MESH_FORMATS:
        known = ", ".join(MESH_FORMATS)
        raise CloudFormatError(f"{name}: '.{printable(extension)}' is not a known mesh format; use one of {known}")
    data = _file_bytes(path)
    try:
        _refuse_other_kind(data, extension)
        with np.errstate(all="ignore"):
            mesh = read_glb(data) if extension == "glb" else _mesh_of(_SURFACES[extension](data))
        if not len(mesh.faces):
            raise CloudFormatError("it holds no faces; export the mesh again")
        return mesh
    except CloudFormatError as error:
        raise CloudFormatError(f"{name}: {error}") from None


def _mesh_of(surface: Surface) -> TriangleMesh:
    normals = None if surface.normals is None else surface.normals.astype(np.float32)
    return TriangleMesh(
        vertices=surface.points,
        faces=surface.triangles(),
        normals=normals,
        colors=surface.colors,
        confidence=surface.confidence,
    )


def write_mesh(mesh: TriangleMesh, path: str | os.PathLike[str]) -> None:
    """Write a mesh in the format of the path's extension: completely, or not at all.

    ply: binary, with normals; float32 coordinates unless they would lose more than a millionth of the diagonal.
    obj, with normals, and off, without: text with as many digits as the position needs. glb: float32 with normals;
    far from the origin relative to the node's translation, so that the position is kept. stl: float32 by its
    definition, so that far from the origin it rounds (to 0.5 m at UTM northings); choose another format there.

    Colours, where there are any: ply red, green and blue, bytes; obj behind the coordinates, 0 to 1; off becomes coff;
    glb as COLOR_0, converted to shares of light, as glTF has them; stl has no room. Confidence, where there is any: ply
    as the float property `confidence`, glb as the attribute `_CONFIDENCE`.

    Raises OutputError where the file cannot be written, MissingDependencyError for glb without trimesh.
    """
    write = _WRITERS[known_extension(Path(path))]
    with replacing(path) as stream:
        write(mesh, stream)


def write_ply(
    path: str | os.PathLike[str],
    points: Floats,
    *,
    normals: NDArray[Any] | None = None,
    colors: Colors | None = None,
    faces: NDArray[np.int64] | None = None,
    **values: NDArray[Any] | None,
) -> None:
    """Write points (n, 3) as binary PLY, with what else is known of them: completely, or not at all.

    normals: (n, 3). colors: (n, 3) uint8. faces: (f, 3) rows of `points`. values: float32 columns (n,), by the name of
    their property; those that are None are left out.

    Raises OutputError where the file cannot be written.
    """
    with replacing(path) as stream:
        _ply(stream, points, normals, colors, faces, **values)


# Reading


def _file_bytes(path: Path) -> bytes:
    with open_cloud(path) as stream:
        try:
            return stream.read()
        except OSError as error:
            raise CloudError(f"{printable(str(path))} cannot be read: {reason(error)}") from None


_MAGIC: tuple[tuple[re.Pattern[bytes], str, tuple[str, ...]], ...] = (
    (re.compile(rb"ply[\r\n]"), "a PLY file", ("ply",)),
    (re.compile(rb"\x93NUMPY"), "an NPY file", ("npy",)),
    (re.compile(rb"PK\x03\x04"), "a zip archive", ("npz",)),
    (re.compile(rb"LASF"), "a LAS file", ("las", "laz")),
    (re.compile(rb"ASTM-E57"), "an E57 file", ("e57",)),
    (re.compile(rb"(# )?\.PCD|VERSION \.?\d"), "a PCD file", ("pcd",)),
    (re.compile(rb"(ST)?C?N?OFF\s"), "an OFF file", ("off",)),
    (re.compile(rb"glTF"), "a GLB file", ("glb",)),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", ()),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page or XML", ()),
)


def _refuse_other_kind(data: bytes, extension: str) -> None:
    for pattern, kind, extensions in _MAGIC:
        if not pattern.match(data) or extension in extensions:
            continue
        if extension == "stl" and len(data) >= 84 and len(data) == stl_size(data):
            continue  # the first 80 bytes of a binary STL are free text
        remedy = f"rename it to end in .{extensions[0]}" if extensions else "export or unpack the cloud again"
        raise CloudFormatError(f"the file is {kind}, not {extension.upper()}; {remedy}")


_READERS: dict[str, Callable[[bytes], PointCloud]] = {
    "ply": read_ply,
    **dict.fromkeys(("xyz", "xyzn", "pts", "txt", "asc", "csv"), read_text),
    "npy": read_npy,
    "npz": read_npz,
    "pcd": read_pcd,
    "obj": read_obj,
    "off": read_off,
    "stl": read_stl,
    **dict.fromkeys(("las", "laz"), read_las),
}

_SURFACES: dict[str, Callable[[bytes], Surface]] = {
    "ply": ply_surface,
    "obj": obj_surface,
    "off": off_surface,
    "stl": stl_surface,
}

CLOUD_FORMATS: tuple[str, ...] = (*_READERS, "e57")
"""The extensions, without their dot, that read_cloud knows."""


# Writing


def _float32_keeps(vertices: Floats) -> bool:
    if not len(vertices):
        return True
    diagonal = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    with np.errstate(over="ignore"):
        loss = np.abs(vertices - vertices.astype(np.float32)).max()
    return bool(loss <= _FLOAT32_LOSS * diagonal)


def _write_ply(mesh: TriangleMesh, stream: BinaryIO) -> None:
    _ply(stream, mesh.vertices, mesh.normals, mesh.colors, mesh.faces, confidence=mesh.confidence)


def _ply(
    stream: BinaryIO,
    points: Floats,
    normals: NDArray[Any] | None,
    colors: Colors | None,
    corners: NDArray[np.int64] | None,
    **values: NDArray[Any] | None,
) -> None:
    real, code = ("float", "<f4") if _float32_keeps(points) else ("double", "<f8")
    columns: dict[str, tuple[str, str, NDArray[Any]]] = {
        axis: (real, code, points[:, i]) for i, axis in enumerate("xyz")
    }
    if normals is not None:
        columns |= {name: ("float", "<f4", normals[:, i]) for i, name in enumerate(("nx", "ny", "nz"))}
    if colors is not None:
        columns |= {name: ("uchar", "u1", colors[:, i]) for i, name in enumerate(("red", "green", "blue"))}
    columns |= {name: ("float", "<f4", value) for name, value in values.items() if value is not None}
    vertices = np.empty(len(points), dtype=np.dtype([(name, code) for name, (_, code, _) in columns.items()]))
    for name, (_, _, column) in columns.items():
        vertices[name] = column
    properties = [f"property {kind} {name}" for name, (kind, _, _) in columns.items()]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *properties]
    if corners is not None:
        header += [f"element face {len(corners)}", "property list uchar int vertex_indices"]
    stream.write("\n".join([*header, "end_header", ""]).encode("ascii"))
    stream.write(vertices.tobytes())
    if corners is not None:
        faces = np.empty(len(corners), dtype=np.dtype([("size", "u1"), ("corners", "<i4", 3)]))
        faces["size"] = 3
        faces["corners"] = corners
        stream.write(faces.tobytes())


def _digits(vertices: Floats) -> int:
    """Significant digits that keep a billionth of the diagonal, and never fewer than float32 has."""
    if not len(vertices):
        return 9
    largest, diagonal = float(np.abs(vertices).max()), float(np.linalg.norm(np.ptp(vertices, axis=0)))
    if not (largest > 0 and diagonal > 0 and np.isfinite(largest / diagonal)):
        return 17
    return int(np.clip(np.ceil(np.log10(largest / diagonal)) + 9, 9, 17))


def _write_rows(stream: BinaryIO, row: str, table: NDArray[Any]) -> None:
    """`row` formatted with each row of the table."""
    for start in range(0, len(table), _ROWS_PER_WRITE):
        part = table[start : start + _ROWS_PER_WRITE]
        stream.write((row * len(part) % tuple(part.reshape(-1).tolist())).encode("ascii"))


def _write_obj(mesh: TriangleMesh, stream: BinaryIO) -> None:
    number = f"%.{_digits(mesh.vertices)}g"
    if mesh.colors is None:
        _write_rows(stream, f"v {number} {number} {number}\n", mesh.vertices)
    else:
        row = f"v {number} {number} {number} %.4g %.4g %.4g\n"
        _write_rows(stream, row, np.hstack([mesh.vertices, mesh.colors / 255]))
    if mesh.normals is None:
        _write_rows(stream, "f %d %d %d\n", mesh.faces + 1)
        return
    _write_rows(stream, "vn %.6g %.6g %.6g\n", mesh.normals)
    _write_rows(stream, "f %d//%d %d//%d %d//%d\n", np.repeat(mesh.faces + 1, 2, axis=1))


def _write_off(mesh: TriangleMesh, stream: BinaryIO) -> None:
    number = f"%.{_digits(mesh.vertices)}g"
    kind = "OFF" if mesh.colors is None else "COFF"
    stream.write(f"{kind}\n{len(mesh.vertices)} {len(mesh.faces)} 0\n".encode("ascii"))
    if mesh.colors is None:
        _write_rows(stream, f"{number} {number} {number}\n", mesh.vertices)
    else:
        row = f"{number} {number} {number} %d %d %d 255\n"
        _write_rows(stream, row, np.hstack([mesh.vertices, mesh.colors]))
    _write_rows(stream, "3 %d %d %d\n", mesh.faces)


def _write_stl(mesh: TriangleMesh, stream: BinaryIO) -> None:
    normals = area_normals(mesh.vertices, mesh.faces)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    facets = np.zeros(len(mesh.faces), dtype=np.dtype([("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")]))
    facets["n"] = np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)
    facets["v"] = mesh.vertices[mesh.faces]
    stream.write(b"binary STL, float32".ljust(80) + struct.pack("<I", len(facets)))
    stream.write(facets.tobytes())


def _write_glb(mesh: TriangleMesh, stream: BinaryIO) -> None:
    trimesh = trimesh_package()
    vertices, transform = mesh.vertices, np.eye(4)
    if not _float32_keeps(vertices):
        transform[:3, 3] = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        vertices = vertices - transform[:3, 3]
    body = trimesh.Trimesh(
        vertices=vertices,
        faces=mesh.faces,
        vertex_normals=None if mesh.normals is None else mesh.normals.astype(np.float64),
        process=False,
    )
    # trimesh writes colours as bytes, too coarse for light in the dark: they go as an attribute, renamed below.
    if mesh.colors is not None:
        body.vertex_attributes[_LIGHT] = light_of(mesh.colors).astype(np.float32)
    if mesh.confidence is not None:
        body.vertex_attributes[CONFIDENCE] = mesh.confidence
    scene = trimesh.Scene()
    scene.add_geometry(body, transform=transform, geom_name="surface")
    stream.write(
        scene.export(file_type="glb", include_normals=mesh.normals is not None, tree_postprocessor=_name_light_as_color)
    )


_LIGHT = "_LIGHT"


def _name_light_as_color(tree: dict[str, Any]) -> None:
    for primitive in (primitive for mesh in tree["meshes"] for primitive in mesh["primitives"]):
        attributes = primitive["attributes"]
        if _LIGHT in attributes:
            attributes["COLOR_0"] = attributes.pop(_LIGHT)


_WRITERS: dict[str, Callable[[TriangleMesh, BinaryIO], None]] = {
    "ply": _write_ply,
    "obj": _write_obj,
    "stl": _write_stl,
    "glb": _write_glb,
    "off": _write_off,
}
