"""Local networks: their written-out passes against autograd, and a blend without seams."""

import pytest
import torch
from torch import Tensor

from sdfserver.config import LocalNetworkConfig, NetworkConfig
from sdfserver.local import CellGrid, LocalLevel, LocalSirens, PartitionOfUnity, in_blocks
from sdfserver.siren import Siren, value_and_gradient

SMALL = LocalNetworkConfig(side=4, hidden=8, omega=5.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sirens(k: int, config: LocalNetworkConfig = SMALL, seed: int = 0) -> LocalSirens:
    """Networks that differ wildly from each other, so that a seam between two of them would be seen."""
    networks = LocalSirens(k, config, generator=generator(seed)).double()
    with torch.no_grad():
        networks.linear.copy_(torch.randn(networks.linear.shape, generator=generator(seed + 1), dtype=torch.float64))
        networks.weights[-1].mul_(10)
    return networks.requires_grad_(False)


def level(side: int, every: int, seed: int = 0) -> LocalLevel:
    """A level in which one cell in `every` has no network."""
    grid = CellGrid(side, SMALL.margin)
    numbers = torch.arange(side**3)
    cells = grid.cells(numbers[numbers % every != 0])
    config = LocalNetworkConfig(side=side, hidden=8, omega=5.0)
    return LocalLevel(cells, sirens(len(cells), config, seed))


@pytest.fixture(scope="module")
def partition() -> PartitionOfUnity:
    """Two levels over a coarse network, with holes in both."""
    coarse = Siren(NetworkConfig(hidden=16, layers=2, omega=5.0), generator=generator(3)).double().requires_grad_(False)
    return PartitionOfUnity(coarse, [level(3, 4, seed=5), level(6, 3, seed=9)])


def spread(n: int, seed: int = 2) -> Tensor:
    return torch.rand((n, 3), generator=generator(seed), dtype=torch.float64) * 2.2 - 1.1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_written_out_passes_are_autograd_s(layers: int) -> None:
    networks = sirens(3, LocalNetworkConfig(side=4, hidden=6, layers=layers, omega=3.0)).requires_grad_()
    u = torch.rand((3, 5, 3), generator=generator(7), dtype=torch.float64) * 2 - 1
    parameters = [networks.linear, *(p for layer in networks._scaled_layers(None) for p in layer)]
    torch.autograd.gradcheck(
        lambda linear, *rest: value_and_gradient(u, linear, list(zip(rest[0::2], rest[1::2], strict=True))), parameters
    )
    u.requires_grad_()
    value = networks(u)
    (expected,) = torch.autograd.grad(value.sum(), u)
    phi, gradient = networks.value_and_gradient(u)
    torch.testing.assert_close(phi, value)
    torch.testing.assert_close(gradient, expected)


def test_the_weights_of_all_cells_sum_to_one_inside_the_cube() -> None:
    grid, x = CellGrid(5, 0.3), spread(2000) * 0.85
    rows, numbers = grid.overlaps(x)
    u = (x[rows] - grid.centres(grid.cells(numbers), x.dtype)) / grid.half
    weight, slope = grid.weights(u)
    assert (u.abs() <= 1 + 1e-9).all()
    sums = torch.zeros(len(x), 4, dtype=torch.float64)
    sums.index_add_(0, rows, torch.cat([weight[:, None], slope], dim=1))
    torch.testing.assert_close(sums[:, 0], torch.ones(len(x), dtype=torch.float64))
    torch.testing.assert_close(sums[:, 1:], torch.zeros(len(x), 3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_every_point_meets_all_cells_that_reach_it() -> None:
    grid, x = CellGrid(3, 0.4), spread(500)
    rows, numbers = grid.overlaps(x)
    found = {(int(row), int(number)) for row, number in zip(rows, numbers, strict=True)}
    centres = grid.centres(grid.cells(torch.arange(27)), x.dtype)
    reach = ((x[:, None] - centres).abs() < grid.half - 1e-9).all(dim=2)
    assert found == {(int(row), int(number)) for row, number in reach.nonzero()}


def test_the_blended_gradient_is_the_slope_of_the_blended_value(partition: PartitionOfUnity) -> None:
    x, h = spread(3000), 1e-6
    phi, gradient = partition.value_and_gradient(x)
    torch.testing.assert_close(partition(x), phi, rtol=1e-12, atol=1e-12)
    slopes = [(partition(x + h * e) - partition(x - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
    torch.testing.assert_close(gradient, torch.stack(slopes, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [3, 6])
def test_value_and_gradient_do_not_jump_where_cells_begin_and_end(partition: PartitionOfUnity, side: int) -> None:
    """On both sides of the planes where cells' supports begin and end, for cells with a network and without."""
    grid = partition.levels[0].grid if side == 3 else partition.levels[1].grid
    borders = torch.linspace(-1, 1, side + 1, dtype=torch.float64)
    h = 1e-7
    for shift in (-1, 0, 1):
        x = spread(4000, seed=side)
        x[:, 0] = borders[torch.arange(len(x)) % (side + 1)] + shift * (grid.half - grid.width / 2)
        across = torch.tensor([h, 0, 0], dtype=torch.float64)
        (low, low_gradient), (high, high_gradient) = (partition.value_and_gradient(x + s * across) for s in (-1, 1))
        steepest, most_bent = float(low_gradient.norm(dim=1).max()), 1e5
        assert float((high - low).abs().max()) < 2 * h * 1.1 * steepest
        assert float((high_gradient - low_gradient).norm(dim=1).max()) < 2 * h * most_bent


def autograd_phi(partition: PartitionOfUnity, x: Tensor) -> Tensor:
    """The slow reference: every level's sum over every cell, with nothing written out and nothing left out."""
    phi = partition.coarse(x)
    for level in partition.levels:
        total, value = torch.zeros_like(phi), torch.zeros_like(phi)
        for row, cell in enumerate(level.cells):
            u = (x - level.grid.centres(cell, x.dtype)) / level.grid.half
            t = ((1 - u.abs()) * (1 + level.grid.margin) / (2 * level.grid.margin)).clamp(0, 1)
            weight = (t**3 * ((6 * t - 15) * t + 10)).prod(dim=1)
            network = torch.tensor([row])
            total = total + weight
            value = value + weight * level.sirens(u[None], network)[0] * level.grid.half
        phi = (1 - total) * phi + value
    return phi


def test_the_blended_second_derivatives_are_those_of_double_automatic_differentiation(
    partition: PartitionOfUnity,
) -> None:
    x = torch.cat([spread(400), spread(400, seed=4) * 0.8])
    phi, gradient, hessian = partition.value_gradient_and_hessian(x)
    x.requires_grad_()
    expected_phi = autograd_phi(partition, x)
    (slope,) = torch.autograd.grad(expected_phi.sum(), x, create_graph=True)
    expected = torch.stack([torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0] for i in range(3)], dim=1)
    torch.testing.assert_close(phi, expected_phi.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, slope.detach(), rtol=1e-4, atol=1e-4)
    most = float(expected.abs().max())
    assert most > 100  # local networks that differ wildly bend the blend
    # What is left out of the blend (NEGLIGIBLE, UNBENT) is left out here.
    torch.testing.assert_close(hessian, expected, rtol=1e-6, atol=0.1)
    assert float((hessian - expected).abs().max()) < 1e-4 * most


def test_second_derivatives_do_not_jump_where_cells_begin_and_end(partition: PartitionOfUnity) -> None:
    grid, h = partition.levels[1].grid, 1e-6
    borders = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for shift in (-1, 1):
        x = spread(2000, seed=11) * 0.85
        x[:, 0] = borders[torch.arange(len(x)) % 7] + shift * (grid.half - grid.width / 2)
        across = torch.tensor([h, 0, 0], dtype=torch.float64)
        low, high = (partition.value_gradient_and_hessian(x + s * across)[2] for s in (-1, 1))
        assert float((high - low).abs().max()) < 2 * h * 1e7


def test_where_no_network_reaches_the_field_is_the_coarse_one(partition: PartitionOfUnity) -> None:
    far = spread(200) + 5
    torch.testing.assert_close(partition(far), partition.coarse(far))
    torch.testing.assert_close(partition.value_and_gradient(far)[1], partition.coarse.value_and_gradient(far)[1])


def test_a_finer_level_lies_over_a_wider_one() -> None:
    coarse = Siren(NetworkConfig(hidden=16, layers=2, omega=5.0), generator=generator(3)).double().requires_grad_(False)
    grid = CellGrid(4, SMALL.margin)
    fine = LocalLevel(grid.cells(torch.tensor([21])), sirens(1))
    both = PartitionOfUnity(coarse, [level(2, 9), fine])
    centre = grid.centres(fine.cells, torch.float64)
    offset = spread(50) * 0.05
    x, networks = centre + offset, torch.zeros(50, dtype=torch.int64)
    (value,) = in_blocks(lambda u, rows: (fine.sirens(u, rows),), offset / grid.half, networks)
    torch.testing.assert_close(both(x), value * grid.half)


def test_no_points_give_no_values(partition: PartitionOfUnity) -> None:
    nothing = torch.empty((0, 3), dtype=torch.float64)
    assert partition(nothing).shape == (0,)
    assert partition.value_and_gradient(nothing)[1].shape == (0, 3)


def test_how_many_are_asked_at_once_does_not_matter(partition: PartitionOfUnity) -> None:
    x = spread(700)
    alone = torch.cat([partition(part) for part in torch.split(x, 13)])
    torch.testing.assert_close(partition(x), alone, rtol=1e-12, atol=1e-12)


def test_the_detail_follows_the_level_with_most_networks() -> None:
    coarse = Siren(NetworkConfig(hidden=4, layers=1))
    grid = CellGrid(20, SMALL.margin)
    few = LocalLevel(grid.cells(torch.arange(3)), sirens(3, LocalNetworkConfig(side=20, hidden=8)))
    many = level(4, 1000)
    assert PartitionOfUnity(coarse, [many, few]).detail == 20 * 4
    assert PartitionOfUnity(coarse, [few]).detail == 20 * 20
