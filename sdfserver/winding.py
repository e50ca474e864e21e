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
from torch import Tensor

from sdfserver.device import sums
from sdfserver.neighbours import Neighbours, along_a_curve, morton, neighbours_of

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
    """An octree over oriented points (n, 3), with normals (n, 3) and areas (n,), on `device`."""

    def __init__(
        self,
        points_on_host: NDArray[np.float64],
        normals_on_host: NDArray[np.float64],
        areas_on_host: NDArray[np.float64],
        device: torch.device | str = "cpu",
    ) -> None:
        host = points_on_host, normals_on_host, areas_on_host
        points, normals, areas = (torch.from_numpy(array).to(device) for array in host)
        depth = max(1, round(math.log(max(len(points) / LEAF_POINTS, 1), 4)))
        low = points.amin(dim=0)
        cells = (points - low) * (2**depth / (points - low).max().clamp_min(1e-300))
        codes = morton(cells.long().clamp(max=2**depth - 1), depth)
        codes, order = codes.sort(stable=True)
        points, weights = points[order], areas[order].clamp_min(1e-300)[:, None]
        vectors = weights * normals[order]
        self.levels: list[Dipoles] = []
        """From the root to the points."""
        self.terms = 0
        """Pairs of query and node that were summed so far."""
        starts = [_starts(codes >> 3 * (depth - level)) for level in range(depth + 1)]
        everything = torch.arange(len(points), device=points.device)
        for start, next_start in zip(starts, [*starts[1:], everything], strict=True):
            first = torch.searchsorted(next_start, start)
            sizes = _lengths(start, len(points))
            owner = torch.arange(len(start), device=points.device).repeat_interleave(sizes)
            total = sums(weights, owner, len(start), ascending=True)
            centres = sums(weights * points, owner, len(start), ascending=True) / total
            away = (points - centres[owner]).norm(dim=1)
            self.levels.append(
                Dipoles(
                    points=centres.float(),
                    vectors=sums(vectors, owner, len(start), ascending=True).float(),
                    radii=away.new_zeros(len(start)).scatter_reduce_(0, owner, away, "amax").float(),
                    first=first,
                    count=_lengths(first, len(next_start)),
                )
            )
        nothing = torch.zeros_like(everything)
        self.levels.append(
            Dipoles(points=points.float(), vectors=vectors.float(), radii=nothing.float(), first=nothing, count=nothing)
        )


def _starts(codes: Tensor) -> Tensor:
    """Where in ascending `codes` (n,) a new one begins."""
    return (codes.diff(prepend=codes[:1] - 1) != 0).nonzero()[:, 0]


def _lengths(start: Tensor, end: int) -> Tensor:
    """How long each of the ranges is that begin at `start`, the last of which ends at `end`."""
    return start.diff(append=start.new_tensor([end]))


def point_areas(points: NDArray[np.float64], among: Neighbours) -> NDArray[np.float64]:
    """The area (n,) that each of `points` (n, 3) stands for: its disc out to the 12th neighbour, over 12."""
    k = min(AREA_NEIGHBOURS, len(points) - 1)
    distance, _ = among.query(points, k + 1)
    areas: NDArray[np.float64] = math.pi * distance[:, -1] ** 2 / k
    return areas


def spacing_of(points: NDArray[np.float64], device: torch.device | str = "cpu") -> float:
    """The mean distance between neighbouring ones of `points` (n, 3); looked for on `device`."""
    return mean_spacing(point_areas(points, neighbours_of(points, device)))


def mean_spacing(areas: NDArray[np.float64]) -> float:
    """The mean distance between neighbouring points that stand for `areas` (n,)."""
    return math.sqrt(areas.mean())


def blurred_distance(areas: NDArray[np.float64]) -> float:
    """How near to a cloud whose points stand for `areas` (n,) its winding number says too little."""
    return math.sqrt(areas.sum() / min(BLURRED_POINTS, max(1, len(areas) // 2)))


def winding_number(queries: Tensor, tree: DipoleTree) -> Tensor:
    """Winding numbers (q,) at `queries` (q, 3), which are where the tree is."""
    device, n = queries.device, len(queries)
    if not n:
        return queries.new_empty(0)
    order = along_a_curve(queries)
    padded = torch.cat([order, order[-1:].expand(-n % GROUP)])
    groups = queries[padded].view(-1, GROUP, 3)
    axes = [groups[..., axis].contiguous() for axis in range(3)]
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    centres, reach = (low + high) / 2, (high - low).norm(dim=1) / 2
    w = queries.new_zeros(groups.shape[:2])
    owner, node = torch.arange(len(groups), device=device), torch.zeros(len(groups), dtype=torch.int64, device=device)
    for level in tree.levels:
        gap = (centres[owner] - level.points[node]).norm(dim=1) - reach[owner]
        whole = (gap > OPENING * level.radii[node]) | (level.count[node] == 0)
        _add(w, axes, owner[whole], level, node[whole])
        tree.terms += GROUP * int(whole.sum())
        owner, node = owner[~whole], node[~whole]
        count = level.count[node]
        shift = level.first[node] - (count.cumsum(0) - count)
        owner, shift = owner.repeat_interleave(count), shift.repeat_interleave(count)
        node = torch.arange(len(owner), device=device) + shift
    out = torch.empty_like(queries[:, 0])
    out[padded] = w.flatten()
    return out


def _add(w: Tensor, axes: list[Tensor], owner: Tensor, dipoles: Dipoles, node: Tensor) -> None:
    """Adds to w (g, GROUP) what the dipoles `node` (p,) give at the groups `owner` (p,), of coordinates (g, GROUP)."""
    for some in _chunks(len(owner), w.device):
        g, i = owner[some], node[some]
        offsets = [p[:, None] - q[g] for p, q in zip(dipoles.points[i].unbind(1), axes, strict=True)]
        squared = (offsets[0] * offsets[0]).addcmul_(offsets[1], offsets[1]).addcmul_(offsets[2], offsets[2])
        inverse = squared.clamp_min_(1e-10).rsqrt_()
        a, b, c = (v[:, None] for v in dipoles.vectors[i].unbind(1))
        flux = offsets[0].mul_(a).addcmul_(offsets[1], b).addcmul_(offsets[2], c)
        flux.mul_(inverse).mul_(inverse).mul_(inverse).mul_(1 / (4 * math.pi))
        if w.device.type == "cpu":
            w.index_add_(0, g, flux)  # as `sums`, without an array of all groups for each part
        else:
            w += sums(flux, g, len(w), ascending=True)


def _chunks(pairs: int, device: torch.device) -> Iterator[slice]:
    size = (BLOCK if device.type == "cpu" else 64 * BLOCK) // GROUP
    return (slice(start, start + size) for start in range(0, pairs, size))
