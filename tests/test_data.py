"""The bundled clouds are what their README says, and their script makes them again."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sdfserver.cloud import validate
from sdfserver.errors import CloudError
from sdfserver.io import read_cloud

NAMES = ["bare", "bracket", "goblet", "knot", "lattice", "noisy", "sparse", "terrain"]
EXACT = {"knot": "knot", "bracket": "bracket", "goblet": "goblet", "lattice": "lattice", "sparse": "duck"}
TERRAIN_OFFSET = np.array([431_200.0, 5_312_600.0, 640.0])


@pytest.fixture(scope="module")
def make(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", data / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(make: ModuleType) -> dict[str, Callable[..., np.ndarray]]:
    shapes = {name: getattr(make, shape) for name, shape in EXACT.items()}
    return shapes | {"knot": make.knot(), "goblet": make.goblet()}


def test_the_script_makes_the_same_bytes(make: ModuleType, data: Path) -> None:
    made = dict(make.make())
    assert sorted(made) == sorted(path.name for path in data.glob("*.ply"))
    for name, content in made.items():
        assert (data / name).read_bytes() == content, name


def test_another_libm_would_make_the_same_bytes(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = np.arange(241) / 240
    here = make.circle(turns)
    cos, sin = np.cos, np.sin
    for direction in (-np.inf, np.inf):
        monkeypatch.setattr(make.np, "cos", lambda x, to=direction: np.nextafter(cos(x), to))
        monkeypatch.setattr(make.np, "sin", lambda x, to=direction: np.nextafter(sin(x), to))
        assert np.array_equal(make.circle(turns), here)


def test_random_numbers_are_uniform_and_normal(make: ModuleType) -> None:
    random = make.Random(0)
    uniform, normal = random.uniform(100_000), random.normal(100_000)
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.005)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.01)


def test_they_are_small(data: Path) -> None:
    sizes = [path.stat().st_size for path in data.glob("*.ply")]
    assert len(sizes) == len(NAMES)
    assert sum(sizes) < 2.1e6


def test_the_readme_counts_the_points_of_each(data: Path) -> None:
    rows = re.findall(
        r"^\| `(\w+)\.ply` \| ([\d,]+) \|", (data / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    said = {name: int(count.replace(",", "")) for name, count in rows}
    assert said == {name: len(read_cloud(data / f"{name}.ply").points) for name in NAMES}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bare"])
def test_they_can_be_reconstructed_as_they_are(data: Path, name: str) -> None:
    cloud = read_cloud(data / f"{name}.ply")
    assert len(validate(cloud).points) == len(cloud.points)
    assert cloud.normals is not None
    assert np.linalg.norm(cloud.normals, axis=1) == pytest.approx(1, abs=2e-5)


def test_the_bare_one_has_no_normals(data: Path) -> None:
    cloud = read_cloud(data / "bare.ply")
    assert cloud.normals is None
    with pytest.raises(CloudError, match="--normals estimate"):
        validate(cloud)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_points_lie_on_their_shape_and_normals_point_out_of_it(
    data: Path, shapes: dict[str, Callable[..., np.ndarray]], name: str
) -> None:
    cloud, f = read_cloud(data / f"{name}.ply"), shapes[name]
    size = np.ptp(cloud.points, axis=0).max()
    step = 1e-3 * size * cloud.normals
    outside, inside = f(*(cloud.points + step).T), f(*(cloud.points - step).T)
    assert np.mean((outside > 0) & (inside < 0)) > 0.999
    # Rounding alone separates them from the surface.
    slope = (outside - inside) / (2e-3 * size)
    assert np.median(np.abs(f(*cloud.points.T)) / slope) < 1e-5


def test_the_noise_is_what_the_readme_says(data: Path, make: ModuleType) -> None:
    cloud = read_cloud(data / "noisy.ply")
    value, gradient = make.value_and_gradient(make.duck, cloud.points, 1e-5)
    slope = np.linalg.norm(gradient, axis=1)
    assert np.std(value / slope) == pytest.approx(0.01, rel=0.1)
    diagonal = np.linalg.norm(np.ptp(cloud.points, axis=0))
    assert 0.01 / diagonal == pytest.approx(0.004, abs=0.0005)
    cosine = (cloud.normals * gradient).sum(axis=1) / slope
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean() == pytest.approx(8, abs=1.5)


def test_the_terrain_is_open_and_far_away(data: Path, make: ModuleType) -> None:
    cloud = read_cloud(data / "terrain.ply")
    local = cloud.points - TERRAIN_OFFSET
    assert (local.min(axis=0) > [-1e-3, -1e-3, -20]).all()
    assert (local.max(axis=0) < [120.001, 80.001, 60]).all()
    assert np.abs(make.terrain(*local.T)).max() < 1e-4
    assert (cloud.normals[:, 2] > 0).all()


def test_points_are_uniform_by_area(data: Path) -> None:
    points = read_cloud(data / "bracket.ply").points
    under, side = np.abs(points[:, 2]) < 1e-3, np.abs(points[:, 1] - 25) < 1e-3
    areas = [80 * 50 - 2 * np.pi * 5**2, 80 * 10 + 50 * 10]
    share = under.sum() / (under.sum() + side.sum())
    assert share == pytest.approx(areas[0] / sum(areas), abs=0.02)
