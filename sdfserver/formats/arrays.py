"""NPY and NPZ: numpy's own files, read without pickle."""

import io
import warnings
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.files import printable, reason
from sdfserver.formats.common import broken_promise, cloud_of, named_columns, quote, unnamed_columns

_POINT_KEYS = ("points", "xyz", "vertices", "positions", "position", "pos", "coords", "pts")
_NORMAL_KEYS = ("normals", "normal", "vertex_normals", "n")


def read_npy(data: bytes) -> PointCloud:
    """An (n, 3) array of points, (n, 6) with normals, or a structured array with x, y, z."""
    stream = io.BytesIO(data)
    return _array_cloud(_read_array(stream, len(data)), "the array")


def read_npz(data: bytes) -> PointCloud:
    """The arrays 'points' and 'normals' of an archive, or its only array."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy").lower(): info for info in archive.infolist()}
            points_key, normals_key = _npz_keys(list(members))
            used = [members[key] for key in (points_key, normals_key) if key is not None]
            expanded = sum(info.file_size for info in used)
            if expanded > max(1 << 28, 200 * len(data)):
                raise CloudFormatError(f"{len(data)} bytes would expand to {expanded}; save it again, uncompressed")
            arrays = []
            for info in used:
                with archive.open(info) as stream:
                    arrays.append(_read_array(stream, info.file_size))
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises a dozen kinds on a damaged archive
        raise CloudFormatError(f"it is not a sound NPZ archive ({reason(error)}); save it again") from None
    cloud = _array_cloud(arrays[0], f"the array '{printable(points_key)}'")
    if len(arrays) == 1:
        return cloud
    normals = _numbers(arrays[1], f"the array '{printable(str(normals_key))}'")
    if normals.ndim != 2 or normals.shape[1] != 3 or len(normals) != len(cloud.points):
        raise CloudFormatError(
            f"its normals have shape {normals.shape}, its points {cloud.points.shape}; both are (n, 3)"
        )
    return cloud_of(cloud.points, normals)


def _npz_keys(keys: list[str]) -> tuple[str, str | None]:
    points = next((key for key in _POINT_KEYS if key in keys), None)
    if points is None and len(keys) == 1:
        return keys[0], None
    if points is None:
        found = quote(", ".join(keys), 80)
        raise CloudFormatError(f"it has the arrays {found} but no 'points'; save it with points= and normals=")
    return points, next((key for key in _NORMAL_KEYS if key in keys), None)


def _read_array(stream: Any, size: int) -> NDArray[Any]:
    """An array in NPY format; `size` bytes are there at most, and no more are ever allocated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's parser warns about headers that are refused below
            version = np.lib.format.read_magic(stream)
            reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = reader(stream)
    except Exception as error:  # noqa: BLE001 - the header is a Python literal, with every error of a parser
        raise CloudFormatError(f"its NPY header cannot be read ({reason(error)}); save it again with numpy") from None
    if dtype.hasobject:
        raise CloudFormatError("it holds Python objects, which are never loaded; save the array as float64")
    count = 1
    for length in shape:
        count *= max(int(length), 0)
    room = size - stream.tell()
    if dtype.itemsize == 0 or count * dtype.itemsize > room:
        raise broken_promise(count, room // max(dtype.itemsize, 1), "numbers")
    data = stream.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise broken_promise(count, len(data) // dtype.itemsize, "numbers")
    flat = np.frombuffer(data, dtype=dtype, count=count)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _numbers(array: NDArray[Any], what: str) -> NDArray[Any]:
    if array.dtype.kind not in "fiu":
        raise CloudFormatError(f"{what} has the type {quote(str(array.dtype))}; save it as float64")
    return array


def _array_cloud(array: NDArray[Any], what: str) -> PointCloud:
    if array.dtype.names and array.ndim == 1:
        points, normals = named_columns(array.dtype.names)
        columns = [_numbers(array[array.dtype.names[i]], what) for i in points + (normals or [])]
        if any(column.ndim != 1 for column in columns):
            raise CloudFormatError(f"{what} has fields that are not single numbers; save it as (n, 3) or (n, 6)")
        table = np.stack(columns, axis=1).astype(np.float64)
        return cloud_of(table[:, :3], table[:, 3:] if normals else None)
    if array.ndim != 2 or array.shape[1] < 3:
        raise CloudFormatError(f"{what} has shape {array.shape}; points are (n, 3), with normals (n, 6)")
    return unnamed_columns(_numbers(array, what))
