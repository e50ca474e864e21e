"""Cloud to field to mesh in one call, in world units."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

import sdfserver
from sdfserver.assumptions import Assumptions, Mending, measure, mended, warnings_of
from sdfserver.attributes import attributes_from, colors_of
from sdfserver.cloud import Frame, PointCloud, drop_strays, validate
from sdfserver.config import PRESETS, FitConfig, LocalConfig, MeshConfig, NetworkConfig, SurfaceKind, preset_named
from sdfserver.device import without_trace
from sdfserver.errors import DeviceError, DivergenceError, NoSurfaceError, SdfServerError
from sdfserver.extract import CappedField, ExtractedSurface, ScalarField, extract, leaves_the_cube
from sdfserver.field import SignedDistanceField
from sdfserver.fit import ANOTHER, Failure, FitJob, FitProgress, FitReport, fit_together
from sdfserver.mesh import (
    TriangleMesh,
    drop_small_components,
    drop_unsupported_components,
    face_areas,
    simplify,
    trim_to_points,
)
from sdfserver.metrics import closest_on_mesh, cloud_to_mesh, evenly, mesh_health
from sdfserver.offset import OffsetMesh, offset_mesh
from sdfserver.progress import Progress as Progress
from sdfserver.refine import RefineReport
from sdfserver.sampling import sketch_rows
from sdfserver.sharp import SharpReport, sharpen
from sdfserver.siren import Siren
from sdfserver.support import LEAST_PIECE, SUPPORTERS, SurfaceReport, as_asked, support_of
from sdfserver.tolerance import displacement, tolerance
from sdfserver.winding import spacing_of

REPORT_FORMAT = 1
STAGES = {"prepare": 0.05, "fit": 0.75, "mesh": 0.15, "measure": 0.05}
"""Stages in order, and the share of the whole that each stands for in the progress."""
MEASURED_POINTS, FAR_POINTS = 300_000, 20_000
"""Points of a larger cloud whose distance to the mesh is measured; fewer where it is an offset, and far from them."""
_CUT = (
    "cut_by_frame: the surface runs out of the box that is searched for it, a little larger than the cloud's, and is "
    "closed along the walls of that box; --surface open cuts away what is far from all points"
)
FIT_STAGES = ("prepare", "fit")
MESH_STAGES = ("mesh", "measure")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What comes out: the mesh, the field that it was taken from, and a report that is plain JSON."""

    mesh: TriangleMesh
    field: SignedDistanceField
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedField:
    """The field, the cloud as it was fitted (world units, strays dropped), and the report up to there."""

    field: SignedDistanceField
    cloud: PointCloud
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeshedField:
    """The mesh in world units, and the report on it."""

    mesh: TriangleMesh
    report: dict[str, Any]


class Clock:
    """Names the stage under way, times it, and reports progress over `stages`."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, stages: tuple[str, ...] = tuple(STAGES)) -> None:
        self.start = time.perf_counter()
        self.on_progress = on_progress
        self.stages = stages
        self.seconds: dict[str, float] = {}
        self.stage = ""

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """While this is open, `stage` is under way."""
        self.stage, start = stage, time.perf_counter()
        self.report(0.0)
        yield
        self.seconds[stage] = time.perf_counter() - start

    def report(self, share: float, **details: Any) -> None:
        """Report `share` of the stage under way as done."""
        if self.on_progress is None:
            return
        before = sum(STAGES[name] for name in self.stages[: self.stages.index(self.stage)])
        fraction = (before + STAGES[self.stage] * share) / sum(STAGES[name] for name in self.stages)
        elapsed = time.perf_counter() - self.start
        # The first stage says little about the others' speed.
        eta_s = elapsed * (1 - fraction) / fraction if fraction > STAGES["prepare"] else None
        self.on_progress(Progress(stage=self.stage, fraction=fraction, eta_s=eta_s, **details))

    def report_fit(self, progress: FitProgress) -> None:
        """Report a step of the fit."""
        self.report(progress.share, step=progress.step, steps=progress.steps, losses=progress.losses)


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names. Raises DeviceError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name!r} is not a device; use auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{name!r} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{name!r} is not supported; use auto, cpu or cuda")
    return device


def reconstruct(
    cloud: PointCloud,
    *,
    preset: str = "standard",
    network: NetworkConfig | None = None,
    fit_config: FitConfig | None = None,
    local: LocalConfig | None = None,
    mesh: MeshConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Reconstruction:
    """The surface of an oriented `cloud`, as a mesh and as a signed distance field, both in the cloud's own units.

    `preset` names the settings; `network`, `fit_config`, `local` and `mesh` replace those of the preset; with `network`
    or `fit_config` alone there is no second stage. The same seed on the same device gives the same mesh. `should_stop`
    is asked before every step of the fit and every batch of the extraction. `fit_field` and `mesh_field` are its two
    halves.

    Raises CloudError when the cloud cannot be reconstructed, ConfigError and DeviceError for settings, DivergenceError
    when the fit fails, ExtractionError when the field has no surface at the level asked for, Stopped when told to.
    """
    clock = Clock(on_progress)
    fitted = fit_field(
        cloud,
        preset=preset,
        network=network,
        fit_config=fit_config,
        local=local,
        device=device,
        seed=seed,
        clock=clock,
        should_stop=should_stop,
    )
    return reconstruction_of(fitted, mesh or PRESETS[preset].mesh, clock=clock, should_stop=should_stop)


def reconstruction_of(
    fitted: FittedField, mesh: MeshConfig, *, clock: Clock, should_stop: Callable[[], bool] | None
) -> Reconstruction:
    """What comes of a fitted field: its mesh is made, and the two halves of the report are joined."""
    meshed = mesh_field(fitted.field, fitted.cloud, mesh, clock=clock, should_stop=should_stop)
    return Reconstruction(mesh=meshed.mesh, field=fitted.field, report=join_reports(fitted.report, meshed.report))


def fit_field(
    cloud: PointCloud,
    *,
    preset: str = "standard",
    network: NetworkConfig | None = None,
    fit_config: FitConfig | None = None,
    local: LocalConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    clock: Clock | None = None,
    on_cloud: Callable[[PointCloud], None] | None = None,
    on_field: Callable[[FitProgress, SignedDistanceField], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FittedField:
    """The first half of `reconstruct`: the field, the cloud it was fitted to, and that half of the report.

    `on_cloud` gets the cloud as it will be fitted, `on_field` the field every few dozen steps, while it forms.
    """
    job = FieldJob(cloud=cloud, seed=seed, clock=clock, on_cloud=on_cloud, on_field=on_field, should_stop=should_stop)
    (found,) = fit_fields([job], preset=preset, network=network, fit_config=fit_config, local=local, device=device)
    if isinstance(found, Exception):
        raise found
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class FieldJob:
    """A cloud whose field is wanted, and who wants to know: as `fit_field`."""

    cloud: PointCloud
    seed: int = 0
    clock: Clock | None = None
    on_cloud: Callable[[PointCloud], None] | None = None
    on_field: Callable[[FitProgress, SignedDistanceField], None] | None = None
    should_stop: Callable[[], bool] | None = None


def fit_fields(
    jobs: Sequence[FieldJob],
    *,
    preset: str = "standard",
    network: NetworkConfig | None = None,
    fit_config: FitConfig | None = None,
    local: LocalConfig | None = None,
    device: str = "auto",
) -> list[FittedField | Failure]:
    """What `fit_field` gives or raises for each of several clouds, whose fits share the device.

    The result of each is that of its job alone, but for rounding. A GPU that one fit does not fill takes little longer
    for several.
    """
    settings = preset_named(preset)
    if network is None and fit_config is None and local is None:
        local = settings.local
    network, fit_config = network or settings.network, fit_config or settings.fit
    torch_device = choose_device(device)
    found: dict[int, FittedField | Failure] = {}
    ready: dict[int, _Prepared] = {}
    for i, job in enumerate(jobs):
        try:
            ready[i] = _prepared(job, torch_device)
        except SdfServerError as error:
            found[i] = error
        except (MemoryError, torch.OutOfMemoryError) as error:
            found[i] = without_trace(error)
    with ExitStack() as running:
        for prepared in ready.values():
            running.enter_context(prepared.clock.running("fit"))
        fits = fit_together(
            [prepared.fit_job() for prepared in ready.values()], network, fit_config, local=local, device=torch_device
        )
    for (i, prepared), fitted in zip(ready.items(), fits, strict=True):
        if isinstance(fitted, Exception):
            found[i] = _explained(fitted, prepared)
            continue
        field, fit_report = SignedDistanceField(fitted[0], prepared.frame), fitted[1]
        report = start_report(
            preset,
            seed=prepared.job.seed,
            device=torch_device,
            network=network,
            fit_config=fit_config,
            local=local,
        ) | {
            "cloud": {
                "points": len(prepared.job.cloud.points),
                "used": len(prepared.cloud.points),
                "strays_dropped": prepared.strays,
                "scale_to_unit": prepared.frame.scale,
            },
            "assumptions": asdict(prepared.assumptions),
            "warnings": prepared.warnings,
            "seconds": {**prepared.clock.seconds, "pool": fit_report.seconds_pool},
            "fit": fit_section(fit_report, prepared.frame),
        }
        if prepared.mending.flattened is not None:
            report["fit"]["noise"] = prepared.mending.flattened
        found[i] = FittedField(field=field, cloud=prepared.cloud, report=report)
    return [found[i] for i in range(len(jobs))]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """A job whose cloud is ready to be fitted."""

    job: FieldJob
    clock: Clock
    cloud: PointCloud
    strays: int
    assumptions: Assumptions
    mending: Mending
    frame: Frame

    @property
    def warnings(self) -> list[str]:
        """Which assumptions the cloud fails, in words."""
        return warnings_of(self.assumptions, self.mending)

    def fit_job(self) -> FitJob:
        """What is asked of the fit."""
        on_field = self.job.on_field

        def on_network(progress: FitProgress, network: Siren) -> None:
            if on_field is not None:
                on_field(progress, SignedDistanceField(network, self.frame))

        return FitJob(
            cloud_unit=PointCloud(points=self.frame.to_unit(self.cloud.points), normals=self.cloud.normals),
            seed=self.job.seed,
            on_progress=self.clock.report_fit,
            on_network=None if on_field is None else on_network,
            should_stop=self.job.should_stop,
        )


def _prepared(job: FieldJob, device: torch.device) -> _Prepared:
    clock = job.clock or Clock(None, FIT_STAGES)
    with clock.running("prepare"):
        cloud, strays = drop_strays(job.cloud)  # first: one far stray makes the rest look like a single place
        cloud = validate(cloud, device=str(device))
        assumptions = measure(cloud, device=str(device))
        cloud, mending = mended(cloud, assumptions, device=str(device))
        sketch = cloud.points[sketch_rows(len(cloud.points), np.random.default_rng(job.seed))]
        frame = Frame.around(cloud.points, margin=spacing_of(sketch, device))
        if job.on_cloud is not None:
            job.on_cloud(cloud)
    return _Prepared(
        job=job, clock=clock, cloud=cloud, strays=strays, assumptions=assumptions, mending=mending, frame=frame
    )


def _explained(error: Failure, prepared: _Prepared) -> Failure:
    """The error, and beside one of a fit that came to nothing what is known to be wrong with the cloud."""
    if not isinstance(error, DivergenceError) or not prepared.warnings:
        return error
    return DivergenceError("; ".join([str(error).removesuffix(f"; {ANOTHER}"), *prepared.warnings]))


def mesh_field(
    field: SignedDistanceField,
    cloud: PointCloud,
    config: MeshConfig,
    *,
    clock: Clock | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> MeshedField:
    """The second half of `reconstruct`: the mesh of `field`, measured against the `cloud` it was fitted to."""
    clock = clock or Clock(None, MESH_STAGES)
    resolution, device = config.resolution_for(field.detail), str(field.device)
    # An offset takes about three times as long again.
    own, taken = (0.25, 0.75) if config.is_offset else (1.0, 0.0)
    settings: dict[str, Any] = {
        "resolution": resolution,
        "projection_steps": config.projection_steps,
        "on_progress": lambda share: clock.report(own * share),
        "should_stop": should_stop,
    }
    source: ScalarField = field
    found: OffsetMesh | None = None
    creases: SharpReport | None = None
    with clock.running("mesh"):
        try:
            surface = extract(field, **settings)
            shaped = _shaped(surface, field, cloud, config)
            cut = shaped.runs_out(field.frame, resolution)
            if cut:
                source = CappedField(field, resolution=resolution, level=0.0)
                surface = extract(source, **settings | {"on_progress": None})  # progress never falls
                shaped = _shaped(surface, field, cloud, config)
        except NoSurfaceError as error:
            raise error.scaled(1 / field.frame.scale) from None
        base = shaped.mesh
        if config.is_offset:
            # What no point supports would otherwise grow into what some do.
            base = drop_small_components(base, config.min_component_share)
            found = offset_mesh(
                field,
                base,
                config,
                capped=source,
                resolution=resolution,
                finish=lambda mesh, asked: finish_mesh(mesh, cloud, asked),
                on_progress=lambda share: clock.report(own + taken * share),
                should_stop=should_stop,
            )
            shaped = _opened(attributes_from(base, found.mesh), cloud, config, config.surface_asked, device)
            triangles = shaped.mesh
        elif config.sharp:
            sharpened, creases = sharpen(base, cloud, device=device)
            triangles = finish_mesh(attributes_from(base, sharpened), cloud, config)
        else:
            triangles = finish_mesh(base, cloud, config)
        triangles = replace(triangles, colors=colors_of(triangles, cloud, device=device))
    with clock.running("measure"):
        limit = FAR_POINTS if config.level_world else MEASURED_POINTS
        rows = evenly(len(cloud.points), limit)
        closest = closest_on_mesh(cloud.points[rows], triangles, device=field.device)
        accuracy = asdict(cloud_to_mesh(cloud, triangles, max_points=limit, closest=closest, device=field.device))
        health = asdict(mesh_health(triangles, device=field.device))
        sure = None
        if health["watertight"] and cloud.normals is not None:
            if found is not None:
                closest = closest_on_mesh(cloud.points[rows], base, device=field.device)
            off = displacement(cloud, rows, closest, triangles if found is None else base, device=device)
            sure = tolerance(triangles, off if found is None else replace(off, length=off.length + found.error))
    report = {
        "config": {"mesh": asdict(config)},
        "seconds": {stage: clock.seconds[stage] for stage in MESH_STAGES},
        "input_to_mesh": accuracy,
        "mesh": {
            **health,
            "area_tolerance": None if sure is None else sure.area,
            "volume_tolerance": None if sure is None else sure.volume,
            "resolution": resolution,
            "field_evaluations": surface.evaluations + (0 if found is None else found.evaluations),
            "gradient_evaluations": surface.gradient_evaluations + (0 if found is None else found.gradient_evaluations),
            "cut_by_frame": cut,
            "offset": None if found is None else found.about,
            "sharp": None if creases is None else asdict(creases),
        },
        "surface": asdict(shaped.report) | {"confidence": _mean_confidence(triangles)},
        "warnings": [
            *([_CUT] if cut else []),
            *([] if found is None else found.warnings),
            *([] if creases is None else creases.warnings()),
        ],
    }
    return MeshedField(mesh=triangles, report=report)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shaped:
    """An extracted surface in world units, without what no points support, and what was decided about that."""

    mesh: TriangleMesh
    report: SurfaceReport

    def runs_out(self, frame: Frame, resolution: int) -> bool:
        """Whether it runs out of the cube. Most of what does is a sheet without points, and is gone by now."""
        return leaves_the_cube(frame.to_unit(self.mesh.vertices), self.mesh.faces, resolution)


def _shaped(surface: ExtractedSurface, field: SignedDistanceField, cloud: PointCloud, config: MeshConfig) -> _Shaped:
    """What is to be made of a surface of phi = 0: closed, if an offset of it is wanted."""
    device, mesh = str(field.device), to_world(surface, field.frame)
    if config.drop_unsupported:
        mesh = drop_unsupported_components(mesh, cloud.points, device=device)
    support = support_of(mesh, cloud, device=device)
    mesh = replace(mesh, confidence=support.astype(np.float32))
    return _opened(mesh, cloud, config, "closed" if config.is_offset else config.surface_asked, device)


def _opened(mesh: TriangleMesh, cloud: PointCloud, config: MeshConfig, asked: SurfaceKind, device: str) -> _Shaped:
    mesh, report = as_asked(mesh, cloud, asked)
    if report.cut and config.drop_unsupported:
        fewest = max(SUPPORTERS, round(LEAST_PIECE * len(cloud.points)))
        mesh = drop_unsupported_components(mesh, cloud.points, min_points=fewest, device=device)
    return _Shaped(mesh=mesh, report=report)


def _mean_confidence(mesh: TriangleMesh) -> float | None:
    """The mean over the area; None for a mesh without confidence."""
    if mesh.confidence is None:
        return None
    areas = face_areas(mesh.vertices, mesh.faces)
    return float(np.average(mesh.confidence[mesh.faces].mean(axis=1), weights=areas))


def start_report(
    preset: str,
    *,
    seed: int,
    device: torch.device,
    network: NetworkConfig,
    fit_config: FitConfig,
    local: LocalConfig | None,
) -> dict[str, Any]:
    """What a report begins with: what was asked for, and where it was computed."""
    return {
        "format": REPORT_FORMAT,
        "preset": preset,
        "seed": seed,
        "device": str(device) + (f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else ""),
        "versions": _versions(),
        "config": {
            "network": asdict(network),
            "fit": asdict(fit_config),
            "local": None if local is None else asdict(local),
        },
    }


def join_reports(fit_report: dict[str, Any], mesh_report: dict[str, Any]) -> dict[str, Any]:
    """One report of a reconstruction from those of its two halves; seconds.total is the sum over the stages."""
    seconds = fit_report["seconds"] | mesh_report["seconds"]
    return {
        **fit_report,
        **mesh_report,
        "config": fit_report["config"] | mesh_report["config"],
        "warnings": [*fit_report.get("warnings", []), *mesh_report["warnings"]],
        "seconds": {**seconds, "total": sum(seconds[stage] for stage in STAGES)},
    }


def report_json(report: dict[str, Any]) -> bytes:
    """The report as JSON, with null for what JSON cannot say: infinities and NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return json.dumps(plain(report), indent=2, allow_nan=False).encode() + b"\n"


def to_world(surface: ExtractedSurface, frame: Frame) -> TriangleMesh:
    """The extracted surface in world units."""
    return TriangleMesh(vertices=frame.to_world(surface.vertices_unit), faces=surface.faces, normals=surface.normals)


def finish_mesh(mesh: TriangleMesh, cloud: PointCloud, config: MeshConfig) -> TriangleMesh:
    """What `config` asks for when it has been decided where the surface ends: trimming, dropped parts, fewer faces."""
    if config.trim_distance_world is not None:
        mesh = trim_to_points(mesh, cloud.points, config.trim_distance_world)
    mesh = drop_small_components(mesh, config.min_component_share)
    return mesh if config.target_faces is None else attributes_from(mesh, simplify(mesh, config.target_faces))


def fit_section(report: FitReport, frame: Frame) -> dict[str, Any]:
    """What a report says of the fit, in world units."""
    return {
        "steps": report.steps,
        "warm_start_steps": report.warm_start_steps,
        "restarts": list(report.restarts),
        "low_precision_steps": report.low_precision_steps,
        "losses": report.losses,
        "trusted_share": report.trusted_share,
        "noise": report.noise / frame.scale,
        "omega": report.omega,
        "local": None if report.local is None else local_section(report.local, frame),
        "held_out": {
            "surface_distance": report.health.surface / frame.scale,
            "wrong_signs": report.health.wrong_signs,
            "eikonal": report.health.eikonal,
        },
    }


def local_section(report: RefineReport, frame: Frame) -> dict[str, Any]:
    """What a report says of the second stage, in world units."""
    return {
        "cells_tried": report.tried,
        "cells_kept": report.kept,
        "cell_steps": report.cell_steps,
        "cells_per_side": list(report.sides),
        "held_out": {"coarse": report.before / frame.scale, "local": report.after / frame.scale},
        "seconds": report.seconds,
    }


def _versions() -> dict[str, str]:
    found = {"sdfserver": sdfserver.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "scipy", "scikit-image"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on a path, without metadata
            found[name] = "unknown"
    return found
