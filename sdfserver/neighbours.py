"""Nearest neighbours among points: SciPy's k-d tree on a CPU, blocks of neighbours on a CUDA device.

Both are exact, in float64, and give the same up to the order of equally near points.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

BLOCK = 32
"""Points of a block, and queries of a group: neighbours on a space-filling curve."""
FIRST_BLOCKS = 12
"""Blocks among which a group's neighbours are looked for at first; four times as many where that is not enough."""
ROOM = 2**24
"""Distances that are held at a time."""


class Neighbours(Protocol):
    """Points (n, 3) that can be asked which of them are near."""

    def query(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distances (q, k), ascending, from queries (q, 3) to the k nearest points, and their rows (q, k)."""


def neighbours_of(points: NDArray[np.float64], device: torch.device | str) -> Neighbours:
    """The points (n, 3), ready to be asked on `device`."""
    return BlockedPoints(points, device) if torch.device(device).type == "cuda" else KdTree(points)


class KdTree:
    """On all cores of a CPU."""

    def __init__(self, points: NDArray[np.float64]) -> None:
        self._tree = cKDTree(points)

    def query(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As Neighbours says."""
        distance, rows = self._tree.query(queries, [*range(1, k + 1)], workers=-1)
        return distance, rows


class BlockedPoints:
    """Points in blocks with boxes around them, for whole groups of queries that look at whole blocks.

    A group looks at the blocks whose boxes are nearest to its own. That was enough if the next box is no nearer than
    the farthest neighbour found.
    """

    def __init__(self, points: NDArray[np.float64], device: torch.device | str) -> None:
        on_device = torch.as_tensor(points, dtype=torch.float64, device=device)
        self._count = len(on_device)
        self._rows, self._points = _blocks(on_device)
        self._low, self._high = self._points.amin(dim=1), self._points.amax(dim=1)
        # What fills the last block up is nobody's neighbour.
        self._missing = torch.arange(self._rows.numel(), device=self._rows.device) >= self._count

    def query(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As Neighbours says."""
        asked = torch.as_tensor(queries, dtype=torch.float64, device=self._points.device)
        if not 1 <= k <= self._count:
            raise ValueError(f"k is {k}; there are {self._count} points")
        distance = asked.new_empty((len(asked), k))
        rows = torch.empty((len(asked), k), dtype=torch.int64, device=asked.device)
        if len(asked):
            places, groups = _blocks(asked)
            for part in torch.split(torch.arange(len(groups), device=asked.device), max(1, ROOM // len(self._points))):
                found, found_rows = self._nearest(groups[part], k)
                distance[places[part].flatten()] = found.flatten(0, 1)
                rows[places[part].flatten()] = found_rows.flatten(0, 1)
        return distance.cpu().numpy(), rows.cpu().numpy()

    def _nearest(self, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and rows (g, BLOCK, k) for groups of queries (g, BLOCK, 3)."""
        low, high = groups.amin(dim=1), groups.amax(dim=1)
        apart = torch.maximum(self._low - high[:, None], low[:, None] - self._high).clamp_min(0)
        gaps = torch.linalg.vector_norm(apart, dim=2)
        distance = groups.new_empty((len(groups), BLOCK, k))
        rows = torch.empty((len(groups), BLOCK, k), dtype=torch.int64, device=groups.device)
        open_groups = torch.arange(len(groups), device=groups.device)
        count = max(FIRST_BLOCKS, -(-k // BLOCK) + 1)
        while len(open_groups):
            count = min(count, gaps.shape[1])
            gap, blocks = gaps[open_groups].topk(min(count + 1, gaps.shape[1]), dim=1, largest=False)
            parts = torch.split(torch.arange(len(open_groups), device=groups.device), max(1, ROOM // (1024 * count)))
            for part in parts:
                some = open_groups[part]
                distance[some], rows[some] = self._among(groups[some], blocks[part, :count], k)
            if count == gaps.shape[1]:
                break
            open_groups = open_groups[gap[:, count] < distance[open_groups].amax(dim=(1, 2))]
            count *= 4
        return distance, rows

    def _among(self, groups: Tensor, blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest points in `blocks` (g, c)."""
        candidates = self._points[blocks].flatten(1, 2)
        squared = groups.new_zeros((len(groups), BLOCK, candidates.shape[1]))
        for axis in range(3):
            offset = groups[:, :, None, axis] - candidates[:, None, :, axis]
            squared.addcmul_(offset, offset)
        missing = self._missing.view(-1, BLOCK)[blocks].flatten(1)
        squared.masked_fill_(missing[:, None], torch.inf)
        if k == 1:  # far quicker than the general case
            nearest, place = squared.min(dim=2, keepdim=True)
        else:
            nearest, place = squared.topk(k, dim=2, largest=False)
        rows = self._rows[blocks].flatten(1)
        return nearest.sqrt(), rows.gather(1, place.flatten(1)).view_as(place)


def _blocks(points: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (b, BLOCK) of points that follow each other along a curve, the last one repeated, and the points there."""
    order = along_a_curve(points)
    rows = torch.cat([order, order[-1:].expand(-len(order) % BLOCK)]).view(-1, BLOCK)
    return rows, points[rows]


def along_a_curve(points: Tensor) -> Tensor:
    """The order of `points` (n, 3) along a Morton curve, on which neighbours are mostly near each other."""
    low = points.amin(dim=0)
    cells = (points - low) * (1023 / (points - low).max().clamp_min(1e-30))
    return morton(cells.long(), 10).argsort(stable=True)


def morton(cells: Tensor, bits: int) -> Tensor:
    """Numbers (n,) of cells (n, 3) int64 of `bits` binary digits an axis, in the order of a walk through an octree."""
    codes = torch.zeros_like(cells[:, 0])
    for bit in range(bits):
        for axis in range(3):
            codes |= (cells[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return codes
