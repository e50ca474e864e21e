"""Normals for clouds that have none, and the removal of outliers.

World frame; normals are unit vectors that point outward, or towards the viewpoint where one is given. All of it is
numpy and scipy: beside Open3D's consistent tangent planes this is as accurate, faster, and has no degenerate cases.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from sdfserver.cloud import PointCloud, drop_strays, validate
from sdfserver.errors import ConfigError
from sdfserver.orientation import consistent_signs

_CHUNK = 65_536
_PIECE_NEIGHBOURS = 6


def estimate_normals(
    cloud: PointCloud, *, viewpoint: Sequence[float] | NDArray[np.float64] | None = None, neighbours: int = 15
) -> PointCloud:
    """The validated cloud with new normals, from planes through each point and its nearest neighbours.

    With a viewpoint (3,), the sensor's position, every normal points to its side. Without, they are made consistent
    along a spanning tree (Hoppe et al. 1992) and then turned outward, one connected piece at a time, by the sign of the
    volume that the piece encloses. A piece inside another one is taken for a body, not for a cavity; an open scan
    that is concave, such as a room from within, needs its viewpoint. Points at exactly the same position become one.
    Deterministic.

    Raises CloudError where the cloud is degenerate, ConfigError for values out of range.
    """
    if not 3 <= neighbours <= 1000:
        raise ConfigError(f"neighbours is {neighbours}; it must be 3 to 1000")
    toward = None if viewpoint is None else np.asarray(viewpoint, dtype=np.float64)
    if toward is not None and (toward.shape != (3,) or not np.isfinite(toward).all()):
        raise ConfigError(f"viewpoint is {viewpoint}; it must be three finite numbers")
    cloud = validate(replace(cloud, normals=None), require_normals=False)
    points = cloud.points
    low, high = points.min(axis=0), points.max(axis=0)
    # Far from the origin, and at odd scales, squares would lose the digits that matter.
    unit = (points - (low + high) / 2) / float((high - low).max())
    distance, near = KDTree(unit).query(unit, k=min(neighbours, len(unit)))
    normals = _plane_normals(unit, near)
    if toward is not None:
        away = np.einsum("ij,ij->i", normals, toward - points) < 0
        return replace(cloud, normals=np.where(away[:, None], -normals, normals))
    normals = normals * consistent_signs(unit, normals, neighbours)[:, None]
    # Few neighbours, so that pieces with a gap between them are turned outward one by one.
    few = min(_PIECE_NEIGHBOURS, near.shape[1] - 1)
    area, piece = distance[:, few] ** 2, _pieces(near[:, 1 : few + 1])
    return replace(cloud, normals=normals * _outward(unit, normals, area, piece)[piece, None])


def remove_outliers(cloud: PointCloud, *, neighbours: int = 20, deviations: float = 2.0) -> tuple[PointCloud, int]:
    """The cloud without points far from their neighbours, and how many they were (Rusu et al. 2008).

    A point goes if its mean distance to its nearest `neighbours` exceeds the mean of that over the cloud by more than
    `deviations` standard deviations. Raises ConfigError for values out of range.
    """
    if not 1 <= neighbours <= 1000:
        raise ConfigError(f"neighbours is {neighbours}; it must be 1 to 1000")
    if not 0 < deviations < np.inf:
        raise ConfigError(f"deviations is {deviations}; it must be positive")
    points = cloud.points
    if len(points) < 2:
        return cloud, 0
    centred = points - (points.min(axis=0) + points.max(axis=0)) / 2
    distances = KDTree(centred).query(centred, k=min(neighbours + 1, len(points)))[0]
    mean = distances[:, 1:].mean(axis=1)
    keep = mean <= mean.mean() + deviations * mean.std()
    if keep.all():
        return cloud, 0
    return cloud.take(keep), int((~keep).sum())


def prepare(
    cloud: PointCloud,
    *,
    remove_strays_and_outliers: bool = False,
    estimate: bool = False,
    viewpoint: NDArray[np.float64] | None = None,
) -> tuple[PointCloud, int, int]:
    """The cloud as it was asked for, and how many strays and outliers it lost on the way."""
    removed = 0
    if not (remove_strays_and_outliers or estimate):
        return cloud, 0, 0
    cloud, strays = drop_strays(cloud)
    if remove_strays_and_outliers:
        cloud, removed = remove_outliers(validate(cloud, require_normals=False))
    if estimate:
        cloud = estimate_normals(cloud, viewpoint=viewpoint)
    return cloud, strays, removed


def _plane_normals(unit: NDArray[np.float64], near: NDArray[np.int64]) -> NDArray[np.float64]:
    """The direction in which each point's neighbours `near` (n, k) spread least; its sign means nothing."""
    normals = np.empty_like(unit)
    for start in range(0, len(unit), _CHUNK):
        part = unit[near[start : start + _CHUNK]]
        part = part - part.mean(axis=1, keepdims=True)
        normals[start : start + _CHUNK] = np.linalg.eigh(np.einsum("nki,nkj->nij", part, part))[1][:, :, 0]
    return normals


def _pieces(near: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each point, the same for all that neighbours `near` (n, k) connect."""
    rows = np.repeat(np.arange(len(near)), near.shape[1])
    links = coo_array((np.ones(len(rows)), (rows, near.reshape(-1))), shape=(len(near), len(near)))
    piece: NDArray[np.int64] = connected_components(links, directed=False)[1]
    return piece


def _outward(
    unit: NDArray[np.float64], normals: NDArray[np.float64], area: NDArray[np.float64], piece: NDArray[np.int64]
) -> NDArray[np.float64]:
    """A sign for each piece that makes its enclosed volume positive.

    The volume is sum(area * normal . position) / 3 about the piece's own centroid (divergence theorem), `area` given up
    to a factor. A piece that encloses none, such as a plane, gets the sign that turns it upward.
    """
    count = int(piece.max()) + 1

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(piece, values, minlength=count).astype(np.float64)

    weight = np.maximum(total(area), np.finfo(np.float64).tiny)
    center = np.stack([total(area * unit[:, axis]) / weight for axis in range(3)], axis=1)
    volume = total(area * np.einsum("ij,ij->i", normals, unit - center[piece])) / weight
    upward = total(area * (normals[:, 2] + 1e-3 * normals[:, 1] + 1e-6 * normals[:, 0]))
    return np.where(np.where(np.abs(volume) > 1e-9, volume, upward) < 0, -1.0, 1.0)
