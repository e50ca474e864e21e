"""Each term against its formula, by hand."""

import math

import pytest
import torch

from sdfserver.config import LossWeights
from sdfserver.losses import (
    distance_loss,
    eikonal_loss,
    normal_loss,
    off_surface_loss,
    signed_off_surface_loss,
    surface_loss,
)

ALPHA = 100.0


def test_surface_is_the_mean_of_absolute_values() -> None:
    assert surface_loss(torch.tensor([-1.0, 3.0])).item() == 2


def test_surface_is_quadratic_up_to_its_width_and_runs_on_without_a_kink() -> None:
    phi = torch.tensor([0.1, -0.2, 0.6], requires_grad=True)
    loss = surface_loss(phi, 0.2)
    assert loss.item() == pytest.approx((0.1**2 / 0.4 + 0.1 + 0.5) / 3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert phi.grad is not None
    assert (3 * phi.grad).tolist() == pytest.approx([0.5, -1, 1])


def test_normal_is_zero_along_one_across_and_two_against_the_normal_at_any_length() -> None:
    normals = torch.tensor([[0.0, 0.0, 1.0]])
    for gradient, expected in (([0.0, 0.0, 5.0], 0), ([3.0, 0.0, 0.0], 1), ([0.0, 0.0, -0.5], 2)):
        assert normal_loss(torch.tensor([gradient]), normals).item() == pytest.approx(expected, abs=1e-6)


def test_eikonal_is_the_distance_of_the_gradient_s_length_from_one() -> None:
    assert eikonal_loss(torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.5, 0.0]])).item() == pytest.approx((4 + 0.5) / 2)


def test_off_surface_is_one_on_the_zero_set_and_gone_far_from_it() -> None:
    assert off_surface_loss(torch.tensor([0.0]), ALPHA).item() == 1
    assert off_surface_loss(torch.tensor([-0.02]), ALPHA).item() == pytest.approx(math.exp(-2))


def signed(phi: list[float], sign: list[float], trusted: list[bool], untrusted: float = 1.0) -> float:
    return signed_off_surface_loss(
        torch.tensor(phi), torch.tensor(sign), torch.tensor(trusted), alpha=ALPHA, untrusted=untrusted
    ).item()


def test_where_no_sign_is_trusted_the_signed_term_is_the_published_one() -> None:
    phi = [-0.02, 0.01, 0.3]
    assert signed(phi, [1, -1, 1], [False] * 3) == pytest.approx(off_surface_loss(torch.tensor(phi), ALPHA).item())


def test_a_wrong_sign_is_pushed_with_a_constant_force_and_a_right_one_let_go() -> None:
    wrong = torch.tensor([-0.5, -0.01], requires_grad=True)
    sign, trusted = torch.ones(2), torch.ones(2, dtype=torch.bool)
    signed_off_surface_loss(wrong, sign, trusted, alpha=ALPHA, untrusted=1.0).backward()  # type: ignore[no-untyped-call]
    assert wrong.grad is not None
    assert wrong.grad.tolist() == pytest.approx([-ALPHA / 2, -ALPHA / 2])
    assert signed([0.5], [1], [True]) < 1e-20
    assert signed([0.5], [-1], [True]) == pytest.approx(1 + ALPHA * 0.5)


def test_the_untrusted_share_weighs_the_untrusted_samples_alone() -> None:
    assert signed([0.0, 0.0], [1, 1], [False, True], untrusted=0.1) == pytest.approx((0.1 + 1) / 2)


def test_distance_counts_known_samples_only() -> None:
    loss = distance_loss(torch.tensor([0.1, 5.0]), torch.tensor([0.3, 0.0]), torch.tensor([True, False]))
    assert loss.item() == pytest.approx(0.2 / 2)


def test_weights_follow_the_published_convention_that_halves_one_sided_terms() -> None:
    one = torch.tensor(1.0)
    weights = LossWeights(surface=3e3, normal=1e2, off_surface=1e2, eikonal=5e1, distance=7.0)
    terms = {"surface": one, "normal": one, "off_surface": one, "eikonal": one, "distance": one}
    assert weights.total(terms).item() == pytest.approx((3e3 + 1e2 + 1e2) / 2 + 5e1 + 7)
