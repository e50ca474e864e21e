"""What can be asked of a field: against exact formulas, on exact fields and on fitted ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shapes import directions, even_sphere, torus
from test_field import refined_field, small_field

from sdfserver.cloud import Frame
from sdfserver.config import PRESETS, FitConfig, NetworkConfig, PoolConfig
from sdfserver.errors import NoSurfaceError
from sdfserver.field import SignedDistanceField
from sdfserver.io import read_cloud
from sdfserver.queries import FieldQueries, curvatures
from sdfserver.reconstruct import fit_field

Floats = NDArray[np.float64]
CENTER, SCALE = np.array([432_100.25, 5_411_200.5, 312.125]), 0.02


class Exact(FieldQueries):
    """A formula in the unit frame, its derivatives by central differences; `stretch` makes it no distance."""

    def __init__(self, phi: Callable[[Floats], Floats], stretch: float = 0.0) -> None:
        self.frame = Frame(center=CENTER, scale=SCALE)
        self.phi = lambda x: phi(x) * (1 + stretch * (x[:, 0] + x[:, 1] ** 2))
        self.asked = 0

    def at(self, x: Floats, order: int) -> tuple[Floats, ...]:
        self.asked = max(self.asked, len(x))
        h, e = 1e-4, np.eye(3)
        out: list[Floats] = [self.phi(x)]
        if order > 0:
            out.append(np.stack([(self.phi(x + h * d) - self.phi(x - h * d)) / (2 * h) for d in e], axis=1))
        if order > 1:
            slopes = [(self.at(x + h * d, 1)[1] - self.at(x - h * d, 1)[1]) / (2 * h) for d in e]
            out.append(np.stack(slopes, axis=1))
        return tuple(out)


def sphere_distance(x: Floats, radius: float = 0.7) -> Floats:
    return np.linalg.norm(x, axis=1) - radius


def torus_distance(x: Floats, major: float = 0.65, minor: float = 0.25) -> Floats:
    return np.hypot(np.hypot(x[:, 0], x[:, 1]) - major, x[:, 2]) - minor


def shell_distance(x: Floats) -> Floats:
    """A hollow ball whose wall is 0.012 thick."""
    return np.abs(np.linalg.norm(x, axis=1) - 0.7) - 0.006


def world(x: Floats) -> Floats:
    return x / SCALE + CENTER


def spread(n: int, reach: float = 1.5, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).uniform(-reach, reach, (n, 3))


QUICK = FitConfig(steps=300, learning_rate=2e-3, batch_surface=400, batch_space=400, pool=PoolConfig(size=8000))
SMALL = NetworkConfig(hidden=64, layers=3, omega=10.0)


@pytest.fixture(scope="module")
def fitted_torus() -> SignedDistanceField:
    return fit_field(torus(4000), network=SMALL, fit_config=QUICK, device="cpu").field


@pytest.fixture(scope="module")
def fitted_sphere() -> SignedDistanceField:
    return fit_field(even_sphere(2000), network=SMALL, fit_config=QUICK, device="cpu").field


@pytest.mark.parametrize("stretch", [0.0, 0.3])
@pytest.mark.parametrize("distance", [sphere_distance, torus_distance])
def test_closest_points_give_the_true_distance_even_where_the_field_is_none(
    distance: Callable[[Floats], Floats], stretch: float
) -> None:
    field, x = Exact(distance, stretch), spread(3000)
    found = field.closest(world(x))
    truth = distance(x) / SCALE
    # At equally near parts of the surface either may be taken: the distance is that of both.
    np.testing.assert_allclose(found.distances, truth, atol=2e-3 / SCALE)
    assert np.percentile(np.abs(found.distances - truth), 99) < 1e-5 / SCALE
    assert np.abs(distance((found.points - CENTER) * SCALE)).max() < 5e-6
    assert found.residuals.max() < 1e-5 / SCALE
    assert np.percentile(found.sines, 99) < 1e-3
    np.testing.assert_array_equal(field.distance(world(x)), found.distances)
    np.testing.assert_array_equal(field.inside(world(x)), distance(np.clip(x, -1, 1)) < 0)


def test_a_point_on_the_surface_is_its_own_closest_one() -> None:
    x = world(0.7 * directions(200))
    found = Exact(sphere_distance).closest(x)
    np.testing.assert_allclose(found.points, x, atol=1e-4)
    assert np.abs(found.distances).max() < 1e-4


def test_curvatures_of_exact_shapes_are_their_formulas() -> None:
    d = directions(500)
    ball = Exact(sphere_distance).curvature(world(0.7 * d))
    np.testing.assert_allclose(ball.mean, SCALE / 0.7, rtol=1e-4)
    np.testing.assert_allclose(ball.gaussian, (SCALE / 0.7) ** 2, rtol=1e-3)
    cloud = torus(500)
    ring = np.hypot(cloud.points[:, 0], cloud.points[:, 1])
    cosine = (ring - 0.65) / 0.25
    mean, gaussian = (0.65 + 2 * 0.25 * cosine) / (2 * 0.25 * ring), cosine / (0.25 * ring)
    for stretch in (0.0, 0.3):  # another field with the same surface has the same curvatures on it
        found = Exact(torus_distance, stretch).curvature(world(cloud.points))
        np.testing.assert_allclose(found.mean, mean * SCALE, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.gaussian, gaussian * SCALE**2, rtol=1e-3, atol=1e-5)


def test_a_saddle_has_negative_gaussian_and_no_mean_curvature() -> None:
    """z = x y at the origin."""
    mean, gaussian = curvatures(np.array([[0.0, 0, 1]]), np.array([[[0.0, -1, 0], [-1, 0, 0], [0, 0, 0]]]))
    assert (mean[0], gaussian[0]) == (0, -1)


@pytest.mark.parametrize("make", [small_field, refined_field])
def test_what_is_asked_in_world_units_comes_from_the_written_out_derivatives(
    make: Callable[[], SignedDistanceField],
) -> None:
    """Of networks in float64, against finite differences of their gradients in the world."""
    field = make()
    field.network.double()
    x, h = field.frame.to_world(spread(200, 0.9)), 0.01
    gradient = field.gradient(x)
    slopes = [(field.gradient(x + h * e) - field.gradient(x - h * e)) / (2 * h) for e in np.eye(3)]
    mean, gaussian = curvatures(gradient, np.stack(slopes, axis=1))
    found = field.curvature(x)
    good = np.linalg.norm(gradient, axis=1) > 0.1
    np.testing.assert_allclose(found.mean[good], mean[good], rtol=1e-2, atol=1e-2 * np.abs(mean[good]).max())
    np.testing.assert_allclose(
        found.gaussian[good], gaussian[good], rtol=1e-2, atol=1e-2 * np.abs(gaussian[good]).max()
    )


def test_rays_hit_a_torus_where_the_formula_says() -> None:
    rng = np.random.default_rng(1)
    start, target = 2.5 * directions(3000), rng.uniform(-0.9, 0.9, (3000, 3))
    way = target - start
    field = Exact(torus_distance, 0.3)
    found = field.cast(world(start), way * rng.uniform(0.1, 10, (3000, 1)))
    t = np.linspace(0, 5, 5001)
    unit = way / np.linalg.norm(way, axis=1, keepdims=True)
    inside = np.stack([torus_distance(start + s * unit) < 0 for s in t], axis=1)
    hit, first = inside.any(axis=1), t[inside.argmax(axis=1)]
    assert (hit != found.hit).mean() < 1e-3  # rays that graze it between two samples
    both = hit & found.hit
    assert np.abs(found.t[both] * SCALE - first[both]).max() < 0.05
    assert np.median(np.abs(found.t[both] * SCALE - first[both])) < 1e-3
    at = (found.points[found.hit] - CENTER) * SCALE
    assert np.abs(torus_distance(at)).max() < 2e-6
    assert ((found.normals * unit).sum(axis=1)[found.hit] < 0).all()  # a ray from outside meets an outward normal
    assert np.isnan(found.t[~found.hit]).all()
    np.testing.assert_allclose(np.linalg.norm(found.normals[found.hit], axis=1), 1)


def test_rays_do_not_pass_through_a_thin_wall() -> None:
    start, target = 2.5 * directions(2000), spread(2000, 0.35, seed=5)
    found = Exact(shell_distance, 0.5).cast(world(start), target - start)
    assert found.hit.all()
    np.testing.assert_allclose(np.linalg.norm((found.points - CENTER) * SCALE, axis=1), 0.706, atol=1e-5)
    from_within = Exact(shell_distance, 0.5).cast(world(target), directions(2000, seed=3))
    assert from_within.hit.all()
    np.testing.assert_allclose(np.linalg.norm((from_within.points - CENTER) * SCALE, axis=1), 0.694, atol=1e-5)


def test_rays_that_cannot_hit_do_not() -> None:
    field = Exact(sphere_distance)
    beside = field.cast(world(np.array([[-3.0, 0, 2], [-3, 0, 0], [0, 0, 0.99]])), [[1, 0, 0], [-1, 0, 0], [0, 1, 0]])
    assert not beside.hit.any()
    near = field.cast(world(np.array([[-3.0, 0, 0]])), [[1, 0, 0]], max_distance=2.2 / SCALE)
    assert not near.hit.any()
    assert field.cast(world(np.array([[-3.0, 0, 0]])), [[1, 0, 0]], max_distance=2.4 / SCALE).t[0] == pytest.approx(
        2.3 / SCALE, abs=1e-3
    )


def test_a_distance_says_that_it_is_one_and_another_field_that_it_is_not() -> None:
    exact, stretched = Exact(torus_distance).distance_error, Exact(torus_distance, 0.3).distance_error
    assert exact.p95 < 1e-3
    assert exact.band == pytest.approx(0.02 / SCALE)
    assert stretched.mean > 0.1
    # | |g| - 1 | on the surface itself is 0.3 |x + y^2| there.
    on = torus(4000).points
    assert stretched.mean == pytest.approx(np.abs(0.3 * (on[:, 0] + on[:, 1] ** 2)).mean(), rel=0.2)


def test_a_field_without_a_surface_says_so() -> None:
    nothing = Exact(lambda x: np.linalg.norm(x, axis=1) + 1)
    for ask in (lambda: nothing.distance(world(spread(3))), lambda: nothing.distance_error):
        with pytest.raises(NoSurfaceError, match="no surface at level 0: its values on the grid run from 5"):
            ask()
    assert not nothing.cast(world(spread(3)), directions(3)).hit.any()


def test_what_a_call_holds_does_not_grow_with_the_points() -> None:
    field = Exact(sphere_distance)
    field.inside(world(spread(300_000)))
    assert field.asked == 1 << 16
    assert field.closest(np.empty((0, 3))).points.shape == (0, 3)
    assert field.cast(np.empty((0, 3)), np.empty((0, 3))).t.shape == (0,)
    assert field.curvature(np.empty((0, 3))).mean.shape == (0,)


def test_what_cannot_be_asked_is_refused_with_the_value() -> None:
    field = Exact(sphere_distance)
    with pytest.raises(ValueError, match=r"shape \(3,\); they must be \(n, 3\)"):
        field.inside([0, 0, 0])
    with pytest.raises(ValueError, match="1 directions have zero length"):
        field.cast(world(spread(2)), [[0, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="2 origins and 1 directions"):
        field.cast(world(spread(2)), [[1, 0, 0]])


def test_a_fitted_torus_is_asked_the_same_questions(fitted_torus: SignedDistanceField) -> None:
    x = spread(4000, 1.4)
    truth, raw = torus_distance(x), fitted_torus.evaluate(x)
    off = np.abs(fitted_torus.distance(x) - truth)
    assert off.mean() < 2e-3
    assert off.max() < 0.02
    assert np.abs(raw - truth).mean() > 20 * off.mean()  # the value itself is no distance that far off
    cloud = torus(2000, seed=9)
    on = fitted_torus.closest(cloud.points).points
    ring = np.hypot(cloud.points[:, 0], cloud.points[:, 1])
    mean = (2 * ring - 0.65) / (2 * 0.25 * ring)
    assert np.abs(fitted_torus.curvature(on).mean - mean).mean() < 0.15 * np.abs(mean).mean()
    error = fitted_torus.distance_error
    assert 0.001 < error.mean < error.p95 < 0.15
    steepness = np.linalg.norm(fitted_torus.gradient(cloud.points), axis=1)
    assert error.mean == pytest.approx(np.abs(steepness - 1).mean(), rel=0.5)


def test_rays_hit_a_fitted_sphere_everywhere(fitted_sphere: SignedDistanceField) -> None:
    d = directions(3000, seed=4)
    found = fitted_sphere.cast(2.5 * d, -d)
    assert found.hit.all()
    np.testing.assert_allclose(found.t, 1.5, atol=0.01)
    assert (found.normals * d).sum(axis=1).min() > 0.98
    assert np.abs(fitted_sphere.evaluate(found.points)).max() < 5e-6


def test_rays_do_not_pass_through_the_thin_parts_of_a_sample(data: Path) -> None:
    """The wall of a goblet, by the field's own sign at many places along each ray."""
    cloud = read_cloud(data / "goblet.ply")
    field = fit_field(cloud, network=PRESETS["draft"].network, fit_config=QUICK, device="cpu").field
    low, high = cloud.points.min(axis=0), cloud.points.max(axis=0)
    size = np.linalg.norm(high - low)
    rng = np.random.default_rng(0)
    start = (low + high) / 2 + size * directions(400)
    way = low + rng.random((400, 3)) * (high - low) - start
    unit = way / np.linalg.norm(way, axis=1, keepdims=True)
    found = field.cast(start, way)
    t = np.linspace(0, 2 * size, 3001)
    places = (start[:, None] + t[:, None] * unit[:, None]).reshape(-1, 3)
    # As far as the field goes, and no farther: beyond the cube it was never fitted.
    inside = (field.inside(places) & (np.abs(field.frame.to_unit(places)) <= 1).all(axis=1)).reshape(400, -1)
    hit, first = inside.any(axis=1), t[inside.argmax(axis=1)]
    assert hit.mean() > 0.3
    assert not (hit & ~found.hit).any()
    assert (found.t[hit] < first[hit] + 1e-4 * size).all()
    assert np.abs(field.evaluate(found.points[found.hit])).max() < 1e-4 * size
