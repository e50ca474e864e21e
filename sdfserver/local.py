"""Detail: small SIRENs on overlapping cells, blended with a coarse one by a partition of unity.

Everything in the unit frame; sdf < 0 inside. A level is a grid of side^3 cubic cells over [-1, 1]^3, some of which have
a network. Neighbouring cells overlap by `margin` of their width. Their weights are products over the axes of a ramp

    S(t) = t^3 (6 t^2 - 15 t + 10),    S(t) + S(1 - t) = 1,

across the overlap, so that over all cells of the grid, with a network or without, they sum to one everywhere. With f_c
the networks and W the sum of the weights of the cells that have one, a level turns the field phi below it into

    (1 - W) phi + sum_c w_c f_c,

the partition of unity method (Babuska and Melenk 1997; Ohtake et al., Multi-level Partition of Unity Implicits, 2003).
S has two continuous derivatives, and so has the result: there are no seams between cells, levels and the coarse field.

Symbols: x (n, 3) points; c and H a cell's centre and half-width, overlap included; u = (x - c) / H in [-1, 1]^3; a
local network gives f / H at u, so that its gradient with respect to u is that of f with respect to x.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from sdfserver.config import LocalNetworkConfig, NetworkConfig
from sdfserver.device import sums
from sdfserver.siren import Siren, layers_of, uniform, value_and_gradient, value_gradient_and_hessian

BLOCK = 64
"""Points of one cell that are evaluated together; a cell with fewer is padded to it."""
VOXELS = 20
"""Cells of a mesh's grid along each side of a local network's cell: finer ones hardly show more of it."""
FEW = 0.1
"""A level with less than this share of all networks does not make the mesh finer for them."""
NEGLIGIBLE = 1e-6
"""A field with less weight than this is not evaluated."""
UNBENT = 1e-2
"""Nor, for second derivatives, unless those of its weight are larger: what is left of it may still bend the blend."""
_BITS = torch.cartesian_prod(*3 * [torch.arange(2)])


class CellGrid:
    """A grid of side^3 cubic cells over [-1, 1]^3, and who overlaps whom."""

    def __init__(self, side: int, margin: float) -> None:
        self.side, self.margin, self.width = side, margin, 2 / side
        self.half = self.width / 2 * (1 + margin)
        """Half-width H of a cell, overlap included."""

    def numbers(self, cells: Tensor) -> Tensor:
        """One number (...,) for each of the cells (..., 3) int64."""
        return (cells[..., 0] * self.side + cells[..., 1]) * self.side + cells[..., 2]

    def cells(self, numbers: Tensor) -> Tensor:
        """The cells (..., 3) with these numbers (...,)."""
        return torch.stack([numbers // self.side**2, numbers // self.side % self.side, numbers % self.side], dim=-1)

    def centres(self, cells: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centres (..., 3) of cells (..., 3)."""
        return (cells.to(dtype) + 0.5) * self.width - 1

    def overlaps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every pair of a point of x (n, 3) and a cell in which it lies, overlap included: rows (p,), numbers (p,)."""
        t = (x + 1) / self.width
        home = t.floor()
        t -= home
        cell, beside = home.long(), torch.where(t < 0.5, -1, 1)
        in_overlap = (t - 0.5).abs() > 0.5 - self.margin / 2
        rows, numbers = [], []
        for bits in _BITS.to(x.device):
            some = (in_overlap | (bits == 0)).all(dim=1).nonzero()[:, 0]
            reached = cell[some] + beside[some] * bits
            inside = ((reached >= 0) & (reached < self.side)).all(dim=1)
            rows.append(some[inside])
            numbers.append(self.numbers(reached[inside]))
        return torch.cat(rows), torch.cat(numbers)

    def weights(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (n,) of a cell at its local coordinates u (n, 3), and its gradient (n, 3) with respect to x."""
        steepness = (1 + self.margin) / (2 * self.margin)
        t = ((1 - u.abs()) * steepness).clamp(0, 1)
        x, y, z = (t**3 * ((6 * t - 15) * t + 10)).unbind(1)
        dx, dy, dz = ((30 * steepness / self.half) * -u.sign() * (t * (1 - t)) ** 2).unbind(1)
        return x * y * z, torch.stack([dx * y * z, x * dy * z, x * y * dz], dim=1)

    def bends(self, u: Tensor) -> Tensor:
        """The second derivatives (n, 3, 3) of the weight of a cell at u (n, 3), with respect to x."""
        steepness = (1 + self.margin) / (2 * self.margin)
        t = ((1 - u.abs()) * steepness).clamp(0, 1)
        s = t**3 * ((6 * t - 15) * t + 10)
        ds = (30 * steepness / self.half) * -u.sign() * (t * (1 - t)) ** 2
        dds = (60 * (steepness / self.half) ** 2) * t * (1 - t) * (1 - 2 * t)
        out = u.new_empty((len(u), 3, 3))
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            out[:, i, i] = dds[:, i] * s[:, j] * s[:, k]
            out[:, i, j] = out[:, j, i] = ds[:, i] * ds[:, j] * s[:, k]
        return out


class LocalSirens(nn.Module):
    """k SIRENs 3 -> hidden x layers -> 1, each with a linear part a . u beside it, as batched products.

    What a smooth surface is in a small cell, a plane, is the linear part's; the sines learn the difference.
    """

    def __init__(self, k: int, config: LocalNetworkConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (fan_in, fan_out, bound) in enumerate(layers_of(config)):
            # The last layer is small, for the linear part to begin with.
            bound *= 0.1 if i == config.layers else 1.0
            self.weights.append(uniform((k, fan_in, fan_out), bound, generator))
            self.biases.append(uniform((k, 1, fan_out), 1 / math.sqrt(fan_in), generator))
        self.linear = nn.Parameter(torch.zeros(k, 3, 1))

    def __len__(self) -> int:
        return len(self.linear)

    def forward(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        """The value f / H (b, n) at u (b, n, 3), by the networks in `rows` (b,), or by each its own."""
        *sine_layers, (last, offset) = self._scaled_layers(rows)
        x = u
        for weight, bias in sine_layers:
            x = torch.baddbmm(bias, x, weight).sin_()
        return (torch.baddbmm(offset, x, last) + u @ _pick(self.linear, rows))[..., 0]

    def value_and_gradient(self, u: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The value f / H (b, n) and the gradient (b, n, 3) at u (b, n, 3); `rows` as in `forward`."""
        return value_and_gradient(u, _pick(self.linear, rows), self._scaled_layers(rows))

    def value_gradient_and_hessian(self, u: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The value f / H (b, n), the gradient (b, n, 3) and the Hessian (b, n, 3, 3) at u (b, n, 3), all by u."""
        return value_gradient_and_hessian(u, _pick(self.linear, rows), self._scaled_layers(rows))

    def _scaled_layers(self, rows: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        omega = self.config.omega
        layers = [(_pick(w, rows), _pick(b, rows)) for w, b in zip(self.weights, self.biases, strict=True)]
        return [*((weight * omega, bias * omega) for weight, bias in layers[:-1]), layers[-1]]


def _pick(parameter: Tensor, rows: Tensor | None) -> Tensor:
    return parameter if rows is None else parameter[rows]


class LocalLevel(nn.Module):
    """The networks of one level.

    cells: (k, 3) int64, ascending by number: where each of `sirens` is at home.
    """

    cells: Tensor
    table: Tensor

    def __init__(self, cells: Tensor, sirens: LocalSirens) -> None:
        super().__init__()
        self.grid = CellGrid(sirens.config.side, sirens.config.margin)
        self.sirens = sirens
        self.register_buffer("cells", cells)
        table = torch.full((self.grid.side**3,), -1, dtype=torch.int32, device=cells.device)
        table[self.grid.numbers(cells)] = torch.arange(len(cells), dtype=torch.int32, device=cells.device)
        self.register_buffer("table", table, persistent=False)

    @property
    def config(self) -> LocalNetworkConfig:
        """That of each network."""
        return self.sirens.config

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W (n,) and the sum of w f (n,) at x (n, 3)."""
        points, networks, u = self._pairs(x)
        (f,) = in_blocks(lambda u, rows: (self.sirens(u, rows),), u, networks)
        w, _ = self.grid.weights(u)
        total, value = sums(torch.stack([w, w * f * self.grid.half], dim=1), points, len(x)).unbind(1)
        return total, value

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W (n,), its gradient (n, 3), the sum of w f (n,) and its gradient (n, 3) at x (n, 3)."""
        points, networks, u = self._pairs(x)
        f, g = in_blocks(self.sirens.value_and_gradient, u, networks)
        f = f * self.grid.half
        w, dw = self.grid.weights(u)
        terms = [w[:, None], dw, (w * f)[:, None], w[:, None] * g + f[:, None] * dw]
        parts = sums(torch.cat(terms, dim=1), points, len(x))
        total, slope, value, gradient = torch.split(parts, [1, 3, 1, 3], dim=1)
        return total[:, 0], slope, value[:, 0], gradient

    def value_gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, ...]:
        """As `value_and_gradient`, each pair followed by its Hessian (n, 3, 3)."""
        points, networks, u = self._pairs(x)
        f, g, h = in_blocks(self.sirens.value_gradient_and_hessian, u, networks)
        f, h = f * self.grid.half, h / self.grid.half
        w, dw = self.grid.weights(u)
        ddw = self.grid.bends(u)
        bent = w[:, None, None] * h + both_ways(g, dw) + f[:, None, None] * ddw
        terms = [w[:, None], dw, ddw.flatten(1), (w * f)[:, None], w[:, None] * g + f[:, None] * dw, bent.flatten(1)]
        total, slope, bend, value, gradient, hessian = torch.split(
            sums(torch.cat(terms, dim=1), points, len(x)), [1, 3, 9, 1, 3, 9], dim=1
        )
        return total[:, 0], slope, bend.view(-1, 3, 3), value[:, 0], gradient, hessian.view(-1, 3, 3)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of a point of x (n, 3) and a network: its row, the network (ascending) and u (p, 3)."""
        points, numbers = self.grid.overlaps(x)
        networks = self.table[numbers]
        points, networks = points[networks >= 0], networks[networks >= 0]
        networks, order = networks.sort(stable=True)
        points, networks = points[order], networks.long()
        return points, networks, (x[points] - self.grid.centres(self.cells[networks], x.dtype)) / self.grid.half


def both_ways(a: Tensor, b: Tensor) -> Tensor:
    """a b^T + b a^T (n, 3, 3) of vectors (n, 3): what second derivatives of a product have of the first ones."""
    outer = a[:, :, None] * b[:, None, :]
    return outer + outer.mT


def in_blocks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], u: Tensor, networks: Tensor
) -> tuple[Tensor, ...]:
    """What `function` gives for u (p, 3) by the networks (p,), ascending: its values (p, ...).

    It is called once, with blocks (b, BLOCK, 3) of points of one network each and these networks (b,).
    """
    each, counts = torch.unique_consecutive(networks, return_counts=True)
    blocks = -(-counts // BLOCK)
    # A network's first block begins where the blocks before it end; its first point, where the points do.
    shift = (blocks.cumsum(0) - blocks) * BLOCK - (counts.cumsum(0) - counts)
    places = torch.arange(len(u), device=u.device) + shift.repeat_interleave(counts)
    owners = each.repeat_interleave(blocks)
    packed = u.new_zeros((len(owners) * BLOCK, 3)).index_copy_(0, places, u).view(len(owners), BLOCK, 3)
    return tuple(values.flatten(0, 1)[places] for values in function(packed, owners))


class PartitionOfUnity(nn.Module):
    """A coarse SIREN and levels of local ones over it, as one field."""

    def __init__(self, coarse: Siren, levels: list[LocalLevel]) -> None:
        super().__init__()
        self.coarse = coarse
        self.level = nn.ModuleList(levels)

    @property
    def levels(self) -> list[LocalLevel]:
        """From wide cells to narrow ones; a later one lies over an earlier one."""
        return cast(list[LocalLevel], list(self.level))

    @property
    def config(self) -> NetworkConfig:
        """The coarse network's."""
        return self.coarse.config

    @property
    def detail(self) -> int:
        """Cells along each side of the cube [-1, 1]^3 that the finest waves want in a mesh."""
        most = sum(len(level.cells) for level in self.levels)
        return max(VOXELS * level.grid.side for level in self.levels if len(level.cells) >= FEW * most)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The value phi (n,) at x (n, 3)."""
        phi, rest = x.new_zeros(len(x)), x.new_ones(len(x))
        open_rows = torch.arange(len(x), device=x.device)
        for level in reversed(self.levels):
            total, value = level.value(x[open_rows])
            phi[open_rows] += rest[open_rows] * value
            rest[open_rows] *= 1 - total
            open_rows = open_rows[rest[open_rows] > NEGLIGIBLE]
        if len(open_rows):
            phi[open_rows] += rest[open_rows] * self.coarse(x[open_rows])
        return phi

    @torch.no_grad()
    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value phi (n,) and its gradient (n, 3) at x (n, 3)."""
        phi, gradient = x.new_zeros(len(x)), x.new_zeros((len(x), 3))
        rest, slope = x.new_ones(len(x)), x.new_zeros((len(x), 3))  # what is left for the levels below; its gradient
        rows = torch.arange(len(x), device=x.device)
        for level in reversed(self.levels):
            total, total_slope, value, value_gradient = level.value_and_gradient(x[rows])
            r, dr = rest[rows], slope[rows]
            phi[rows] += r * value
            gradient[rows] += r[:, None] * value_gradient + value[:, None] * dr
            slope[rows] = (1 - total)[:, None] * dr - r[:, None] * total_slope
            rest[rows] = r * (1 - total)
            rows = rows[rest[rows] > NEGLIGIBLE]
        if len(rows):
            value, value_gradient = self.coarse.value_and_gradient(x[rows])
            phi[rows] += rest[rows] * value
            gradient[rows] += rest[rows, None] * value_gradient + value[:, None] * slope[rows]
        return phi, gradient

    @torch.no_grad()
    def value_gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value phi (n,), its gradient (n, 3) and its second derivatives (n, 3, 3) at x (n, 3)."""
        phi, gradient, hessian = x.new_zeros(len(x)), x.new_zeros((len(x), 3)), x.new_zeros((len(x), 3, 3))
        rest, slope, bend = x.new_ones(len(x)), torch.zeros_like(gradient), torch.zeros_like(hessian)
        rows = torch.arange(len(x), device=x.device)

        def add(value: Tensor, value_gradient: Tensor, value_hessian: Tensor) -> None:
            r, dr, ddr = rest[rows], slope[rows], bend[rows]
            phi[rows] += r * value
            gradient[rows] += r[:, None] * value_gradient + value[:, None] * dr
            hessian[rows] += (
                r[:, None, None] * value_hessian + both_ways(value_gradient, dr) + value[:, None, None] * ddr
            )

        for level in reversed(self.levels):
            total, total_slope, total_bend, *values = level.value_gradient_and_hessian(x[rows])
            # The sum of w f has its weights in it: what is above the level is all that it is multiplied with.
            add(*values)
            r, dr, ddr = rest[rows], slope[rows], bend[rows]
            left = 1 - total
            bend[rows] = left[:, None, None] * ddr - both_ways(dr, total_slope) - r[:, None, None] * total_bend
            slope[rows] = left[:, None] * dr - r[:, None] * total_slope
            rest[rows] = r * left
            rows = rows[(rest[rows] > NEGLIGIBLE) | (bend[rows].abs().amax(dim=(1, 2)) > UNBENT)]
        if len(rows):
            add(*self.coarse.value_gradient_and_hessian(x[rows]))
        return phi, gradient, hessian
