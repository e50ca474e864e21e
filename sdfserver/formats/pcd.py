"""PCD, the Point Cloud Library's format, in its three encodings."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.formats.common import Floats, broken_promise, cloud_of, named_columns, quote, whole_number
from sdfserver.formats.text import number_table, plain_text

_MAX_HEADER = 1 << 20

_PCD_TYPES = {"F": "f", "I": "i", "U": "u"}


@dataclass(frozen=True, kw_only=True)
class _PcdHeader:
    names: list[str]
    dtypes: list[np.dtype[Any]]
    counts: list[int]
    points: int
    encoding: str


def read_pcd(data: bytes) -> PointCloud:
    """Points, and normals from normal_x, normal_y, normal_z; rows without any coordinate were not measured."""
    header, offset = _pcd_header(data)
    points_at, normals_at = named_columns(header.names)
    wanted = points_at + (normals_at or [])
    if any(header.counts[i] != 1 for i in wanted):
        raise CloudFormatError("its header gives a coordinate a COUNT other than 1; export the cloud again")
    columns = {"ascii": _pcd_ascii, "binary": _pcd_binary, "binary_compressed": _pcd_compressed}[header.encoding]
    table = columns(data, offset, header, wanted)
    measured = ~np.isnan(table[:, :3]).all(axis=1)
    if not measured.all():
        table = table[measured]
    return cloud_of(table[:, :3], table[:, 3:] if normals_at else None)


def _pcd_header(data: bytes) -> tuple[_PcdHeader, int]:
    end = re.search(rb"(?:^|\n)DATA[ \t]+(\w+)[ \t]*\r?\n", data[:_MAX_HEADER])
    if end is None:
        raise CloudFormatError(
            f"it starts with {quote(data[:12])} and has no line 'DATA ...': it is no PCD, or cut off"
        )
    entries: dict[str, list[bytes]] = {}
    for line in data[: end.start()].split(b"\n"):
        words = line.split()
        if words and not words[0].startswith(b"#"):
            entries[words[0].decode("latin-1").upper()] = words[1:]
    names = [word.decode("latin-1") for word in entries.get("FIELDS", [])]
    sizes = [whole_number(word, "a SIZE in its header") for word in entries.get("SIZE", [])]
    kinds = [word.decode("latin-1") for word in entries.get("TYPE", [])]
    counts = [whole_number(word, "a COUNT in its header") for word in entries.get("COUNT", [b"1"] * len(names))]
    if not names or not len(names) == len(sizes) == len(kinds) == len(counts):
        raise CloudFormatError(
            f"its header has {len(names)} FIELDS, {len(sizes)} SIZE, {len(kinds)} TYPE and {len(counts)} COUNT; "
            "all must be as many: export the cloud again"
        )
    for kind, size in zip(kinds, sizes, strict=True):
        if kind not in _PCD_TYPES or size not in ((4, 8) if kind == "F" else (1, 2, 4, 8)):
            raise CloudFormatError(f"its header has the type {quote(kind)} of size {size}; export the cloud again")
    points = 1
    for word in entries.get("POINTS") or entries.get("WIDTH", [])[:1] + entries.get("HEIGHT", [])[:1] or [b"missing"]:
        points *= whole_number(word, "its number of POINTS")
    encoding = end[1].decode("latin-1")
    if encoding not in ("ascii", "binary", "binary_compressed"):
        raise CloudFormatError(
            f"its DATA is {quote(encoding)}, not ascii, binary or binary_compressed; export it again"
        )
    dtypes = [np.dtype(f"<{_PCD_TYPES[kind]}{size}") for kind, size in zip(kinds, sizes, strict=True)]
    return _PcdHeader(names=names, dtypes=dtypes, counts=counts, points=points, encoding=encoding), end.end()


def _pcd_ascii(data: bytes, offset: int, header: _PcdHeader, wanted: list[int]) -> Floats:
    body = plain_text(data[offset:])
    if not body.strip() or header.points > len(body):
        raise broken_promise(header.points, body.count(b"\n"), "points")
    starts = np.cumsum([0, *header.counts])
    table = number_table(body, columns=[int(starts[i]) for i in wanted], first_line=data.count(b"\n", 0, offset) + 1)
    if len(table) != header.points:
        raise broken_promise(header.points, len(table), "points")
    return table


def _pcd_binary(data: bytes, offset: int, header: _PcdHeader, wanted: list[int]) -> Floats:
    widths = [dtype.itemsize * count for dtype, count in zip(header.dtypes, header.counts, strict=True)]
    row, starts = sum(widths), np.cumsum([0, *widths])
    room = (len(data) - offset) // max(row, 1)
    if header.points > room or row > len(data):
        raise broken_promise(max(header.points, 1), room, "points")
    fields = {f"{i}": (header.dtypes[column], int(starts[column])) for i, column in enumerate(wanted)}
    dtype = np.dtype({"names": [*fields], "formats": [f[0] for f in fields.values()],
                      "offsets": [f[1] for f in fields.values()], "itemsize": row})  # fmt: skip
    table = np.frombuffer(data, dtype=dtype, count=header.points, offset=offset)
    return _table([table[name] for name in fields])


def _pcd_compressed(data: bytes, offset: int, header: _PcdHeader, wanted: list[int]) -> Floats:
    """One field after another, compressed with LZF."""
    widths = [dtype.itemsize * count for dtype, count in zip(header.dtypes, header.counts, strict=True)]
    packed, size = (int.from_bytes(data[offset + i : offset + i + 4], "little") for i in (0, 4))
    if header.points * sum(widths) != size:
        raise broken_promise(header.points, size // max(sum(widths), 1), "points")
    if packed > len(data) - offset - 8:
        raise broken_promise(packed, max(len(data) - offset - 8, 0), "compressed bytes")
    unpacked = _lzf_unpacked(data[offset + 8 : offset + 8 + packed], size)
    starts = np.cumsum([0, *widths]) * header.points
    columns = [np.frombuffer(unpacked, header.dtypes[i], count=header.points, offset=int(starts[i])) for i in wanted]
    return _table(columns)


def _table(columns: list[NDArray[Any]]) -> Floats:
    table = np.empty((len(columns[0]), len(columns)))
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def _lzf_unpacked(data: bytes, size: int) -> bytes:
    """LZF (Lehmann's liblzf): runs of up to 32 literal bytes, and copies of 3 to 264 bytes from up to 8192 back."""
    out = bytearray()
    at = 0
    try:
        while at < len(data) and len(out) <= size:
            control = data[at]
            at += 1
            if control < 32:
                out += data[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            length += 2
            back = ((control & 31) << 8) + data[at] + 1
            at += 1
            start = len(out) - back
            if start < 0:
                raise IndexError
            # A copy may reach into what it writes: then the bytes there repeat.
            out += out[start : start + length] if back >= length else (out[start:] * (length // back + 1))[:length]
    except IndexError:
        at = -1
    if at != len(data) or len(out) != size:
        raise CloudFormatError(
            f"its compressed data is corrupt: {len(out)} of {size} bytes could be unpacked; export it again"
        )
    return bytes(out)
