"""The field in world units, and its way to a file and back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sdfserver.cloud import Frame
from sdfserver.config import LocalNetworkConfig, NetworkConfig
from sdfserver.errors import FieldFormatError
from sdfserver.field import SignedDistanceField
from sdfserver.local import CellGrid, LocalLevel, LocalSirens, PartitionOfUnity
from sdfserver.saved import read_field
from sdfserver.siren import Siren

UTM = np.array([432_100.25, 5_411_200.5, 312.125])


def small_field() -> SignedDistanceField:
    siren = Siren(NetworkConfig(hidden=16, layers=2), generator=torch.Generator().manual_seed(0))
    return SignedDistanceField(siren, Frame(center=UTM, scale=0.01))


def near(n: int = 100) -> np.ndarray:
    return UTM + (np.random.default_rng(0).random((n, 3)) * 2 - 1) * 90


def test_values_are_unit_values_over_the_scale() -> None:
    field = small_field()
    unit = torch.tensor((near() - UTM) * 0.01, dtype=torch.float32)
    np.testing.assert_allclose(field.evaluate(near()), field.network(unit).double().numpy() / 0.01, rtol=1e-6)


def test_the_gradient_is_the_slope_of_the_values() -> None:
    field = small_field()
    field.network.double()
    x, h = near(20), 0.5
    slopes = [(field.evaluate(x + h * e) - field.evaluate(x - h * e)) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(field.gradient(x), np.stack(slopes, axis=1), atol=2e-2)


def test_no_points_give_no_values() -> None:
    assert small_field().evaluate(np.empty((0, 3))).shape == (0,)
    assert small_field().gradient(np.empty((0, 3))).shape == (0, 3)


def test_a_saved_field_comes_back_to_the_bit(tmp_path: Path) -> None:
    field = small_field()
    field.save(tmp_path / "f.safetensors")
    back = SignedDistanceField.load(tmp_path / "f.safetensors")
    assert (back.frame.center == UTM).all()
    assert back.frame.scale == 0.01
    assert (back.evaluate(near()) == field.evaluate(near())).all()


def test_a_file_that_is_no_field_is_one_clear_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    (tmp_path / "text.safetensors").write_text("not a field")
    small_field().save(tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    for name in ("other", "text", "cut", "absent"):
        with pytest.raises(FieldFormatError, match="is not a field saved by sdfserver") as caught:
            SignedDistanceField.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


def refined_field() -> SignedDistanceField:
    """A coarse network with two levels of local ones over it."""

    def level(side: int, seed: int) -> LocalLevel:
        config = LocalNetworkConfig(side=side, hidden=8)
        cells = CellGrid(side, config.margin).cells(torch.arange(0, side**3, 2))
        return LocalLevel(cells, LocalSirens(len(cells), config, generator=torch.Generator().manual_seed(seed)))

    coarse = Siren(NetworkConfig(hidden=16, layers=2), generator=torch.Generator().manual_seed(0))
    return SignedDistanceField(PartitionOfUnity(coarse, [level(3, 1), level(5, 2)]), Frame(center=UTM, scale=0.01))


def test_a_saved_field_of_many_networks_comes_back_to_the_bit(tmp_path: Path) -> None:
    field = refined_field()
    field.save(tmp_path / "f.safetensors")
    back = SignedDistanceField.load(tmp_path / "f.safetensors")
    assert (back.evaluate(near()) == field.evaluate(near())).all()
    assert (back.gradient(near()) == field.gradient(near())).all()
    assert back.detail == field.detail > small_field().detail / 3


@pytest.mark.parametrize("make", [small_field, refined_field])
def test_what_the_api_computes_with_numpy_is_the_field(make: Callable[[], SignedDistanceField], tmp_path: Path) -> None:
    field = make()
    field.save(tmp_path / "f.safetensors")
    saved = read_field(tmp_path / "f.safetensors")
    value, gradient = saved.evaluate(near(20_000)), saved.gradient(near(20_000))
    np.testing.assert_allclose(value, field.evaluate(near(20_000)), atol=1e-4 * np.abs(value).max())
    np.testing.assert_allclose(gradient, field.gradient(near(20_000)), atol=1e-3 * np.abs(gradient).max())
    x = field.frame.to_unit(near(5000))
    for found, expected in (pair for i in range(3) for pair in zip(saved.at(x, i), field.at(x, i), strict=True)):
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_the_api_s_field_holds_far_outside_the_cube(tmp_path: Path) -> None:
    refined_field().save(tmp_path / "f.safetensors")
    outside = UTM + np.full((3, 3), 500.0)
    saved = read_field(tmp_path / "f.safetensors")
    value, gradient = saved.evaluate(outside), saved.gradient(outside)
    assert value.shape == (3,)
    assert np.isfinite(gradient).all()
    assert np.isfinite(saved.curvature(outside).mean).all()
