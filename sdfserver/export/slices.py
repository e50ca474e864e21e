"""Slices: where a plane cuts the surface, as polylines, written as SVG or DXF. World units, numpy and scikit-image.

A drawing's coordinates are those along the plane's two directions. Closed curves run counter-clockwise around the
inside, and clockwise around a hole in it; a curve is open where the surface leaves the field's cube.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdfserver.errors import ConfigError
from sdfserver.queries import FieldQueries

Floats = NDArray[np.float64]
Axis = Literal["x", "y", "z"]

MIN_CELLS, MAX_CELLS = 8, 4096
ROWS_AT_A_TIME = 1 << 16
FAR = 100
"""Coordinates this many times larger than the drawing are shifted in an SVG: viewers compute in single precision."""
MARGIN = 0.05
DIGITS = 7
"""Significant digits of a position within the drawing."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plane:
    """The plane through `origin` (3,) along the unit vectors `right` and `up` (3,), seen from where `normal` points."""

    origin: Floats
    right: Floats
    up: Floats

    @property
    def normal(self) -> Floats:
        """The unit vector (3,) towards the viewer."""
        return np.cross(self.right, self.up)

    @classmethod
    def across(cls, axis: Axis, at: float) -> "Plane":
        """The plane axis = at, drawn in the two other coordinates, which keep their values: (x, y), (x, z), (y, z)."""
        if not math.isfinite(at):
            raise ConfigError(f"the place of a slice is {at}; it must be finite")
        i = "xyz".index(axis)
        right, up = (np.eye(3)[j] for j in range(3) if j != i)
        return cls(origin=at * np.eye(3)[i], right=right, up=up)

    @classmethod
    def through(cls, origin: ArrayLike, normal: ArrayLike) -> "Plane":
        """The plane through `origin` (3,) across `normal` (3,), of any length but zero; z is up as far as it can be.

        The drawing's coordinates are relative to `origin`.
        """
        o, n = (np.asarray(value, dtype=np.float64) for value in (origin, normal))
        if o.shape != (3,) or n.shape != (3,) or not np.isfinite([o, n]).all() or not n.any():
            raise ConfigError(
                f"the plane has the origin {_shown(o)} and the normal {_shown(n)}; give three finite numbers for each, "
                "and a normal that points somewhere"
            )
        n = n / np.abs(n).max()
        n /= np.linalg.norm(n)
        right = np.cross([0.0, 0.0, 1.0], n)
        length = np.linalg.norm(right)
        right = right / length if length > 1e-9 else np.array([1.0, 0.0, 0.0])
        return cls(origin=o, right=right, up=np.cross(n, right))

    def to_world(self, points: Floats) -> Floats:
        """Points of the drawing (n, 2) in space (n, 3)."""
        out: Floats = self.origin + points[:, :1] * self.right + points[:, 1:] * self.up
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Curve:
    """A polyline: points (n, 2) in the drawing's coordinates; the first is not repeated at the end of a closed one."""

    points: Floats
    closed: bool

    @property
    def length(self) -> float:
        """How long it is."""
        ends = np.concatenate([self.points, self.points[:1]]) if self.closed else self.points
        return float(np.linalg.norm(np.diff(ends, axis=0), axis=1).sum())

    @property
    def area(self) -> float:
        """The area within a closed curve, negative where it goes around a hole; 0 for an open one."""
        if not self.closed:
            return 0.0
        x, y = (self.points - self.points.mean(axis=0)).T
        return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Slice:
    """What a plane cuts out of a surface.

    low, high: (2,) the part of the drawing that was looked at. spacing: the width of a cell of its grid, which finds
    what is wider than two of them.
    """

    plane: Plane
    curves: tuple[Curve, ...]
    low: Floats
    high: Floats
    spacing: float

    @property
    def area(self) -> float:
        """The area of the inside, if all curves are closed."""
        return sum(curve.area for curve in self.curves)

    @property
    def length(self) -> float:
        """How long all curves are together."""
        return sum(curve.length for curve in self.curves)


def slice_field(field: FieldQueries, plane: Plane, *, resolution: int = 256) -> Slice:
    """Where `plane` cuts the surface phi = 0, within the field's cube; without curves where it does not.

    Marching squares on `resolution` cells along the longer side, by scikit-image; then each vertex is moved along its
    edge of the grid to where phi is zero, to within what float32 can tell.
    """
    if not MIN_CELLS <= resolution <= MAX_CELLS:
        raise ConfigError(f"the resolution of a slice is {resolution}; it must be from {MIN_CELLS} to {MAX_CELLS}")
    scale = field.frame.scale
    origin = field.frame.to_unit(plane.origin[None])[0]
    window = _window(origin, plane)
    if window is None:
        return Slice(plane=plane, curves=(), low=np.zeros(2), high=np.zeros(2), spacing=0.0)
    low, size = window
    h = float(size.max()) / resolution
    columns, rows = (np.ceil(size / h - 1e-9).astype(int) + 1).tolist()
    grid = _Lattice(origin=origin + low[0] * plane.right + low[1] * plane.up, right=plane.right, up=plane.up, h=h)
    phi, within = _values(field, grid, rows, columns)
    curves = [
        Curve(points=(low + h * places) / scale, closed=closed)
        for places, closed in _outlines(field, grid, phi, within)
    ]
    return Slice(plane=plane, curves=tuple(curves), low=low / scale, high=(low + size) / scale, spacing=h / scale)


def to_svg(cut: Slice, *, whole: bool = False) -> str:
    """The slice as SVG, its viewBox in world units, y upwards; one unit is one of the cloud's.

    whole: show all that was looked at, and not just the outlines: the same view wherever the plane is.

    Coordinates far from the origin are shifted: `data-offset` says by how much; add it to get the plane's own.
    """
    low, high = (cut.low, cut.high) if whole else _extent(cut)
    size = float((high - low).max()) or 1.0
    low, high = low - MARGIN * size, high + MARGIN * size
    offset = np.zeros(2)
    if max(float(np.abs([low, high]).max()), size) > FAR * size:
        unit = 10.0 ** math.floor(math.log10(size))
        offset = np.floor(low / unit) * unit
    text = _Numbers(low - offset, high - offset)
    box = f"{text(low[0] - offset[0])} {text(offset[1] - high[1])} {text(high[0] - low[0])} {text(high[1] - low[1])}"
    paths = []
    for closed, paint in ((True, 'fill="#4a86c8" fill-opacity=".25" fill-rule="evenodd"'), (False, 'fill="none"')):
        path = " ".join(
            "M" + " L".join(f"{text(x)},{text(y)}" for x, y in curve.points - offset) + (" Z" if closed else "")
            for curve in cut.curves
            if curve.closed == closed
        )
        if path:
            paths.append(f'<path vector-effect="non-scaling-stroke" {paint} d="{path}"/>\n')
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" data-offset="{offset[0]:.17g} {offset[1]:.17g}">\n'
        f"<title>{_title(cut)}</title>\n"
        '<g transform="scale(1 -1)" stroke="#4a86c8" stroke-width="1.5" stroke-linejoin="round">\n'
        f"{''.join(paths)}</g>\n</svg>\n"
    )


def to_dxf(cut: Slice) -> str:
    """The slice as DXF R12, which every CAD program reads: polylines in the plane's coordinates, without a unit.

    Written here: the format is pairs of lines, and packages that write it bring fifty megabytes.
    """
    low, high = _extent(cut)
    text = _Numbers(low, high)
    lines = [(999, _title(cut)), (0, "SECTION"), (2, "HEADER"), (9, "$ACADVER"), (1, "AC1009")]
    for name, corner in (("$EXTMIN", low), ("$EXTMAX", high)):
        lines += [(9, name), (10, text(corner[0])), (20, text(corner[1])), (30, "0")]
    lines += [(0, "ENDSEC"), (0, "SECTION"), (2, "ENTITIES")]
    for curve in cut.curves:
        lines += [(0, "POLYLINE"), (8, "0"), (66, "1"), (10, "0"), (20, "0"), (30, "0"), (70, str(int(curve.closed)))]
        for x, y in curve.points:
            lines += [(0, "VERTEX"), (8, "0"), (10, text(x)), (20, text(y)), (30, "0")]
        lines += [(0, "SEQEND"), (8, "0")]
    lines += [(0, "ENDSEC"), (0, "EOF")]
    return "".join(f"{code}\n{value}\n" for code, value in lines)


# Finding the curves


@dataclass(frozen=True, eq=False, kw_only=True)
class _Lattice:
    """Nodes (row, column) of a plane, h apart, in the unit frame."""

    origin: Floats
    right: Floats
    up: Floats
    h: float

    def points(self, places: Floats) -> Floats:
        """Where places (n, 2) are, rows and columns being numbers of any kind: (n, 3)."""
        out: Floats = self.origin + self.h * (places[:, 1:] * self.right + places[:, :1] * self.up)
        return out


def _window(origin: Floats, plane: Plane) -> tuple[Floats, Floats] | None:
    """The low corner and the size (2,) of the rectangle in which the plane meets the cube [-1, 1]^3."""
    corners = np.array(list(product((-1.0, 1.0), repeat=3)))
    height = (corners - origin) @ plane.normal
    meets = [*corners[height == 0]]
    for a, b in combinations(range(8), 2):
        if (corners[a] != corners[b]).sum() == 1 and height[a] * height[b] < 0:
            meets.append(corners[a] + height[a] / (height[a] - height[b]) * (corners[b] - corners[a]))
    if not meets:
        return None
    inside = (np.array(meets) - origin) @ np.stack([plane.right, plane.up], axis=1)
    low, size = inside.min(axis=0), np.ptp(inside, axis=0)
    return (low, size) if size.min() > 1e-6 else None


def _values(field: FieldQueries, grid: _Lattice, rows: int, columns: int) -> tuple[Floats, NDArray[np.bool_]]:
    """phi (rows, columns) on the nodes, and which of them are in the cube."""
    phi, within = np.empty(rows * columns), np.empty(rows * columns, bool)
    for start in range(0, rows * columns, ROWS_AT_A_TIME):
        nodes = np.arange(start, min(start + ROWS_AT_A_TIME, rows * columns))
        x = grid.points(np.stack(np.divmod(nodes, columns), axis=1).astype(np.float64))
        phi[nodes], within[nodes] = field.at(np.clip(x, -1, 1), 0)[0], (np.abs(x) <= 1 + 1e-9).all(axis=1)
    return phi.reshape(rows, columns), within.reshape(rows, columns)


def _outlines(
    field: FieldQueries, grid: _Lattice, phi: Floats, within: NDArray[np.bool_]
) -> Iterator[tuple[Floats, bool]]:
    """Curves as columns and rows (n, 2), counter-clockwise around the inside, and whether each is closed."""
    from skimage.measure import find_contours

    # "high" is for rows that run downwards; here they run upwards, and low values are to the left of a curve.
    found = find_contours(phi, 0.0, positive_orientation="high", mask=None if within.all() else within)
    for places in found:
        closed = bool(len(places) > 3 and (places[0] == places[-1]).all())
        exact = _onto_the_surface(field, grid, phi, places[:-1] if closed else places)
        if closed:
            exact = exact[(exact != np.roll(exact, 1, axis=0)).any(axis=1)]
        if len(exact) > 2 or (len(exact) == 2 and not closed):
            yield exact[:, ::-1], closed


def _onto_the_surface(field: FieldQueries, grid: _Lattice, phi: Floats, places: Floats) -> Floats:
    """The places (n, 2), each on an edge of the grid, moved along that to where phi is zero."""
    low, high = np.floor(places).astype(int), np.ceil(places).astype(int)
    way = (high - low).astype(np.float64)
    t = field.between(
        grid.points(low.astype(np.float64)),
        way[:, 1:] * grid.right + way[:, :1] * grid.up,
        np.zeros(len(low)),
        np.full(len(low), grid.h),
        phi[low[:, 0], low[:, 1]],
        phi[high[:, 0], high[:, 1]],
    )
    moved: Floats = low + way * (t / grid.h)[:, None]
    return moved


# Writing them


class _Numbers:
    """Writes numbers with as many digits as DIGITS of the drawing's size take at its place."""

    def __init__(self, low: Floats, high: Floats) -> None:
        size, largest = float((high - low).max()) or 1.0, float(np.abs([low, high]).max()) or 1.0
        self._digits = min(17, DIGITS + max(0, math.ceil(math.log10(largest / size))))

    def __call__(self, value: float) -> str:
        return f"{value:.{self._digits}g}"


def _extent(cut: Slice) -> tuple[Floats, Floats]:
    """The low and the high corner (2,) of the curves, or of what was looked at where there are none."""
    if not cut.curves:
        return cut.low, cut.high
    points = np.concatenate([curve.points for curve in cut.curves])
    return cast(Floats, points.min(axis=0)), cast(Floats, points.max(axis=0))


def _title(cut: Slice) -> str:
    plane = cut.plane
    return f"Slice across {_shown(plane.normal)} through {_shown(plane.origin)}"


def _shown(vector: Floats) -> str:
    return ", ".join(f"{value + 0.0:.10g}" for value in np.ravel(vector))
