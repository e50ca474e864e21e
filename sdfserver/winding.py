"""Generalised winding number: the sign of space around an oriented cloud.

w(q) is the solid angle of the oriented surface seen from q, over 4 pi: 1 inside a closed surface, 0 outside, and in
between where part of the surface is missing. For points p with normals n and areas a (Barill et al., Fast Winding
Numbers for Soups and Clouds, SIGGRAPH 2018, equation 5):

    w(q) = sum_i a_i n_i . (p_i - q) / (4 pi |p_i - q|^3)

Points far from q are summed by the nodes of an octree, each of which stands for those in it as one such dipole. Queries
go down the tree in groups of neighbours, so that all of it is a few large array operations: n log n.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

AREA_NEIGHBOURS = 12
LEAF_POINTS = 8
"""Points in a cell of the octree's finest level, about."""
OPENING = 2.0
"""A node is opened for queries nearer to it than this many of its radii (beta in Barill et al.)."""
GROUP = 32
"""Queries that go down the tree together."""
BLOCK = 2**18
"""Pairs of query and node whose terms are held at a time on a CPU, where they then stay in cache."""
BLURRED_POINTS = 16_000
"""Nearer to the cloud than so many points on it would be to each other, noise may put a query on either side."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dipoles:
    """The nodes of one level of the tree, or its points.

    points: (m, 3) float32 centres. vectors: (m, 3) float32, the sum of area times normal. radii: (m,) float32, how far
    a node reaches from its centre. first, count: (m,) int64, its children in the next level; none of a point.
    """

    points: Tensor
    vectors: Tensor
    radii: Tensor
    first: Tensor
    count: Tensor


class DipoleTree:
    """An octree over oriented points (n, 3), with normals (n, 3) and areas (n,)."""

    def __init__(self, points: NDArray[np.float64], normals: NDArray[np.float64], areas: NDArray[np.float64]) -> None:
        depth = max(1, round(math.log(max(len(points) / LEAF_POINTS, 1), 4)))
        low = points.min(axis=0)
        cells = (points - low) * (2**depth / max(float((points - low).max()), 1e-300))
        codes = _morton(np.minimum(cells.astype(np.int64), 2**depth - 1), depth)
        order = codes.argsort(kind="stable")
        codes, points = codes[order], points[order]
        weights = np.maximum(areas[order], 1e-300)
        vectors = weights[:, None] * normals[order]
        self.levels: list[Dipoles] = []
        """From the root to the points."""
        self.terms = 0
        """Pairs of query and node that were summed so far."""
        starts = [np.unique(codes >> 3 * (depth - level), return_index=True)[1] for level in range(depth + 1)]
        for start, next_start in zip(starts, [*starts[1:], np.arange(len(points))], strict=True):
            first = np.searchsorted(next_start, start)
            total = np.add.reduceat(weights, start)
            centres = np.add.reduceat(weights[:, None] * points, start) / total[:, None]
            sizes = np.diff(start, append=len(points))
            away = np.linalg.norm(points - centres.repeat(sizes, axis=0), axis=1)
            self.levels.append(
                _level(
                    centres,
                    np.add.reduceat(vectors, start),
                    np.maximum.reduceat(away, start),
                    first,
                    np.diff(first, append=len(next_start)),
                )
            )
        nothing = np.zeros(len(points), dtype=np.int64)
        self.levels.append(_level(points, vectors, np.zeros(len(points)), nothing, nothing))


def _level(
    points: NDArray[np.float64],
    vectors: NDArray[np.float64],
    radii: NDArray[np.float64],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
) -> Dipoles:
    points32, vectors32, radii32 = (torch.tensor(x, dtype=torch.float32) for x in (points, vectors, radii))
    return Dipoles(
        points=points32, vectors=vectors32, radii=radii32, first=torch.tensor(first), count=torch.tensor(count)
    )


def _morton(cells: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Numbers (n,) of cells (n, 3) of `bits` binary digits an axis, in the order of a walk through an octree."""
    codes = np.zeros(len(cells), dtype=np.int64)
    for bit in range(bits):
        for axis in range(3):
            codes |= (cells[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return codes


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


def blurred_distance(areas: NDArray[np.float64]) -> float:
    """How near to a cloud whose points stand for `areas` (n,) its winding number says too little."""
    return math.sqrt(areas.sum() / min(BLURRED_POINTS, max(1, len(areas) // 2)))


def winding_number(queries: Tensor, tree: DipoleTree) -> Tensor:
    """Winding numbers (q,) at `queries` (q, 3)."""
    device, n = queries.device, len(queries)
    if not n:
        return queries.new_empty(0)
    order = torch.from_numpy(along_a_curve(queries.cpu().numpy())).to(device)
    padded = torch.cat([order, order[-1:].expand(-n % GROUP)])
    groups = queries[padded].view(-1, GROUP, 3)
    axes = [groups[..., axis].contiguous() for axis in range(3)]
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    centres, reach = (low + high) / 2, (high - low).norm(dim=1) / 2
    w = queries.new_zeros(groups.shape[:2])
    owner, node = torch.arange(len(groups), device=device), torch.zeros(len(groups), dtype=torch.int64, device=device)
    for level in tree.levels:
        here = Dipoles(**{name: value.to(device) for name, value in vars(level).items()})
        gap = (centres[owner] - here.points[node]).norm(dim=1) - reach[owner]
        whole = (gap > OPENING * here.radii[node]) | (here.count[node] == 0)
        _add(w, axes, owner[whole], here, node[whole])
        tree.terms += GROUP * int(whole.sum())
        owner, node = owner[~whole], node[~whole]
        count = here.count[node]
        shift = here.first[node] - (count.cumsum(0) - count)
        owner, shift = owner.repeat_interleave(count), shift.repeat_interleave(count)
        node = torch.arange(len(owner), device=device) + shift
    out = torch.empty_like(queries[:, 0])
    out[padded] = w.flatten()
    return out


def along_a_curve(points: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.int64]:
    """The order of `points` (n, 3) along a Morton curve, on which neighbours are mostly near each other."""
    low = points.min(axis=0)
    cells = (points - low) * (1023 / max(float((points - low).max()), 1e-30))
    return _morton(cells.astype(np.int64), 10).argsort(kind="stable")


def _add(w: Tensor, axes: list[Tensor], owner: Tensor, dipoles: Dipoles, node: Tensor) -> None:
    """Adds to w (g, GROUP) what the dipoles `node` (p,) give at the groups `owner` (p,), of coordinates (g, GROUP)."""
    for some in _chunks(len(owner), w.device):
        g, i = owner[some], node[some]
        offsets = [p[:, None] - q[g] for p, q in zip(dipoles.points[i].unbind(1), axes, strict=True)]
        squared = (offsets[0] * offsets[0]).addcmul_(offsets[1], offsets[1]).addcmul_(offsets[2], offsets[2])
        inverse = squared.clamp_min_(1e-10).rsqrt_()
        a, b, c = (v[:, None] for v in dipoles.vectors[i].unbind(1))
        flux = offsets[0].mul_(a).addcmul_(offsets[1], b).addcmul_(offsets[2], c)
        w.index_add_(0, g, flux.mul_(inverse).mul_(inverse).mul_(inverse), alpha=1 / (4 * math.pi))


def _chunks(pairs: int, device: torch.device) -> Iterator[slice]:
    size = (BLOCK if device.type == "cpu" else 64 * BLOCK) // GROUP
    return (slice(start, start + size) for start in range(0, pairs, size))
