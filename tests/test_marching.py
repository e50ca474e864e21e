"""The table of plain cases against scikit-image, whose triangles these are."""

from itertools import product

import numpy as np
import torch

from sdfserver.marching import CORNERS, EDGES, WITHIN, inner_place, march_packed, table, triangles_of


def triples(owner: np.ndarray, edges: np.ndarray) -> set[tuple[int, ...]]:
    """Triangles as their cell and edges, from whichever corner they start."""
    return {
        (int(cell), *np.roll(triangle, -int(np.argmin(triangle))).tolist())
        for cell, triangle in zip(owner, edges, strict=True)
    }


def test_edges_are_the_twelve_of_a_cube_each_once() -> None:
    assert len(EDGES) == WITHIN == 12
    assert len({tuple(edge) for edge in EDGES.tolist()}) == 12
    assert all(edge[edge[3]] == 0 for edge in EDGES.tolist())


def test_the_signs_of_a_plain_case_alone_decide() -> None:
    of_cases = table()
    plain = of_cases.plain.nonzero()[:, 0]
    # Of Lewiner et al.'s classes 0, 1, 2, 5, 8, 9, 11 and 14.
    assert len(plain) == 2 + 16 + 24 + 48 + 6 + 8 + 12 + 12
    rng = np.random.default_rng(0)
    signs = 1 - 2 * ((plain[:, None] >> torch.arange(8)) & 1).numpy()
    for _ in range(20):
        values = signs * np.exp(rng.normal(scale=2, size=signs.shape))
        owner, edges = march_packed(rng.integers(0, 500, (len(plain), 3)).astype(np.int32), values)
        expected = {
            (row, *np.roll(t, -int(np.argmin(t))).tolist())
            for row, case in enumerate(plain.tolist())
            for t in of_cases.edges[case, : of_cases.count[case]].numpy()
        }
        assert triples(owner, edges) == expected


def test_all_cells_get_the_triangles_that_scikit_image_gives() -> None:
    rng = np.random.default_rng(1)
    cells = rng.integers(0, 1000, (20_000, 3)).astype(np.int32)
    values = rng.normal(size=(20_000, 8))
    values = values[:, :] + np.repeat(rng.normal(size=(20_000, 1)), 8, axis=1)  # not all signs equally mixed
    owner, edges = triangles_of(torch.from_numpy(cells), torch.from_numpy(values))
    assert triples(owner.numpy(), edges.numpy()) == triples(*march_packed(cells, values))
    assert (edges == WITHIN).any()


def test_an_edge_is_joined_where_its_ends_differ_and_nowhere_else() -> None:
    case = torch.arange(1, 255)
    of_cases = table()
    corner = {tuple(c): i for i, c in enumerate(CORNERS.tolist())}
    for number in case[of_cases.plain[case]].tolist():
        joined = set(of_cases.edges[number, : of_cases.count[number]].flatten().tolist())
        for edge, (*low, axis) in enumerate(EDGES.tolist()):
            high = [*low]
            high[axis] = 1
            crossed = (number >> corner[tuple(low)] & 1) != (number >> corner[tuple(high)] & 1)
            assert crossed == (edge in joined)


def test_the_vertex_within_a_cell_is_pulled_to_corners_near_the_level() -> None:
    values = torch.full((1, 8), 1.0)
    assert torch.allclose(inner_place(values), torch.full((1, 3), 0.5, dtype=torch.float64))
    for i, corner in enumerate(product((0, 1), repeat=3)):
        near = values.clone()
        near[0, i] = 1e-3
        assert torch.allclose(inner_place(near)[0], torch.tensor(corner, dtype=torch.float64), atol=0.02)
