"""Generalised winding number: the sign of space around an oriented cloud.

w(q) is the solid angle of the oriented surface seen from q, over 4 pi: 1 inside a closed surface, 0 outside, and in
between where part of the surface is missing. For points p with normals n and areas a (Barill et al., Fast Winding
Numbers for Soups and Clouds, SIGGRAPH 2018, equation 5):

    w(q) = sum_i a_i n_i . (p_i - q) / (4 pi |p_i - q|^3)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

AREA_NEIGHBOURS = 12
LEVEL_SIZES = (1000, 4000, 16000)
"""Patches at each level of detail: each halves the width of the one before."""
BLOCK = 2**23
"""Pairs of query and patch whose terms are held at a time, in three arrays of float32: 100 MB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dipoles:
    """Oriented patches that stand for a cloud when it is seen from a distance.

    points: (m, 3) float32 centres. area_normals: (m, 3) float32, the sum of area times normal of each patch.
    spacing: the width of a patch; w is accurate for queries farther away than this.
    """

    points: Tensor
    area_normals: Tensor
    spacing: float


def point_areas(points: NDArray[np.float64], tree: cKDTree) -> NDArray[np.float64]:
    """The area (n,) that each of `points` (n, 3) stands for: its disc out to the 12th neighbour, over 12."""
    k = min(AREA_NEIGHBOURS, len(points) - 1)
    distance, _ = tree.query(points, [k + 1], workers=-1)
    areas: NDArray[np.float64] = math.pi * distance[:, 0] ** 2 / k
    return areas


def spacing_of(points: NDArray[np.float64]) -> float:
    """The mean distance between neighbouring ones of `points` (n, 3)."""
    return mean_spacing(point_areas(points, cKDTree(points)))


def mean_spacing(areas: NDArray[np.float64]) -> float:
    """The mean distance between neighbouring points that stand for `areas` (n,)."""
    return math.sqrt(areas.mean())


def dipoles(
    points: NDArray[np.float64], normals: NDArray[np.float64], areas: NDArray[np.float64], *, size: int = 3000
) -> Dipoles:
    """The cloud gathered into about `size` patches, each the sum of the points of one cell of a grid.

    A sum over cells, unlike a random sub-sample, keeps the area and the mean orientation of every part of the cloud.
    """
    width = math.sqrt(areas.sum() / size)
    low = points.min(axis=0)
    for _ in range(8):  # the count of occupied cells is only roughly area / width^2
        cells = np.floor((points - low) / width).astype(np.int64)
        extent = cells.max(axis=0) + 1
        keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
        _, patch = np.unique(keys, return_inverse=True)
        count = int(patch.max()) + 1
        if count <= 1.3 * size:
            break
        width *= math.sqrt(count / size)
    weight = np.maximum(areas, 1e-300)
    total = np.bincount(patch, weight, count)
    centres = np.stack([np.bincount(patch, weight * points[:, i], count) / total for i in range(3)], axis=1)
    vectors = np.stack([np.bincount(patch, weight * normals[:, i], count) for i in range(3)], axis=1)
    return Dipoles(
        points=torch.tensor(centres, dtype=torch.float32),
        area_normals=torch.tensor(vectors, dtype=torch.float32),
        spacing=width,
    )


def dipole_levels(
    points: NDArray[np.float64], normals: NDArray[np.float64], areas: NDArray[np.float64]
) -> list[Dipoles]:
    """Patches of the cloud, coarse to fine, none finer than two points a patch."""
    sizes = sorted({min(size, max(1, len(points) // 2)) for size in LEVEL_SIZES})
    return [dipoles(points, normals, areas, size=size) for size in sizes]


def winding_number(queries: Tensor, distances: Tensor, levels: list[Dipoles]) -> Tensor:
    """Winding numbers (q,) at `queries` (q, 3) that lie `distances` (q,) from the cloud.

    Each query sums over the coarsest patches that are narrower than its distance; those nearer than the finest
    patches' spacing get the finest, and w is not accurate there.
    """
    w = torch.empty_like(distances)
    upper = math.inf
    for level, patches in enumerate(levels):
        lower = patches.spacing if level + 1 < len(levels) else -math.inf
        rows = ((distances <= upper) & (distances > lower)).nonzero()[:, 0]
        w[rows] = _dipole_sum(queries[rows], patches)
        upper = lower
    return w


def _dipole_sum(queries: Tensor, patches: Dipoles) -> Tensor:
    points, vectors = patches.points.to(queries.device), patches.area_normals.to(queries.device)
    points_squared, offsets = (points**2).sum(1), (points * vectors).sum(1)
    parts = []
    for q in torch.split(queries, max(1, BLOCK // len(points))):
        distance_squared = torch.addmm(points_squared, q, points.T, alpha=-2).add_((q**2).sum(1)[:, None])
        inverse = distance_squared.clamp_min_(1e-10).rsqrt_()
        flux = torch.addmm(offsets, q, vectors.T, alpha=-1)
        parts.append(flux.mul_(inverse).mul_(inverse).mul_(inverse).sum(1) / (4 * math.pi))
    return torch.cat(parts)
