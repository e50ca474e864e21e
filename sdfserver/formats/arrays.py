"""NPY and NPZ: numpy's own files, read without pickle."""

import io
import math
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.files import printable, reason
from sdfserver.formats.common import (
    broken_promise,
    byte_colors,
    check_expansion,
    cloud_of,
    named_columns,
    quote,
    unnamed_columns,
)

_POINT_KEYS = ("points", "xyz", "vertices", "positions", "position", "pos", "coords", "pts")
_NORMAL_KEYS = ("normals", "normal", "vertex_normals", "n")
_COLOR_KEYS = ("colors", "colours", "color", "colour", "rgb", "rgba", "vertex_colors")


def read_npy(data: bytes) -> PointCloud:
    """An (n, 3) array of points, (n, 6) with normals or colours, or a structured array with x, y, z."""
    stream = io.BytesIO(data)
    header = _read_header(stream)
    return _array_cloud(_read_array(stream, header, len(data), data), "the array")


def read_npz(data: bytes) -> PointCloud:
    """The arrays 'points', 'normals' and 'colors' of an archive, or its only array.

    Colours are (n, 3) or (n, 4); an array of another shape or type under that name is not looked at.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy").lower(): info for info in archive.infolist()}
            points_key, normals_key = _npz_keys(list(members))
            colors_key = _colors_key(archive, members, members[points_key])
            used = {key: members[key] for key in (points_key, normals_key, colors_key) if key is not None}
            _check_packing(archive, list(used.values()), len(data))
            arrays = {}
            for key, info in used.items():
                with archive.open(info) as stream:
                    arrays[key] = _read_array(stream, _read_header(stream), info.file_size)
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises a dozen kinds on a damaged archive
        raise CloudFormatError(f"it is not a sound NPZ archive ({reason(error)}); save it again") from None
    cloud = _array_cloud(arrays[points_key], f"the array '{printable(points_key)}'")
    if colors_key is not None:
        cloud = replace(cloud, colors=byte_colors([*arrays[colors_key].T[:3]]))
    if normals_key is None:
        return cloud
    normals = _numbers(arrays[normals_key], f"the array '{printable(normals_key)}'")
    if normals.ndim != 2 or normals.shape[1] != 3 or len(normals) != len(cloud.points):
        raise CloudFormatError(
            f"its normals have shape {normals.shape}, its points {cloud.points.shape}; both are (n, 3)"
        )
    return cloud_of(cloud.points, normals, cloud.colors)


def _colors_key(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], points: zipfile.ZipInfo) -> str | None:
    """The array of colours, where there is one with a row of numbers for each point."""
    key = next((key for key in _COLOR_KEYS if key in members), None)
    if key is None or members[key] is points:
        return None
    shapes = []
    for info in (points, members[key]):
        try:
            with archive.open(info) as stream:
                shape, _, dtype = _read_header(stream)
        except CloudFormatError:
            return None  # of the points it is said later
        shapes.append(shape)
    fits = len(shape) == 2 and shape[1] in (3, 4) and shape[:1] == shapes[0][:1] and dtype.kind in "fiu"
    return key if fits else None


def read_rows(stream: BinaryIO, names: Collection[str], most: int) -> dict[str, NDArray[np.float64]]:
    """Those of the arrays `names` that an NPZ has, (n, 3) of numbers each, where n is `most` at most.

    Nothing is allocated for what is not wanted, too long or no numbers: headers and directory are looked at first.
    """
    try:
        _check_directory(stream)
        with zipfile.ZipFile(stream) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if unknown := [name for name in members if name not in names]:
                raise CloudFormatError(f"it has an array {quote(unknown[0])}; only {', '.join(names)} are known")
            return {name: _read_rows(archive, info, most) for name, info in members.items()}
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises a dozen kinds on a damaged archive
        raise CloudFormatError(f"it is not a sound NPZ archive ({reason(error)}); save it with numpy.savez") from None


def _read_rows(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> NDArray[np.float64]:
    name = printable(info.filename.removesuffix(".npy"))
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CloudFormatError(f"the array '{name}' is neither stored nor deflated; save it with numpy.savez")
    with archive.open(info) as stream:
        header = _read_header(stream)
        shape, _, dtype = header
        if len(shape) != 2 or shape[1] != 3 or dtype.kind not in "fiu":
            raise CloudFormatError(
                f"the array '{name}' has shape {quote(str(shape))} of {quote(str(dtype))}; it must be (n, 3) numbers"
            )
        if shape[0] > most:
            raise CloudFormatError(f"the array '{name}' has {shape[0]:,} rows; send {most:,} at a time, or fewer")
        return _read_array(stream, header, info.file_size).astype(np.float64)


_END_BYTES, _MAX_DIRECTORY = 22, 1 << 16


def _check_directory(stream: BinaryIO) -> None:
    """Refuse an archive whose directory is larger than that of any numpy writes, which zipfile reads as a whole."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - _END_BYTES - 20))
    tail = stream.read()
    locator, end = tail[:-_END_BYTES], tail[-_END_BYTES:]
    if not end.startswith(b"PK\5\6") or locator.startswith(b"PK\6\7"):
        raise CloudFormatError("it is not an NPZ archive as numpy.savez writes it; save it with that")
    directory = int.from_bytes(end[12:16], "little")
    if directory > _MAX_DIRECTORY:
        raise CloudFormatError(f"its directory has {directory:,} bytes; save the arrays with numpy.savez")
    stream.seek(0)


def _check_packing(archive: zipfile.ZipFile, used: list[zipfile.ZipInfo], packed: int) -> None:
    """Refuse arrays that become too many numbers for the size of the archive, before they are unpacked."""
    expanded = 0
    for info in used:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # numpy writes no other, and what those allocate is up to the file.
            raise CloudFormatError("it is neither stored nor deflated; save it again with numpy")
        with archive.open(info) as stream:
            shape, _, dtype = _read_header(stream)
        numbers = math.prod(shape) * max(len(dtype.names or ()), 1)
        expanded += max(info.file_size, 8 * numbers)
    check_expansion(packed, expanded)


def _npz_keys(keys: list[str]) -> tuple[str, str | None]:
    points = next((key for key in _POINT_KEYS if key in keys), None)
    if points is None and len(keys) == 1:
        return keys[0], None
    if points is None:
        found = quote(", ".join(keys), 80)
        raise CloudFormatError(f"it has the arrays {found} but no 'points'; save it with points= and normals=")
    return points, next((key for key in _NORMAL_KEYS if key in keys), None)


_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def _read_header(stream: Any) -> _Header:
    """Shape, whether columns come first, and type of an array in NPY format."""
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
    if any(length < 0 for length in shape) or dtype.subdtype is not None:
        raise CloudFormatError(
            f"its NPY header has the shape {quote(str(shape))} of {quote(str(dtype))}; save it again"
        )
    return tuple(map(int, shape)), bool(fortran), dtype


def _read_array(stream: Any, header: _Header, size: int, held: bytes | None = None) -> NDArray[Any]:
    """The array that follows its header; `size` bytes are there at most, and no more are ever allocated.

    held: all that the stream has, where it is in memory already.
    """
    shape, fortran, dtype = header
    count = math.prod(shape)
    room = size - stream.tell()
    if dtype.itemsize == 0 or count * dtype.itemsize > room:
        raise broken_promise(count, room // max(dtype.itemsize, 1), "numbers")
    if held is not None:
        flat = np.frombuffer(held, dtype=dtype, count=count, offset=stream.tell())
    else:
        data = stream.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise broken_promise(count, len(data) // dtype.itemsize, "numbers")
        flat = np.frombuffer(data, dtype=dtype, count=count)
    try:
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except ValueError as error:  # more dimensions, or longer ones beside an empty one, than numpy has
        raise CloudFormatError(f"its shape cannot be had ({reason(error)}); save points as (n, 3)") from None


def _numbers(array: NDArray[Any], what: str) -> NDArray[Any]:
    if array.dtype.kind not in "fiu":
        raise CloudFormatError(f"{what} has the type {quote(str(array.dtype))}; save it as float64")
    return array


def _array_cloud(array: NDArray[Any], what: str) -> PointCloud:
    if array.dtype.names and array.ndim == 1:
        found = named_columns(array.dtype.names)
        columns = [_numbers(array[array.dtype.names[i]], what) for i in found.shape]
        if any(column.ndim != 1 for column in columns):
            raise CloudFormatError(f"{what} has fields that are not single numbers; save it as (n, 3) or (n, 6)")
        table = np.stack(columns, axis=1).astype(np.float64)
        colors = [array[array.dtype.names[i]] for i in found.colors or []]
        usable = colors and all(column.ndim == 1 for column in colors)
        return cloud_of(table[:, :3], table[:, 3:] if found.normals else None, byte_colors(colors) if usable else None)
    if array.ndim != 2 or array.shape[1] < 3:
        raise CloudFormatError(f"{what} has shape {array.shape}; points are (n, 3), with normals (n, 6)")
    return unnamed_columns(_numbers(array, what))
