"""Extraction against dense marching cubes and analytic surfaces."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact_fields import Field
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from torch import Tensor

import sdfserver.extract as module
from sdfserver.config import NetworkConfig
from sdfserver.errors import ExtractionError, Stopped
from sdfserver.extract import CappedField, ExtractedSurface, extract, leaves_the_cube
from sdfserver.mesh import face_normals
from sdfserver.siren import Siren


def sphere(radius: float = 0.7, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Callable[[Tensor], Tensor]:
    return lambda x: (x - torch.tensor(center, dtype=x.dtype)).norm(dim=1) - radius


def box(half: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.abs().amax(dim=1) - half


def torus(x: Tensor) -> Tensor:
    return torch.hypot(torch.hypot(x[:, 0], x[:, 1]) - 0.55, x[:, 2]) - 0.2


def thin_shell(x: Tensor) -> Tensor:
    """A shell 1.2 voxels thick at 128 cells a side."""
    return (x.norm(dim=1) - 0.63).abs() - 0.6 * 2 / 128


def droplets(x: Tensor) -> Tensor:
    """Nine spheres, the smallest three voxels wide at 128 cells a side."""
    centers = torch.tensor([[i, j, k] for i in (-0.5, 0.45) for j in (-0.4, 0.5) for k in (-0.5, 0.4)] + [[0.0, 0, 0]])
    radii = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.035, 0.0235, 0.2])
    return (torch.cdist(x, centers.to(x.dtype)) - radii.to(x.dtype)).amin(dim=1)


def gyroid(x: Tensor) -> Tensor:
    """Of high genus, cut by a sphere; not a distance: the gradient's norm runs from 0 to 18."""
    s, c = torch.sin(11 * x), torch.cos(11 * x)
    wave = (s * c.roll(-1, dims=1)).sum(dim=1)
    return torch.maximum(wave, 12 * (x.norm(dim=1) - 0.83))


def random_siren(seed: int, omega: float = 30.0) -> Callable[[Tensor], Tensor]:
    """An untrained SIREN: sheets and bubbles everywhere, closed off by a sphere."""
    network = Siren(
        NetworkConfig(hidden=32, layers=3, omega=omega), generator=torch.Generator().manual_seed(seed)
    ).double()
    network.requires_grad_(False)
    offset = network(torch.zeros(1, 3, dtype=torch.float64)).item()
    return lambda x: torch.maximum(network(x) - offset - 0.01, 0.3 * (x.norm(dim=1) - 0.85))


FIELDS = {
    "sphere": sphere(),
    "torus": torus,
    "box": box(0.613),
    "thin shell": thin_shell,
    "droplets": droplets,
    "gyroid": gyroid,
    "scaled up": lambda x: 1e4 * torus(x),
    "scaled down": lambda x: 1e-5 * droplets(x),
    "warped": lambda x: torus(x) * (0.3 + 2 * torch.sin(7 * x[:, 0]) ** 2),
    "random SIREN": random_siren(0),
}


def surface_of(function: Callable[[Tensor], Tensor], resolution: int = 64, **options: object) -> ExtractedSurface:
    """In float64, so that a value does not depend on the batch it was computed in by more than 1e-15."""
    return extract(Field(function), resolution=resolution, dtype=torch.float64, **options)


def dense_values(function: Callable[[Tensor], Tensor], resolution: int) -> np.ndarray:
    axis = torch.arange(resolution + 1).double() * (2 / resolution) - 1
    planes = [function(torch.cartesian_prod(axis[i : i + 1], axis, axis)) for i in range(resolution + 1)]
    return torch.cat(planes).view(3 * (resolution + 1,)).numpy()


def edge_counts(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each directed edge is there, and how often its opposite is."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    size = faces.max() + 1
    keys, counts = np.unique(start * size + end, return_counts=True)
    opposite = np.isin(keys % size * size + keys // size, keys)
    return counts, opposite


def is_closed_manifold(faces: np.ndarray) -> bool:
    """Each directed edge once, and its opposite once."""
    counts, opposite = edge_counts(faces)
    return bool((counts == 1).all() and opposite.all())


def signed_volume(surface: ExtractedSurface) -> float:
    a, b, c = (surface.vertices_unit[surface.faces[:, i]] for i in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def genus(surface: ExtractedSurface) -> int:
    return 1 - (len(surface.vertices_unit) - len(surface.faces) // 2) // 2


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def rotated(faces: np.ndarray) -> np.ndarray:
    """Faces with their smallest index first, sorted: the same for the same set of oriented triangles."""
    first = faces.argmin(axis=1)
    return sorted_rows(np.take_along_axis(faces, (first[:, None] + np.arange(3)) % 3, axis=1))


@pytest.mark.parametrize(("name", "resolution"), [*((name, 64) for name in FIELDS), ("droplets", 128)])
def test_sparse_evaluation_equals_the_dense_grid_exactly(
    name: str, resolution: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = surface_of(FIELDS[name], resolution, projection_steps=0)
    monkeypatch.setattr(module, "_coarsest_stride", lambda resolution: 1)
    dense = surface_of(FIELDS[name], resolution, projection_steps=0)
    assert dense.evaluations == (resolution + 1) ** 3 > sparse.evaluations
    np.testing.assert_allclose(sparse.vertices_unit, dense.vertices_unit, rtol=0, atol=1e-9)
    assert np.array_equal(rotated(sparse.faces), rotated(dense.faces))


@pytest.mark.parametrize("name", FIELDS)
def test_vertices_and_triangles_are_those_of_scikit_image_on_the_dense_grid(name: str) -> None:
    """Positions to a thousandth of a voxel, by which ours keep away from the nodes."""
    ours = surface_of(FIELDS[name], 128, projection_steps=0)
    values = dense_values(FIELDS[name], 128)
    vertices, faces, _, _ = marching_cubes(values * (128 / np.abs(values).max()), 0.0)
    assert len(ours.vertices_unit) == len(vertices)
    assert len(ours.faces) == len(faces)
    distance, _ = cKDTree((ours.vertices_unit + 1) * 64).query(vertices)
    assert distance.max() < 1.01e-3


def test_float32_network_gives_the_dense_grid_s_triangles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 differ in their last bits between batches: vertices to 1e-3 of a voxel, triangles exactly."""
    network = Siren(NetworkConfig(hidden=64, layers=3), generator=torch.Generator().manual_seed(3))
    field = Field(lambda x: torch.maximum(network(x) - network(torch.zeros(1, 3)), 0.3 * (x.norm(dim=1) - 0.85)))
    sparse = extract(field, resolution=64, projection_steps=0)
    monkeypatch.setattr(module, "_coarsest_stride", lambda resolution: 1)
    dense = extract(field, resolution=64, projection_steps=0)
    np.testing.assert_allclose(sparse.vertices_unit, dense.vertices_unit, rtol=0, atol=1e-3 * 2 / 64)
    assert np.array_equal(rotated(sparse.faces), rotated(dense.faces))


@pytest.mark.parametrize("name", ["torus", "gyroid", "warped"])
def test_surface_is_followed_where_the_bounds_were_far_too_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = surface_of(FIELDS[name], 96)
    for constant in ("LIPSCHITZ_SAFETY", "OWN_SAFETY", "WORST_SAFETY"):
        monkeypatch.setattr(module, constant, 1e-3)
    followed = surface_of(FIELDS[name], 96)
    assert np.array_equal(whole.vertices_unit, followed.vertices_unit)
    assert np.array_equal(rotated(whole.faces), rotated(followed.faces))


@pytest.mark.parametrize("seed", range(6))
def test_mesh_of_a_wild_field_is_a_closed_manifold(seed: int) -> None:
    surface = surface_of(random_siren(seed, omega=60.0), 48)
    assert is_closed_manifold(surface.faces)
    assert signed_volume(surface) > 0


def test_mesh_is_a_closed_manifold_where_every_ambiguous_face_is_a_tie() -> None:
    """Values of 1 and -1 alone: the product test of marching cubes decides nothing."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (32, 32, 32), generator=generator).double() * 2 - 1
    signs[:3], signs[:, :3], signs[:, :, :3], signs[-3:], signs[:, -3:], signs[:, :, -3:] = 6 * (1.0,)

    def noise(x: Tensor) -> Tensor:
        i, j, k = ((x + 1) * 16).round().long().clamp(0, 31).unbind(1)
        return signs[i, j, k] + 0 * x.sum(dim=1)

    surface = surface_of(noise, 32)
    assert len(surface.faces) > 50_000
    assert is_closed_manifold(surface.faces)
    assert np.isfinite(surface.normals).all()


@pytest.mark.parametrize(
    ("function", "volume"),
    [(box(0.5), 1.0), (sphere(0.5), math.pi / 6), (sphere(0.625, (0.125, 0.0, -0.0625)), 1.0226)],
)
def test_no_hole_where_samples_equal_the_level(function: Callable[[Tensor], Tensor], volume: float) -> None:
    assert (dense_values(function, 64) == 0).sum() > 5
    surface = surface_of(function, 64, projection_steps=0)
    assert is_closed_manifold(surface.faces)
    assert genus(surface) == 0
    assert signed_volume(surface) == pytest.approx(volume, rel=1e-2)
    assert np.linalg.norm(face_normals(surface.vertices_unit, surface.faces), axis=1).min() > 0


def test_sphere_mesh_lies_on_the_sphere() -> None:
    surface = surface_of(sphere(0.7), 64)
    radius = np.linalg.norm(surface.vertices_unit, axis=1)
    assert np.abs(radius - 0.7).max() < 1e-6
    assert np.abs(surface.normals - surface.vertices_unit / 0.7).max() < 1e-2
    assert signed_volume(surface) == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=1e-3)


@pytest.mark.parametrize("name", FIELDS)
def test_triangles_and_normals_face_outward(name: str) -> None:
    surface = surface_of(FIELDS[name], 128)
    area_vectors = face_normals(surface.vertices_unit, surface.faces)
    areas = np.linalg.norm(area_vectors, axis=1)
    cosine = (area_vectors[:, None] * surface.normals[surface.faces]).sum(axis=2).mean(axis=1)
    assert signed_volume(surface) > 0
    assert cosine.sum() / areas.sum() > 0.85
    np.testing.assert_allclose(np.linalg.norm(surface.normals, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_projection_moves_at_most_half_a_voxel_and_turns_nothing_over(name: str) -> None:
    before, after = surface_of(FIELDS[name], projection_steps=0), surface_of(FIELDS[name], projection_steps=3)
    assert np.array_equal(before.faces, after.faces)
    assert np.linalg.norm(after.vertices_unit - before.vertices_unit, axis=1).max() < 0.501 * 2 / 64
    turn = face_normals(before.vertices_unit, before.faces) * face_normals(after.vertices_unit, after.faces)
    assert (turn.sum(axis=1) >= 0).all()


@pytest.mark.parametrize("name", FIELDS)
def test_projection_brings_vertices_closer_to_the_level(name: str) -> None:
    def error(steps: int) -> np.ndarray:
        surface = surface_of(FIELDS[name], projection_steps=steps)
        return FIELDS[name](torch.from_numpy(surface.vertices_unit)).abs().numpy()

    assert error(2).mean() < 0.5 * error(0).mean() + 1e-12


def test_level_is_an_offset() -> None:
    surface = surface_of(sphere(0.5), level=0.2)
    assert np.abs(np.linalg.norm(surface.vertices_unit, axis=1) - 0.7).max() < 1e-6


@pytest.mark.parametrize("resolution", [8, 9, 20, 31, 33, 100])
def test_any_resolution_gives_a_closed_torus(resolution: int) -> None:
    surface = surface_of(torus, resolution)
    assert is_closed_manifold(surface.faces)
    assert genus(surface) == 1
    assert np.abs(surface.vertices_unit).max() < 0.76


def test_surface_that_leaves_the_cube_is_open_there() -> None:
    surface = surface_of(lambda x: x[:, 2] + 0.3 * x[:, 0] - 0.1, 40, projection_steps=0)
    edges = np.sort(surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges, counts = np.unique(edges, axis=0, return_counts=True)
    border = surface.vertices_unit[edges[counts == 1]]
    assert len(border) > 0
    assert (np.abs(border).max(axis=2) > 1 - 1e-6).all()


def test_few_evaluations_for_each_vertex() -> None:
    surface = surface_of(torus, 128, projection_steps=0)
    assert surface.evaluations < 3 * len(surface.vertices_unit)


def test_same_field_gives_the_same_mesh_twice() -> None:
    one, two = surface_of(FIELDS["random SIREN"]), surface_of(FIELDS["random SIREN"])
    assert np.array_equal(one.vertices_unit, two.vertices_unit)
    assert np.array_equal(one.faces, two.faces)
    assert np.array_equal(one.normals, two.normals)


def test_a_device_that_is_full_is_asked_at_fewer_points(caplog: pytest.LogCaptureFixture) -> None:
    whole = surface_of(torus)
    sizes = []

    def crowded(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 2000:
            raise torch.OutOfMemoryError("no room")
        return torus(x)

    surface = surface_of(crowded)
    assert np.array_equal(surface.vertices_unit, whole.vertices_unit)
    assert np.array_equal(surface.faces, whole.faces)
    assert max(sizes[10:]) <= 2000  # it is not tried again and again
    assert "memory is full" in caplog.text

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room at all")

    with pytest.raises(torch.OutOfMemoryError):
        surface_of(full)


def test_batch_size_does_not_change_the_mesh() -> None:
    seen: list[int] = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torus(x)

    small, large = surface_of(counted, batch_size=1000), surface_of(torus)
    assert max(seen) == 1000
    assert np.array_equal(small.vertices_unit, large.vertices_unit)
    assert np.array_equal(small.faces, large.faces)


def test_error_without_a_surface_names_the_values_seen() -> None:
    with pytest.raises(ExtractionError, match=r"no surface at level 2: its values on the grid run from -0\.5 to 1\.23"):
        surface_of(sphere(0.5), 16, level=2.0)


def test_constant_field_is_an_error() -> None:
    with pytest.raises(ExtractionError, match="no surface"):
        surface_of(lambda x: 0 * x[:, 0] + 3)


def test_field_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ExtractionError, match="not finite at"):
        surface_of(lambda x: torch.where(x[:, 0] > 0.4, torch.nan, sphere()(x)))


def test_progress_rises_to_one() -> None:
    seen: list[float] = []
    surface_of(torus, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 4


@pytest.mark.parametrize("calls", [0, 3, 12])
def test_extraction_stops_when_asked(calls: int) -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > calls

    with pytest.raises(Stopped):
        surface_of(torus, batch_size=4096, should_stop=should_stop)
    assert len(asked) == calls + 1


@pytest.mark.gpu
def test_cuda_gives_the_mesh_of_the_cpu() -> None:
    network = Siren(NetworkConfig(), generator=torch.Generator().manual_seed(1)).double().requires_grad_(False)
    offset = network(torch.zeros(1, 3, dtype=torch.float64)).item()
    cpu = Field(lambda x: network(x) - offset - 0.001)
    on_cpu = extract(cpu, resolution=48, dtype=torch.float64)
    network.cuda()
    cpu.device = torch.device("cuda")
    on_cuda = extract(cpu, resolution=48, dtype=torch.float64)
    np.testing.assert_allclose(on_cuda.vertices_unit, on_cpu.vertices_unit, rtol=0, atol=1e-9)
    assert np.array_equal(on_cuda.faces, on_cpu.faces)


@pytest.mark.parametrize("sign", [1, -1], ids=["body", "room"])
def test_a_surface_that_leaves_the_cube_is_closed_along_its_faces(sign: int) -> None:
    def function(x: Tensor) -> Tensor:
        return sign * (x.norm(dim=1) - 1.2)

    resolution, level = 32, 0.05 * sign
    field = Field(function)
    settings = {"resolution": resolution, "level": level, "dtype": torch.float64}
    bare = extract(field, **settings)
    assert leaves_the_cube(bare.vertices_unit, bare.faces, resolution)
    assert not is_closed_manifold(bare.faces)
    surface = extract(CappedField(field, resolution=resolution, level=level), **settings)
    assert not leaves_the_cube(surface.vertices_unit, surface.faces, resolution)
    assert is_closed_manifold(surface.faces)
    assert np.abs(surface.vertices_unit).max() <= 1
    on_walls = np.abs(surface.vertices_unit).max(axis=1) > 1 - 1.5 / resolution
    radius = np.linalg.norm(surface.vertices_unit, axis=1)
    assert np.abs(radius[~on_walls] - 1.25).max() < 0.05
    a, b, c = (surface.vertices_unit[surface.faces[:, i]] for i in range(3))
    volume = (np.cross(a, b) * c).sum() / 6
    # A ball of 1.25 in a cube of 2: all of it but the corners; the room is the same, wound to its air.
    within = np.linalg.norm(np.random.default_rng(0).random((200_000, 3)) * 2 - 1, axis=1) < 1.25
    assert sign * volume == pytest.approx(8 * within.mean(), rel=0.1)


def test_a_surface_within_the_cube_is_not_capped() -> None:
    for surface in (surface_of(FIELDS["torus"], 32), surface_of(lambda x: x.norm(dim=1) - 0.99, 32)):
        assert not leaves_the_cube(surface.vertices_unit, surface.faces, 32)
