"""The command line: `sdfserver COMMAND ...`.

Exit 0 when it worked; 2 with one line on standard error for bad usage or bad input; 1 with one line otherwise; 130
when interrupted. Standard output stays free for results; progress bars go to standard error and only to a terminal.
Nothing heavy is imported before a command has checked what it was asked for, so that --help and mistakes are quick.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

import sdfserver
from sdfserver.config import PRESETS, MeshConfig
from sdfserver.errors import (
    CloudError,
    ConfigError,
    DeviceError,
    MissingDependencyError,
    OutputError,
    SdfServerError,
)

if TYPE_CHECKING:
    from sdfserver.cloud import PointCloud
    from sdfserver.reconstruct import Progress

USER_ERRORS = (CloudError, ConfigError, DeviceError, MissingDependencyError, OutputError)
"""What the user can mend: exit code 2."""
DEBUG = "SDFSERVER_DEBUG"
"""Set in the environment, it lets tracebacks and third-party warnings through."""
INTERRUPTED = 130

Preset = Literal["draft", "standard", "fine", "paper"]

app = typer.Typer(
    name="sdfserver",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments`, or the process's own; returns the exit code."""
    debug = bool(os.environ.get(DEBUG))
    with warnings.catch_warnings():
        if not debug:
            # Other packages' notes to developers are no use to a user, and break the rule of one line.
            warnings.simplefilter("ignore")
        try:
            code = app(
                args=None if arguments is None else list(arguments), prog_name="sdfserver", standalone_mode=False
            )
        except TyperException as error:
            return _fail(_usage(error), error.exit_code)
        except SdfServerError as error:
            if debug:
                raise
            return _fail(str(error), 2 if isinstance(error, USER_ERRORS) else 1)
        except Exception as error:  # the last line of defence: no traceback reaches a user
            if debug:
                raise
            return _fail(f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 for details)", 1)
    if code == INTERRUPTED:
        _say("interrupted")
    return int(code or 0)


def _fail(message: str, code: int) -> int:
    _say(f"error: {message}")
    return code


def _say(message: str) -> None:
    """One line on standard error, whatever is in `message`."""
    line = " ".join(message.split())
    sys.stderr.write(f"sdfserver: {line}\n")
    sys.stderr.flush()


def _usage(error: TyperException) -> str:
    """What is wrong with the command line, and where its help is."""
    message = error.format_message().replace("Value error, ", "").strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "sdfserver"
    return f"{message[:1].lower()}{message[1:]} (see {command} --help)"


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"sdfserver {sdfserver.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def sdfserver_command(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """From an oriented point cloud to its surface: a mesh and a signed distance field."""
    if context.invoked_subcommand is None:
        raise ConfigError("a command is missing (see sdfserver --help)")


@app.command()
def reconstruct(
    cloud: Annotated[
        Path,
        typer.Argument(
            metavar="CLOUD",
            show_default=False,
            help="The points: PLY, XYZ, PTS, CSV, NPZ, PCD, LAS, E57, OBJ and more.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="MESH",
            show_default=False,
            rich_help_panel="Results",
            help="Where the mesh goes: .ply, .obj, .stl, .glb or .off.",
        ),
    ],
    preset: Annotated[
        Preset,
        typer.Option(
            rich_help_panel="Fit", help="How much care to take; [bold]paper[/] is the published recipe, for comparison."
        ),
    ] = "standard",
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(rich_help_panel="Fit", help="Where to compute; auto takes a CUDA device if there is one."),
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel="Fit", help="The same seed on the same device gives the same mesh."
        ),
    ] = 0,
    normals: Annotated[
        Literal["file", "estimate"],
        typer.Option(rich_help_panel="Cloud", help="Take the normals from the file, or estimate them."),
    ] = "file",
    viewpoint: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y,Z",
            show_default=False,
            rich_help_panel="Cloud",
            help="Where the sensor stood: estimated normals point to its side.",
        ),
    ] = None,
    remove_outliers: Annotated[
        bool,
        typer.Option(
            "--remove-outliers",
            rich_help_panel="Cloud",
            help="Drop points that lie unusually far from the others.",
        ),
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default="the preset's",
            rich_help_panel="Mesh",
            help="Cells of the meshing grid along each side; more cells, finer mesh.",
        ),
    ] = None,
    level: Annotated[
        float,
        typer.Option(
            metavar="D",
            rich_help_panel="Mesh",
            help="Take the surface at this signed distance, in the cloud's units: above 0 is outside.",
        ),
    ] = 0.0,
    trim: Annotated[
        float | None,
        typer.Option(
            metavar="DISTANCE",
            show_default=False,
            rich_help_panel="Mesh",
            help="Cut away what is farther than this from every point, in the cloud's units: for open surfaces.",
        ),
    ] = None,
    min_component: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            show_default=False,
            rich_help_panel="Mesh",
            help="Drop separate parts with less than this share (0 to 1) of the largest one's area.",
        ),
    ] = None,
    faces: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            rich_help_panel="Mesh",
            help="Simplify the mesh to about this many faces.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            show_default=False,
            rich_help_panel="Results",
            help="Write settings, timings, losses and the quality of the mesh to this file.",
        ),
    ] = None,
    field: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            show_default=False,
            rich_help_panel="Results",
            help="Write the signed distance field itself to this file.",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel="Results", help="Print nothing but errors.")
    ] = False,
) -> None:
    """Reconstruct the surface of a point cloud and write it as a mesh.

    The points need normals that point outward, or --normals estimate.

    The mesh is closed unless --trim is given, and keeps the cloud's units and position.
    """
    if viewpoint is not None and normals != "estimate":
        raise ConfigError("--viewpoint has no effect without --normals estimate; add that or leave it out")
    sensor = None if viewpoint is None else _triple(viewpoint)
    if seed >= 2**63:
        raise ConfigError(f"seed is {seed}; it must be below 2^63")
    mesh_config = _mesh_config(
        PRESETS[preset].mesh,
        resolution=resolution,
        level_world=level,
        trim_distance_world=trim,
        min_component_share=min_component,
        target_faces=faces,
    )
    _check_paths(cloud, output, report=report, field=field)
    points, strays, outliers = _prepare(
        cloud, remove_outliers=remove_outliers, estimate=normals == "estimate", sensor=sensor
    )

    with _progress_bar(quiet=quiet) as on_progress:
        # Here, not above: torch takes seconds to load, and a mistake should not.
        from sdfserver.io import replacing, write_mesh
        from sdfserver.reconstruct import reconstruct as run

        result = run(points, preset=preset, mesh=mesh_config, device=device, seed=seed, on_progress=on_progress)
    write_mesh(result.mesh, output)
    if field is not None:
        result.field.save(field)
    result.report["cloud"]["outliers_removed"] = outliers
    result.report["cloud"]["strays_dropped"] += strays
    if report is not None:
        with replacing(report) as stream:
            stream.write(json.dumps(_plain(result.report), indent=2, allow_nan=False).encode() + b"\n")
    if not quiet:
        _say(_summary(output, result.report))


def _triple(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"viewpoint is {text!r}; it must be three numbers, like 0,-2.5,1.6") from None
    if not all(map(math.isfinite, (x, y, z))):
        raise ConfigError(f"viewpoint is {text!r}; it must be finite")
    return x, y, z


def _mesh_config(base: MeshConfig, **wanted: Any) -> MeshConfig:
    return replace(base, **{name: value for name, value in wanted.items() if value is not None})


def _check_paths(cloud: Path, output: Path, *, report: Path | None, field: Path | None) -> None:
    """Raise OutputError now rather than after the fit, if a result could not be written."""
    from sdfserver.io import check_writable

    check_writable(output)
    if report is not None:
        check_writable(report, ("json",))
    if field is not None:
        check_writable(field, ("safetensors",))
    seen = {os.path.realpath(cloud): "the cloud"}
    for path, name in ((output, "the mesh"), (report, "the report"), (field, "the field")):
        if path is None:
            continue
        earlier = seen.setdefault(os.path.realpath(path), name)
        if earlier != name:
            raise OutputError(f"{path} is {earlier} already; give {name} another name")


def _prepare(
    path: Path, *, remove_outliers: bool, estimate: bool, sensor: tuple[float, float, float] | None
) -> tuple["PointCloud", int, int]:
    """The cloud as it was asked for, and how many strays and outliers it lost on the way."""
    from sdfserver.io import read_cloud

    cloud, removed = read_cloud(path), 0
    if not (remove_outliers or estimate):
        return cloud, 0, 0
    import numpy as np

    from sdfserver import normals
    from sdfserver.cloud import drop_strays, validate

    cloud, strays = drop_strays(cloud)
    if remove_outliers:
        cloud, removed = normals.remove_outliers(validate(cloud, require_normals=False))
    if estimate:
        cloud = normals.estimate_normals(cloud, viewpoint=None if sensor is None else np.array(sensor))
    return cloud, strays, removed


@contextmanager
def _progress_bar(*, quiet: bool) -> Iterator[Callable[["Progress"], None] | None]:
    """A callback that draws a bar on standard error, or None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", table_column=Column(width=7)),
        BarColumn(bar_width=20, table_column=Column(width=20)),
        TaskProgressColumn(table_column=Column(width=4)),
        # What a narrow terminal has no room for is cut off here.
        TextColumn("{task.fields[details]}", style="dim", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("loading", total=1.0, details="")

        def show(progress: "Progress") -> None:
            bar.update(task, completed=progress.fraction, description=progress.stage, details=_details(progress))

        yield show


def _details(progress: "Progress") -> str:
    parts = []
    if progress.eta_s is not None:
        minutes, seconds = divmod(round(progress.eta_s), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    if progress.step is not None and progress.steps is not None:
        parts.append(f"step {progress.step}/{progress.steps}")
    parts += [f"{name} {value:.2g}" for name, value in progress.losses.items()]
    return "  ".join(parts)


def _plain(value: Any) -> Any:
    """`value` with null for what JSON cannot say: infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _summary(output: Path, report: dict[str, Any]) -> str:
    mesh, distance, cloud = report["mesh"], report["input_to_mesh"], report["cloud"]
    parts = f"{mesh['components']} parts, " if mesh["components"] != 1 else ""
    closed = f"watertight, genus {mesh['genus']}" if mesh["watertight"] else "open"
    lost = {"outliers removed": cloud["outliers_removed"], "far strays left out": cloud["strays_dropped"]}
    return "; ".join(
        [
            f"{output}: {mesh['vertices']:,} vertices, {mesh['faces']:,} faces, {parts}{closed}",
            f"the points lie {distance['mean']:.3g} from it on average, {distance['max']:.3g} at most",
            *(f"{count:,} {what}" for what, count in lost.items() if count),
            f"{report['seconds']['total']:.1f} s",
        ]
    )
