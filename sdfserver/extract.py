"""The level set of a field as triangles: sparse evaluation, scikit-image's marching cubes, Newton projection.

Unit frame: the cube [-1, 1]^3, sdf < 0 inside, normals point outward. A surface that leaves the cube is open there.

Symbols: N the resolution, h = 2 / N the voxel size; node (i, j, k), 0..N, lies at -1 + h (i, j, k); cell (i, j, k) is
the cube of eight nodes with that low corner; a block of stride s is a cube of s^3 cells, and only its eight corners
are looked at: they are nodes of the lattice of stride s. "Value" is the field less the level.

What is evaluated. A block cannot hold a zero if its corners have one sign and are all farther from zero than a
bound on how far the field strays from their trilinear interpolation. Two such bounds are measured:

- Lipschitz: L sqrt(3)/2 s h, where L is the largest gradient norm on samples, enlarged;
- interpolation: what the values just evaluated differed from the interpolation of the blocks twice as large,
  halved (it falls by two at a crease and by four where the field is smooth), enlarged.

Both rest on samples, so the last level checks them: it walks from cell to neighbouring cell wherever a face shows a
change of sign, into what had been dropped as well, until nothing crosses the border of what was evaluated. Every cell
with a change of sign has its eight corners evaluated, so the triangles are those of the dense grid.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.device import free_device_memory
from sdfserver.errors import ExtractionError, NoSurfaceError, Stopped
from sdfserver.marching import CORNERS, EDGES, MARGIN, inner_place, triangles_of
from sdfserver.mesh import half_edges, vertex_normals

log = logging.getLogger(__name__)

BRICK = 8
"""Nodes along one side of a brick, the unit of storage."""
LIPSCHITZ_SAFETY = 1.25
"""The Lipschitz bound is this much larger than the steepest slope that was seen."""
OWN_SAFETY = 2.0
WORST_SAFETY = 1.5
FLOOR = 0.25
"""How far the field may stray within a block: OWN_SAFETY x what was seen in it, but at most WORST_SAFETY x the most
seen in any block of that size, and at least FLOOR of that."""
SETTLED = 0.01
"""A Newton step shorter than this share of a voxel is taken without looking at where it led."""
SMALLEST_BATCH = 1024
"""Points; a device that has no room for these has none for anything."""
REACH = 0.5
"""No vertex moves farther than this share of a voxel from where marching cubes put it."""

_STENCIL = torch.cartesian_prod(*3 * [torch.arange(3, dtype=torch.int32)])
_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22
"""Rows from which something is built at a time, on a CPU, where it then stays in cache, and elsewhere."""


class ScalarField(Protocol):
    """A field in the unit frame, and the device its points must be on."""

    @property
    def device(self) -> torch.device:
        """Where `value` expects its points."""

    def value(self, x: Tensor) -> Tensor:
        """The value phi (n,) at x (n, 3)."""

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value phi (n,) and its gradient (n, 3) at x (n, 3)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExtractedSurface:
    """A level set as triangles in the unit frame, wound counter-clockwise seen from outside (where phi is larger).

    vertices_unit: (v, 3) float64, one per crossed grid edge, in the order of those edges.
    faces: (f, 3) int64 rows of `vertices_unit`.
    normals: (v, 3) float32 unit vectors along the field's gradient.
    evaluations: points at which the field's value was taken.
    gradient_evaluations: points at which its value and gradient were taken.
    lipschitz: the measured bound on the gradient's norm.
    """

    vertices_unit: NDArray[np.float64]
    faces: NDArray[np.int64]
    normals: NDArray[np.float32]
    evaluations: int
    gradient_evaluations: int
    lipschitz: float


class CappedField:
    """A field whose level set is closed where it would leave the cube: along walls half a voxel within its faces.

    Beyond the walls all is outside, or all inside if most of the cube's faces are inside, as around a room.
    """

    def __init__(self, field: ScalarField, *, resolution: int, level: float) -> None:
        self._field, self._level, self._wall = field, level, 1 - 1 / resolution
        axis = torch.linspace(-1, 1, 17, device=field.device)
        grid = torch.cartesian_prod(axis, axis, axis)
        with torch.no_grad():
            faces = field.value(grid[(grid.abs() == 1).any(dim=1)])
        self._solid = bool((faces < level).float().mean() > 0.5)

    @property
    def device(self) -> torch.device:
        """As the field's."""
        return self._field.device

    def value(self, x: Tensor) -> Tensor:
        """The value (n,) at x (n, 3)."""
        phi, beyond = self._field.value(x), x.abs().amax(dim=1) - self._wall
        return torch.minimum(phi, self._level - beyond) if self._solid else torch.maximum(phi, self._level + beyond)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value (n,) and its gradient (n, 3) at x (n, 3)."""
        phi, gradient = self._field.value_and_gradient(x)
        beyond, axis = (x.abs() - self._wall).max(dim=1)
        side = torch.zeros_like(x).scatter_(1, axis[:, None], x.gather(1, axis[:, None]).sign())
        if self._solid:
            beyond, side = -beyond, -side
        walls = self._level + beyond
        there = walls < phi if self._solid else walls > phi
        return torch.where(there, walls, phi), torch.where(there[:, None], side.to(gradient), gradient)


def leaves_the_cube(vertices_unit: NDArray[np.float64], faces: NDArray[np.int64], resolution: int) -> bool:
    """Whether a surface of vertices (v, 3) and faces (f, 3) reaches the cube's faces and has a border."""
    return bool((np.abs(vertices_unit) > 1 - 2 / resolution).any()) and borders(faces)


def borders(faces: NDArray[np.int64]) -> bool:
    """Whether an edge of faces (f, 3) is in one of them alone."""
    edges = np.sort(half_edges(faces), axis=1)
    _, count = np.unique(edges[:, 0] * (faces.max(initial=0) + 1) + edges[:, 1], return_counts=True)
    return bool((count == 1).any())


def extract(
    field: ScalarField,
    *,
    resolution: int,
    level: float = 0.0,
    projection_steps: int = 2,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ExtractedSurface:
    """The surface phi = level over [-1, 1]^3, as marching cubes sees it on a grid of `resolution`^3 cells.

    Before projection the result is that of marching cubes on the dense grid. `projection_steps` clamped Newton steps
    then move each vertex onto the level set, half a voxel at most; 0 leaves them where they are. Connectivity never
    changes: the mesh is closed wherever the level set is closed within the cube. Triangles may be as thin as
    marching cubes makes them; none is merged or dropped.

    The same field on the same device gives the same arrays. Points are handed to the field in batches of
    `batch_size` (default: 16384 on a CPU, where the activations then stay in cache; 262144 elsewhere) as `dtype`.
    `on_progress` gets a rising share from 0 to 1; `should_stop` is asked before every batch.

    Marching cubes: Lewiner et al., Efficient implementation of Marching Cubes' cases with topological guarantees,
    JGT 8(2), 2003.

    Raises ExtractionError where the field is not finite or nothing crosses the level, Stopped when asked to.
    """
    on_progress, should_stop = on_progress or (lambda _: None), should_stop or (lambda: False)
    batch = batch_size or (16_384 if field.device.type == "cpu" else 262_144)
    grid = _Grid(field, resolution, level, dtype, batch, on_progress, should_stop)
    with torch.no_grad():
        lattice, cells = _descend(grid)
        cells = _flood(grid, lattice, cells)
        grid.on_progress(0.4)
        keys, faces = _march(grid, lattice, cells)
        vertices = _place(grid, lattice, keys)
        del lattice, cells, keys
        grid.on_progress(0.5)
        vertices, normals = _project(grid, vertices, faces, projection_steps)
    grid.on_progress(1.0)
    return ExtractedSurface(
        vertices_unit=vertices.cpu().numpy(),
        faces=faces.cpu().numpy(),
        normals=normals.cpu().numpy(),
        evaluations=grid.evaluations,
        gradient_evaluations=grid.gradient_evaluations,
        lipschitz=grid.lipschitz,
    )


class _Grid:
    """The field on the grid: evaluates it in bounded batches, counts what that costs, knows its slopes."""

    def __init__(
        self,
        field: ScalarField,
        resolution: int,
        level: float,
        dtype: torch.dtype,
        batch_size: int,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.field, self.resolution, self.level, self.dtype = field, resolution, level, dtype
        self.device, self.batch_size, self.h = field.device, batch_size, 2 / resolution
        self.on_progress, self.should_stop = on_progress, should_stop
        self.evaluations = self.gradient_evaluations = 0
        self.lowest, self.highest = float("inf"), float("-inf")
        self.lipschitz = self.unit = 0.0

    def points(self, nodes: Tensor) -> Tensor:
        """Positions (n, 3) float64 of nodes (n, 3): the same for a node whoever asks.

        Blocks of the coarse lattices may overhang the cube; there the field is that of the nearest point in the cube,
        which keeps the Lipschitz bound and asks nothing of the field outside.
        """
        return nodes.clamp(max=self.resolution).double() * self.h - 1

    def values(self, nodes: Tensor) -> Tensor:
        """The value phi - level at nodes (n, 3), never zero."""
        out = torch.empty(len(nodes), dtype=self.dtype, device=self.device)

        def ask(part: slice) -> None:
            out[part] = self.field.value(self.points(nodes[part]).to(self.dtype))

        self._in_batches(ask, len(nodes))
        self.evaluations += len(nodes)
        if len(nodes):
            low, high = (float(x) for x in torch.aminmax(out))  # synchronises; NaN spreads into both
            if not (np.isfinite(low) and np.isfinite(high)):
                bad = int((~torch.isfinite(out)).sum())
                raise ExtractionError(f"the field is not finite at {bad} of {len(out)} grid nodes; fit it again")
            self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        out -= self.level
        # A sample on the level counts as just outside: without a sign, it would leave a hole.
        return torch.where(out == 0, torch.finfo(self.dtype).tiny, out)

    def gradients(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The value phi - level (n,) and its gradient (n, 3) at points (n, 3), float64."""
        value = torch.empty(len(points), dtype=torch.float64, device=self.device)
        gradient = torch.empty((len(points), 3), dtype=torch.float64, device=self.device)

        def ask(part: slice) -> None:
            value[part], gradient[part] = self.field.value_and_gradient(points[part].to(self.dtype))

        self._in_batches(ask, len(points), share=0.5)  # a gradient keeps twice the activations
        self.gradient_evaluations += len(points)
        return value - self.level, gradient

    def _in_batches(self, ask: Callable[[slice], None], n: int, *, share: float = 1.0) -> None:
        """Has `ask` see to n points, a batch at a time, or a `share` of one; smaller ones where memory runs out."""
        start = 0
        while start < n:
            self.check_stop()
            end = min(n, start + max(1, int(share * self.batch_size)))
            try:
                ask(slice(start, end))
                start = end
                continue
            except torch.OutOfMemoryError:
                if self.batch_size <= SMALLEST_BATCH:
                    raise
            self.batch_size = max(SMALLEST_BATCH, self.batch_size // 4)
            free_device_memory()
            log.warning("the device's memory is full; the field is asked at %d points at a time", self.batch_size)

    def measure_slopes(self, values: Tensor, nodes: Tensor, stride: int) -> None:
        """Sets the Lipschitz bound and the unit in which values are handed to scikit-image.

        From gradients all over the cube and near the surface, and from the differences of `values` (n^3,) along the
        edges of the lattice `nodes` (n^3, 3): a field may have steps between the points where it is looked at.
        """
        cube = values.view(3 * (round(len(values) ** (1 / 3)),))
        steps = max(float(cube.diff(dim=axis).abs().max()) for axis in range(3)) / (stride * self.h)
        n = 1024
        spread = _quasi_random(n, device=self.device) * 2 - 1
        near = self.points(nodes[values.abs().argsort(stable=True)[:n]])
        steepness = self.gradients(torch.cat([spread, near]))[1].norm(dim=-1)
        # A field may have points without a gradient (the centre of a sphere).
        steepness = torch.where(torch.isfinite(steepness), steepness, 0.0)
        self.lipschitz = LIPSCHITZ_SAFETY * max(float(steepness.max()), steps)
        self.unit = self.h * (float(steepness[n:].median()) or self.lipschitz)

    def check_stop(self) -> None:
        """Raises Stopped if the caller wants to stop."""
        if self.should_stop():
            raise Stopped("the extraction was stopped")


def _quasi_random(n: int, *, device: torch.device) -> Tensor:
    """Points (n, 3) that fill [0, 1]^3 evenly: the additive recurrence of the generalised golden ratio.

    Roberts, The unreasonable effectiveness of quasirandom sequences, 2018.
    """
    ratio = 1.2207440846057596  # x^4 = x + 1
    powers = torch.tensor([ratio**-1, ratio**-2, ratio**-3], dtype=torch.float64, device=device)
    return (0.5 + torch.arange(1, n + 1, device=device)[:, None] * powers) % 1


class _Lattice:
    """Values at the nodes of a cubic lattice, stored in bricks of 8^3 nodes where there is something to store.

    A slot is a node's place in storage. Brick 0 stands for everything not stored: its values are NaN.

    values: what was evaluated or predicted; NaN where neither. known: it was evaluated. visited: the cell with this
    low corner has been looked at.
    """

    def __init__(self, nodes_per_side: int, grid: _Grid) -> None:
        self.nodes_per_side = nodes_per_side
        self._side = -(-nodes_per_side // BRICK)
        self._table = torch.zeros(self._side**3, dtype=torch.int32, device=grid.device)
        self._origin = torch.zeros((1, 3), dtype=torch.int32, device=grid.device)
        self._count = 1
        self.values = torch.full((BRICK**3,), torch.nan, dtype=grid.dtype, device=grid.device)
        self.known = torch.zeros(BRICK**3, dtype=torch.bool, device=grid.device)
        self.visited = torch.zeros(BRICK**3, dtype=torch.bool, device=grid.device)

    def _bricks(self, nodes: Tensor) -> Tensor:
        i, j, k = (nodes >> 3).unbind(-1)
        return (i.long() * self._side + j) * self._side + k

    def slots(self, nodes: Tensor) -> Tensor:
        """The slots (...,) of nodes (..., 3); those not stored share slots of brick 0."""
        i, j, k = (nodes & 7).unbind(-1)
        return self._table[self._bricks(nodes)].long() * BRICK**3 + ((i * BRICK + j) * BRICK + k)

    def nodes(self, slots: Tensor) -> Tensor:
        """The nodes (n, 3) int32 in slots (n,)."""
        local = (slots % BRICK**3).int()
        offset = torch.stack([local >> 6, (local >> 3) & 7, local & 7], dim=-1)
        nodes: Tensor = self._origin[slots // BRICK**3] + offset
        return nodes

    def distinct(self, slots: Tensor) -> Tensor:
        """`slots` sorted, each once."""
        if len(slots) * 64 < len(self.known):
            each_once: Tensor = torch.unique(slots)
            return each_once
        # Marking is several times faster than sorting where there are many.
        marked = torch.zeros_like(self.known)
        marked[slots] = True
        return marked.nonzero().squeeze(1)

    def store(self, nodes: Iterator[Tensor]) -> None:
        """Makes room for batches of nodes (..., 3)."""
        wanted = torch.zeros(len(self._table), dtype=torch.bool, device=self._table.device)
        for part in nodes:
            wanted[self._bricks(part).flatten()] = True
        new = (wanted & (self._table == 0)).nonzero()[:, 0]
        first, self._count = self._count, self._count + len(new)
        self._table[new] = torch.arange(first, self._count, dtype=torch.int32, device=new.device)
        if self._count > len(self._origin):
            room = max(self._count, len(self._origin) * 5 // 4) - len(self._origin)
            self._origin = torch.cat([self._origin, self._origin.new_zeros((room, 3))])
            self.values = torch.cat([self.values, self.values.new_full((room * BRICK**3,), torch.nan)])
            self.known = torch.cat([self.known, self.known.new_zeros(room * BRICK**3)])
            self.visited = torch.cat([self.visited, self.visited.new_zeros(room * BRICK**3)])
        corner = torch.stack([new // self._side**2, new // self._side % self._side, new % self._side], dim=-1)
        self._origin[first : self._count] = corner.int() * BRICK

    def evaluate(self, slots: Tensor, grid: _Grid, *, stride: int = 1) -> Tensor:
        """Evaluates the field in slots (n,); returns by how much that changed what had been predicted there."""
        before = self.values[slots]
        values = grid.values(self.nodes(slots) * stride)
        self.values[slots] = values
        self.known[slots] = True
        return values - before


def _descend(grid: _Grid) -> tuple[_Lattice, Tensor]:
    """The lattice of stride 1, filled with predictions around the surface, and the cells (n, 3) that may hold it."""
    stride = _coarsest_stride(grid.resolution)
    blocks_per_side = -(-grid.resolution // stride)
    lattice = _Lattice(blocks_per_side + 1, grid)
    axis = torch.arange(blocks_per_side + 1, dtype=torch.int32, device=grid.device)
    nodes = torch.cartesian_prod(axis, axis, axis)
    lattice.store(iter([nodes]))
    slots = lattice.slots(nodes)
    lattice.evaluate(slots, grid, stride=stride)
    grid.measure_slopes(lattice.values[slots], nodes * stride, stride)
    blocks = torch.cartesian_prod(*3 * [axis[:-1]])
    bounds = torch.full((len(blocks),), _lipschitz_bound(grid, stride), dtype=grid.dtype, device=grid.device)
    while stride > 1:
        keep = torch.cat([_undecided(_corner_values(lattice, part), bound) for part, bound in _split(blocks, bounds)])
        blocks, bounds = blocks[keep], bounds[keep]
        stride //= 2
        if stride > 1:
            lattice, blocks, bounds = _refine(grid, lattice, blocks, bounds, stride)
        else:
            lattice, blocks = _refine_last(grid, lattice, blocks, bounds)
        grid.on_progress(0.2 / stride)
    return lattice, blocks[(blocks < grid.resolution).all(dim=-1)]


def _coarsest_stride(resolution: int) -> int:
    """The power of two that cuts the cube into 16 to 32 blocks a side."""
    stride = 1
    while resolution // (2 * stride) >= 16:
        stride *= 2
    return stride


def _lipschitz_bound(grid: _Grid, stride: int) -> float:
    """How far the field can stray from the trilinear interpolation of a block's corners.

    phi(x) >= sum w_i (phi_i - L |x - c_i|) with trilinear weights w; by Jensen's inequality sum w_i |x - c_i| is at
    most sqrt(sum_d t_d (1 - t_d)) s h <= sqrt(3)/2 s h.
    """
    return grid.lipschitz * 3**0.5 / 2 * stride * grid.h


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Consecutive parts of `rows`, so that what is built from each stays small; one empty part of an empty tensor."""
    size = _CHUNK if rows.device.type == "cpu" else _DEVICE_CHUNK
    return (rows[start : start + size] for start in range(0, max(len(rows), 1), size))


def _split(blocks: Tensor, bounds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_parts(blocks), _parts(bounds), strict=True)


def _corner_nodes(blocks: Tensor) -> Tensor:
    return blocks[:, None] + CORNERS.to(blocks.device)


def _corner_values(lattice: _Lattice, blocks: Tensor) -> Tensor:
    """Values (n, 2, 2, 2) at the corners of blocks (n, 3)."""
    return lattice.values[lattice.slots(_corner_nodes(blocks))].view(-1, 2, 2, 2)


def _missing(lattice: _Lattice, blocks: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """The slots of those corners of blocks (n, 3) for whose slots `wanted` is true, ascending, each once."""
    found = []
    for part in _parts(blocks):
        slots = lattice.slots(_corner_nodes(part)).flatten()
        found.append(slots[wanted(slots)])
    return lattice.distinct(torch.cat(found))


def _undecided(corners: Tensor, bound: Tensor | float) -> Tensor:
    """Which blocks with these corner values (n, 2, 2, 2) may hold a zero."""
    low, high = corners.flatten(1).amin(1), corners.flatten(1).amax(1)
    return ~((low > bound) | (high < -bound))


def _refine(
    grid: _Grid, parent: _Lattice, blocks: Tensor, bounds: Tensor, stride: int
) -> tuple[_Lattice, Tensor, Tensor]:
    """The lattice of `stride`, half the parent's, over `blocks`; the blocks in it that may hold a zero; their bounds.

    The centre of every block is evaluated first: how far it lies from the interpolation decides how many children are
    worth their corners.
    """
    child = _predict(grid, parent, blocks)
    strayed = torch.zeros_like(child.values)
    centers = child.slots(2 * blocks + 1)
    strayed[centers] = child.evaluate(centers, grid, stride=stride).abs()
    bounds = torch.minimum(bounds, _stray_bounds(strayed[centers], strayed))
    children = _undecided_children(parent, blocks, bounds)
    slots = _missing(child, children, lambda slots: ~child.known[slots])
    strayed[slots] = child.evaluate(slots, grid, stride=stride).abs()
    own = [strayed[child.slots(_corner_nodes(part))].amax(dim=1) for part in _parts(children)]
    # Half the size: half as far at a crease, a quarter where the field is smooth.
    child_bounds = _stray_bounds(torch.cat(own), strayed) / 2
    return child, children, child_bounds.clamp(max=_lipschitz_bound(grid, stride))


def _refine_last(grid: _Grid, parent: _Lattice, blocks: Tensor, bounds: Tensor) -> tuple[_Lattice, Tensor]:
    """The lattice of stride 1 over `blocks`, and the cells in it that may hold a zero.

    Nothing is evaluated yet: it holds predictions, and NaN where their sign is uncertain.
    """
    child, stencil = _predict(grid, parent, blocks), _STENCIL.to(grid.device)
    inherited = (stencil % 2 == 0).all(dim=-1)
    for part, bound in _split(blocks, bounds):
        slots = child.slots((2 * part)[:, None] + stencil)
        fine = _interpolate(_corner_values(parent, part)).flatten(1)
        child.values[slots[(fine.abs() <= bound[:, None]) & ~inherited]] = torch.nan
    return child, _undecided_children(parent, blocks, bounds)


def _predict(grid: _Grid, parent: _Lattice, blocks: Tensor) -> _Lattice:
    """The lattice of half the parent's stride over `blocks` (n, 3), filled by interpolation."""
    child, stencil = _Lattice(2 * parent.nodes_per_side - 1, grid), _STENCIL.to(grid.device)
    child.store((2 * part)[:, None] + 2 * CORNERS.to(grid.device) for part in _parts(blocks))
    inherited = (stencil % 2 == 0).all(dim=-1)
    for part in _parts(blocks):
        slots = child.slots((2 * part)[:, None] + stencil)
        child.values[slots] = _interpolate(_corner_values(parent, part)).flatten(1)
        child.known[slots[:, inherited]] = True
    return child


def _undecided_children(parent: _Lattice, blocks: Tensor, bounds: Tensor) -> Tensor:
    """The blocks of half the size (m, 3) within `blocks` (n, 3) that may hold a zero."""
    children = []
    for part, bound in _split(blocks, bounds):
        fine = _interpolate(_corner_values(parent, part))
        low, high = _window(fine, torch.minimum).flatten(1), _window(fine, torch.maximum).flatten(1)
        block, corner = (~((low > bound[:, None]) | (high < -bound[:, None]))).nonzero().unbind(1)
        children.append(2 * part[block] + CORNERS.to(parent.values.device)[corner])
    return torch.cat(children)


def _stray_bounds(own: Tensor, strayed: Tensor) -> Tensor:
    worst = WORST_SAFETY * strayed.max()
    return (OWN_SAFETY * own).clamp(min=FLOOR * worst, max=worst)


def _interpolate(corners: Tensor) -> Tensor:
    """Values (n, 3, 3, 3) of the trilinear interpolation of corners (n, 2, 2, 2).

    One axis after another, so that two blocks give exactly the same on the face they share.
    """
    for axis in (1, 2, 3):
        low, high = corners.narrow(axis, 0, 1), corners.narrow(axis, 1, 1)
        corners = torch.cat([low, (low + high) / 2, high], dim=axis)
    return corners


def _window(fine: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The minimum or maximum (n, 2, 2, 2) over each 2^3 window of values (n, 3, 3, 3)."""
    for axis in (1, 2, 3):
        fine = pick(fine.narrow(axis, 0, 2), fine.narrow(axis, 1, 2))
    return fine


def _flood(grid: _Grid, lattice: _Lattice, cells: Tensor) -> Tensor:
    """The cells (n, 3) with a change of sign: among `cells`, and wherever the surface leads from there."""
    found = [cells[:0]]
    cells = _visit(lattice, cells)
    while len(cells):
        lattice.evaluate(_missing(lattice, cells, lambda slots: lattice.values[slots].isnan()), grid)
        cells = _mixed(lattice, cells)
        slots = _missing(lattice, cells, lambda slots: ~lattice.known[slots])
        predicted = lattice.values[slots]
        lattice.evaluate(slots, grid)
        found.append(cells)
        # Predictions of which the sign was thought certain, and was not: look around them again.
        flipped = slots[(predicted < 0) != (lattice.values[slots] < 0)]
        around = (lattice.nodes(flipped)[:, None] - CORNERS.to(grid.device)).reshape(-1, 3)
        beyond = _across(lattice, cells, grid.resolution)
        cells = torch.cat([around, beyond])
        cells = _visit(lattice, cells[((cells >= 0) & (cells < grid.resolution)).all(dim=-1)])
    result = _mixed(lattice, torch.cat(found))
    if not len(result):
        raise NoSurfaceError(grid.level, grid.lowest, grid.highest)
    return lattice.nodes(lattice.distinct(lattice.slots(result)))


def _visit(lattice: _Lattice, cells: Tensor) -> Tensor:
    """Stores the cells (n, 3) and marks them as visited; returns each once."""
    lattice.store(_corner_nodes(part) for part in _parts(cells))
    slots = lattice.distinct(lattice.slots(cells))
    lattice.visited[slots] = True
    return lattice.nodes(slots)


def _mixed(lattice: _Lattice, cells: Tensor) -> Tensor:
    """Those of the cells (n, 3) whose corners have both signs."""
    return torch.cat([part[_undecided(_corner_values(lattice, part), 0.0)] for part in _parts(cells)])


def _across(lattice: _Lattice, cells: Tensor, resolution: int) -> Tensor:
    """Cells not yet visited that share a face of mixed signs with one of `cells` (n, 3)."""
    found = [cells[:0]]
    for part in _parts(cells):
        inside = _corner_values(lattice, part) < 0
        for axis in range(3):
            for side in (0, 1):
                face = inside.select(axis + 1, side).flatten(1)
                beside = part[face.any(1) & ~face.all(1)].clone()
                beside[:, axis] += 2 * side - 1
                beside = beside[((beside >= 0) & (beside < resolution)).all(dim=-1)]
                found.append(beside[~lattice.visited[lattice.slots(beside)]])
    return torch.cat(found)


def _march(grid: _Grid, lattice: _Lattice, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Marching cubes on each of the cells (n, 3), with the vertices on shared edges found by the edge, not by place.

    Returns keys (v,), ascending, and faces (f, 3) into them. A key is 4 x the node's number + an axis: the vertex on
    the edge from that node along that axis; axis 3 stands for the extra vertex within the cell.
    """
    side = grid.resolution + 1
    i, j, k, axis = torch.cat([EDGES, EDGES.new_tensor([[0, 0, 0, 3]])]).to(grid.device).unbind(1)
    beyond = ((i * side + j) * side + k) * 4 + axis
    keys, faces = [], []
    for part in _parts(cells):
        grid.check_stop()
        owner, edges = triangles_of(part, _corner_values(lattice, part).flatten(1) / grid.unit)
        i, j, k = part.long().unbind(1)
        key = (((i * side + j) * side + k) * 4)[owner][:, None] + beyond[edges]
        batch_keys, index = torch.unique(key, return_inverse=True)
        keys.append(batch_keys)
        faces.append(index)
    if len(keys) == 1:
        return keys[0], faces[0]
    merged = torch.unique(torch.cat(keys))
    joined = [torch.searchsorted(merged, own)[index] for own, index in zip(keys, faces, strict=True)]
    return merged, torch.cat(joined)


def _place(grid: _Grid, lattice: _Lattice, keys: Tensor) -> Tensor:
    """Positions (v, 3) float64 of the vertices with these keys: linear interpolation along the edge."""
    side, out = grid.resolution + 1, []
    for key in _parts(keys):
        axis, number = key % 4, key // 4
        node = torch.stack([number // side**2, number // side % side, number % side], dim=-1).int()
        step = torch.nn.functional.one_hot(axis, 4)[:, :3].int()
        low = lattice.values[lattice.slots(node)].double()
        high = lattice.values[lattice.slots(node + step)].double()
        inner = (axis == 3).nonzero()[:, 0]
        place = node + step * (low / (low - high)).clamp(MARGIN, 1 - MARGIN)[:, None]
        place[inner] = node[inner] + inner_place(_corner_values(lattice, node[inner]).flatten(1) / grid.unit)
        out.append(place * grid.h - 1)
    return torch.cat(out)


def _project(grid: _Grid, vertices: Tensor, faces: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The vertices (v, 3) moved onto the level set by clamped Newton steps, and their unit normals (v, 3) float32."""
    moved, gradient = torch.empty_like(vertices), torch.empty_like(vertices)
    size = 4 * grid.batch_size
    for start in range(0, len(vertices), size):
        part = slice(start, start + size)
        moved[part], gradient[part] = _newton(grid, vertices[part], steps)
        grid.on_progress(0.5 + 0.5 * min(1.0, (start + size) / len(vertices)))
    _put_back_overturned(vertices, moved, faces)
    length = gradient.norm(dim=1, keepdim=True)
    usable = torch.isfinite(length) & (length > 1e-6 * grid.lipschitz)
    normals = gradient / torch.where(usable, length, 1)
    if not usable.all():
        by_faces = torch.from_numpy(vertex_normals(moved.cpu().numpy(), faces.cpu().numpy()))
        normals = torch.where(usable, normals, by_faces.to(normals))
    return moved, normals.float()


def _newton(grid: _Grid, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Points (n, 3) after at most `steps` steps x -= phi g / |g|^2, and the last gradient (n, 3) seen on the way.

    A point goes no farther than REACH h from `start`, and back where |phi| did not fall. Steps shorter than
    SETTLED h end a point's way without another look: there the gradient before serves for the normal.
    """
    place, (phi, gradient) = start.clone(), grid.gradients(start)
    going = torch.arange(len(start), device=start.device)
    for _ in range(steps):
        g = gradient[going]
        step = -(phi[going] / (g**2).sum(dim=1))[:, None] * g
        target = place[going] + torch.where(torch.isfinite(step), step, 0.0)
        way = target - start[going]
        length = way.norm(dim=1, keepdim=True)
        target = start[going] + way * (REACH * grid.h / length.clamp(min=REACH * grid.h))
        far = (target - place[going]).norm(dim=1) > SETTLED * grid.h
        place[going[~far]] = target[~far]
        going, target = going[far], target[far]
        new_phi, new_gradient = grid.gradients(target)
        better = new_phi.abs() < phi[going].abs()
        going = going[better]
        place[going], phi[going], gradient[going] = target[better], new_phi[better], new_gradient[better]
    return place, gradient


def _put_back_overturned(before: Tensor, after: Tensor, faces: Tensor, rounds: int = 4) -> None:
    """Puts back, in `after`, the vertices of triangles that the way from `before` turned over."""
    suspects = faces
    for _ in range(rounds):
        turned = [
            part[(_area_vectors(before, part) * _area_vectors(after, part)).sum(1) < 0] for part in _parts(suspects)
        ]
        corners = torch.cat(turned).flatten()
        if not len(corners):
            return
        after[corners] = before[corners]
        touched = torch.zeros(len(after), dtype=torch.bool, device=after.device)
        touched[corners] = True
        suspects = faces[touched[faces].any(dim=1)]


def _area_vectors(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices[faces].unbind(1)
    vectors: Tensor = torch.linalg.cross(b - a, c - a)
    return vectors
