"""What the gallery shows: the derivatives it asks for, its references, and what a SIREN has that a ReLU has not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from sdfserver.compare.choices import Choice
from sdfserver.compare.gallery import (
    WAVE_NUMBER,
    Problem,
    by_gradients,
    by_laplacian,
    by_values,
    figures_of,
    fused,
    gallery,
    gradient_of,
    grid,
    helmholtz,
    helmholtz_by_differences,
    laplacian_of,
    photograph,
    problems,
    psnr,
    source,
    write_sheet,
)

SMALL = 24


def test_derivatives_of_an_image_are_those_of_the_function_it_shows() -> None:
    x, y, _ = grid(64).double().numpy().T
    image = (np.sin(2 * x) * np.cos(3 * y)).reshape(64, 64)
    inner = np.zeros((64, 64), dtype=bool)
    inner[2:-2, 2:-2] = True
    dx, dy = gradient_of(image).numpy().T
    np.testing.assert_allclose(dx[inner.ravel()], (2 * np.cos(2 * x) * np.cos(3 * y))[inner.ravel()], atol=5e-3)
    np.testing.assert_allclose(dy[inner.ravel()], (-3 * np.sin(2 * x) * np.sin(3 * y))[inner.ravel()], atol=1e-2)
    bent = laplacian_of(image).numpy()
    np.testing.assert_allclose(bent[inner.ravel()], -13 * image[inner], atol=0.1)


def test_the_ratio_of_signal_to_noise_knows_what_derivatives_leave_open() -> None:
    truth = photograph("camera", SMALL)
    x, y, _ = grid(SMALL).double().numpy().T
    assert psnr(truth + 0.1, truth) == pytest.approx(20)
    assert psnr(truth + 0.1, truth, up_to="level") > 200
    plane = (0.3 * x - 0.2 * y).reshape(truth.shape)
    assert psnr(truth + plane, truth, up_to="level") < 20
    assert psnr(truth + plane, truth, up_to="line") > 200


def test_photographs_are_small_and_fill_their_range() -> None:
    for name in ("camera", "astronaut"):
        image = photograph(name, 32)
        assert image.shape == (32, 32)
        assert (image.min(), image.max()) == (0, 1)


def test_the_reference_of_helmholtz_solves_the_equation_and_has_settled() -> None:
    coarse, fine = helmholtz_by_differences(65), helmholtz_by_differences(129)
    assert np.abs(coarse - fine[::2, ::2]).max() < 0.02 * np.ptp(fine)
    assert np.abs(np.r_[fine[0], fine[-1], fine[:, 0], fine[:, -1]]).max() == 0
    # By another rule for the second derivative, of fourth order.
    h, u = 2 / 128, fine
    row = np.array([-1, 16, -30, 16, -1]) / (12 * h**2)
    bent = sum(row[i] * (u[2:-2, i : i + 125] + u[i : i + 125, 2:-2]) for i in range(5))
    ticks = np.linspace(-1, 1, 129)[2:-2]
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    residual = bent + WAVE_NUMBER**2 * u[2:-2, 2:-2] + 100 * source(x, y)
    assert np.sqrt((residual**2).mean() / ((100 * source(x, y)) ** 2).mean()) < 0.01


def pair(problem: Problem, steps: int) -> tuple[float, float, float, float]:
    """Of SIREN and of ReLU: PSNR of each, residual of each."""
    siren, relu = gallery([problem], steps)
    assert (siren.network, relu.network) == (Choice(name="siren"), Choice(name="relu"))
    return siren.psnr, relu.psnr, siren.residual, relu.residual


def test_an_image_from_its_values_is_better_by_15_db() -> None:
    siren, relu, *_ = pair(by_values(photograph("camera", SMALL)), 120)
    assert siren > 30
    assert siren > relu + 15


def test_an_image_from_its_gradient_alone_is_better_by_10_db() -> None:
    siren, relu, *residuals = pair(by_gradients(photograph("camera", SMALL)), 120)
    assert siren > relu + 10
    assert residuals[0] < 0.3 * residuals[1]


def test_an_image_from_its_laplacian_alone_is_better_by_4_db_and_relu_has_none() -> None:
    siren, relu, *residuals = pair(by_laplacian(photograph("camera", SMALL)), 150)
    assert siren > relu + 4
    assert residuals[0] < 0.2
    assert residuals[1] == pytest.approx(1, abs=1e-6)


def test_two_images_are_fused_by_their_gradients_better_by_10_db() -> None:
    first, second = photograph("camera", SMALL), photograph("astronaut", SMALL)
    problem = fused(first, second)
    np.testing.assert_array_equal(problem.truth, (first + second) / 2)
    siren, relu, *_ = pair(problem, 120)
    assert siren > relu + 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_pieces_are_solved_and_written(tmp_path: Path) -> None:
    pieces = gallery(problems(32), 400)
    assert [piece.problem for piece in pieces[::2]] == ["values", "gradients", "Laplacian", "fusion", "Helmholtz"]
    for siren, relu in zip(pieces[::2], pieces[1::2], strict=True):
        assert siren.psnr > relu.psnr + 4, siren.problem
        assert siren.residual < 0.3 * relu.residual, siren.problem
    figures = figures_of(pieces)
    assert json.loads(json.dumps(figures)) == figures
    write_sheet(pieces, tmp_path / "sheet.png")
    with Picture.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
        assert sheet.height > 900


def test_a_relu_network_is_off_with_helmholtz_though_its_residual_does_not_show_it() -> None:
    """It bends at creases alone, where no sample falls: what is asked for between them is not what it is."""
    siren, relu, *residuals = pair(helmholtz(SMALL), 200)
    assert siren > relu + 5
    assert residuals[0] < 0.3


def test_a_laplacian_of_nothing_is_nothing() -> None:
    assert torch.equal(laplacian_of(np.ones((8, 8))), torch.zeros(64))
