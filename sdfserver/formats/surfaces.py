"""OBJ, OFF and STL: surfaces whose vertices are taken as a cloud.

Where vertices carry no normals they get the area-weighted normals of their faces, which are wound counter-clockwise
seen from outside.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud, distinct_rows
from sdfserver.errors import CloudFormatError
from sdfserver.formats.common import Colors, Floats, Ints, broken_promise, byte_colors, cloud_of, quote, whole_number
from sdfserver.formats.text import line_blocks, number_table, number_tables, plain_text

ROWS_AT_A_TIME = 1 << 14
"""Lines that are taken apart at a time."""
_CORNERS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Polygons:
    """Polygons of any size: `corners` holds `sizes[0]` rows of vertices for the first, and so on."""

    sizes: Ints
    corners: Ints


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What a file says of a surface.

    normals: (n, 3) of the vertices where it has them, of any length.
    colors: (n, 3) of the vertices, or None.
    confidence: (n,) from 0 to 1, or None.
    """

    points: Floats
    polygons: Polygons
    normals: Floats | None = None
    colors: Colors | None = None
    confidence: NDArray[np.float32] | None = None

    def triangles(self) -> Ints:
        """Triangles (t, 3) that cover the polygons. Raises CloudFormatError where a corner is no vertex."""
        return _fan(self.polygons, len(self.points))


def polygons_of(sizes: Any, corners: Any) -> Polygons:
    """Polygons whose corners are clipped to 62 bits, so that an absurd one is out of range and not an overflow."""
    limit = 2**62
    if isinstance(corners, list):
        corners = np.array([min(max(corner, -limit), limit) for corner in corners], dtype=np.int64)
    corners = np.asarray(corners)
    if corners.dtype.kind not in "iu" or corners.dtype.itemsize == 8:  # shorter ones stay as short as they are
        with np.errstate(invalid="ignore"):
            corners = corners.astype(np.int64)
    return Polygons(sizes=np.asarray(sizes, dtype=np.int64), corners=corners)


def joined(parts: Sequence[Polygons]) -> Polygons:
    """The polygons of one part after the other."""
    if not parts:
        return polygons_of([], [])
    sizes, corners = ([getattr(part, name) for part in parts] for name in ("sizes", "corners"))
    return Polygons(sizes=np.concatenate(sizes), corners=np.concatenate(corners))


def surface_cloud(surface: Surface) -> PointCloud:
    """Vertices with the area-weighted normals of their polygons."""
    points, normals = surface.points, np.zeros_like(surface.points)
    for part in _parts(surface.polygons, max(_CORNERS_AT_A_TIME, len(points) // 4)):
        triangles = _fan(part, len(points))
        vectors = np.repeat(area_normals(points, triangles), 3, axis=0)
        for axis in range(3):
            normals[:, axis] += np.bincount(triangles.reshape(-1), weights=vectors[:, axis], minlength=len(points))
    return _with_direction(points, normals, surface.colors)


def _parts(polygons: Polygons, corners: int) -> Iterator[Polygons]:
    """The polygons in parts of about that many corners."""
    ends = np.cumsum(polygons.sizes)
    if not ends.size:
        return
    breaks = np.searchsorted(ends, np.arange(corners, int(ends[-1]), corners), side="left") + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ends)], strict=True):
        if first < last:
            start = int(ends[first - 1]) if first else 0
            yield Polygons(sizes=polygons.sizes[first:last], corners=polygons.corners[start : int(ends[last - 1])])


def _fan(polygons: Polygons, n_vertices: int) -> Ints:
    """Triangles (t, 3) that cover the polygons, each as a fan around its first corner."""
    fans = np.maximum(polygons.sizes - 2, 0)
    first = np.repeat(np.cumsum(polygons.sizes) - polygons.sizes, fans)
    step = np.arange(len(first)) - np.repeat(np.cumsum(fans) - fans, fans)
    triangles: Ints = np.empty((len(first), 3), dtype=np.int64)
    for corner, at in enumerate((first, first + step + 1, first + step + 2)):
        triangles[:, corner] = polygons.corners[at]
    if triangles.size and (triangles.min() < 0 or triangles.max() >= n_vertices):
        wrong = int(triangles.min()) if triangles.min() < 0 else int(triangles.max())
        raise CloudFormatError(f"a face refers to vertex {wrong}, but there are {n_vertices}; export it again")
    return triangles


def area_normals(points: Floats, triangles: Ints) -> Floats:
    """Normals (t, 3) as long as twice the area; zero where the corners are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, b, c = (points[triangles[:, i]] for i in range(3))
        normals: Floats = np.cross(b - a, c - a)
    normals[~np.isfinite(normals).all(axis=1)] = 0
    return normals


def _with_direction(points: Floats, normals: Floats, colors: Colors | None) -> PointCloud:
    """The vertices that have a direction; the others are no part of the surface.

    Unless they are most of the points: then this is a cloud with a few polygons, and has no normals.
    """
    has = np.any(normals != 0, axis=1)
    if 2 * np.count_nonzero(has) < len(points):
        return cloud_of(points, None, colors)
    cloud = cloud_of(points, normals, colors)
    return cloud if has.all() else cloud.take(has)


def read_stl(data: bytes) -> PointCloud:
    """Corners at the same position become one vertex; facet normals follow from the winding, not from the file."""
    corners = _stl_corners(data)
    first, vertex = distinct_rows(corners)
    polygons = polygons_of(np.full(len(vertex) // 3, 3), vertex)
    return surface_cloud(Surface(points=corners[first].astype(np.float64), polygons=polygons))


def stl_surface(data: bytes) -> Surface:
    """Every triangle with corners of its own, as the file has it."""
    corners = _stl_corners(data).astype(np.float64)
    return Surface(points=corners, polygons=polygons_of(np.full(len(corners) // 3, 3), np.arange(len(corners))))


def _stl_corners(data: bytes) -> NDArray[np.floating]:
    """The corners (3t, 3) of the triangles, in turn: float32 in a binary file."""
    is_text = re.match(rb"\s*solid", data) is not None and len(data) != stl_size(data)
    if not is_text and 84 < stl_size(data) <= len(data):
        layout = np.dtype([("n", "<f4", 3), ("v", "<f4", 9), ("a", "<u2")])
        facets = np.frombuffer(data, dtype=layout, offset=84, count=(stl_size(data) - 84) // 50)
        corners: NDArray[np.float32] = np.ascontiguousarray(facets["v"], dtype=np.float32).reshape(-1, 3)
        return corners
    if is_text:
        tables: list[Floats] = []
        rows = 0
        for block in line_blocks(plain_text(data)):
            lines = [line for line in block if line.lstrip()[:6].lower() == b"vertex"]
            if lines:
                tables.append(number_table(lines, columns=(1, 2, 3), first_line=rows + 1))
                rows += len(lines)
        if not rows or rows % 3:
            raise CloudFormatError(f"it has {rows} 'vertex' lines, not three for each facet; export it again")
        if b"endsolid" not in data[-1000:].lower():
            raise CloudFormatError(
                f"it ends with {quote(data[-30:])}, not with 'endsolid'; it is truncated: export it again"
            )
        return np.concatenate(tables)
    if len(data) >= 134:
        promised = int.from_bytes(data[80:84], "little")
        raise broken_promise(promised, (len(data) - 84) // 50, "triangles")
    raise CloudFormatError(f"it starts with {quote(data[:12])} and has {len(data)} bytes, which is no STL")


def stl_size(data: bytes) -> int:
    """How many bytes a binary STL has by its own count."""
    return 84 + 50 * int.from_bytes(data[80:84], "little")


def read_off(data: bytes) -> PointCloud:
    """Vertices of OFF and NOFF, in text, with or without colours and texture coordinates."""
    surface = off_surface(data)
    if surface.normals is not None or not surface.polygons.sizes.size:
        return cloud_of(surface.points, surface.normals, surface.colors)
    return surface_cloud(surface)


def off_surface(data: bytes) -> Surface:
    """OFF and NOFF, in text, with or without colours of vertices (COFF) and texture coordinates."""
    data = plain_text(data)
    if b"#" in data:
        data = re.sub(rb"#[^\n]*", b"", data)
    head = re.match(rb"\s*(?:ST)?(C?)(N?)OFF(\s+BINARY)?", data)
    if head is None:
        raise CloudFormatError(f"it starts with {quote(data[:12])}, not with OFF or NOFF; check its extension")
    if head[3]:
        raise CloudFormatError("it is a binary OFF; save it as text, or as PLY")
    lines = (line for block in line_blocks(data, head.end()) for line in block if line and not line.isspace())
    first = next(lines, b"")
    counts = first.split()
    if len(counts) < 2:
        raise CloudFormatError(f"the line {quote(first)} does not hold its counts; export it again")
    n_vertices, n_faces = whole_number(counts[0], "its vertex count"), whole_number(counts[1], "its face count")
    room = data.count(b"\n", head.end()) + 1
    if n_vertices + n_faces > room:
        raise broken_promise(n_vertices + n_faces, room, "vertices and faces")
    if not n_vertices:
        raise CloudFormatError("it holds no vertices; export it again")
    width = 6 if head[2] else 3
    if 2 * width * n_vertices > len(data):  # a digit and a separator for each number
        raise broken_promise(n_vertices, len(data) // (2 * width), "vertices")
    table: Floats = np.empty((n_vertices, width))
    colors = np.empty((n_vertices, 3), np.float32) if head[1] else None
    done = 0
    for rows in _batches(lines, n_vertices):
        part, more = number_tables(
            rows, range(width), range(width, width + 3) if colors is not None else None, first_line=done + 1
        )
        table[done : done + len(rows)] = part
        if colors is not None and more is not None:
            colors[done : done + len(rows)] = more
        else:
            colors = None
        done += len(rows)
    faces: list[Polygons] = []
    for rows in _batches(lines, n_faces):
        faces.append(even_polygons(rows) or _off_faces(rows))
        done += len(rows)
    if done < n_vertices + n_faces:
        raise broken_promise(n_vertices + n_faces, done, "vertices and faces")
    return Surface(
        points=table[:, :3],
        polygons=joined(faces),
        normals=table[:, 3:] if head[2] else None,
        colors=None if colors is None else byte_colors([*colors.T]),
    )


def _batches(lines: Iterator[bytes], count: int) -> Iterator[list[bytes]]:
    """The next `count` lines, or as many as there are, some at a time."""
    while count > 0 and (rows := list(islice(lines, min(count, ROWS_AT_A_TIME)))):
        yield rows
        count -= len(rows)


def even_polygons(lines: list[bytes]) -> Polygons | None:
    """Rows of a size and that many corners, where all have as many as the first one; None for any others."""
    try:
        table = number_table(lines)
    except CloudFormatError:
        return None  # the general way reads it, or finds the line to quote
    if not table.size:
        return None
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
    """Vertices with their vn, and with the colours behind their coordinates, if all have them.

    A vertex that faces pair with several vn gets their sum.
    """
    found = _obj_content(data)
    points, given, polygons = found.points, found.given, found.polygons
    if len(given) == len(points) and found.paired_by_order():
        return cloud_of(points, given, found.colors)
    summed = found.summed()
    if summed is not None:
        return _with_direction(points, summed, found.colors)
    if len(given) and not polygons.sizes.size:
        raise CloudFormatError(
            f"it has {len(points)} v but {len(given)} vn, and no faces that pair them; export it again"
        )
    if not polygons.sizes.size:
        return cloud_of(points, None, found.colors)
    return surface_cloud(Surface(points=points, polygons=polygons, colors=found.colors))


def obj_surface(data: bytes) -> Surface:
    """Vertices in the order of their lines, and their vn where there is one for each or faces pair them."""
    found = _obj_content(data)
    by_order = len(found.given) == len(found.points) and found.paired_by_order()
    normals = found.given if by_order else found.summed()
    return Surface(points=found.points, polygons=found.polygons, normals=normals, colors=found.colors)


@dataclass(frozen=True, kw_only=True)
class _ObjContent:
    """The v and vn of an OBJ, its faces, and the vn of their corners (-1: none)."""

    points: Floats
    colors: Colors | None
    given: Floats
    polygons: Polygons
    paired: Ints

    def paired_by_order(self) -> bool:
        corners = self.polygons.corners
        if np.array_equal(corners, self.paired):
            return True
        return 2 * len(np.unique(corners[self.paired >= 0])) < len(self.points)

    def summed(self) -> Floats | None:
        """The sum of the directions of all vn that faces pair a vertex with; None where they pair none."""
        if not len(self.given) or not (self.paired >= 0).any():
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.linalg.norm(self.given, axis=1, keepdims=True)
            unit = np.divide(self.given, length, out=np.zeros_like(self.given), where=length > 0)
        total = np.zeros_like(self.points)
        step = max(_CORNERS_AT_A_TIME, len(total) // 4)
        for start in range(0, len(self.paired), step):
            paired = self.paired[start : start + step]
            index, vectors = self.polygons.corners[start : start + step][paired >= 0], unit[paired[paired >= 0]]
            for axis in range(3):
                total[:, axis] += np.bincount(index, weights=vectors[:, axis], minlength=len(total))
        return total


def _obj_content(data: bytes) -> _ObjContent:
    data = plain_text(data)
    if b"\\\n" in data:
        data = data.replace(b"\\\n", b" ")
    tables: dict[bytes, list[Floats]] = {b"v": [], b"vn": []}
    counts = {b"v": 0, b"vn": 0}
    polygons: list[Polygons] = []
    paired: list[Ints] = []
    colors: list[NDArray[np.float32]] | None = []
    for block in line_blocks(data):
        lines = [line for line in map(bytes.lstrip, block) if line]
        at = {
            key: [i for i, line in enumerate(lines) if line.startswith((key + b" ", key + b"\t"))] for key in _OBJ_KEYS
        }
        if at[b"f"]:
            sizes, corners, normals = map(_narrow, _obj_faces(lines, at, counts))
            polygons.append(Polygons(sizes=sizes, corners=corners))
            paired.append(normals)
        for key, found in tables.items():
            if not at[key]:
                continue
            rows, first = [lines[i] for i in at[key]], counts[key] + 1
            counts[key] += len(rows)
            colored = key == b"v" and colors is not None and len(rows[0].split()) == _COLORED_TOKENS
            table, more = number_tables(rows, (1, 2, 3), (4, 5, 6) if colored else None, first_line=first)
            found.append(table)
            if key == b"v" and more is None:
                colors = None
            elif colors is not None and more is not None:
                colors.append(more.astype(np.float32))
    if not tables[b"v"]:
        raise CloudFormatError("it has no 'v' lines; export the cloud with its points as vertices")
    content = _ObjContent(
        points=np.concatenate(tables.pop(b"v")),
        colors=None if colors is None else byte_colors([*np.concatenate(colors).T]),
        given=np.concatenate(tables.pop(b"vn") or [np.empty((0, 3))]),
        polygons=joined(polygons),
        paired=np.concatenate(paired or [np.empty(0, np.int64)]),
    )
    for index, there, what in (
        (content.polygons.corners, len(content.points), "v"),
        (content.paired, len(content.given), "vn"),
    ):
        if index.size and index.max() >= there:
            raise CloudFormatError(f"a face refers to {what} {index.max() + 1}, of {there}; export it again")
    return content


def _narrow(index: Ints) -> Ints:
    """The same in half the bytes, where that is enough."""
    narrow: Ints = index.astype(np.int32) if index.size and index.max() < 2**31 else index
    return narrow


_OBJ_KEYS = (b"v", b"vn", b"f")
_COLORED_TOKENS = 7
"""Of a line 'v x y z r g b'; with fewer the fourth number is a weight."""
_MOST_INDICES = 2.0**62


def _obj_faces(lines: list[bytes], at: dict[bytes, list[int]], above: dict[bytes, int]) -> tuple[Ints, Ints, Ints]:
    """Sizes, corners and the corners' normals (-1: none), counted from zero; `above` are the v and vn above."""
    even = _even_obj_faces([lines[i] for i in at[b"f"]])
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
            corners.append(_obj_index(parts[0], at[b"v"], above[b"v"], i, lines[i]))
            has_normal = len(parts) == 3 and parts[2]
            normals.append(_obj_index(parts[2], at[b"vn"], above[b"vn"], i, lines[i]) if has_normal else -1)
    return np.array(sizes, np.int64), np.array(corners, np.int64), np.array(normals, np.int64)


def _even_obj_faces(lines: list[bytes]) -> tuple[Ints, Ints, Ints] | None:
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
    if table.shape != (len(lines), used * size) or not ((table >= 1) & (table <= _MOST_INDICES)).all():
        return None
    if not (table == np.floor(table)).all():
        return None
    corners = table[:, ::used].reshape(-1) - 1
    normals = table[:, used - 1 :: used].reshape(-1) - 1 if normals_given else np.full(corners.shape, -1.0)
    return np.full(len(lines), size, np.int64), corners.astype(np.int64), normals.astype(np.int64)


def _obj_index(token: bytes, defined_at: list[int], above: int, line: int, text: bytes) -> int:
    """An index from zero; a negative one counts back from what is defined above its line."""
    if re.fullmatch(rb"-?\d{1,18}", token):
        index, defined = int(token), above + bisect_right(defined_at, line)
        index = index - 1 if index > 0 else defined + index if index < 0 else -1
        if index >= 0:
            return index
    raise CloudFormatError(f"the face {quote(text)} refers to {quote(token)}, which is no line above; export it again")
