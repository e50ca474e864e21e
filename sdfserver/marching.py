"""Marching cubes on single cells: which edges of a cell its triangles join, by the values at its eight corners.

Corners and edges are numbered as _CORNERS and EDGES say. Most cells are plain: the signs at their corners alone decide,
and a table of the 256 cases, made by scikit-image, has their triangles. Where a face has both signs on both diagonals,
or two corners across the cell differ from all others, values decide too (Lewiner et al., Efficient implementation of
Marching Cubes' cases with topological guarantees, JGT 8(2), 2003): such cells are handed to scikit-image.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import marching_cubes
from torch import Tensor

MARGIN = 1e-3
"""Vertices stay this share of a voxel away from the nodes: at a sample on the level several would be in one place, and
the triangles between them without area."""
PACK = 32
"""Cells along one side of the volume that is handed to scikit-image: coordinates below 64 leave float32 18 bits of
fraction, and MARGIN / _CLIP keeps every vertex farther than that from the nodes."""
_CLIP = 8.0

CORNERS = torch.cartesian_prod(*3 * [torch.arange(2, dtype=torch.int32)])
EDGES = torch.tensor([(*low, axis) for axis in range(3) for low in product((0, 1), repeat=3) if not low[axis]])
"""(12, 4): the low corner of each edge, and its axis."""
WITHIN = len(EDGES)
"""Stands for the extra vertex within a cell, in place of an edge."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """Triangles of the plain cases.

    A case is the sum of 2^c over the corners c that are inside. plain: (256,) bool. count: (256,) triangles, of the
    others none. edges: (256, 5, 3), which edges each triangle joins, wound counter-clockwise seen from outside.
    """

    plain: Tensor
    count: Tensor
    edges: Tensor

    def to(self, device: torch.device) -> "Table":
        """The same on `device`."""
        return Table(**{name: value.to(device) for name, value in vars(self).items()})


@lru_cache
def table() -> Table:
    """The table, made on first use."""
    cases = np.arange(256)
    inside = (cases[:, None] >> np.arange(8)) & 1
    plain = np.array([_is_plain(signs) for signs in inside.reshape(-1, 2, 2, 2)])
    cell, edges = march_packed(np.zeros((256, 3), np.int32), np.where(inside == 1, -1.0, 1.0))
    count, rows = np.zeros(256, np.int64), np.zeros((256, 5, 3), np.int64)
    for case, triangle in zip(cell, edges, strict=True):
        if plain[case]:
            rows[case, count[case]] = triangle
            count[case] += 1
    return Table(plain=torch.from_numpy(plain), count=torch.from_numpy(count), edges=torch.from_numpy(rows))


def _is_plain(inside: NDArray[np.int64]) -> bool:
    """Whether signs (2, 2, 2) alone decide how their cell is cut."""
    for axis in range(3):
        for side in (0, 1):
            # Both signs, each on a diagonal.
            face = inside.take(side, axis).ravel()
            if face.sum() == 2 and face[0] == face[3]:
                return False
    few = inside if inside.sum() <= 4 else 1 - inside
    across = few & few[::-1, ::-1, ::-1]  # 1 where the corner across the cell is alike
    return not (few.sum() == 2 and across.any())


def triangles_of(cells: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of cells (n, 3) with corner values (n, 8): which cell each triangle is of (t,), and its edges (t, 3)."""
    of_cases = table().to(values.device)
    bits = 1 << torch.arange(8, device=values.device)
    case = ((values < 0) * bits).sum(dim=1)
    count = of_cases.count[case]
    owner = torch.arange(len(cells), device=cells.device).repeat_interleave(count)
    place = torch.arange(len(owner), device=cells.device) - (count.cumsum(0) - count)[owner]
    edges = of_cases.edges[case[owner], place]
    unclear = (~of_cases.plain[case]).nonzero()[:, 0]
    owners, all_edges = [owner], [edges]
    for rows in torch.split(unclear, PACK**3) if len(unclear) else ():
        cell, found = march_packed(cells[rows].cpu().numpy(), values[rows].cpu().numpy().astype(np.float64))
        owners.append(rows[torch.from_numpy(cell).to(rows.device)])
        all_edges.append(torch.from_numpy(found).to(rows.device))
    return torch.cat(owners), torch.cat(all_edges)


def march_packed(cells: NDArray[np.int32], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """scikit-image's marching cubes on cells (n, 3) with corner values (n, 8), at most PACK^3 of them.

    The cells lie side by side in one volume, each with its own eight nodes, and a mask skips the gaps. A cell's
    triangles follow from its own eight values, and a face's edges from its four: neighbours agree.
    Returns for each triangle its cell's row (t,) and its edges (t, 3).
    """
    # Where the product test on an ambiguous face is a tie, the two cells at the face may decide differently: nodes
    # are scaled apart by a fixed pattern. Bounding the values keeps vertices off the nodes (see PACK). Both
    # change only which triangles are chosen in ambiguous cells, near a tie; where vertices lie is computed elsewhere.
    node = cells[:, None].astype(np.int64) + CORNERS.numpy()
    pattern = (node[..., 0] * 73_856_093 ^ node[..., 1] * 19_349_663 ^ node[..., 2] * 83_492_791) % 1021
    values = np.copysign(np.clip(np.abs(values), MARGIN, _CLIP), values) * (1 + pattern * 2.0**-24)
    packed = np.ones((PACK**3, 8), np.float32)
    packed[: len(values)] = values
    volume = packed.reshape(3 * (PACK,) + 3 * (2,)).transpose(0, 3, 1, 4, 2, 5).reshape(3 * (2 * PACK,))
    mask = np.zeros(volume.shape, bool)
    mask[1::2, 1::2, 1::2] = True  # scikit-image looks at the high corner of a cell
    vertices, triangles, _, _ = marching_cubes(volume, 0.0, mask=mask)
    place = np.floor(vertices / 2).astype(np.int64)
    cell = (place[:, 0] * PACK + place[:, 1]) * PACK + place[:, 2]
    return cell[triangles[:, 0]], _edge_of(vertices.astype(np.float64) - 2 * place)[triangles]


def _edge_of(place: NDArray[np.float64]) -> NDArray[np.int64]:
    """The edges (v,) that vertices at `place` (v, 3) within [0, 1]^3 lie on, or WITHIN."""
    between = (place > 0) & (place < 1)
    axis = between.argmax(axis=1)
    number = np.zeros((2, 2, 2, 3), np.int64)
    number[tuple(EDGES.T.numpy())] = np.arange(len(EDGES))
    low = np.where(between, 0, place == 1).astype(np.int64)
    return np.where(between.sum(axis=1) == 1, number[low[:, 0], low[:, 1], low[:, 2], axis], WITHIN)


def inner_place(corners: Tensor) -> Tensor:
    """Where scikit-image puts the extra vertex of cells with these corner values (n, 8), within [0, 1]^3."""
    weight = 1 / corners.double().abs().clamp(min=MARGIN)
    return weight @ CORNERS.to(weight) / weight.sum(1, keepdim=True)
