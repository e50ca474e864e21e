"""LAS, LAZ and E57, through laspy and pye57, which are optional."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError, MissingDependencyError
from sdfserver.files import reason
from sdfserver.formats.common import (
    Colors,
    Columns,
    Floats,
    broken_promise,
    byte_colors,
    check_expansion,
    cloud_of,
    named_columns,
    quote,
)

_CHUNK_BYTES = 1 << 24
"""What is unpacked at a time."""


def _missing(package: str, extra: str, kind: str) -> MissingDependencyError:
    return MissingDependencyError(f"reading {kind} needs {package}: pip install 'sdfserver[{extra}]'")


def _is_stop(error: BaseException) -> bool:
    """Whether it asks the program to end; a panic in a Rust extension is a BaseException too, but does not."""
    return isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)


def read_las(data: bytes) -> PointCloud:
    """Scaled coordinates, normals from extra dimensions named NormalX, NormalY, NormalZ, and colours.

    Colours that are zero everywhere were never filled in. Others are of 8 bits where none is larger, else of 16.
    """
    try:
        import laspy
    except ImportError:
        raise _missing("laspy", "las", "LAS and LAZ") from None
    if data[:4] != b"LASF":
        raise CloudFormatError(f"it starts with {quote(data[:4])}, not with 'LASF'; check its format and extension")
    _check_las_records(data)
    packed = data[104] >= 0x80
    if packed and laspy.LazBackend.Lazrs not in laspy.LazBackend.detect_available():
        raise _missing("laspy[lazrs]", "las", "LAZ")
    try:
        # The sequential decoder: the parallel one allocates what the chunk table promises.
        backend = laspy.LazBackend.Lazrs
        with laspy.open(io.BytesIO(data), laz_backend=backend, read_evlrs=False) as reader:
            promised, width = int(reader.header.point_count), int(reader.header.point_format.size)
            found = named_columns(["x", "y", "z", *reader.header.point_format.dimension_names])
            colored = reader.header.point_format.id in _LAS_COLORED
            held = 8 * len(found.shape) + (6 if colored else 0)
            if packed:
                check_expansion(len(data), promised * max(width, held))
                _check_laz_chunks(data, promised)
            else:
                room = (len(data) - int(reader.header.offset_to_point_data)) // width
                if promised > room:
                    raise broken_promise(promised, room, "points")
            table, done = np.empty((promised, len(found.shape))), 0
            colors = np.empty((promised, 3), np.uint16) if colored else None
            for chunk in reader.chunk_iterator(max(_CHUNK_BYTES // width, 1)):
                rows = slice(done, done + len(chunk))
                _las_columns(chunk, found, table[rows], None if colors is None else colors[rows])
                done += len(chunk)
    except CloudFormatError:
        raise
    except BaseException as error:  # laspy and its Rust decoder raise many kinds on a damaged file
        if _is_stop(error):
            raise
        raise CloudFormatError(f"it is not a sound LAS or LAZ file ({reason(error)}); export it again") from None
    if done != promised:
        raise broken_promise(promised, done, "points")
    return cloud_of(table[:, :3], table[:, 3:] if found.normals else None, _filled_in(colors))


def _filled_in(colors: NDArray[Any] | None) -> Colors | None:
    """The colours (n, 3) of a scan, where one of them is not black."""
    return byte_colors([*colors.T]) if colors is not None and colors.any() else None


def _integer(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _check_las_records(data: bytes) -> None:
    """Refuse more records than there is room for: laspy would make as many as are promised."""
    if len(data) < _LAS_HEADER:
        raise CloudFormatError(f"it has {len(data)} bytes, fewer than a LAS header; export or copy it again")
    promised, room = _integer(data, 100, 4), len(data) // _LAS_RECORD
    if promised > room:
        raise broken_promise(promised, room, "records")


_LAS_HEADER, _LAS_RECORD = 227, 54
"""Bytes of the shortest header, and of a record's own header."""
_LAS_COLORED = (2, 3, 5, 7, 8, 10)
"""The point formats that have room for colours."""


@dataclass(frozen=True, kw_only=True)
class _LasZip:
    """How points are packed: as the LASzip record says."""

    layered: bool
    chunk_points: int
    """Points in each chunk but the last one, or _VARIABLE where the chunk table has a number for each."""
    items: list[tuple[int, int]]
    """Type and size of the parts of a point."""
    record: bytes


_VARIABLE = 0xFFFFFFFF
_LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}
"""Layers of the items that are packed in layers: positions and times, colours, colours with infrared, waveforms."""
_EXTRA_BYTES = 14
"""The item of which every byte is a layer."""


def _laszip(data: bytes) -> _LasZip:
    at = _integer(data, 94, 2)
    for _ in range(_integer(data, 100, 4)):
        size = _integer(data, at + 20, 2)
        if data[at + 2 : at + 18].split(b"\0")[0] == b"laszip encoded" and _integer(data, at + 18, 2) == 22204:
            record = data[at + _LAS_RECORD : at + _LAS_RECORD + size]
            places = range(34, 34 + 6 * _integer(record, 32, 2), 6)
            items = [(_integer(record, place, 2), _integer(record, place + 2, 2)) for place in places]
            layered, chunk_points = _integer(record, 0, 2) == 3, _integer(record, 12, 4)
            if {kind in _LAYERS or kind == _EXTRA_BYTES for kind, _ in items} != {layered}:
                # lazrs goes by the items, whatever the record says of all of them.
                raise CloudFormatError("its LASzip record names items that are not packed together; export it again")
            return _LasZip(layered=layered, chunk_points=chunk_points, items=items, record=record)
        at += _LAS_RECORD + size
    raise CloudFormatError("it is compressed but has no LASzip record; export it again")


def _check_laz_chunks(data: bytes, promised: int) -> None:
    """Refuse chunks, items and layers that are not there: lazrs allocates what is promised."""
    zipped, start = _laszip(data), _integer(data, 96, 4)
    width, parts = _integer(data, 105, 2), sum(size for _, size in zipped.items)
    if parts != width:
        raise CloudFormatError(f"its points have {width} bytes, but {parts} are packed; export it again")
    table = int.from_bytes(data[start : start + 8], "little", signed=True)
    if table == -1:  # written as a stream: the table's place is at the end
        table = int.from_bytes(data[-8:], "little", signed=True)
    if not start + 8 <= table <= len(data) - 8:
        raise CloudFormatError(f"its chunk table is said to be at byte {table} of {len(data)}; export it again")
    chunks = _integer(data, table + 4, 4)
    if chunks > len(data):
        raise broken_promise(chunks, len(data), "compressed chunks")
    if not zipped.layered:
        return
    import lazrs  # type: ignore[import-untyped]

    layers = sum(size if kind == _EXTRA_BYTES else _LAYERS.get(kind, 0) for kind, size in zipped.items)
    at, found = start + 8, 0
    while at + width + 4 + 4 * layers <= table:
        sizes = np.frombuffer(data, "<u4", layers, offset=at + width + 4)
        at += width + 4 + 4 * layers + int(sizes.sum(dtype=np.int64))
        found += 1
    if zipped.chunk_points == _VARIABLE:
        source = io.BytesIO(data)
        source.seek(start)
        there = sum(points for points, _ in lazrs.read_chunk_table(source, lazrs.LazVlr(zipped.record))[:found])
    else:
        there = found * zipped.chunk_points
    if at > table:
        raise CloudFormatError(f"its chunk {found} would end at byte {at}, behind all of them; export or copy it again")
    if there < promised:
        raise broken_promise(promised, there, "points")


def _las_columns(chunk: Any, found: Columns, table: Floats, colors: NDArray[np.uint16] | None) -> None:
    """Coordinates, and normals where there are any, into the rows of `table`; colours into those of `colors`."""
    names = list(chunk.point_format.dimension_names)
    for column, values in enumerate([chunk.x, chunk.y, chunk.z, *(chunk[names[i - 3]] for i in found.normals or [])]):
        table[:, column] = np.asarray(values)
    if colors is not None:
        for column, name in enumerate(("red", "green", "blue")):
            colors[:, column] = np.asarray(chunk[name])


_E57_NORMALS = ("nor:normalX", "nor:normalY", "nor:normalZ")
_E57_COLORS = ("colorRed", "colorGreen", "colorBlue")


def read_e57(data: bytes, path: Path) -> PointCloud:
    """All scans together, each in its pose; normals and colours where every scan has them."""
    try:
        import pye57
    except ImportError:
        raise _missing("pye57", "e57", "E57") from None
    if data[:8] != b"ASTM-E57":
        raise CloudFormatError(f"it starts with {quote(data[:8])}, not with 'ASTM-E57'; check its extension")
    _check_e57(data)
    try:
        with pye57.E57(str(path)) as file:
            scans = [_e57_scan(pye57, file, index, len(data)) for index in range(file.scan_count)]
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - libE57 raises its own kinds, through pybind
        raise CloudFormatError(f"it is not a sound E57 file ({reason(error)}); export it again") from None
    if not scans:
        raise CloudFormatError("it holds no scans; export the cloud again")
    if len(scans) == 1:
        return scans[0]
    normals = [scan.normals for scan in scans if scan.normals is not None]
    colors = [scan.colors for scan in scans if scan.colors is not None]
    return cloud_of(
        np.concatenate([scan.points for scan in scans]),
        np.concatenate(normals) if len(normals) == len(scans) else None,
        np.concatenate(colors) if len(colors) == len(scans) else None,
    )


_E57_PAGE, _E57_CONTENT = 1024, 1020
_E57_DEPTH = 64
"""Elements within each other; files have a dozen."""


def _check_e57(data: bytes) -> None:
    """Refuse XML that does more than describe, and more points than there are bits for.

    libE57 itself opens whatever file a document type, or the place of a schema, names.
    """
    if len(data) < 48 or _integer(data, 40, 8) != _E57_PAGE:
        raise CloudFormatError("its header is cut off, or its pages are not of 1024 bytes; export or copy it again")
    offset, length = _integer(data, 24, 8), _integer(data, 32, 8)
    first, within = divmod(offset, _E57_PAGE)
    pages = range(first * _E57_PAGE, min(len(data), offset + length + length // 200 + 2 * _E57_PAGE), _E57_PAGE)
    xml = b"".join(data[at : at + _E57_CONTENT] for at in pages)[within : within + length]
    if len(xml) < length:
        raise broken_promise(length, len(xml), "bytes of XML")
    sections = _E57Sections()
    try:
        sections.read(xml)
    except (expat.ExpatError, ValueError, OverflowError) as error:
        raise CloudFormatError(f"its XML is not sound ({reason(error)}); export it again") from None
    bits = sum(records * width for records, width, _ in sections.found)
    if bits > 8 * len(data):
        promised = sum(records for records, _, _ in sections.found)
        raise broken_promise(promised, promised * 8 * len(data) // bits, "points")
    # Where every coordinate is the same, a point has no bits at all.
    check_expansion(len(data), sum(8 * records * min(fields, 10) for records, _, fields in sections.found))


class _E57Sections:
    """The compressed vectors that an E57's XML describes: for each its records, their bits and their fields."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []
        self._path: list[str] = []
        self._records = self._bits = self._fields = 0

    def read(self, xml: bytes) -> None:
        """Raises CloudFormatError, ExpatError or ValueError where the XML is not what an E57 has."""
        parser = expat.ParserCreate("UTF-8")
        parser.XmlDeclHandler = self._declared
        parser.StartDoctypeDeclHandler = self._refused
        parser.StartElementHandler = self._started
        parser.EndElementHandler = self._ended
        parser.Parse(xml, True)

    def _declared(self, _version: str, encoding: str | None, _standalone: int) -> None:
        if (encoding or "UTF-8").upper() != "UTF-8":
            raise CloudFormatError(f"its XML is in {quote(str(encoding))}, not in UTF-8; export it again")

    def _refused(self, *_: Any) -> None:
        raise CloudFormatError("its XML has a document type, which no E57 has; export it again")

    def _started(self, name: str, attributes: dict[str, str]) -> None:
        if any("schemalocation" in attribute.lower() for attribute in attributes):
            raise CloudFormatError("its XML names the place of a schema, which no E57 has; export it again")
        if len(self._path) >= _E57_DEPTH:
            raise CloudFormatError(f"its XML has more than {_E57_DEPTH} elements within each other; export it again")
        if self._path[-1:] == ["prototype"]:
            self._fields += 1
            self._bits += _e57_bits(attributes)
        kind = attributes.get("type", "")
        self._path.append("prototype" if name == "prototype" else kind)
        if kind == "CompressedVector":
            self._records, self._bits, self._fields = int(attributes.get("recordCount", "0")), 0, 0

    def _ended(self, _name: str) -> None:
        if self._path.pop() == "CompressedVector":
            if self._records < 0:
                raise CloudFormatError(f"it promises {self._records} points; export it again")
            self.found.append((self._records, self._bits, self._fields))


def _e57_bits(attributes: dict[str, str]) -> int:
    """How many bits a field has in every record; 0 where that is not fixed."""
    match attributes.get("type"):
        case "Float":
            return 32 if attributes.get("precision") == "single" else 64
        case "Integer" | "ScaledInteger":
            low, high = (int(attributes.get(name, str(limit))) for name, limit in _E57_RANGE)
            return max(high - low, 0).bit_length()
    return 0


_E57_RANGE = (("minimum", -(2**63)), ("maximum", 2**63 - 1))


def _e57_scan(pye57: Any, file: Any, index: int, size: int) -> PointCloud:
    header = file.get_header(index)
    fields = list(header.point_fields)
    cartesian = "cartesianX" in fields
    position = ["cartesianX", "cartesianY", "cartesianZ"] if cartesian else list(_E57_SPHERICAL)
    if not set(position) <= set(fields):
        raise CloudFormatError(f"scan {index} has the fields {quote(', '.join(fields), 80)}, without coordinates")
    normals = list(_E57_NORMALS) if set(_E57_NORMALS) <= set(fields) else []
    colored = list(_E57_COLORS) if set(_E57_COLORS) <= set(fields) else []
    state = "cartesianInvalidState" if cartesian else "sphericalInvalidState"
    wanted = position + normals + colored + ([state] if state in fields else [])
    table = _e57_table(pye57, file, header, wanted, size)
    if state in fields:
        table = table[table[:, -1] == 0]
    points = table[:, :3] if cartesian else _from_spherical(table[:, :3])
    vectors = table[:, 3:6] if normals else None
    first = 3 + len(normals)
    colors = _filled_in(table[:, first : first + 3]) if colored else None
    if header.has_pose():
        turned = file.to_global(points, header.rotation, header.translation)
        vectors = None if vectors is None else file.to_global(vectors, header.rotation, np.zeros(3))
        return cloud_of(turned, vectors, colors)
    return cloud_of(points, vectors, colors)


_E57_SPHERICAL = ("sphericalRange", "sphericalAzimuth", "sphericalElevation")


def _from_spherical(table: Floats) -> Floats:
    radius, azimuth, elevation = table.T
    across = radius * np.cos(elevation)
    return np.stack([across * np.cos(azimuth), across * np.sin(azimuth), radius * np.sin(elevation)], axis=1)


def _e57_table(pye57: Any, file: Any, header: Any, fields: list[str], size: int) -> Floats:
    """The fields as columns, read in chunks, so that a false point count allocates nothing."""
    check_expansion(size, 8 * int(header.point_count) * len(fields))
    capacity = max(min(int(header.point_count), _CHUNK_BYTES // (8 * len(fields))), 1)
    arrays = [np.empty(capacity, dtype=np.float64) for _ in fields]
    buffers = pye57.libe57.VectorSourceDestBuffer()
    for name, array in zip(fields, arrays, strict=True):
        buffers.append(pye57.libe57.SourceDestBuffer(file.image_file, name, array, capacity, True, True))
    reader = header.points.reader(buffers)
    table, done = np.empty((int(header.point_count), len(fields))), 0
    while (count := int(reader.read())) and done + count <= len(table):
        for column, array in enumerate(arrays):
            table[done : done + count, column] = array[:count]
        done += count
    if count or done != len(table):
        raise broken_promise(len(table), done, "points")
    return table
