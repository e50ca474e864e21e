"""Voxel grids: where each value belongs, and what a grid may be."""

import io

import numpy as np
import pytest
from test_queries import CENTER, SCALE, Exact, sphere_distance, torus_distance

from sdfserver.errors import ConfigError, NoSurfaceError
from sdfserver.export import grids
from sdfserver.export.grids import write_grid


def written(field: Exact, **options: object) -> "np.lib.npyio.NpzFile":
    stream = io.BytesIO()
    shape = write_grid(field, stream, **options)  # type: ignore[arg-type]
    found = np.load(io.BytesIO(stream.getvalue()), allow_pickle=False)
    assert found["values"].shape == shape
    return found


@pytest.mark.parametrize("at_a_time", [1 << 16, 1000])
def test_each_value_is_the_field_s_at_its_node(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "NODES_AT_A_TIME", at_a_time)
    box = CENTER + np.array([[-20.0, -10, -5], [20, 12, 25]])
    found = written(Exact(torus_distance), resolution=41, box=box)
    values, origin, spacing = found["values"], found["origin"], found["spacing"]
    assert values.shape == (41, 23, 31)
    assert values.dtype == np.float32
    assert (origin == box[0]).all()
    assert spacing == 1.0
    i, j, k = np.random.default_rng(0).integers(0, values.shape, (200, 3)).T
    points = origin + spacing * np.stack([i, j, k], axis=1)
    np.testing.assert_allclose(values[i, j, k], torus_distance((points - CENTER) * SCALE) / SCALE, atol=1e-5)


def test_it_covers_the_cube_and_says_how_far_it_is_from_a_distance() -> None:
    told: list[float] = []
    found = written(Exact(sphere_distance, stretch=0.1), resolution=16, on_progress=told.append)
    assert found["values"].shape == (16, 16, 16)
    np.testing.assert_allclose(found["origin"], CENTER - 1 / SCALE)
    np.testing.assert_allclose(found["origin"] + 15 * found["spacing"], CENTER + 1 / SCALE)
    assert 0.01 < found["distance_error_mean"] < found["distance_error_p95"] < found["distance_error_max"] < 0.3
    assert told[-1] == 1.0


def test_true_distances_are_true_where_the_field_is_none() -> None:
    field = Exact(sphere_distance, stretch=0.3)
    raw, true = (written(field, resolution=9, true_distances=wish)["values"] for wish in (False, True))
    nodes = np.stack(np.meshgrid(*3 * [np.linspace(-1, 1, 9)], indexing="ij"), axis=-1)
    distance = (np.linalg.norm(nodes, axis=-1) - 0.7) / SCALE
    # The middle of the sphere is a point without a nearest one.
    assert np.abs(true - distance).max() < 1e-3 / SCALE
    assert np.abs(raw - distance).max() > 0.1 / SCALE


def test_what_cannot_be_is_refused_with_the_value() -> None:
    field = Exact(sphere_distance)
    for resolution in (1, 4000):
        with pytest.raises(ConfigError, match=f"resolution of a grid is {resolution}"):
            written(field, resolution=resolution)
    with pytest.raises(ConfigError, match="corners must be finite and apart"):
        written(field, box=np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="beyond the cube that the field was fitted in"):
        written(field, box=CENTER + np.array([[-51.0, 0, 0], [10, 10, 10]]))
    nothing = Exact(lambda x: np.ones(len(x)))
    assert "distance_error_mean" not in written(nothing, resolution=4)
    with pytest.raises(NoSurfaceError):
        written(nothing, resolution=4, true_distances=True)
