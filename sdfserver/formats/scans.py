"""LAS, LAZ and E57, through laspy and pye57, which are optional."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError, MissingDependencyError
from sdfserver.files import reason
from sdfserver.formats.common import Floats, broken_promise, cloud_of, named_columns, quote

_CHUNK_POINTS = 1_000_000


def _missing(package: str, extra: str, kind: str) -> MissingDependencyError:
    return MissingDependencyError(f"reading {kind} needs {package}: pip install 'sdfserver[{extra}]'")


def _is_stop(error: BaseException) -> bool:
    """Whether it asks the program to end; a panic in a Rust extension is a BaseException too, but does not."""
    return isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)


def read_las(data: bytes) -> PointCloud:
    """Scaled coordinates, and normals from extra dimensions named NormalX, NormalY, NormalZ."""
    try:
        import laspy
    except ImportError:
        raise _missing("laspy", "las", "LAS and LAZ") from None
    if data[:4] != b"LASF":
        raise CloudFormatError(f"it starts with {quote(data[:4])}, not with 'LASF'; check its format and extension")
    _check_las_records(data)
    if data[104:105] >= b"\x80" and laspy.LazBackend.Lazrs not in laspy.LazBackend.detect_available():
        raise _missing("laspy[lazrs]", "las", "LAZ")
    try:
        # The sequential decoder: the parallel one allocates what the chunk table promises.
        with laspy.open(io.BytesIO(data), laz_backend=laspy.LazBackend.Lazrs) as reader:
            promised = int(reader.header.point_count)
            width = int(reader.header.point_format.size)
            room = (len(data) - int(reader.header.offset_to_point_data)) // width
            if not reader.header.are_points_compressed and promised > room:
                raise broken_promise(promised, room, "points")
            # Chunks grow with what is there, not with what is promised.
            tables = [_las_table(chunk) for chunk in reader.chunk_iterator(_CHUNK_POINTS)]
    except CloudFormatError:
        raise
    except BaseException as error:  # laspy and its Rust decoder raise many kinds on a damaged file
        if _is_stop(error):
            raise
        raise CloudFormatError(f"it is not a sound LAS or LAZ file ({reason(error)}); export it again") from None
    table = np.concatenate(tables) if tables else np.empty((0, 3))
    if len(table) != promised:
        raise broken_promise(promised, len(table), "points")
    return cloud_of(table[:, :3], table[:, 3:] if table.shape[1] == 6 else None)


def _check_las_records(data: bytes) -> None:
    """Refuse more records or chunks than there is room for: laspy and lazrs would allocate what is promised."""
    records = [("records", int.from_bytes(data[100:104], "little"), len(data) // 54)]
    if data[24:26] == b"\x01\x04":
        records.append(("extended records", int.from_bytes(data[243:247], "little"), len(data) // 60))
    if data[104:105] >= b"\x80":
        start = int.from_bytes(data[96:100], "little")
        table = int.from_bytes(data[start : start + 8], "little", signed=True)
        if table == -1:  # written as a stream: the table's place is at the end
            table = int.from_bytes(data[-8:], "little", signed=True)
        chunks = int.from_bytes(data[table + 4 : table + 8], "little") if table > 0 else 0
        records.append(("compressed chunks", chunks, len(data)))
    for what, promised, room in records:
        if promised > room:
            raise broken_promise(promised, room, what)


def _las_table(chunk: Any) -> Floats:
    names = list(chunk.point_format.dimension_names)
    _, normals = named_columns(["x", "y", "z", *names])
    columns = [chunk.x, chunk.y, chunk.z] + [chunk[names[i - 3]] for i in normals or []]
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


_E57_NORMALS = ("nor:normalX", "nor:normalY", "nor:normalZ")


def read_e57(data: bytes, path: Path) -> PointCloud:
    """All scans together, each in its pose; normals where every scan has them."""
    try:
        import pye57
    except ImportError:
        raise _missing("pye57", "e57", "E57") from None
    if data[:8] != b"ASTM-E57":
        raise CloudFormatError(f"it starts with {quote(data[:8])}, not with 'ASTM-E57'; check its extension")
    try:
        with pye57.E57(str(path)) as file:
            scans = [_e57_scan(pye57, file, index) for index in range(file.scan_count)]
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - libE57 raises its own kinds, through pybind
        raise CloudFormatError(f"it is not a sound E57 file ({reason(error)}); export it again") from None
    if not scans:
        raise CloudFormatError("it holds no scans; export the cloud again")
    normals = [scan.normals for scan in scans if scan.normals is not None]
    return cloud_of(
        np.concatenate([scan.points for scan in scans]),
        np.concatenate(normals) if len(normals) == len(scans) else None,
    )


def _e57_scan(pye57: Any, file: Any, index: int) -> PointCloud:
    header = file.get_header(index)
    fields = list(header.point_fields)
    cartesian = "cartesianX" in fields
    position = ["cartesianX", "cartesianY", "cartesianZ"] if cartesian else list(_E57_SPHERICAL)
    if not set(position) <= set(fields):
        raise CloudFormatError(f"scan {index} has the fields {quote(', '.join(fields), 80)}, without coordinates")
    normals = list(_E57_NORMALS) if set(_E57_NORMALS) <= set(fields) else []
    state = "cartesianInvalidState" if cartesian else "sphericalInvalidState"
    table = _e57_table(pye57, file, header, position + normals + ([state] if state in fields else []))
    if state in fields:
        table = table[table[:, -1] == 0]
    points = table[:, :3] if cartesian else _from_spherical(table[:, :3])
    vectors = table[:, 3:6] if normals else None
    if header.has_pose():
        turned = file.to_global(points, header.rotation, header.translation)
        vectors = None if vectors is None else file.to_global(vectors, header.rotation, np.zeros(3))
        return cloud_of(turned, vectors)
    return cloud_of(points, vectors)


_E57_SPHERICAL = ("sphericalRange", "sphericalAzimuth", "sphericalElevation")


def _from_spherical(table: Floats) -> Floats:
    radius, azimuth, elevation = table.T
    across = radius * np.cos(elevation)
    return np.stack([across * np.cos(azimuth), across * np.sin(azimuth), radius * np.sin(elevation)], axis=1)


def _e57_table(pye57: Any, file: Any, header: Any, fields: list[str]) -> Floats:
    """The fields as columns, read in chunks, so that a false point count allocates nothing."""
    capacity = max(min(int(header.point_count), _CHUNK_POINTS), 1)
    arrays = [np.empty(capacity, dtype=np.float64) for _ in fields]
    buffers = pye57.libe57.VectorSourceDestBuffer()
    for name, array in zip(fields, arrays, strict=True):
        buffers.append(pye57.libe57.SourceDestBuffer(file.image_file, name, array, capacity, True, True))
    reader = header.points.reader(buffers)
    chunks = [np.empty((0, len(fields)))]
    while count := reader.read():
        chunks.append(np.stack([array[:count] for array in arrays], axis=1))
    table = np.concatenate(chunks)
    if len(table) != header.point_count:
        raise broken_promise(int(header.point_count), len(table), "points")
    return table
