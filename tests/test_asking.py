"""Questions by name: each answered by the arrays that are promised, with the values of the queries themselves."""

import re
from typing import get_args

import numpy as np
from test_queries import Exact, sphere_distance, spread, torus_distance, world

from sdfserver.asking import ask, ask_rays, distance_error_of, error_arrays
from sdfserver.questions import MEANS, RAYS_MEAN, What

EVERYTHING = get_args(What)


def test_every_question_is_answered_by_the_arrays_it_promises() -> None:
    field, points = Exact(torus_distance), world(spread(50))
    assert set(MEANS) == set(EVERYTHING)
    for what in EVERYTHING:
        promised = set(re.findall(r"`(\w+)`", MEANS[what])) - {"distance_error"}
        answers = ask(field, points, [what])
        assert set(answers) == promised
        assert {len(array) for array in answers.values()} == {50}
        everything = ask(field, points, EVERYTHING)
        for name, array in answers.items():
            np.testing.assert_array_equal(everything[name], array)
    assert set(ask_rays(field, points, -points)) == set(re.findall(r"`(\w+)`", RAYS_MEAN))
    assert ask(field, points, []) == {}


def test_the_field_s_own_value_and_the_true_distance_are_told_apart() -> None:
    field, x = Exact(sphere_distance, stretch=0.3), spread(500)
    found = ask(field, world(x), ["distance", "true_distance", "gradient"])
    truth = sphere_distance(x) / 0.02
    np.testing.assert_allclose(found["true_distances"], truth, atol=0.1)
    assert np.abs(found["distances"] - truth).mean() > 1
    assert found["distances"].dtype == np.float64
    assert found["gradients"].dtype == np.float32


def test_many_points_are_asked_in_parts_and_none_are_fine() -> None:
    field = Exact(sphere_distance)
    assert len(ask(field, world(spread(200_000)), ["gradient", "distance"])["gradients"]) == 200_000
    assert field.asked == 1 << 16
    for name, array in ask(field, np.empty((0, 3)), EVERYTHING).items():
        assert len(array) == 0, name
    assert ask(field, np.empty((0, 3)), ["gradient"])["gradients"].shape == (0, 3)


def test_a_field_without_a_surface_has_no_error_to_tell() -> None:
    assert distance_error_of(Exact(lambda x: np.ones(len(x)))) is None
    assert error_arrays(None) == {}
    error = distance_error_of(Exact(sphere_distance, stretch=0.1))
    assert error is not None
    assert error_arrays(error)["distance_error_p95"] == error.p95
