"""What is done to a mesh without its field."""

import builtins
from typing import Any

import numpy as np
import pytest
from skimage.measure import marching_cubes

from sdfserver.errors import ExtractionError, MissingDependencyError
from sdfserver.mesh import (
    TriangleMesh,
    drop_small_components,
    drop_unsupported_components,
    face_areas,
    face_components,
    simplify,
    trim_to_points,
    vertex_normals,
)
from sdfserver.metrics import compare_meshes, mesh_health


def spheres(*radii: float, n: int = 40) -> TriangleMesh:
    """Spheres side by side along x, as one mesh, with exact normals."""
    vertices, faces, normals, start = [], [], [], 0
    axis = np.linspace(-1.2, 1.2, n)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    for place, radius in enumerate(radii):
        v, f, _, _ = marching_cubes(np.sqrt(x**2 + y**2 + z**2) - 1, 0.0)
        v = v.astype(np.float64) * (2.4 / (n - 1)) - 1.2
        normals.append(v / np.linalg.norm(v, axis=1, keepdims=True))
        vertices.append(v * radius + [3.0 * place, 0, 0])
        faces.append(f.astype(np.int64) + start)
        start += len(v)
    return TriangleMesh(
        vertices=np.concatenate(vertices),
        faces=np.concatenate(faces),
        normals=np.concatenate(normals).astype(np.float32),
    )


def test_vertex_normals_of_a_sphere_point_outward() -> None:
    mesh = spheres(1.0)
    normals = vertex_normals(mesh.vertices, mesh.faces)
    assert normals.dtype == np.float32
    assert (normals * mesh.normals).sum(axis=1).min() > 0.99


def test_vertex_without_faces_has_a_unit_normal() -> None:
    normals = vertex_normals(np.zeros((4, 3)), np.array([[0, 1, 2]]))
    np.testing.assert_array_equal(np.linalg.norm(normals, axis=1), 1)


def test_faces_are_labelled_by_component() -> None:
    mesh = spheres(1.0, 0.5, 0.2)
    labels = face_components(mesh.faces, len(mesh.vertices))
    assert np.array_equal(np.unique(labels), [0, 1, 2])
    place = np.round(mesh.vertices[mesh.faces].mean(axis=1)[:, 0] / 3)
    assert all(len(np.unique(labels[place == i])) == 1 for i in range(3))


@pytest.mark.parametrize(("share", "left"), [(0.0, 3), (0.03, 3), (0.1, 2), (0.3, 1), (1.0, 1)])
def test_components_under_a_share_of_the_largest_area_are_dropped(share: float, left: int) -> None:
    """Areas of 1, 1/4 and 1/25."""
    mesh = drop_small_components(spheres(1.0, 0.5, 0.2), share)
    assert mesh_health(mesh).components == left
    assert mesh_health(mesh).watertight
    assert len(np.unique(mesh.faces)) == len(mesh.vertices) == len(mesh.normals)


def test_normals_stay_with_their_vertices_when_components_are_dropped() -> None:
    mesh = drop_small_components(spheres(0.2, 1.0), 0.5)
    np.testing.assert_allclose(mesh.vertices - [3.0, 0, 0], mesh.normals, atol=5e-3)


def test_trimming_keeps_what_is_near_the_points() -> None:
    mesh = spheres(1.0)
    upper = mesh.vertices[mesh.vertices[:, 2] > 0.2]
    trimmed = trim_to_points(mesh, upper, 0.1)
    assert trimmed.vertices[:, 2].min() > 0.2 - 0.1
    assert face_areas(trimmed.vertices, trimmed.faces).sum() == pytest.approx(2 * np.pi * (1 - 0.13), rel=0.03)
    health = mesh_health(trimmed)
    assert health.boundary_edges > 0
    assert (health.non_manifold_edges, health.components) == (0, 1)


def test_trimming_at_a_generous_distance_changes_nothing() -> None:
    mesh = spheres(1.0)
    trimmed = trim_to_points(mesh, mesh.vertices[:1], 3.0)
    assert np.array_equal(trimmed.vertices, mesh.vertices)
    assert np.array_equal(trimmed.faces, mesh.faces)


def test_trimming_everything_away_is_an_error_that_names_the_distances() -> None:
    with pytest.raises(ExtractionError, match=r"trimming at 0\.1 leaves nothing: the vertices lie 9\S* to 11 from"):
        trim_to_points(spheres(1.0), np.array([[0.0, 0, 10]]), 0.1)


def test_simplified_sphere_stays_a_closed_sphere() -> None:
    pytest.importorskip("fast_simplification")
    mesh = spheres(1.0)
    simple = simplify(mesh, 1000)
    assert 900 <= len(simple.faces) <= 1000
    health = mesh_health(simple)
    assert (health.watertight, health.components, health.genus) == (True, 1, 0)
    assert health.volume == pytest.approx(mesh_health(mesh).volume, rel=0.01)
    assert compare_meshes(simple, mesh, samples=5000).hausdorff < 0.02
    radial = simple.vertices / np.linalg.norm(simple.vertices, axis=1, keepdims=True)
    assert (simple.normals * radial).sum(axis=1).min() > 0.97


def test_simplification_does_not_depend_on_units_and_place() -> None:
    pytest.importorskip("fast_simplification")
    mesh = spheres(1.0)
    moved = TriangleMesh(vertices=mesh.vertices * 1000 + [4.5e5, 5.4e6, 120.0], faces=mesh.faces)
    here, there = simplify(mesh, 1000), simplify(moved, 1000)
    assert abs(len(here.faces) - len(there.faces)) <= 20
    assert mesh_health(there).volume == pytest.approx(mesh_health(here).volume * 1e9, rel=1e-3)
    assert mesh_health(there).watertight


def test_mesh_with_few_faces_is_not_simplified() -> None:
    mesh = spheres(1.0)
    assert simplify(mesh, len(mesh.faces)) is mesh


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "fast_simplification":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="pip install fast-simplification"):
        simplify(spheres(1.0), 100)


def test_component_that_no_point_is_nearest_to_is_dropped() -> None:
    mesh = spheres(0.5, 1.0, 0.2)
    points = mesh.vertices[mesh.vertices[:, 0] > 1.5][:200]
    kept = drop_unsupported_components(mesh, points)
    assert mesh_health(kept).components == 1
    assert kept.vertices[:, 0].min() > 1.9
    assert drop_unsupported_components(mesh, mesh.vertices) is mesh
