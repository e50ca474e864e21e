"""The network: its gradient against autograd, and its initialisation against the paper."""

import math

import pytest
import torch
from torch import Tensor

from sdfserver.config import NetworkConfig
from sdfserver.siren import Siren

SMALL = NetworkConfig(hidden=32, layers=3)


def small_siren(seed: int = 0) -> Siren:
    return Siren(SMALL, generator=torch.Generator().manual_seed(seed)).double()


def points(n: int = 50) -> Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def by_autograd(siren: Siren, x: Tensor) -> tuple[Tensor, Tensor]:
    """The slow reference: value, and gradient by automatic differentiation that can be differentiated again."""
    x = x.requires_grad_()
    phi = siren(x)
    (gradient,) = torch.autograd.grad(phi.sum(), x, create_graph=True)
    return phi, gradient


def test_the_written_out_gradient_is_autograd_s() -> None:
    siren = small_siren()
    phi, gradient = siren.value_and_gradient(points())
    expected_phi, expected_gradient = by_autograd(siren, points())
    torch.testing.assert_close(phi, expected_phi)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_written_out_second_derivatives_are_autograd_s() -> None:
    siren = small_siren().requires_grad_(False)
    x = points()
    phi, gradient, hessian = siren.value_gradient_and_hessian(x)
    expected_phi, expected_gradient = siren.value_and_gradient(x)
    torch.testing.assert_close(phi, expected_phi)
    torch.testing.assert_close(gradient, expected_gradient)
    slopes = by_autograd(siren, x)[1]
    expected = [torch.autograd.grad(slopes[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
    torch.testing.assert_close(hessian, torch.stack(expected, dim=1), rtol=1e-9, atol=1e-9)
    assert torch.equal(hessian, hessian.mT)


def test_one_backward_through_the_gradient_is_the_double_backward() -> None:
    def parameter_gradients(phi: Tensor, gradient: Tensor, siren: Siren) -> list[Tensor]:
        loss = phi.abs().mean() + (gradient.norm(dim=-1) - 1).abs().mean()
        return list(torch.autograd.grad(loss, list(siren.parameters())))

    siren = small_siren()
    ours = parameter_gradients(*siren.value_and_gradient(points()), siren)
    reference = parameter_gradients(*by_autograd(siren, points()), siren)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_backward_pass_the_numbers_are_the_same() -> None:
    siren = small_siren()
    with torch.no_grad():
        bare = siren.value_and_gradient(points())
    for a, b in zip(bare, siren.value_and_gradient(points()), strict=True):
        assert torch.equal(a, b)


def test_a_lower_precision_is_that_of_the_products_alone() -> None:
    siren = small_siren().float()
    x = points().float()
    exact, close = siren.value_and_gradient(x), siren.value_and_gradient(x, dtype=torch.bfloat16)
    for a, b in zip(exact, close, strict=True):
        assert b.dtype is torch.float32
        assert 0 < (a - b).norm() < 0.1 * a.norm()
    (close[0].abs().mean() + close[1].norm(dim=-1).mean()).backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in siren.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracer does it
def test_the_gradient_compiles_as_one_graph_with_its_backward() -> None:
    siren = small_siren()
    compiled = torch.compile(siren.value_and_gradient, fullgraph=True, backend="aot_eager")
    _, gradient = compiled(points())
    gradient.norm(dim=-1).mean().backward()
    assert all(p.grad is not None for p in list(siren.parameters())[:-1])
    torch.testing.assert_close(gradient.detach(), by_autograd(siren, points())[1].detach())


def test_initial_weights_fill_the_paper_s_bounds() -> None:
    siren = Siren(NetworkConfig(hidden=256, layers=4, omega=30.0), generator=torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w in siren.weights] == [(256, 3), (256, 256), (256, 256), (256, 256), (1, 256)]
    for i, weight in enumerate(siren.weights):
        bound = 1 / 3 if i == 0 else math.sqrt(6 / 256) / 30
        assert 0.98 * bound < weight.abs().max() <= bound or i == 4
        assert weight.abs().max() <= bound


def test_the_same_seed_gives_the_same_network() -> None:
    for a, b in zip(small_siren(3).parameters(), small_siren(3).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(small_siren(3).weights[0], small_siren(4).weights[0])
