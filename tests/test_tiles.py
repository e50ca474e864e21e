"""Clouds by tiles: one surface, streamed, watertight across tiles, and gone on with where it was broken off."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import rippled_sphere

import sdfserver.io as io_module
import sdfserver.sampling as sampling_module
import sdfserver.tiles as tiles_module
from sdfserver.cloud import PointCloud
from sdfserver.config import PRESETS, FitConfig, LocalConfig, MeshConfig, NetworkConfig, PoolConfig, Preset
from sdfserver.errors import CloudError, ConfigError, Stopped
from sdfserver.io import read_cloud, stream_cloud, write_ply
from sdfserver.local import PartitionOfUnity
from sdfserver.metrics import cloud_to_mesh, mesh_health
from sdfserver.reconstruct import Clock, Progress
from sdfserver.tiles import fit_tiles, reconstruct_tiles

SMALL = Preset(
    summary="for tests",
    network=NetworkConfig(hidden=48, layers=3, omega=10.0),
    fit=FitConfig(steps=150, learning_rate=2e-3, batch_surface=300, batch_space=300, pool=PoolConfig(size=3000)),
    local=LocalConfig(points_per_cell=80, most_cells=250, steps=50, pool=128, batch_space=16),
    mesh=MeshConfig(resolution=64),
)
TILE = 3000


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "PRESETS", {**PRESETS, "small": SMALL})
    monkeypatch.setattr(sampling_module, "SKETCH", 4000)


@pytest.fixture(scope="module")
def cloud() -> PointCloud:
    return rippled_sphere(12_000)


@pytest.fixture
def file(cloud: PointCloud, tmp_path: Path) -> Path:
    write_ply(tmp_path / "cloud.ply", cloud.points, normals=cloud.normals)
    return tmp_path / "cloud.ply"


def run(file: Path, folder: Path, **options: object) -> torch.nn.Module:
    fitted = fit_tiles(file, folder, preset="small", device="cpu", tile_points=TILE, **options)  # type: ignore[arg-type]
    return fitted.field.network


def state(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


def test_the_mesh_of_many_tiles_is_one_and_closed(cloud: PointCloud, file: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = reconstruct_tiles(file, tmp_path / "work", preset="small", device="cpu", on_progress=seen.append)
    assert result.report["fit"]["tiles"] >= 1
    health = mesh_health(result.mesh)
    assert health.watertight
    assert health.components == 1
    assert cloud_to_mesh(cloud, result.mesh).mean < 0.01
    assert result.report["cloud"]["points"] == len(cloud.points)
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)


def test_sharp_edges_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sharp needs all points in memory"):
        reconstruct_tiles(tmp_path / "none.ply", tmp_path / "work", preset="small", mesh=MeshConfig(sharp=True))
    assert not (tmp_path / "work").exists()


def test_tiles_have_every_point_of_their_cells(cloud: PointCloud, file: Path, tmp_path: Path) -> None:
    """However many tiles: the same cells from the same points, so that only chance tells the networks apart."""
    many = run(file, tmp_path / "many")
    assert isinstance(many, PartitionOfUnity)
    one = fit_tiles(file, tmp_path / "one", preset="small", device="cpu", tile_points=10**9).field.network
    assert isinstance(one, PartitionOfUnity)
    assert [level.grid.side for level in many.levels] == [level.grid.side for level in one.levels]
    counts = [sum(len(level.cells) for level in network.levels) for network in (many, one)]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
    assert len(list((tmp_path / "many").glob("cells-*"))) > 4
    assert len(list((tmp_path / "one").glob("cells-*"))) == 1
    x = torch.tensor(cloud.points[:4000] * 0.85, dtype=torch.float32)
    errors = [float(network(x / x.norm(dim=1, keepdim=True) * 0.85).abs().mean()) for network in (many, one)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_a_broken_off_fit_goes_on_with_the_next_tile(file: Path, tmp_path: Path) -> None:
    whole = run(file, tmp_path / "whole")
    work = tmp_path / "work"
    finished: list[int] = []

    def stop() -> bool:
        finished[:] = [len(list(work.glob("cells-*")))]
        return finished[0] == 2

    with pytest.raises(Stopped):
        run(file, work, should_stop=stop)
    before = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert sum(name.startswith("cells-") for name in before) == 2
    again = run(file, work)
    kept = [name for name in before if not name.startswith("points-")]
    assert {name: (work / name).stat().st_mtime_ns for name in kept} == {name: before[name] for name in kept}
    assert torch.equal(state(again), state(whole))
    assert not list(work.glob("points-*"))


def test_a_killed_fit_goes_on_with_the_next_tile(file: Path, tmp_path: Path) -> None:
    """A real SIGKILL in the middle of the third tile, and the same networks in the end."""
    whole = run(file, tmp_path / "whole")
    program = """
import os, signal, sys
from pathlib import Path
import test_tiles
test_tiles.tiles_module.PRESETS = {**test_tiles.PRESETS, "small": test_tiles.SMALL}
test_tiles.sampling_module.SKETCH = 4000
file, work = map(Path, sys.argv[1:])
asked = 0
def die():
    global asked
    asked += len(list(work.glob("cells-*"))) == 2
    if asked == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
test_tiles.run(file, work, should_stop=die)
"""
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "work")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "work").glob("cells-*"))) == 2
    assert torch.equal(state(run(file, tmp_path / "work")), state(whole))


def test_points_half_sorted_are_sorted_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(file, tmp_path / "whole")
    monkeypatch.setattr(tiles_module, "stream_cloud", lambda path: io_module.stream_cloud(path, 3000))
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += bool(list((tmp_path / "work").glob("points-*")))
        return asked == 2

    with pytest.raises(Stopped, match="sorted into tiles"):
        run(file, tmp_path / "work", should_stop=stop)
    monkeypatch.undo()
    monkeypatch.setattr(tiles_module, "PRESETS", {**PRESETS, "small": SMALL})
    monkeypatch.setattr(sampling_module, "SKETCH", 4000)
    assert torch.equal(state(run(file, tmp_path / "work")), state(whole))


def test_another_cloud_s_folder_is_refused(file: Path, cloud: PointCloud, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(file, tmp_path / "work", should_stop=lambda: True)
    assert cloud.normals is not None
    write_ply(tmp_path / "other.ply", cloud.points[:9000], normals=cloud.normals[:9000])
    with pytest.raises(ConfigError, match="another cloud"):
        run(tmp_path / "other.ply", tmp_path / "work")
    with pytest.raises(ConfigError, match="another cloud, or of other settings"):
        run(file, tmp_path / "work", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="holds other files"):
        run(file, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not touch"


def test_what_cannot_be_fitted_is_told_in_one_line(file: Path, cloud: PointCloud, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no local networks"):
        fit_tiles(file, tmp_path / "a", preset="paper")
    write_ply(tmp_path / "bare.ply", cloud.points)
    with pytest.raises(CloudError, match="normals"):
        run(tmp_path / "bare.ply", tmp_path / "b")
    with pytest.raises(CloudError, match="cannot be read"):
        run(tmp_path / "absent.ply", tmp_path / "c")
    broken = cloud.points.copy()
    broken[11_000] = np.nan
    write_ply(tmp_path / "nan.ply", broken, normals=cloud.normals)
    with pytest.raises(CloudError, match="NaN"):
        run(tmp_path / "nan.ply", tmp_path / "d")


def test_a_stray_does_not_shrink_the_shape(cloud: PointCloud, tmp_path: Path) -> None:
    assert cloud.normals is not None
    points = np.concatenate([cloud.points, [[900.0, 0, 0]]])
    write_ply(tmp_path / "stray.ply", points, normals=np.concatenate([cloud.normals, [[1.0, 0, 0]]]))
    fitted = fit_tiles(tmp_path / "stray.ply", tmp_path / "work", preset="small", device="cpu", clock=Clock(None))
    assert fitted.field.frame.scale == pytest.approx(0.9, rel=0.1)
    assert (fitted.report["cloud"]["used"], fitted.report["cloud"]["strays_dropped"]) == (len(cloud.points), 1)


def test_the_sketch_of_a_streamed_cloud_keeps_its_colours(cloud: PointCloud, tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (len(cloud.points), 3), dtype=np.uint8)
    path = tmp_path / "painted.ply"
    write_ply(path, cloud.points, normals=cloud.normals, colors=colors)
    settings = {"preset": "small", "seed": 0, "tile_points": TILE}
    known = {point.tobytes(): color for point, color in zip(read_cloud(path).points, colors, strict=True)}
    for _ in range(2):  # the second time from the folder
        work = tiles_module._Folder(tmp_path / "work", path, settings)
        sketch = tiles_module._survey(work, path, 0, torch.device("cpu")).sketch
        assert sketch.colors is not None
        assert len(sketch.points) == 4000
        assert all((known[p.tobytes()] == c).all() for p, c in zip(sketch.points, sketch.colors, strict=True))


@pytest.mark.parametrize("suffix", ["ply", "npz"])
def test_a_stream_is_the_file_in_parts(cloud: PointCloud, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cloud.{suffix}"
    if suffix == "ply":
        write_ply(path, cloud.points, normals=cloud.normals)
    else:
        np.savez(path, points=cloud.points, normals=cloud.normals)
    parts = list(stream_cloud(path, 3000))
    whole = read_cloud(path)
    assert [len(part.points) for part in parts] == [3000] * 4
    assert (np.concatenate([part.points for part in parts]) == whole.points).all()
    assert whole.normals is not None
    assert (np.concatenate([part.normals for part in parts if part.normals is not None]) == whole.normals).all()


def test_a_stream_of_a_cut_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CloudError, match=r"cloud\.ply"):
        next(stream_cloud(file))


def test_memory_holds_a_chunk_and_a_tile(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    def counted(path: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal longest
        points, normals = original(path, device)
        longest = max(longest, len(points))
        return points, normals

    original = tiles_module._points_of
    monkeypatch.setattr(tiles_module, "_points_of", counted)
    run(file, tmp_path / "work")
    assert longest < 0.6 * 12_000


def test_local_settings_are_needed_to_be_tried(monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path) -> None:
    """A cloud whose cells are all refused keeps its coarse field."""
    assert SMALL.local is not None
    noisy = replace(SMALL, local=replace(SMALL.local, worth=1e6))
    monkeypatch.setattr(tiles_module, "PRESETS", {**PRESETS, "small": noisy})
    assert not isinstance(run(file, tmp_path / "work"), PartitionOfUnity)
