"""PCD, the Point Cloud Library's format, in its three encodings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError
from sdfserver.formats.common import Colors, broken_promise, byte_colors, cloud_of, named_columns, quote, whole_number
from sdfserver.formats.text import number_tables, plain_text

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
    """Points, normals from normal_x, normal_y, normal_z, and colours from rgb or rgba, or from columns of their own.

    Rows without any coordinate were not measured.
    """
    header, offset = _pcd_header(data)
    found = named_columns(header.names)
    wanted = found.shape
    if any(header.counts[i] != 1 for i in wanted):
        raise CloudFormatError("its header gives a coordinate a COUNT other than 1; export the cloud again")
    packed = _packed_color(header)
    colors_at = found.colors if packed is None else [packed]
    if any(header.counts[i] != 1 for i in colors_at or []):
        colors_at = None
    read = {"ascii": _pcd_ascii, "binary": _pcd_binary, "binary_compressed": _pcd_compressed}[header.encoding]
    columns, more = read(data, offset, header, wanted, colors_at or [])
    cloud = cloud_of(
        np.stack(columns[:3], axis=1, dtype=np.float64, casting="unsafe"),
        np.stack(columns[3:], axis=1, dtype=np.float64, casting="unsafe") if found.normals else None,
        None if not more else byte_colors(more) if packed is None else _unpacked_color(more[0], header.dtypes[packed]),
    )
    measured = np.flatnonzero(~np.isnan(cloud.points).all(axis=1))
    return cloud if len(measured) == len(cloud.points) else cloud.take(measured)


def _packed_color(header: _PcdHeader) -> int | None:
    """The field whose 32 bits hold 8 for each of red, green and blue, below 8 that are of no use here."""
    names = [name.lower() for name in header.names]
    fields = [names.index(name) for name in ("rgb", "rgba") if name in names]
    return next((i for i in fields if header.dtypes[i].itemsize == 4), None)


def _unpacked_color(column: NDArray[Any], declared: np.dtype[Any]) -> Colors:
    """Colours from the field as it lies in a binary file, or as numbers of text, which stand for the declared type."""
    if column.dtype != declared:
        number = np.nan_to_num(column, nan=0.0, posinf=0.0, neginf=0.0)
        limits = None if declared.kind == "f" else np.iinfo(declared)
        column = number.astype(declared) if limits is None else number.clip(limits.min, limits.max).astype(declared)
    bits = np.ascontiguousarray(column).view("<u4")
    colors = np.empty((len(bits), 3), np.uint8)
    for i, shift in enumerate((16, 8, 0)):
        colors[:, i] = bits >> np.uint32(shift) & np.uint32(255)
    return colors


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


_Found = tuple[Sequence[NDArray[Any]], Sequence[NDArray[Any]]]
"""The columns that are wanted, and more of them, or none of those where a row lacks one."""


def _pcd_ascii(data: bytes, offset: int, header: _PcdHeader, wanted: list[int], more: list[int]) -> _Found:
    body = plain_text(data[offset:])
    if not body.strip() or header.points > len(body):
        raise broken_promise(header.points, body.count(b"\n"), "points")
    starts = np.cumsum([0, *header.counts])
    table, others = number_tables(
        body,
        [int(starts[i]) for i in wanted],
        [int(starts[i]) for i in more],
        first_line=data.count(b"\n", 0, offset) + 1,
    )
    if len(table) != header.points:
        raise broken_promise(header.points, len(table), "points")
    return list(table.T), [] if others is None else list(others.T)


def _pcd_binary(data: bytes, offset: int, header: _PcdHeader, wanted: list[int], more: list[int]) -> _Found:
    widths = [dtype.itemsize * count for dtype, count in zip(header.dtypes, header.counts, strict=True)]
    row, starts = sum(widths), np.cumsum([0, *widths])
    room = (len(data) - offset) // max(row, 1)
    if header.points > room or row > len(data):
        raise broken_promise(max(header.points, 1), room, "points")
    fields = {f"{i}": (header.dtypes[column], int(starts[column])) for i, column in enumerate(wanted + more)}
    dtype = np.dtype({"names": [*fields], "formats": [f[0] for f in fields.values()],
                      "offsets": [f[1] for f in fields.values()], "itemsize": row})  # fmt: skip
    table = np.frombuffer(data, dtype=dtype, count=header.points, offset=offset)
    columns = [table[name] for name in fields]
    return columns[: len(wanted)], columns[len(wanted) :]


def _pcd_compressed(data: bytes, offset: int, header: _PcdHeader, wanted: list[int], more: list[int]) -> _Found:
    """One field after another, compressed with LZF."""
    widths = [dtype.itemsize * count for dtype, count in zip(header.dtypes, header.counts, strict=True)]
    packed, size = (int.from_bytes(data[offset + i : offset + i + 4], "little") for i in (0, 4))
    if header.points * sum(widths) != size:
        raise broken_promise(header.points, size // max(sum(widths), 1), "points")
    if packed > len(data) - offset - 8:
        raise broken_promise(packed, max(len(data) - offset - 8, 0), "compressed bytes")
    unpacked = _lzf_unpacked(data[offset + 8 : offset + 8 + packed], size)
    starts = np.cumsum([0, *widths]) * header.points
    columns = [
        np.frombuffer(unpacked, header.dtypes[i], count=header.points, offset=int(starts[i])) for i in wanted + more
    ]
    return columns[: len(wanted)], columns[len(wanted) :]


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
