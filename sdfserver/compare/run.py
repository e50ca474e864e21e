"""Networks fitted to one cloud one after another, meshed and measured: plain figures, and what the page shows of them.

Everything in the unit frame unless the name says otherwise; lengths that are told are percent of the diagonal of the
cloud's box.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

import sdfserver
from sdfserver.cloud import Frame, PointCloud, drop_strays, validate
from sdfserver.compare.choices import Budget, Choice
from sdfserver.compare.networks import OCTAVES, NetworkField, network_named, value_and_gradient
from sdfserver.compare.trainer import Look, Trained, train
from sdfserver.config import PRESETS, FitConfig
from sdfserver.errors import ConfigError, ExtractionError
from sdfserver.extract import extract
from sdfserver.mesh import TriangleMesh, face_normals
from sdfserver.metrics import closest_on_mesh, compare_meshes, mesh_health, sample_surface
from sdfserver.preview import axis_up
from sdfserver.reconstruct import choose_device, to_world
from sdfserver.sampling import draw_samples, normals_of
from sdfserver.winding import spacing_of

SLICE_PX = 200
"""Width and height of a slice through the field."""
MEASURED = 20_000
"""Points of the cloud, and samples of a mesh, by which errors are measured."""
DISC_SPACINGS = 3
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for all networks."""

    budget: Budget = field(default_factory=lambda: Budget(steps=PRESETS["draft"].fit.steps))
    hidden: int = 96
    layers: int = 4
    omega: float = 30.0
    """Of SIREN."""
    octaves: int = OCTAVES
    """Of an encoding."""
    rates: tuple[float, ...] = (PRESETS["draft"].fit.learning_rate,)
    """Of Adam, at its height. Of several each network keeps the one with the least loss on held-out samples."""
    resolution: int = 128
    seed: int = 0
    fit: FitConfig = field(default_factory=lambda: PRESETS["draft"].fit)
    """Samples, terms, weights and schedule."""

    def __post_init__(self) -> None:
        if not 8 <= self.resolution <= 1024:
            raise ConfigError(f"resolution is {self.resolution}; it must be 8 to 1024")
        if not 1 <= self.octaves <= 16:
            raise ConfigError(f"octaves is {self.octaves}; it must be 1 to 16")
        if not self.rates:
            raise ConfigError("give at least one rate")
        for rate in self.rates:
            replace(self.fit, learning_rate=rate)
        network_named("siren", hidden=self.hidden, layers=self.layers, omega=self.omega)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Of a mesh, in percent of the diagonal of the cloud's box, and in degrees.

    to_mesh: mean distance from the points to the mesh. to_points: mean distance from the mesh to the points, each of
    which stands for a disc across its normal: false sheets raise it. error: half their sum. farthest: the largest
    distance from the mesh. normal_error: mean angle between a point's normal and its closest face's. The last three are
    to and from a reference, where there is one.
    """

    to_mesh: float
    to_points: float
    error: float
    farthest: float
    normal_error: float
    parts: int
    watertight: bool
    chamfer: float | None = None
    hausdorff: float | None = None
    normal_consistency: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What became of one network. `mesh` and `errors` are None where there is no surface, and `why` says so.

    steepness, phi: (SLICE_PX, SLICE_PX), |grad phi| and phi on a slice through the middle of the cloud.
    """

    choice: Choice
    parameters: int
    trained: Trained
    mesh: TriangleMesh | None
    why: str | None
    errors: Errors | None
    steepness: NDArray[np.float32]
    phi: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All results, best first, and what they are results of."""

    cloud: str
    points: int
    settings: Settings
    device: str
    axis: int
    """Across which the slices lie."""
    up: int
    """The axis that is up, 1 or 2."""
    results: tuple[Result, ...]

    def figures(self) -> dict[str, Any]:
        """As plain data."""
        settings = asdict(self.settings)
        return {
            "format": FORMAT,
            "version": sdfserver.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "cloud": {"name": self.cloud, "points": self.points},
            "settings": settings,
            "results": [_figures_of(result) for result in self.results],
        }


def _figures_of(result: Result) -> dict[str, Any]:
    return {
        "network": result.choice.written,
        "title": result.choice.title,
        "parameters": result.parameters,
        "why_no_surface": result.why,
        "errors": None if result.errors is None else asdict(result.errors),
        **asdict(result.trained),
    }


OnStep = Callable[[int, Choice, float, Look], None]
"""Told of the network's number, the network, the share of its fit, and how it does."""


def compare(
    cloud: PointCloud,
    choices: Sequence[Choice],
    settings: Settings,
    *,
    name: str,
    device: str = "auto",
    reference: TriangleMesh | None = None,
    on_step: OnStep | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Comparison:
    """Fits each network to the cloud, with the same samples and batches, and measures what comes out.

    Raises CloudError when the cloud cannot be reconstructed, DeviceError for the device.
    """
    torch_device = choose_device(device)
    cloud = validate(drop_strays(cloud)[0], device=str(torch_device))
    frame = Frame.around(cloud.points, margin=spacing_of(cloud.points, torch_device))
    unit = PointCloud(points=frame.to_unit(cloud.points), normals=cloud.normals)
    samples = draw_samples(unit, settings.fit.pool, np.random.default_rng(settings.seed), torch_device)
    samples = samples.to(torch_device)
    omega = settings.fit.omega_for(settings.omega, samples.spacing)
    extent = np.ptp(unit.points, axis=0)
    axis = int(np.argmin(extent))
    results = []
    for i, choice in enumerate(choices):
        best: tuple[torch.nn.Module, Trained] | None = None
        for k, rate in enumerate(settings.rates):
            network = network_named(
                choice.name,
                encoding=choice.encoding,
                hidden=settings.hidden,
                layers=settings.layers,
                omega=omega,
                octaves=settings.octaves,
                generator=torch.Generator().manual_seed(settings.seed),
            ).to(torch_device)

            def tell(share: float, look: Look, i: int = i, k: int = k, choice: Choice = choice) -> None:
                if on_step is not None:
                    on_step(i, choice, (k + share) / len(settings.rates), look)

            config = replace(settings.fit, learning_rate=rate)
            trained = train(network, samples, config, settings.budget, seed=settings.seed, on_look=tell)
            if best is None or _order(trained) < _order(best[1]):
                best = network, trained
        if best is None:  # Settings do not allow it
            raise ConfigError("give at least one rate")
        result = _measured(choice, *best, frame, cloud, axis, reference, settings.resolution)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return Comparison(
        cloud=name,
        points=len(cloud.points),
        settings=settings,
        device=torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "cpu",
        axis=axis,
        up=axis_up(cloud.points, normals_of(cloud)),
        results=tuple(sorted(results, key=_rank)),
    )


def _order(trained: Trained) -> float:
    loss = trained.looks[-1].loss
    return loss if np.isfinite(loss) else np.inf


def _rank(result: Result) -> tuple[bool, float]:
    """By the error against the reference if there is one, else by that of the points; those without surface last."""
    errors = result.errors
    if errors is None:
        return True, _order(result.trained)
    return False, errors.error if errors.chamfer is None else errors.chamfer


def _measured(
    choice: Choice,
    network: torch.nn.Module,
    trained: Trained,
    frame: Frame,
    cloud: PointCloud,
    axis: int,
    reference: TriangleMesh | None,
    resolution: int,
) -> Result:
    field_of, mesh, why, errors = NetworkField(network), None, None, None
    try:
        mesh = to_world(extract(field_of, resolution=resolution), frame)
        errors = _errors(mesh, cloud, reference)
    except ExtractionError as error:
        why = str(error)
    phi, steepness = _slice(network, axis, field_of.device)
    return Result(
        choice=choice,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        trained=trained,
        mesh=mesh,
        why=why,
        errors=errors,
        steepness=steepness,
        phi=phi,
    )


def _errors(mesh: TriangleMesh, cloud: PointCloud, reference: TriangleMesh | None) -> Errors:
    """Of a mesh in world units."""
    percent = 100 / float(np.linalg.norm(np.ptp(cloud.points, axis=0)))
    some = np.linspace(0, len(cloud.points) - 1, min(MEASURED, len(cloud.points))).round().astype(np.int64)
    closest = closest_on_mesh(cloud.points[some], mesh)
    beside = face_normals(mesh.vertices, mesh.faces)[closest.face]
    beside /= np.maximum(np.linalg.norm(beside, axis=1, keepdims=True), 1e-300)
    normals = normals_of(cloud)
    angles = np.degrees(np.arccos(np.clip((beside * normals[some]).sum(axis=1), -1, 1)))
    back = from_discs(sample_surface(mesh, MEASURED, np.random.default_rng(0))[0], cloud.points, normals)
    health = mesh_health(mesh)
    to_mesh, to_points = percent * float(closest.distance.mean()), percent * float(back.mean())
    errors = Errors(
        to_mesh=to_mesh,
        to_points=to_points,
        error=(to_mesh + to_points) / 2,
        farthest=percent * float(back.max()),
        normal_error=float(angles.mean()),
        parts=health.components,
        watertight=health.watertight,
    )
    if reference is None:
        return errors
    apart = compare_meshes(mesh, reference, samples=MEASURED)
    return replace(
        errors,
        chamfer=percent * apart.chamfer,
        hausdorff=percent * apart.hausdorff,
        normal_consistency=apart.normal_consistency,
    )


def from_discs(
    at: NDArray[np.float64], points: NDArray[np.float64], normals: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The distance (m,) of `at` (m, 3) from discs across the normals of points (n, 3), each from its nearest point's.

    The discs reach DISC_SPACINGS mean spacings: far enough to overlap, so that a mesh between points is at no distance.
    """
    _, nearest = cKDTree(points).query(at)
    offset = at - points[nearest]
    height = (offset * normals[nearest]).sum(axis=1)
    across = np.sqrt(np.maximum((offset**2).sum(axis=1) - height**2, 0))
    away: NDArray[np.float64] = np.hypot(height, np.maximum(across - DISC_SPACINGS * spacing_of(points), 0))
    return away


def _slice(
    network: torch.nn.Module, axis: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The field and the length of its gradient on the plane through the middle, across `axis`; rows go down."""
    ticks = torch.linspace(-1, 1, SLICE_PX)
    up, right = torch.meshgrid(-ticks, ticks, indexing="ij")
    at = torch.zeros(SLICE_PX**2, 3)
    first, second = (i for i in range(3) if i != axis)
    at[:, first], at[:, second] = right.flatten(), up.flatten()
    phi, gradient = value_and_gradient(network, at.to(device))
    steepness = torch.linalg.vector_norm(gradient, dim=1)
    a, b = (found.float().cpu().numpy().reshape(SLICE_PX, SLICE_PX) for found in (phi, steepness))
    return a, b


def table_text(comparison: Comparison) -> str:
    """A table of the results for a terminal."""
    settings = comparison.settings
    with_reference = any(r.errors is not None and r.errors.chamfer is not None for r in comparison.results)
    more = f"{'chamfer %':>11}" if with_reference else ""
    lines = [
        f"{comparison.cloud}: {settings.budget} each, {settings.layers} x {settings.hidden}; % is of its diagonal",
        f"{'network':16}{'error %':>9}{'far %':>9}{'normals':>10}{more}{'||g|-1|':>9}{'steps':>7}{'s':>8}{'CPU s':>8}",
    ]
    for result in comparison.results:
        trained, errors = result.trained, result.errors
        row = f"{result.choice.written:16}"
        if errors is None:
            row += f"{'no surface':>28}" + (" " * 11 if with_reference else "")
        else:
            row += f"{errors.error:9.4f}{errors.farthest:9.3f}{errors.normal_error:8.2f} °"
            row += "" if errors.chamfer is None else f"{errors.chamfer:11.4f}"
        lines.append(
            f"{row}{trained.health.eikonal:9.3f}{trained.steps:7d}{trained.seconds:8.1f}{trained.processor_seconds:8.1f}"
        )
    return "\n".join(lines)


def files_in(folder: Path) -> tuple[Path, Path, Path]:
    """Where the page, the picture and the figures go."""
    return folder / "index.html", folder / "compare.png", folder / "results.json"
