"""What the readers share: one-line messages, the meaning of columns, arrays into a PointCloud.

Every message quotes what was found and says what to do; the caller puts the file's name in front.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Colors = NDArray[np.uint8]


def quote(found: bytes | str, limit: int = 40) -> str:
    """What was found, quoted on one line and cut to `limit` characters."""
    text = found.decode("latin-1") if isinstance(found, bytes) else found
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def whole_number(token: bytes, what: str) -> int:
    """The number a token stands for, which `what` names."""
    if not re.fullmatch(rb"\d{1,18}", token):
        raise CloudFormatError(f"{what} is {quote(token)}, not a whole number; export the cloud again")
    return int(token)


def broken_promise(promised: int, there: int, what: str) -> CloudFormatError:
    """The error for a header that promises more than the file holds."""
    found = f"has room for {there}" if there < promised else f"holds {there}"
    return CloudFormatError(
        f"the header promises {promised} {what}, but the file {found}; it is truncated or corrupt: "
        "export or copy it again"
    )


MAY_EXPAND = 1 << 26
"""Bytes of float64 to which the numbers of any packed file may grow, however small it is."""
_MOST_PACKED = 50
"""Beyond that, how many bytes of them there may be for each byte of the file: scans are packed to a twentieth."""


def check_expansion(packed: int, expanded: int) -> None:
    """Refuse a packed file of `packed` bytes that promises `expanded` bytes of numbers, where no real one does."""
    if expanded > max(MAY_EXPAND, _MOST_PACKED * packed):
        raise CloudFormatError(f"{packed} bytes would expand to {expanded}; save it again, uncompressed")


_NORMAL_NAMES = (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"), ("normalx", "normaly", "normalz"))
_COLOR_NAMES = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("rf", "gf", "bf"),
)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where the components of points, normals and colours are among columns; None for what is not there."""

    points: list[int]
    normals: list[int] | None
    colors: list[int] | None

    @property
    def shape(self) -> list[int]:
        """The columns of points and normals, one after the other."""
        return self.points + (self.normals or [])


def named_columns(names: Sequence[str]) -> Columns:
    """Where x, y, z and the components of normals and colours are among the names, in any order and case."""
    where: dict[str, int] = {}
    for index, name in enumerate(names):
        where.setdefault(name.lower(), index)
    missing = [axis for axis in "xyz" if axis not in where]
    if missing:
        found = quote(", ".join(names), 80)
        raise CloudFormatError(f"no column is named {' or '.join(missing)} among {found}; name the columns x, y, z")

    def first(known: Sequence[Sequence[str]]) -> list[int] | None:
        return next(([where[name] for name in three] for three in known if set(three) <= where.keys()), None)

    return Columns(points=[where[axis] for axis in "xyz"], normals=first(_NORMAL_NAMES), colors=first(_COLOR_NAMES))


def byte_colors(columns: Sequence[NDArray[Any]], *, whole: bool | None = None) -> Colors | None:
    """Red, green and blue (n, 3) from a column (n,) of numbers for each; None where they are no colours.

    Whole numbers count to 255, or to 65535 where one of them is larger: scanners keep 8 bits in 16. Others are shares
    of one, but for rounding, where none is larger. Negative, larger or missing values are no colours.

    whole: whether the numbers are of a whole type; None, the columns' own tells.
    """
    if any(column.dtype.kind not in "fiu" for column in columns):
        return None
    if not len(columns[0]):
        return np.empty((0, 3), np.uint8)
    low, top = np.min([column.min() for column in columns]), np.max([column.max() for column in columns])
    if not (low >= 0 and top <= _MOST_COLOR):  # NaN is neither
        return None
    whole = all(column.dtype.kind in "iu" for column in columns) if whole is None else whole
    colors = np.empty((len(columns[0]), 3), np.uint8)
    for i, column in enumerate(columns):
        if top <= _FULL and not whole:
            colors[:, i] = np.rint(np.minimum(column, 1) * 255.0)
        elif top <= 255:
            colors[:, i] = column if column.dtype.kind in "iu" else np.rint(column)
        else:
            colors[:, i] = column // np.uint16(256)  # as 256 * v and as 257 * v an 8-bit v comes back
    return colors


_FULL, _MOST_COLOR = 1.01, 65535


def unnamed_columns(table: NDArray[Any]) -> PointCloud:
    """Points from the first three columns; normals where a later triple looks like normals and not like colours.

    Six columns: the last three, unless none is negative and they are not unit vectors either, as colours are.
    More: the first triple behind optional intensity or colours of which 99 in 100 rows are unit vectors.
    Colours are what lies between points and normals, or behind both, or alone behind the points, with an intensity
    before it, as in PTS, or behind it: whole numbers up to 255, or shares of one.
    """
    width = table.shape[1]
    if not len(table):
        return cloud_of(table[:, :3])
    for start in (3,) if width <= 6 else (3, 4, 6, 7):
        triple = table[:, start : start + 3]
        if triple.shape[1] < 3:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            unit = np.abs(np.einsum("ij,ij->i", triple, triple, dtype=np.float64, casting="unsafe") - 1) < 0.02
        if np.mean(unit) > 0.99 or (width == 6 and not np.all(triple >= 0)):
            return cloud_of(table[:, :3], triple, _unnamed_colors(table, _COLORS_BESIDE[start]))
    return cloud_of(table[:, :3], None, _unnamed_colors(table, _COLORS_ALONE.get(width, ())))


_COLORS_BESIDE = {3: (6,), 4: (7,), 6: (3,), 7: (4, 3)}
"""Where colours may begin, by where the normals do."""
_COLORS_ALONE = {6: (3,), 7: (4, 3)}
"""Where they may begin without normals, by the number of columns: of wider tables nobody knows."""
_LEAST_TOP = 32
"""The largest of whole numbers that are colours is no less: classes and counts of echoes are."""


def _unnamed_colors(table: NDArray[Any], starts: Sequence[int]) -> Colors | None:
    """The first triple of columns that looks like colours."""
    for start in starts:
        columns = [table[:, i] for i in range(start, min(start + 3, table.shape[1]))]
        if len(columns) < 3:
            continue
        top = max(column.max() for column in columns)
        whole = top > 1 and all((column == np.floor(column)).all() for column in columns)
        if _LEAST_TOP <= top <= 255 if whole else 0 < top <= _FULL:
            colors = byte_colors(columns)
            if colors is not None:
                return colors
    return None


def cloud_of(points: NDArray[Any], normals: NDArray[Any] | None = None, colors: Colors | None = None) -> PointCloud:
    """A PointCloud of any numbers, as float64 arrays that may be written to; colours as byte_colors makes them."""
    return PointCloud(points=_owned(points), normals=None if normals is None else _owned(normals), colors=colors)


def _owned(table: NDArray[Any]) -> Floats:
    return np.require(table, np.float64, ["C_CONTIGUOUS", "WRITEABLE"])
