"""Volume and area of a field's surface: within the tolerance of what far finer meshes have."""

import pytest
import torch
from balls import CENTER, RADIUS, ball_field

from sdfserver.errors import NoSurfaceError
from sdfserver.measures import measure


def test_figures_are_within_their_tolerance_of_those_of_a_finer_mesh() -> None:
    field = ball_field()
    coarse, fine = measure(field, resolution=48), measure(field, resolution=128)
    assert coarse.volume is not None
    assert fine.volume is not None
    assert 0 < abs(coarse.volume - fine.volume) < coarse.volume_tolerance < 0.01 * fine.volume
    assert 0 < abs(coarse.area - fine.area) < coarse.area_tolerance < 0.01 * fine.area
    assert fine.volume_tolerance < coarse.volume_tolerance / 5
    assert (abs(fine.low - (CENTER - RADIUS)) < 0.02 * RADIUS).all()


def test_an_open_surface_has_no_volume_and_no_surface_has_nothing() -> None:
    field = ball_field()
    with torch.no_grad():  # larger than the cube
        field.network.biases[-1] -= 0.6
    found = measure(field, resolution=32)
    assert found.volume is None
    assert found.volume_tolerance is None
    assert found.area > 0
    with torch.no_grad():
        field.network.biases[-1] += 9
    with pytest.raises(NoSurfaceError):
        measure(field, resolution=32)
