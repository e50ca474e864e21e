"""OBJ, OFF and STL: surfaces whose vertices are taken as a cloud.

Where vertices carry no normals they get the area-weighted normals of their faces, which are wound counter-clockwise
seen from outside.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdfserver.cloud import PointCloud, distinct_rows
from sdfserver.errors import CloudFormatError
from sdfserver.formats.common import Floats, Ints, broken_promise, cloud_of, quote, whole_number
from sdfserver.formats.text import number_table, plain_text


@dataclass(frozen=True, kw_only=True)
class Polygons:
    """Polygons of any size: `corners` holds `sizes[0]` rows of vertices for the first, and so on."""

    sizes: Ints
    corners: Ints


def polygons_of(sizes: Any, corners: Any) -> Polygons:
    """Polygons whose corners are clipped to 62 bits, so that an absurd one is out of range and not an overflow."""
    limit = 2**62
    if isinstance(corners, list):
        corners = [min(max(corner, -limit), limit) for corner in corners]
    with np.errstate(invalid="ignore"):
        return Polygons(sizes=np.asarray(sizes, dtype=np.int64), corners=np.asarray(corners).astype(np.int64))


def surface_cloud(points: Floats, polygons: Polygons) -> PointCloud:
    """Vertices with the area-weighted normals of their polygons."""
    triangles = _fan(polygons)
    if triangles.size and (triangles.min() < 0 or triangles.max() >= len(points)):
        wrong = int(triangles.min()) if triangles.min() < 0 else int(triangles.max())
        raise CloudFormatError(f"a face refers to vertex {wrong}, but there are {len(points)}; export it again")
    normals = _summed(len(points), triangles.reshape(-1), np.repeat(area_normals(points, triangles), 3, axis=0))
    return _with_direction(points, normals)


def _fan(polygons: Polygons) -> Ints:
    """Triangles (t, 3) that cover the polygons, each as a fan around its first corner."""
    fans = np.maximum(polygons.sizes - 2, 0)
    first = np.repeat(np.cumsum(polygons.sizes) - polygons.sizes, fans)
    step = np.arange(len(first)) - np.repeat(np.cumsum(fans) - fans, fans)
    at = np.stack([first, first + step + 1, first + step + 2], axis=1)
    triangles: Ints = polygons.corners[at]
    return triangles


def area_normals(points: Floats, triangles: Ints) -> Floats:
    """Normals (t, 3) as long as twice the area; zero where the corners are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, b, c = (points[triangles[:, i]] for i in range(3))
        normals: Floats = np.cross(b - a, c - a)
    normals[~np.isfinite(normals).all(axis=1)] = 0
    return normals


def _summed(count: int, index: Ints, vectors: Floats) -> Floats:
    return np.stack([np.bincount(index, weights=vectors[:, i], minlength=count) for i in range(3)], axis=1)


def _with_direction(points: Floats, normals: Floats) -> PointCloud:
    """The vertices that have a direction; the others are no part of the surface.

    Unless they are most of the points: then this is a cloud with a few polygons, and has no normals.
    """
    has = np.any(normals != 0, axis=1)
    if 2 * np.count_nonzero(has) < len(points):
        return cloud_of(points, None)
    return cloud_of(points[has], normals[has]) if not has.all() else cloud_of(points, normals)


def read_stl(data: bytes) -> PointCloud:
    """Corners at the same position become one vertex; facet normals follow from the winding, not from the file."""
    is_text = re.match(rb"\s*solid", data) is not None and len(data) != stl_size(data)
    if not is_text and 84 < stl_size(data) <= len(data):
        layout = np.dtype([("n", "<f4", 3), ("v", "<f4", 9), ("a", "<u2")])
        facets = np.frombuffer(data, dtype=layout, offset=84, count=(stl_size(data) - 84) // 50)
        corners = facets["v"].reshape(-1, 3).astype(np.float64)
    elif is_text:
        lines = [line for line in plain_text(data).split(b"\n") if line.lstrip()[:6].lower() == b"vertex"]
        if not lines or len(lines) % 3:
            raise CloudFormatError(f"it has {len(lines)} 'vertex' lines, not three for each facet; export it again")
        if b"endsolid" not in data[-1000:].lower():
            raise CloudFormatError(
                f"it ends with {quote(data[-30:])}, not with 'endsolid'; it is truncated: export it again"
            )
        corners = number_table(lines, columns=(1, 2, 3))
    elif len(data) >= 134:
        promised = int.from_bytes(data[80:84], "little")
        raise broken_promise(promised, (len(data) - 84) // 50, "triangles")
    else:
        raise CloudFormatError(f"it starts with {quote(data[:12])} and has {len(data)} bytes, which is no STL")
    first, vertex = distinct_rows(corners)
    return surface_cloud(corners[first], polygons_of(np.full(len(corners) // 3, 3), vertex))


def stl_size(data: bytes) -> int:
    """How many bytes a binary STL has by its own count."""
    return 84 + 50 * int.from_bytes(data[80:84], "little")


def read_off(data: bytes) -> PointCloud:
    """Vertices of OFF and NOFF, in text, with or without colours and texture coordinates."""
    data = re.sub(rb"#[^\n]*", b"", plain_text(data))
    head = re.match(rb"\s*((?:ST)?C?(N?))OFF(\s+BINARY)?", data)
    if head is None:
        raise CloudFormatError(f"it starts with {quote(data[:12])}, not with OFF or NOFF; check its extension")
    if head[3]:
        raise CloudFormatError("it is a binary OFF; save it as text, or as PLY")
    lines = [line for line in data[head.end() :].split(b"\n") if line.strip()]
    counts = lines[0].split() if lines else []
    if len(counts) < 2:
        raise CloudFormatError(
            f"the line {quote(lines[0] if lines else b'')} does not hold its counts; export it again"
        )
    n_vertices, n_faces = whole_number(counts[0], "its vertex count"), whole_number(counts[1], "its face count")
    if n_vertices + n_faces > len(lines) - 1:
        raise broken_promise(n_vertices + n_faces, len(lines) - 1, "vertices and faces")
    if not n_vertices:
        raise CloudFormatError("it holds no vertices; export it again")
    table = number_table(lines[1 : 1 + n_vertices], columns=range(6 if head[2] else 3))
    if head[2]:
        return cloud_of(table[:, :3], table[:, 3:])
    if not n_faces:
        return cloud_of(table, None)
    faces = lines[1 + n_vertices : 1 + n_vertices + n_faces]
    return surface_cloud(table, _even_off_faces(faces) or _off_faces(faces))


def _even_off_faces(lines: list[bytes]) -> Polygons | None:
    """Faces with as many corners as the first one; None for any others."""
    try:
        table = number_table(lines)
    except CloudFormatError:
        return None  # the general way reads it, or finds the line to quote
    size = int(table[0, 0]) if 0 <= table[0, 0] < table.shape[1] else -1
    corners = table[:, 1 : size + 1]
    if size < 0 or not (table[:, 0] == size).all() or not ((corners >= 0) & (corners == np.floor(corners))).all():
        return None
    return polygons_of(np.full(len(table), size), np.minimum(corners, 2.0**62).reshape(-1))


def _off_faces(lines: list[bytes]) -> Polygons:
    sizes: list[int] = []
    corners: list[int] = []
    for line in lines:
        tokens = line.split()
        size = whole_number(tokens[0], "a face's number of corners")
        if len(tokens) <= size:
            raise CloudFormatError(f"the face {quote(line)} has fewer than {size} corners; export it again")
        sizes.append(size)
        corners.extend(whole_number(token, "a face's corner") for token in tokens[1 : 1 + size])
    return polygons_of(sizes, corners)


def read_obj(data: bytes) -> PointCloud:
    """Vertices with their vn; one that faces pair with several vn gets their sum."""
    lines = [line.lstrip() for line in plain_text(data).replace(b"\\\n", b" ").split(b"\n")]
    at = {key: [i for i, line in enumerate(lines) if line.startswith((key + b" ", key + b"\t"))] for key in _OBJ_KEYS}
    if not at[b"v"]:
        raise CloudFormatError("it has no 'v' lines; export the cloud with its points as vertices")
    points = number_table([lines[i] for i in at[b"v"]], columns=(1, 2, 3))
    given = number_table([lines[i] for i in at[b"vn"]], columns=(1, 2, 3)) if at[b"vn"] else np.empty((0, 3))
    sizes, corners, normal_corners = _obj_faces(lines, at)
    paired = normal_corners >= 0
    by_order = 2 * len(np.unique(corners[paired])) < len(points) or np.array_equal(corners, normal_corners)
    if len(given) == len(points) and by_order:
        return cloud_of(points, given)
    if len(given) and paired.any():
        index, vectors = corners[paired], given[normal_corners[paired]]
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.linalg.norm(vectors, axis=1, keepdims=True)
            unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
        return _with_direction(points, _summed(len(points), index, unit))
    if len(given) and not sizes.size:
        raise CloudFormatError(
            f"it has {len(points)} v but {len(given)} vn, and no faces that pair them; export it again"
        )
    if not sizes.size:
        return cloud_of(points, None)
    return surface_cloud(points, Polygons(sizes=sizes, corners=corners))


_OBJ_KEYS = (b"v", b"vn", b"f")


def _obj_faces(lines: list[bytes], at: dict[bytes, list[int]]) -> tuple[Ints, Ints, Ints]:
    """Sizes, corners and the corners' normals (-1: none), counted from zero."""
    even = _even_obj_faces([lines[i] for i in at[b"f"]], len(at[b"v"]), len(at[b"vn"]))
    if even is not None:
        return even
    sizes: list[int] = []
    corners: list[int] = []
    normals: list[int] = []
    for i in at[b"f"]:
        tokens = lines[i].split()[1:]
        sizes.append(len(tokens))
        for token in tokens:
            parts = token.split(b"/")
            corners.append(_obj_index(parts[0], at[b"v"], i, lines[i]))
            has_normal = len(parts) == 3 and parts[2]
            normals.append(_obj_index(parts[2], at[b"vn"], i, lines[i]) if has_normal else -1)
    return np.array(sizes, np.int64), np.array(corners, np.int64), np.array(normals, np.int64)


def _even_obj_faces(lines: list[bytes], n_vertices: int, n_normals: int) -> tuple[Ints, Ints, Ints] | None:
    """Faces that are all written as the first one is, with indices that count from the start; None for any others."""
    parts = lines[0].split()[1:2] if lines else []
    text = b"\n".join(lines)
    size = len(lines[0].split()) - 1 if lines else 0
    fields = [bool(field) for field in parts[0].split(b"/")] if parts else []
    used = sum(fields)
    slashes = (len(fields) - 1) * size * len(lines)
    doubled = (fields == [True, False, True]) * size * len(lines)
    if not fields or not fields[0] or text.count(b"/") != slashes or text.count(b"//") != doubled:
        return None
    try:
        table = number_table(text.translate(bytes.maketrans(b"/f", b"  ")))
    except CloudFormatError:
        return None  # the general way finds the line to quote
    normals_given = len(fields) == 3 and fields[2]
    if table.shape != (len(lines), used * size) or not (table >= 1).all() or not (table == np.floor(table)).all():
        return None
    corners = table[:, ::used].reshape(-1) - 1
    normals = table[:, used - 1 :: used].reshape(-1) - 1 if normals_given else np.full(corners.shape, -1.0)
    if corners.max() >= n_vertices or normals.max() >= n_normals:
        return None
    return np.full(len(lines), size, np.int64), corners.astype(np.int64), normals.astype(np.int64)


def _obj_index(token: bytes, defined_at: list[int], line: int, text: bytes) -> int:
    """An index from zero; a negative one counts back from what is defined above its line."""
    if re.fullmatch(rb"-?\d{1,18}", token):
        index = int(token)
        index = index - 1 if index > 0 else bisect_right(defined_at, line) + index if index < 0 else -1
        if 0 <= index < len(defined_at):
            return index
    raise CloudFormatError(f"the face {quote(text)} refers to {quote(token)}, of {len(defined_at)}; export it again")
