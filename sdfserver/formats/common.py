"""What the readers share: one-line messages, the meaning of columns, arrays into a PointCloud.

Every message quotes what was found and says what to do; the caller puts the file's name in front.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.cloud import PointCloud
from sdfserver.errors import CloudFormatError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def named_columns(names: Sequence[str]) -> tuple[list[int], list[int] | None]:
    """Where x, y, z and the normal's components are among the names, in any order and case."""
    where: dict[str, int] = {}
    for index, name in enumerate(names):
        where.setdefault(name.lower(), index)
    missing = [axis for axis in "xyz" if axis not in where]
    if missing:
        found = quote(", ".join(names), 80)
        raise CloudFormatError(f"no column is named {' or '.join(missing)} among {found}; name the columns x, y, z")
    normals = next(([where[name] for name in three] for three in _NORMAL_NAMES if set(three) <= where.keys()), None)
    return [where[axis] for axis in "xyz"], normals


def unnamed_columns(table: NDArray[Any]) -> PointCloud:
    """Points from the first three columns; normals where a later triple looks like normals and not like colours.

    Six columns: the last three, unless none is negative and they are not unit vectors either, as colours are.
    More: the first triple behind optional intensity or colours of which 99 in 100 rows are unit vectors.
    """
    width = table.shape[1]
    if not len(table):
        return cloud_of(table[:, :3], None)
    for start in (3,) if width <= 6 else (3, 4, 6, 7):
        triple = table[:, start : start + 3]
        if triple.shape[1] < 3:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            unit = np.abs(np.einsum("ij,ij->i", triple, triple, dtype=np.float64, casting="unsafe") - 1) < 0.02
        if np.mean(unit) > 0.99 or (width == 6 and not np.all(triple >= 0)):
            return cloud_of(table[:, :3], triple)
    return cloud_of(table[:, :3], None)


def cloud_of(points: NDArray[Any], normals: NDArray[Any] | None) -> PointCloud:
    """A PointCloud of any numbers, as float64 arrays that may be written to."""
    return PointCloud(points=_owned(points), normals=None if normals is None else _owned(normals))


def _owned(table: NDArray[Any]) -> Floats:
    return np.require(table, np.float64, ["C_CONTIGUOUS", "WRITEABLE"])
