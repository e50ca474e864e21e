"""Neighbours on a device against SciPy's k-d tree; the same code runs on the CPU here."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from sdfserver.neighbours import BlockedPoints, KdTree, neighbours_of


def clouds() -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(3000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    return {
        "sphere": sphere,
        "density varies by 1000": rng.normal(size=(2000, 3)) * np.exp(rng.normal(scale=3, size=(2000, 1))),
        "two far apart": np.concatenate([sphere[:700], sphere[700:1400] + np.array([1e4, 0, 0])]),
        "a plane at large coordinates": np.column_stack([rng.random((1500, 2)), np.zeros(1500)]) + 1e6,
        "duplicates": np.repeat(rng.random((40, 3)), 30, axis=0),
        "fewer than a block": rng.random((7, 3)),
    }


@pytest.mark.parametrize("name", list(clouds()))
@pytest.mark.parametrize("k", [1, 7, 25])
def test_blocks_find_what_the_tree_finds(name: str, k: int) -> None:
    points = clouds()[name]
    k = min(k, len(points))
    rng = np.random.default_rng(1)
    low, high = points.min(axis=0), points.max(axis=0)
    queries = np.concatenate([points[:: max(1, len(points) // 300)], low + (high - low) * rng.random((200, 3)) * 1.5])
    distance, rows = BlockedPoints(points, "cpu").query(queries, k)
    expected = cKDTree(points).query(queries, k)[0].reshape(len(queries), k)
    assert distance.shape == rows.shape == (len(queries), k)
    assert np.allclose(distance, expected, rtol=1e-9, atol=1e-12 * np.abs(points).max())
    at = np.linalg.norm(points[rows] - queries[:, None], axis=2)
    assert np.allclose(at, distance, rtol=1e-9, atol=1e-12 * np.abs(points).max())
    assert all(len(set(row)) == k for row in rows.tolist())


def test_no_queries_are_no_neighbours() -> None:
    distance, rows = BlockedPoints(np.random.default_rng(0).random((50, 3)), "cpu").query(np.empty((0, 3)), 4)
    assert distance.shape == rows.shape == (0, 4)


def test_more_neighbours_than_there_are_points_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 51; there are 50 points"):
        BlockedPoints(np.random.default_rng(0).random((50, 3)), "cpu").query(np.zeros((1, 3)), 51)


def test_a_cpu_has_a_tree_and_both_answer_alike() -> None:
    points = np.random.default_rng(0).random((500, 3))
    tree = neighbours_of(points, "cpu")
    assert isinstance(tree, KdTree)
    for k in (1, 5):
        for ours, theirs in zip(tree.query(points, k), BlockedPoints(points, "cpu").query(points, k), strict=True):
            assert np.allclose(ours, theirs)
