"""PointCloud and its frames; what a cloud must be before it is fitted.

World frame: the input's own units and position, float64 throughout.
Unit frame: the cloud's box, centred, inside [-0.9, 0.9]^3: unit = scale * (world - center). Smaller for a cloud of few
points: between them the surface may leave their box, and it must not leave the cube that is searched for it.
sdf < 0 inside; normals point outward.
The order is read, drop_strays, (estimate normals,) validate, Frame.around. Whatever is measured here is measured in
coordinates centred on the cloud, so that UTM offsets cost no digits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from sdfserver.errors import CloudError
from sdfserver.orientation import disagreement

UNIT_EXTENT = 0.9
MIN_POINTS = 50
MAX_DISAGREEMENT = 0.3
_NO_NORMALS = "the cloud has no normals; use --normals estimate, or export it with normals"


@dataclass(frozen=True, eq=False, kw_only=True)
class PointCloud:
    """Points, and what is known of each.

    points: (n, 3) float64.
    normals: (n, 3) float64, pointing outward, or None where the file had none.
    colors: (n, 3) uint8 red, green and blue, encoded as on a screen (sRGB), or None where the file had none.
    """

    points: NDArray[np.float64]
    normals: NDArray[np.float64] | None = None
    colors: NDArray[np.uint8] | None = None

    def take(self, rows: NDArray[Any] | slice) -> "PointCloud":
        """The points of `rows`, a mask (n,), row numbers or a slice, with all that is known of them."""
        return PointCloud(
            points=self.points[rows],
            normals=None if self.normals is None else self.normals[rows],
            colors=None if self.colors is None else self.colors[rows],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """The similarity between world and unit coordinates: unit = scale * (world - center)."""

    center: NDArray[np.float64]
    scale: float

    @classmethod
    def around(cls, points: NDArray[np.float64], *, margin: float = 0.0) -> "Frame":
        """The frame in which the box of `points` (n, 3) fits [-0.9, 0.9]^3, centred, `margin` or more off the cube."""
        low, high = points.min(axis=0), points.max(axis=0)
        extent = float((high - low).max())
        return cls(center=(low + high) / 2, scale=min(2 * UNIT_EXTENT / extent, 2 / (extent + 2 * margin)))

    def to_unit(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """World points (n, 3) in the unit frame."""
        return (points - self.center) * self.scale

    def to_world(self, points_unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unit points (n, 3) in the world frame."""
        return points_unit / self.scale + self.center


def shown(row: Iterable[float]) -> str:
    """A place or a direction, as messages have it."""
    return ", ".join(f"{value:g}" for value in row)


def validate(
    cloud: PointCloud,
    *,
    require_normals: bool = True,
    max_disagreement: float = MAX_DISAGREEMENT,
    device: str = "cpu",
) -> PointCloud:
    """The cloud, fit to be reconstructed, or CloudError with what is wrong with it, in one line.

    Points at exactly the same position become one, with the mean of their normals and of their colours: they carry no
    more shape than one point, and their zero distances would spoil every estimate of spacing. Normals of any length
    become unit vectors.
    Planar clouds pass. The result shares the input's arrays where nothing had to change.

    require_normals: refuse a cloud without normals, or with normals that carry no orientation.
    max_disagreement: the share of neighbouring normals pointing to opposite sides from which on that is so.
    device: where neighbours are looked for.
    """
    _check_points(cloud.points)
    normals = cloud.normals
    if normals is None and require_normals:
        raise CloudError(_NO_NORMALS)
    if normals is not None:
        normals = _unit_normals(normals, len(cloud.points))
    _check_colors(cloud)
    merged = _merge_positions(replace(cloud, normals=normals))
    if len(merged.points) < MIN_POINTS:
        count = f"{len(merged.points)} different positions among {len(cloud.points)} points"
        raise CloudError(f"the cloud has only {count}; at least {MIN_POINTS} are needed")
    _check_extent(merged.points)
    if require_normals:
        _check_orientation(merged, max_disagreement, device)
    return merged


def checked(cloud: PointCloud) -> PointCloud:
    """Part of a cloud with unit normals, or CloudError where coordinates or normals are not usable or missing.

    What only the whole cloud shows, validate looks at.
    """
    bad = _not_finite(cloud.points)
    if bad.size:
        where = f"first point {_triple(cloud.points[bad[0]])}"
        raise CloudError(f"{bad.size} points have NaN or infinite coordinates, {where}; remove them")
    if cloud.normals is None:
        raise CloudError(_NO_NORMALS)
    return replace(cloud, normals=_unit_normals(cloud.normals, len(cloud.points)))


def drop_strays(cloud: PointCloud) -> tuple[PointCloud, int]:
    """The cloud without the few far strays that would shrink its shape in the frame, and how many they were.

    A stray lies outside the box of the middle 90% of the points along each axis, by more than half of that box's
    diagonal, in a group of a few points at most (one in 1000, but 5 to 100), none of which is nearer to any other
    point than 0.7 of its own distance to the box. A thin part that continues the shape, a second shape or a thinly
    scanned surround are none of that, whatever their distance. Only what makes the cloud's box larger is dropped.
    Only points outside the box are tested, so that a cloud without any costs next to nothing.
    A cloud with NaN or infinite values, or without a normal or colour for each point, is returned as it is: validate
    refuses it.
    """
    points = cloud.points
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < MIN_POINTS or not np.isfinite(points).all():
        return cloud, 0
    if any(rows is not None and len(rows) != len(points) for rows in (cloud.normals, cloud.colors)):
        return cloud, 0
    middle, diagonal, distance = _outside_middle(points)
    candidates = np.flatnonzero(distance > 0.5 * diagonal)
    if not diagonal > 0 or not candidates.size:
        return cloud, 0
    # Farther than this is far enough: squares of 1e200 would overflow in the tree.
    near = np.clip((points - middle) / diagonal, -1e9, 1e9)
    strays = candidates[_isolated(near, candidates, np.minimum(distance[candidates] / diagonal, 1e9))]
    keep = np.ones(len(points), dtype=bool)
    keep[strays] = False
    low, high = points[keep].min(axis=0), points[keep].max(axis=0)
    keep |= np.all((points >= low) & (points <= high), axis=1)
    if keep.all():
        return cloud, 0
    return cloud.take(keep), int((~keep).sum())


def orientation_disagreement(cloud: PointCloud, device: str = "cpu") -> float:
    """How far the normals are from pointing to one side of the surface: about 0 where they do, 0.5 where it is chance.

    See orientation.disagreement for what is measured. Raises CloudError where there are no normals.
    """
    if cloud.normals is None:
        raise CloudError(_NO_NORMALS)
    return disagreement(cloud.points, cloud.normals, device)


def distinct_rows(points: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First rows (m,) of the distinct positions in (n, 3), in the order they come, and each row's position (n,).

    Rows are told apart by a 64-bit hash, which is checked: a hundred times faster than comparing them.
    """
    mixed = np.zeros(len(points), dtype=np.uint64)
    for axis in range(3):
        column = points[:, axis] + points.dtype.type(0)  # -0.0 becomes 0.0
        mixed += column.view(f"u{column.itemsize}")
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    first, inverse = _distinct(mixed)
    some = range(0, len(points), _ROWS_CHECKED)
    if not all(
        np.array_equal(points[first[inverse[i : i + _ROWS_CHECKED]]], points[i : i + _ROWS_CHECKED]) for i in some
    ):
        _, first, inverse = np.unique(points, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _distinct(values: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each distinct value comes first, and which each one is: as np.unique, in half the memory."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.ones(len(values), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    del ordered
    which = np.empty(len(values), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


_ROWS_CHECKED = 1 << 16


# What validate checks


def _check_points(points: NDArray[np.float64]) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise CloudError(f"the points have shape {points.shape}; they must be (n, 3)")
    if len(points) < MIN_POINTS:
        raise CloudError(f"the cloud has {len(points)} points; at least {MIN_POINTS} are needed")
    bad = _not_finite(points)
    if bad.size:
        where = f"first point {bad[0]} at {_triple(points[bad[0]])}"
        raise CloudError(f"{bad.size} of {len(points)} points have NaN or infinite coordinates, {where}; remove them")


def _not_finite(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    # One pass decides the usual case.
    if np.isfinite(rows).all():
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(~np.isfinite(rows).all(axis=1))


def _triple(row: NDArray[np.float64]) -> str:
    return f"({shown(row)})"


def _check_colors(cloud: PointCloud) -> None:
    colors = cloud.colors
    if colors is not None and (colors.shape != cloud.points.shape or colors.dtype != np.uint8):
        raise CloudError(
            f"there are {len(cloud.points)} points, but the colours have shape {colors.shape} and type {colors.dtype}; "
            "give red, green and blue for each as uint8, or leave them out"
        )


def _unit_normals(normals: NDArray[np.float64], n_points: int) -> NDArray[np.float64]:
    if normals.shape != (n_points, 3):
        raise CloudError(f"there are {n_points} points, but the normals have shape {normals.shape}; give one for each")
    remedy = "re-estimate them with --normals estimate, or remove those points"
    bad = _not_finite(normals)
    if bad.size:
        where = f"first normal {bad[0]}, {_triple(normals[bad[0]])}"
        raise CloudError(f"{bad.size} of {n_points} normals have NaN or infinite values, {where}; {remedy}")
    # The largest component is divided out first, so that no length overflows or vanishes when squared.
    largest = np.abs(normals).max(axis=1, keepdims=True)
    zero = np.flatnonzero(largest == 0)
    if zero.size:
        raise CloudError(f"{zero.size} of {n_points} normals have zero length, first normal {zero[0]}; {remedy}")
    scaled = normals / largest
    unit: NDArray[np.float64] = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    return unit


def _merge_positions(cloud: PointCloud) -> PointCloud:
    first, position = distinct_rows(cloud.points)
    if len(first) == len(cloud.points):
        return cloud
    merged = cloud.take(first)

    def total(rows: NDArray[Any]) -> NDArray[np.float64]:
        columns = [np.bincount(position, weights=rows[:, axis], minlength=len(first)) for axis in range(3)]
        return np.stack(columns, axis=1)

    if cloud.normals is not None:
        summed = total(cloud.normals)
        length = np.linalg.norm(summed, axis=1, keepdims=True)
        # Normals that cancel out have no mean; the first stands for them.
        normals = np.where(length > 1e-6, summed / np.maximum(length, 1e-6), cloud.normals[first])
        merged = replace(merged, normals=normals)
    if cloud.colors is not None:
        counts = np.bincount(position, minlength=len(first))
        colors = np.rint(total(cloud.colors) / counts[:, None]).astype(np.uint8)
        merged = replace(merged, colors=colors)
    return merged


def _check_extent(points: NDArray[np.float64]) -> None:
    low, high = points.min(axis=0), points.max(axis=0)
    largest = float(np.abs([low, high]).max())
    if largest > _LARGEST_COORDINATE:
        raise CloudError(f"the largest coordinate is {largest:g}, beyond {_LARGEST_COORDINATE:g}; choose a larger unit")
    extent = float((high - low).max())
    if extent < max(_SMALLEST_EXTENT, 1e3 * np.finfo(np.float64).eps * largest):
        raise CloudError(
            f"all points lie within {extent:g} of each other at coordinates up to {largest:g}, which is all the same "
            "position; subtract an offset or choose a smaller unit before the cloud is exported"
        )
    centred = (points - (low + high) / 2) / extent
    centred -= centred.mean(axis=0)
    along, across, _ = np.sqrt(np.maximum(np.linalg.eigvalsh(centred.T @ centred / len(points))[::-1], 0))
    if across < _COLLINEAR * along:
        raise CloudError(
            f"all points lie on one line (spread {along * extent:g} along it, {across * extent:g} across); "
            "a surface needs points that span an area"
        )


_LARGEST_COORDINATE = 1e100
_SMALLEST_EXTENT = 1e-100
_COLLINEAR = 1e-5


def _check_orientation(cloud: PointCloud, max_disagreement: float, device: str) -> None:
    share = orientation_disagreement(cloud, device)
    if share > max_disagreement:
        raise CloudError(
            f"the normals carry no orientation: {share:.0%} of them contradict the others on which side is outside "
            "(50% is chance); use --normals estimate, or export the cloud with outward normals"
        )


# What drop_strays looks at


def _outside_middle(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Centre and diagonal of the middle 90%'s box, and each point's distance outside it."""
    trimmed = max(3, len(points) // 20)
    ordered = np.partition(points, (trimmed, len(points) - 1 - trimmed), axis=0)
    low, high = ordered[trimmed], ordered[-1 - trimmed]
    middle = low / 2 + high / 2
    with np.errstate(over="ignore"):
        diagonal = float(np.linalg.norm(high - low))
        distance = np.linalg.norm(np.maximum(np.maximum(low - points, points - high), 0), axis=1)
    return middle, diagonal, distance


def _isolated(
    points: NDArray[np.float64], candidates: NDArray[np.int64], distance: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which candidates (c,) belong to a small group with nothing near it; `distance` is theirs from the middle box."""
    few = int(np.clip(len(points) // 1000, 5, 100))
    reach = 0.7 * distance
    isolated = np.zeros(len(candidates), dtype=bool)
    # Company among some of the points is company: this clears nearly all of a large surround without the large tree.
    some = KDTree(points[:: max(1, len(points) // 20_000)])
    alone = np.flatnonzero(some.query(points[candidates], k=[few + 2])[0][:, 0] > reach)
    if not alone.size:
        return isolated
    gaps, near = KDTree(points).query(points[candidates[alone]], k=few + 2)
    still = gaps[:, -1] > reach[alone]
    alone, gaps, near = alone[still], gaps[still], near[still]
    # Link the lone ones to what is within their reach; the last node stands for everything that is not alone.
    node = np.full(len(points), len(alone))
    node[candidates[alone]] = np.arange(len(alone))
    linked = gaps <= reach[alone][:, None]
    rows = np.broadcast_to(np.arange(len(alone))[:, None], linked.shape)[linked]
    columns = node[near[linked]]
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(alone) + 1, len(alone) + 1))
    group = connected_components(graph, directed=False)[1]
    isolated[alone] = (group[:-1] != group[-1]) & (np.bincount(group)[group[:-1]] <= few)
    return isolated
