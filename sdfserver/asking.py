"""Questions to a field by name, answered by named arrays, as sdfserver.questions has them; by sdfserver.queries."""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.errors import NoSurfaceError
from sdfserver.queries import DistanceError, FieldQueries
from sdfserver.questions import What

AT_A_TIME = 1 << 16
Answers = dict[str, NDArray[Any]]


def ask(field: FieldQueries, points: NDArray[np.float64], what: Collection[What]) -> Answers:
    """What MEANS says of each of `what`, at `points` (n, 3), by the names there.

    Positions, distances are float64; gradients, normals and curvatures float32. Raises NoSurfaceError where closest
    points are asked for and the field has none.
    """
    answers: Answers = {}
    if "distance" in what or "gradient" in what:
        value, *gradient = _in_parts(field, points, order=int("gradient" in what))
        if "distance" in what:
            answers["distances"] = value / field.frame.scale
        if gradient:
            answers["gradients"] = gradient[0].astype(np.float32)
    if "true_distance" in what or "closest" in what:
        found = field.closest(points)
        answers["true_distances"] = found.distances
        if "closest" in what:
            answers["closest_points"] = found.points
    if "curvature" in what:
        bent = field.curvature(points)
        answers |= {
            "mean_curvatures": bent.mean.astype(np.float32),
            "gaussian_curvatures": bent.gaussian.astype(np.float32),
        }
    if "inside" in what:
        answers["inside"] = field.inside(points)
    return answers


def ask_rays(
    field: FieldQueries,
    origins: NDArray[np.float64],
    directions: NDArray[np.float64],
    max_distance: float | None = None,
) -> Answers:
    """What RAYS_MEAN says of rays from `origins` (n, 3) along `directions` (n, 3); NaN where there is no hit."""
    found = field.cast(origins, directions, max_distance=max_distance)
    return {
        "hits": found.hit,
        "ray_distances": found.t,
        "hit_points": found.points,
        "hit_normals": found.normals.astype(np.float32),
    }


def distance_error_of(field: FieldQueries) -> DistanceError | None:
    """How far the field is from a distance near its surface; None where it has none."""
    try:
        return field.distance_error
    except NoSurfaceError:
        return None


def error_arrays(error: DistanceError | None) -> Answers:
    """The same as named numbers, for a file of arrays."""
    if error is None:
        return {}
    names = ("mean", "p95", "max", "band", "samples")
    return {f"distance_error_{name}": np.array(getattr(error, name)) for name in names}


def _in_parts(field: FieldQueries, points: NDArray[np.float64], order: int) -> tuple[NDArray[np.float64], ...]:
    """What the field has `at` points (n, 3), without their unit copies all being there at once."""
    out = tuple(np.empty((len(points), *shape)) for shape in ((), (3,))[: order + 1])
    for start in range(0, len(points), AT_A_TIME):
        part = slice(start, start + AT_A_TIME)
        for array, values in zip(out, field.at(field.frame.to_unit(points[part]), order), strict=True):
            array[part] = values
    return out
