"""PLY (Turk 1994): text and both byte orders, any elements and properties around the vertices."""

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.files import printable
from sdfserver.formats.common import (
    Colors,
    Floats,
    Ints,
    broken_promise,
    byte_colors,
    cloud_of,
    named_columns,
    quote,
    whole_number,
)
from sdfserver.formats.surfaces import (
    ROWS_AT_A_TIME,
    Polygons,
    Surface,
    even_polygons,
    joined,
    polygons_of,
    surface_cloud,
)
from sdfserver.formats.text import MAX_LINE, number_table

_MAX_HEADER = 1 << 20

_PLY_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "int64": "i8",
    "uint64": "u8",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}


@dataclass(frozen=True, kw_only=True)
class _Property:
    name: str
    type: str
    """numpy's code without byte order; of the items, for a list."""
    count_type: str | None = None
    """The type of a list's length; None for a single number."""


@dataclass(frozen=True, kw_only=True)
class _Element:
    name: str
    count: int
    properties: tuple[_Property, ...]

    def has_lists(self) -> bool:
        return any(item.count_type for item in self.properties)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """An element's content: one array for each property that is a number, polygons for each that is a list."""

    numbers: dict[str, NDArray[Any]]
    lists: dict[str, Polygons]


def read_ply(data: bytes) -> PointCloud:
    """Vertices with nx, ny, nz; of a surface without them, with the normals of its faces.

    Colours come from red, green and blue, whole numbers or shares of one, as byte_colors tells them apart.
    """
    surface = _ply_surface(data, always_faces=False)
    if surface.normals is None and surface.polygons.sizes.size:
        return surface_cloud(surface)
    return cloud_of(surface.points, surface.normals, surface.colors)


def ply_surface(data: bytes) -> Surface:
    """Vertices, their nx, ny, nz, colours and confidence where there are any, and the faces."""
    return _ply_surface(data, always_faces=True)


def _ply_surface(data: bytes, *, always_faces: bool) -> Surface:
    """The faces are left out where they are not needed, as there are normals."""
    elements, encoding, offset = _ply_header(data)
    kinds = [element.name for element in elements]
    if "vertex" not in kinds:
        raise CloudFormatError("its header has no 'element vertex'; export the cloud with its points as vertices")
    vertex, face = kinds.index("vertex"), kinds.index("face") if "face" in kinds else -1
    scalars = [item.name for item in elements[vertex].properties if not item.count_type]
    found = named_columns(scalars)
    corners = "" if face < 0 or (found.normals and not always_faces) else _corner_list(elements[face])
    last = max(vertex, face) if corners else vertex  # what comes after is not looked at
    rows = _ply_rows(data, offset, encoding, elements[: last + 1])

    def columns(at: list[int]) -> list[NDArray[Any]]:
        return [rows[vertex].numbers[scalars[i]] for i in at]

    confidence = rows[vertex].numbers.get("confidence") if always_faces else None
    return Surface(
        points=_as_columns(columns(found.points)),
        polygons=rows[face].lists[corners] if corners else polygons_of([], []),
        normals=_as_columns(columns(found.normals)) if found.normals else None,
        colors=_colors(elements[vertex], scalars, found.colors, columns) if found.colors else None,
        confidence=None if confidence is None else _shares(confidence),
    )


def _colors(
    vertex: _Element, scalars: list[str], at: list[int], columns: Callable[[list[int]], list[NDArray[Any]]]
) -> Colors | None:
    types = {item.name: item.type for item in vertex.properties}
    return byte_colors(columns(at), whole=all(types[scalars[i]][0] in "iu" for i in at))


def _shares(column: NDArray[Any]) -> NDArray[np.float32] | None:
    """The numbers (n,), or None where they are not all from 0 to 1: then they mean something else."""
    if not len(column) or not (column.min() >= 0 and column.max() <= 1):
        return None
    return np.array(column, np.float32)


def _as_columns(columns: list[NDArray[Any]]) -> Floats:
    table = np.empty((len(columns[0]), len(columns)))
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def _corner_list(element: _Element) -> str:
    names = [item.name for item in element.properties if item.count_type and item.type[0] in "iu"]
    return next((name for name in names if name in ("vertex_indices", "vertex_index")), "")


def _ply_header(data: bytes) -> tuple[list[_Element], str, int]:
    """The elements, the byte order ('<', '>' or 'ascii') and where the data begins."""
    if not re.match(rb"ply[ \t]*[\r\n]", data):
        raise CloudFormatError(f"it starts with {quote(data[:12])}, not with 'ply'; check its format and extension")
    end = re.search(rb"(\r\n|\n|\r)end_header[ \t]*(\r\n|\n|\r|$)", data[:_MAX_HEADER])
    if end is None:
        raise CloudFormatError("its header has no 'end_header'; the file is truncated or corrupt: export it again")
    offset = end.end()
    if end[1] == b"\r" and end[2] == b"\r\n":
        offset -= 1  # lone carriage returns end the lines, so the line feed is data
    encoding = ""
    elements: list[tuple[str, int, dict[str, _Property]]] = []
    for line in re.split(rb"\r\n|\n|\r", data[: end.start()])[1:]:
        words = line.split()
        match words[:1]:
            case [] | [b"comment" | b"obj_info"]:
                continue
            case [b"format"] if len(words) >= 2:
                encoding = {b"ascii": "ascii", b"binary_little_endian": "<", b"binary_big_endian": ">"}.get(
                    words[1], ""
                )
            case [b"element"] if len(words) == 3:
                elements.append((words[1].decode("latin-1"), whole_number(words[2], "a count in its header"), {}))
            case [b"property"] if elements:
                found = _ply_property(words, line)
                if found.name in elements[-1][2]:
                    raise CloudFormatError(f"its header names the property {quote(found.name)} twice; export it again")
                elements[-1][2][found.name] = found
            case _:
                raise CloudFormatError(f"its header has the line {quote(line)}; export the cloud again")
    if not encoding:
        raise CloudFormatError("its header names no format: ascii, binary_little_endian or binary_big_endian")
    return [_Element(name=n, count=c, properties=tuple(p.values())) for n, c, p in elements], encoding, offset


def _ply_property(words: list[bytes], line: bytes) -> _Property:
    types = [_PLY_TYPES.get(word.decode("latin-1")) for word in words[1:]]
    if len(words) == 3 and types[0]:
        return _Property(name=words[2].decode("latin-1").lower(), type=types[0])
    if len(words) == 5 and words[1] == b"list" and types[1] and types[1][0] in "iu" and types[2]:
        return _Property(name=words[4].decode("latin-1").lower(), type=types[2], count_type=types[1])
    raise CloudFormatError(f"its header has the line {quote(line)}, which is no property; export the cloud again")


def _ply_rows(data: bytes, offset: int, encoding: str, elements: list[_Element]) -> list[_Rows]:
    """The content of elements that follow each other from `offset` on."""
    rows: list[_Rows] = []
    stream = io.BytesIO(data)
    stream.seek(offset)
    for element in elements:
        if encoding == "ascii":
            content = _ascii_rows(stream, element, len(data))
        elif element.has_lists():
            content, offset = _binary_list_rows(data, offset, element, encoding)
        else:
            content, offset = _binary_rows(data, offset, element, encoding)
        rows.append(content)
    return rows


def _ascii_rows(stream: io.BytesIO, element: _Element, size: int) -> _Rows:
    least = max(2 * len(element.properties), 1)  # a digit and a separator for each value
    room = (size - stream.tell() + 1) // least
    if element.count > room:
        raise broken_promise(element.count, room, f"'{printable(element.name)}' rows")
    if element.has_lists():
        return _ascii_list_rows(stream, element)
    if not element.count or not element.properties:
        return _Rows(numbers={item.name: np.empty(0) for item in element.properties}, lists={})
    columns = range(len(element.properties))
    table: Floats = np.empty((element.count, len(columns)))
    for start, lines in _row_batches(stream, element):
        table[start : start + len(lines)] = number_table(lines, columns=columns, first_line=start + 1)
    return _Rows(numbers={item.name: table[:, i] for i, item in enumerate(element.properties)}, lists={})


def _row_batches(stream: io.BytesIO, element: _Element) -> Iterator[tuple[int, list[bytes]]]:
    """The element's rows, some at a time, each time with the number of rows before them."""
    done = 0
    while done < element.count:
        lines = _row_lines(stream, min(element.count - done, ROWS_AT_A_TIME))
        if not lines:
            raise broken_promise(element.count, done, f"'{printable(element.name)}' rows")
        yield done, lines
        done += len(lines)


def _row_lines(stream: io.BytesIO, count: int) -> list[bytes]:
    """The next `count` lines that are not blank, or as many as there are."""
    lines = list(islice(stream, count))
    if any(map(bytes.isspace, lines)):
        lines = [line for line in lines if not line.isspace()]
        # What comes now is looked at once: with a blank line after each row it would else be looked at each time.
        lines += islice((line for line in stream if not line.isspace()), count - len(lines))
    longest = max(map(len, lines), default=0)
    if longest > MAX_LINE:
        raise CloudFormatError(f"a line has {longest} characters; the file is corrupt: export it again")
    return lines


def _ascii_list_rows(stream: io.BytesIO, element: _Element) -> _Rows:
    numbers: dict[str, list[Floats]] = {item.name: [] for item in element.properties if not item.count_type}
    lists: dict[str, list[Polygons]] = {item.name: [] for item in element.properties if item.count_type}
    only = element.properties[0].name if len(element.properties) == 1 else None
    for start, lines in _row_batches(stream, element):
        even = even_polygons(lines) if only else None
        if only and even:
            lists[only].append(even)
            continue
        some = _ascii_list_batch(lines, element, start)
        for name, values in some.numbers.items():
            numbers[name].append(values)
        for name, polygons in some.lists.items():
            lists[name].append(polygons)
    return _Rows(
        numbers={name: np.concatenate(parts or [np.empty(0)]) for name, parts in numbers.items()},
        lists={name: joined(parts) for name, parts in lists.items()},
    )


def _ascii_list_batch(lines: list[bytes], element: _Element, start: int) -> _Rows:
    numbers: dict[str, list[float]] = {item.name: [] for item in element.properties if not item.count_type}
    lists: dict[str, tuple[list[int], list[int]]] = {
        item.name: ([], []) for item in element.properties if item.count_type
    }
    for row, line in enumerate(lines, start):
        try:
            tokens = [float(token) for token in line.split()]
            at = 0
            for item in element.properties:
                if item.count_type:
                    size = int(tokens[at])
                    corners = [int(value) for value in tokens[at + 1 : at + 1 + size]]
                    if len(corners) != size:
                        raise IndexError
                    lists[item.name][0].append(size)
                    lists[item.name][1].extend(corners)
                    at += 1 + size
                else:
                    numbers[item.name].append(tokens[at])
                    at += 1
        except (ValueError, IndexError, OverflowError):
            name = printable(element.name)
            raise CloudFormatError(f"row {row + 1} of element '{name}' is {quote(line)}; export it again") from None
    return _Rows(
        numbers={name: np.array(values, dtype=np.float64) for name, values in numbers.items()},
        lists={name: polygons_of(sizes, corners) for name, (sizes, corners) in lists.items()},
    )


def _binary_rows(data: bytes, offset: int, element: _Element, order: str) -> tuple[_Rows, int]:
    dtype = np.dtype([(f"{i}", order + item.type) for i, item in enumerate(element.properties)])
    if not dtype.itemsize:
        return _Rows(numbers={}, lists={}), offset
    room = (len(data) - offset) // dtype.itemsize
    if element.count > room:
        raise broken_promise(element.count, room, f"'{printable(element.name)}' rows")
    table = np.frombuffer(data, dtype=dtype, count=element.count, offset=offset)
    names = {item.name: f"{i}" for i, item in enumerate(element.properties)}
    numbers = {name: table[field] for name, field in names.items()}
    return _Rows(numbers=numbers, lists={}), offset + element.count * dtype.itemsize


def _binary_list_rows(data: bytes, offset: int, element: _Element, order: str) -> tuple[_Rows, int]:
    least = sum(np.dtype(item.count_type or item.type).itemsize for item in element.properties)
    room = (len(data) - offset) // least
    if element.count > room:
        raise broken_promise(element.count, room, f"'{printable(element.name)}' rows")
    if not element.count:
        return _no_rows(element), offset
    return _even_rows(data, offset, element, order) or _uneven_rows(data, offset, element, order)


def _no_rows(element: _Element) -> _Rows:
    return _Rows(
        numbers={item.name: np.empty(0) for item in element.properties if not item.count_type},
        lists={item.name: polygons_of([], []) for item in element.properties if item.count_type},
    )


def _even_rows(data: bytes, offset: int, element: _Element, order: str) -> tuple[_Rows, int] | None:
    """The rows where every list is as long as in the first row, as triangles are; None where they are not."""
    _, sizes, end = _walk_row(data, offset, element, order)
    if end - offset > 1 << 16 or element.count * (end - offset) > len(data) - offset:
        return None
    fields: list[Any] = []
    for i, item in enumerate(element.properties):
        if item.count_type:
            fields.append((f"size{i}", order + item.count_type))
            fields.append((f"{i}", order + item.type, (sizes[i],)))
        else:
            fields.append((f"{i}", order + item.type))
    table = np.frombuffer(data, dtype=np.dtype(fields), count=element.count, offset=offset)
    numbers: dict[str, NDArray[Any]] = {}
    lists: dict[str, Polygons] = {}
    for i, item in enumerate(element.properties):
        if not item.count_type:
            numbers[item.name] = table[f"{i}"]
        elif np.all(table[f"size{i}"] == sizes[i]):
            lists[item.name] = polygons_of(table[f"size{i}"], table[f"{i}"].reshape(-1))
        else:
            return None
    return _Rows(numbers=numbers, lists=lists), offset + table.nbytes


def _uneven_rows(data: bytes, offset: int, element: _Element, order: str) -> tuple[_Rows, int]:
    starts = np.empty((element.count, len(element.properties)), dtype=np.int64)
    sizes = np.ones_like(starts)
    for row in range(element.count):
        starts[row], sizes[row], offset = _walk_row(data, offset, element, order)
    numbers: dict[str, NDArray[Any]] = {}
    lists: dict[str, Polygons] = {}
    raw = np.frombuffer(data, np.uint8)
    for i, item in enumerate(element.properties):
        dtype = np.dtype(order + item.type)
        values = _gathered(raw, starts[:, i], sizes[:, i], dtype)
        if item.count_type:
            lists[item.name] = polygons_of(sizes[:, i], values)
        else:
            numbers[item.name] = values
    return _Rows(numbers=numbers, lists=lists), offset


def _gathered(raw: NDArray[np.uint8], starts: Ints, sizes: Ints, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of all lists, of which each starts at a byte of its own."""
    ends = np.cumsum(sizes)
    values = np.empty(int(ends[-1]), dtype=dtype)
    row = 0
    while row < len(sizes):
        done = int(ends[row - 1]) if row else 0
        last = max(int(np.searchsorted(ends, done + ROWS_AT_A_TIME, side="right")), row + 1)
        first = np.repeat(starts[row:last], sizes[row:last])
        before = np.repeat(ends[row:last] - sizes[row:last] - done, sizes[row:last])
        at = first + (np.arange(len(first)) - before) * dtype.itemsize
        found = raw[at[:, None] + np.arange(dtype.itemsize)]
        values[done : done + len(first)] = np.ascontiguousarray(found).view(dtype).reshape(-1)
        row = last
    return values


_STRUCT_CODES = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}


def _walk_row(data: bytes, offset: int, element: _Element, order: str) -> tuple[list[int], list[int], int]:
    """Where each property's values start in the row at `offset`, how many they are, and where the row ends."""
    starts, sizes = [], []
    for item in element.properties:
        size = 1
        if item.count_type:
            code = struct.Struct(order + _STRUCT_CODES[item.count_type])
            if offset + code.size > len(data):
                raise _cut(element)
            (size,) = code.unpack_from(data, offset)
            offset += code.size
        starts.append(offset)
        sizes.append(size)
        offset += size * int(item.type[1])
        if size < 0 or offset > len(data):
            raise _cut(element)
    return starts, sizes, offset


def _cut(element: _Element) -> CloudFormatError:
    return CloudFormatError(
        f"it ends within the {element.count} rows of element '{printable(element.name)}' that its header promises; "
        "it is truncated or corrupt: export or copy it again"
    )


def ply_chunks(path: Path, rows: int) -> Iterator[PointCloud] | None:
    """The vertices of a binary PLY and their normals, `rows` at a time, read as they are asked for.

    None where the file has to be read as a whole: text, lists among the vertices, or anything before them. Colours that
    are bytes come along; of others only the whole file would tell the scale.
    """
    with path.open("rb") as stream:
        head = stream.read(_MAX_HEADER)
    elements, encoding, offset = _ply_header(head)
    vertex = elements[0] if elements else None
    if encoding == "ascii" or vertex is None or vertex.name != "vertex" or vertex.has_lists() or not vertex.count:
        return None
    scalars = [item.name for item in vertex.properties]
    found = named_columns(scalars)
    row = np.dtype([(item.name, encoding + item.type) for item in vertex.properties])
    colors_at = found.colors if found.colors and all(row[i] == np.uint8 for i in found.colors) else None
    room = (path.stat().st_size - offset) // row.itemsize
    if room < vertex.count:
        raise broken_promise(vertex.count, room, "'vertex' rows")

    def chunks() -> Iterator[PointCloud]:
        for start in range(0, vertex.count, rows):
            count = min(rows, vertex.count - start)
            part = np.fromfile(path, row, count, offset=offset + start * row.itemsize)
            points = _as_columns([part[scalars[i]] for i in found.points])
            normals = _as_columns([part[scalars[i]] for i in found.normals]) if found.normals else None
            yield cloud_of(points, normals, byte_colors([part[scalars[i]] for i in colors_at]) if colors_at else None)

    return chunks()
