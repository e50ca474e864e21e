"""Clouds that do not fit in memory: streamed from disk, refined tile by tile, one field in the end.

The way: what the cloud measures and a sketch of it (one pass); the coarse network, on the sketch; the points sorted
into tiles, each with the overlap of its cells (one pass); the local networks of one tile after the other; all of them
as one field, which is meshed as any other, so that no seam runs between tiles. Memory holds one chunk of the file, or
one tile, and all networks.

Everything that is done lies in a folder, each file complete or absent. The same call goes on where it was broken off.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdfserver.assumptions import measure, warnings_of
from sdfserver.cloud import Frame, PointCloud, checked, drop_strays, validate
from sdfserver.config import PRESETS, LocalConfig, MeshConfig
from sdfserver.errors import CloudError, ConfigError, FieldFormatError, OutputError, Stopped
from sdfserver.field import SignedDistanceField
from sdfserver.files import printable, reason, replacing
from sdfserver.fit import FitProgress, fit, shortened
from sdfserver.io import stream_cloud
from sdfserver.local import CellGrid
from sdfserver.reconstruct import (
    FIT_STAGES,
    Clock,
    FittedField,
    Progress,
    Reconstruction,
    choose_device,
    fit_section,
    local_section,
    reconstruction_of,
    start_report,
)
from sdfserver.refine import FittedCells, Refinement, loaded_cells, plan_cells, saved_cells
from sdfserver.sampling import Noise, Patches, Samples, noise_of, normals_of, sketch_rows, sketch_samples
from sdfserver.siren import Siren
from sdfserver.winding import spacing_of

FORMAT = "sdfserver-tiles-1"
TILE_POINTS = 2_000_000
"""Points of a tile, about, at most."""
POINTS_PER_CELL = 1000
"""A cloud may have as many cells as this makes of it, where the preset would have fewer."""
COARSE_SHARE = 0.25
"""Of the fit's progress; the rest is the tiles'."""
ABOUT, SURVEY, COARSE, COARSE_ABOUT, SORTED = (
    "about.json",
    "survey.npz",
    "coarse.safetensors",
    "coarse.json",
    "sorted.json",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Survey:
    """What a look at the whole file tells: how many points and far strays there are, a sketch, and their frame."""

    count: int
    strays: int
    sketch: PointCloud
    frame: Frame
    noise: Noise


def fit_tiles(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    preset: str = "standard",
    device: str = "auto",
    seed: int = 0,
    tile_points: int = TILE_POINTS,
    clock: Clock | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FittedField:
    """The field of the oriented cloud in the file `path`, as fit_field's; its `cloud` is a sketch of the whole.

    Colours are the sketch's. Of a PLY that is streamed they are read where they are bytes.

    `folder` takes the work, and is made where there is none: about 30 bytes for each point. Called again with the same
    file and settings it goes on there; what another call left is refused. `should_stop` is asked before every step.

    Raises CloudError and ConfigError as reconstruct does, OutputError where the folder cannot be written, Stopped.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; use one of {', '.join(PRESETS)}")
    local = PRESETS[preset].local
    if local is None:
        raise ConfigError(f"preset {preset!r} has no local networks to lay out in tiles; use standard or fine")
    path, torch_device, clock = Path(path), choose_device(device), clock or Clock(None, FIT_STAGES)
    work = _Folder(Path(folder), path, {"preset": preset, "seed": seed, "tile_points": tile_points})
    with clock.running("prepare"):
        survey = _survey(work, path, seed, torch_device)
        assumptions = measure(survey.sketch, device=str(torch_device))
        local = replace(local, most_cells=max(local.most_cells, survey.count // POINTS_PER_CELL))
        unit = PointCloud(points=survey.frame.to_unit(survey.sketch.points), normals=survey.sketch.normals)
        samples = sketch_samples(
            unit, PRESETS[preset].fit.pool, np.random.default_rng(seed), of=survey.count, device=torch_device
        )
        samples = replace(samples, noise=survey.noise.scaled(survey.frame.scale))
    with clock.running("fit"):
        coarse, about = _coarse(
            work, unit, samples, preset, local, survey.frame, torch_device, seed, clock, should_stop
        )
        leaves = plan_cells(samples.points, samples.spacings, local, of=survey.count)
        tiles = _tiles(leaves, survey.count, tile_points)
        _sort(work, path, survey.frame, tiles, clock, should_stop)
        refinement = Refinement(coarse, samples.noise.least, local, seed=seed)
        found = list(_fit_each(work, refinement, tiles, torch_device, clock, should_stop))
        network, refined = refinement.join(found)
        for tile in tiles.parts:
            work.path(_points_file(tile)).unlink(missing_ok=True)
    base = PRESETS[preset]
    report = start_report(
        preset, seed=seed, device=torch_device, network=base.network, fit_config=base.fit, local=local
    ) | {
        "cloud": {
            "points": survey.count,
            "used": survey.count - survey.strays,
            "strays_dropped": survey.strays,
            "scale_to_unit": survey.frame.scale,
        },
        "assumptions": asdict(assumptions),
        "warnings": warnings_of(assumptions),
        "seconds": dict(clock.seconds),
        "fit": {**about, "local": local_section(refined, survey.frame), "tiles": len(tiles.parts)},
    }
    return FittedField(field=SignedDistanceField(network, survey.frame), cloud=survey.sketch, report=report)


def reconstruct_tiles(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    preset: str = "standard",
    mesh: MeshConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Reconstruction:
    """The surface of the cloud in the file `path`, tile by tile: `fit_tiles`, then the mesh of the whole.

    The mesh is one, watertight across tiles. Raises as reconstruct does, and OutputError as fit_tiles.
    """
    if mesh is not None and mesh.sharp:
        raise ConfigError("sharp needs all points in memory, and tiles never have them there: leave one of them out")
    clock = Clock(on_progress)
    fitted = fit_tiles(path, folder, preset=preset, device=device, seed=seed, clock=clock, should_stop=should_stop)
    return reconstruction_of(fitted, mesh or PRESETS[preset].mesh, clock=clock, should_stop=should_stop)


class _Folder:
    """The folder of one piece of work, and whose it is."""

    def __init__(self, folder: Path, cloud: Path, settings: dict[str, Any]) -> None:
        try:
            stat = cloud.stat()
            about = {
                "format": FORMAT,
                "cloud": {"name": cloud.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns},
                **settings,
                "config": hashlib.sha256(repr(PRESETS[settings["preset"]]).encode()).hexdigest(),
            }
        except OSError as error:
            raise CloudError(f"{printable(str(cloud))} cannot be read: {reason(error)}") from None
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ABOUT).exists():
                if any(folder.iterdir()):
                    raise ConfigError(f"{printable(str(folder))} holds other files; give an empty folder, or a new one")
                self.write(ABOUT, about)
            elif self.read(ABOUT) != about:
                raise ConfigError(
                    f"{printable(str(folder))} holds the tiles of another cloud, or of other settings; "
                    "give another folder, or remove it"
                )
        except OSError as error:
            raise OutputError(f"{printable(str(folder))} cannot be used: {reason(error)}") from None

    def path(self, name: str) -> Path:
        """Where a file of this name is."""
        return self._folder / name

    def has(self, name: str) -> bool:
        """Whether it is there: then it is complete."""
        return self.path(name).exists()

    def write(self, name: str, content: Any) -> None:
        """Write JSON."""
        with replacing(self.path(name)) as stream:
            stream.write(json.dumps(content, indent=1).encode())

    def read(self, name: str) -> Any:
        """Read JSON. Raises ConfigError where it is damaged."""
        try:
            return json.loads(self.path(name).read_bytes())
        except ValueError:
            raise ConfigError(f"{printable(str(self.path(name)))} is damaged; remove the folder") from None


def _survey(work: _Folder, path: Path, seed: int, device: torch.device) -> _Survey:
    """One pass for the count, one for the sketch, one for the noise between neighbours."""
    if work.has(SURVEY):
        with np.load(work.path(SURVEY), allow_pickle=False) as saved:
            return _Survey(
                count=int(saved["count"]),
                strays=int(saved["strays"]),
                sketch=PointCloud(
                    points=saved["points"],
                    normals=saved["normals"],
                    colors=saved.get("colors"),
                ),
                frame=Frame(center=saved["center"], scale=float(saved["scale"])),
                noise=Noise(by_quadrics=float(saved["noise"][0]), by_normals=float(saved["noise"][1])),
            )
    count = sum(len(checked(chunk).points) for chunk in stream_cloud(path))
    rng = np.random.default_rng(seed)
    rows, before, parts = sketch_rows(count, rng), 0, []
    for chunk in map(checked, stream_cloud(path)):
        first, last = np.searchsorted(rows, [before, before + len(chunk.points)])
        parts.append(chunk.take(rows[first:last] - before))
        before += len(chunk.points)
    sketch = validate(drop_strays(_joined(parts))[0])
    spacing = spacing_of(sketch.points, device)
    patches = Patches(sketch.points, spacing * math.sqrt(len(sketch.points) / count), rng)
    # The whole cloud reaches a little farther than its sketch, its strays much farther.
    box = sketch.points.min(axis=0) - 4 * spacing, sketch.points.max(axis=0) + 4 * spacing
    corners, near, strays = [*box[::-1]], [], count
    for chunk in map(checked, stream_cloud(path)):
        inside = chunk.points[((chunk.points >= box[0]) & (chunk.points <= box[1])).all(axis=1)]
        strays -= len(inside)
        if len(inside):
            corners = [np.minimum(corners[0], inside.min(axis=0)), np.maximum(corners[1], inside.max(axis=0))]
        near.append(chunk.take(patches.mask(chunk.points)))
    frame = Frame.around(np.stack(corners), margin=spacing)
    survey = _Survey(count=count, strays=strays, sketch=sketch, frame=frame, noise=noise_of(_joined(near), rng, device))
    colors: dict[str, Any] = {} if sketch.colors is None else {"colors": sketch.colors}
    with replacing(work.path(SURVEY)) as stream:
        np.savez(
            stream,
            count=count,
            strays=strays,
            noise=[survey.noise.by_quadrics, survey.noise.by_normals],
            center=frame.center,
            scale=frame.scale,
            points=sketch.points,
            normals=normals_of(sketch),
            **colors,
        )
    return survey


def _coarse(
    work: _Folder,
    unit: PointCloud,
    samples: Samples,
    preset: str,
    local: LocalConfig,
    frame: Frame,
    device: torch.device,
    seed: int,
    clock: Clock,
    should_stop: Callable[[], bool] | None,
) -> tuple[Siren, dict[str, Any]]:
    """The coarse network, fitted to the sketch or found in the folder, and what the report says of it."""
    if not work.has(COARSE_ABOUT):
        config = PRESETS[preset].fit
        if samples.noise.least < local.clean_unit:
            config = shortened(config, local)

        def tell(progress: FitProgress) -> None:
            share = COARSE_SHARE * progress.share
            clock.report(share, step=progress.step, steps=progress.steps, losses=progress.losses)

        network, report = fit(
            unit,
            PRESETS[preset].network,
            config,
            samples=samples,
            device=device,
            seed=seed,
            on_progress=tell,
            should_stop=should_stop,
        )
        SignedDistanceField(network, frame).save(work.path(COARSE))
        work.write(COARSE_ABOUT, fit_section(report, frame))
    coarse = SignedDistanceField.load(work.path(COARSE), device=device).network
    if not isinstance(coarse, Siren):
        raise FieldFormatError(f"{printable(str(work.path(COARSE)))} is not a single network; remove the folder")
    return coarse, work.read(COARSE_ABOUT)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tiles:
    """Cubes whose overlap holds all that their cells do, and by its number each tile's leaves of the octree."""

    grid: CellGrid
    parts: dict[int, list[tuple[CellGrid, Tensor]]]


def _tiles(leaves: list[tuple[CellGrid, Tensor]], count: int, tile_points: int) -> _Tiles:
    """A cell belongs to the tile that its centre lies in, and reaches H beyond it at most."""
    reach = max(grid.half for grid, _ in leaves)
    # A surface meets about 1.5 side^2 of side^3 cubes. Only the tile beside may be reached.
    side = max(1, min(math.ceil(math.sqrt(count / tile_points / 1.5)), math.floor(1 / reach)))
    tiles = CellGrid(side, min(1.0, reach * side))
    parts: dict[int, list[tuple[CellGrid, Tensor]]] = {}
    for grid, cells in leaves:
        home = ((grid.centres(cells) + 1) / tiles.width).floor().long().clamp(0, side - 1)
        numbers = tiles.numbers(home)
        for number in torch.unique(numbers).tolist():
            parts.setdefault(number, []).append((grid, cells[numbers == number]))
    return _Tiles(grid=tiles, parts=dict(sorted(parts.items())))


def _sort(
    work: _Folder,
    path: Path,
    frame: Frame,
    tiles: _Tiles,
    clock: Clock,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Leaves the points of each tile and of its overlap in a file of its own, as rows of float32 in the unit frame."""
    if work.has(SORTED):
        return
    for tile in tiles.parts:
        work.path(_points_file(tile)).unlink(missing_ok=True)
    for chunk in map(checked, stream_cloud(path)):
        if should_stop is not None and should_stop():
            raise Stopped("stopped while the points were sorted into tiles")
        table = np.hstack([frame.to_unit(chunk.points), normals_of(chunk)]).astype(np.float32)
        table = table[(np.abs(table[:, :3]) <= 1).all(axis=1)]  # strays lie outside
        rows, numbers = (found.numpy() for found in tiles.grid.overlaps(torch.from_numpy(table[:, :3])))
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
        for tile in np.unique(numbers):
            if int(tile) not in tiles.parts:
                continue
            first, last = np.searchsorted(numbers, [tile, tile + 1])
            try:
                with work.path(_points_file(int(tile))).open("ab") as stream:
                    table[rows[first:last]].tofile(stream)
            except OSError as error:
                raise OutputError(f"the tiles cannot be written: {reason(error)}") from None
        clock.report(COARSE_SHARE)
    work.write(SORTED, sorted(tiles.parts))


def _fit_each(
    work: _Folder,
    refinement: Refinement,
    tiles: _Tiles,
    device: torch.device,
    clock: Clock,
    should_stop: Callable[[], bool] | None,
) -> Iterator[FittedCells]:
    """The networks of one tile after the other, fitted or found in the folder."""
    for done, (tile, leaves) in enumerate(tiles.parts.items()):
        name = f"cells-{tile}.safetensors"
        if not work.has(name):

            def tell(share: float, done: int = done) -> None:
                whole = COARSE_SHARE + (1 - COARSE_SHARE) * (done + share) / len(tiles.parts)
                clock.report(whole, tile=done + 1, tiles=len(tiles.parts))

            tell(0.0)
            points, normals = _points_of(work.path(_points_file(tile)), device)
            found = refinement.fit(points, normals, leaves, piece=tile, on_progress=tell, should_stop=should_stop)
            with replacing(work.path(name)) as stream:
                stream.write(saved_cells(found))
        yield from loaded_cells(work.path(name), device)


def _points_file(tile: int) -> str:
    return f"points-{tile}.f32"


def _points_of(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    try:
        table = torch.from_numpy(np.fromfile(path, np.float32).reshape(-1, 6)).to(device)
    except (OSError, ValueError):  # no point of the whole cloud lies where one of the sketch did
        table = torch.empty((0, 6), device=device)
    return table[:, :3].contiguous(), table[:, 3:].contiguous()


def _joined(parts: list[PointCloud]) -> PointCloud:
    if not parts:
        raise CloudError("the cloud has no points")
    colors = [part.colors for part in parts if part.colors is not None]
    return PointCloud(
        points=np.concatenate([part.points for part in parts]),
        normals=np.concatenate([*map(normals_of, parts)]),
        colors=np.concatenate(colors) if len(colors) == len(parts) else None,
    )
