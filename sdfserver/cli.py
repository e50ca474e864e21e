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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from typer.exceptions import TyperException

import sdfserver
from sdfserver.config import PRESETS, MeshConfig, NetworkConfig, SurfaceKind, preset_named
from sdfserver.errors import (
    DEBUG,
    CloudError,
    ConfigError,
    DeviceError,
    FieldFormatError,
    MissingDependencyError,
    OutputError,
    SdfServerError,
    ServiceError,
)
from sdfserver.field_commands import add_field_commands
from sdfserver.server.commands import add_commands
from sdfserver.terminal import say

if TYPE_CHECKING:
    from sdfserver import schemas
    from sdfserver.client import Job
    from sdfserver.cloud import PointCloud
    from sdfserver.progress import Progress

USER_ERRORS = (CloudError, ConfigError, DeviceError, FieldFormatError, MissingDependencyError, OutputError)
"""What the user can mend: exit code 2."""
USER_STATUSES = (400, 401, 403, 413, 415, 422)
"""A server's way to say the same: in its refusal, or as the reason why a job failed."""
API_KEY = "SDFSERVER_API_KEY"
"""The key is read from this variable or from a file: the arguments of a process are for all to see."""
INTERRUPTED = 130

Preset = Literal["draft", "standard", "fine", "paper"]

# What the commands share

CloudArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CLOUD",
        show_default=False,
        help="The points: PLY, XYZ, PTS, CSV, NPZ, PCD, LAS, E57, OBJ and more.",
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="MESH",
        show_default=False,
        rich_help_panel="Results",
        help="Where the mesh goes: .ply, .obj, .stl, .glb or .off.",
    ),
]
PresetOption = Annotated[
    Preset,
    typer.Option(
        rich_help_panel="Fit", help="How much care to take; [bold]paper[/] is the published recipe, for comparison."
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(rich_help_panel="Fit", help="Where to compute; auto takes a CUDA device if there is one."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, rich_help_panel="Fit", help="The same seed on the same device gives the same mesh."
    ),
]
NormalsOption = Annotated[
    Literal["file", "estimate"],
    typer.Option(rich_help_panel="Cloud", help="Take the normals from the file, or estimate them."),
]
ViewpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="X,Y,Z",
        show_default=False,
        rich_help_panel="Cloud",
        help="Where the sensor stood: estimated normals point to its side.",
    ),
]
OutliersOption = Annotated[
    bool,
    typer.Option(
        "--remove-outliers",
        rich_help_panel="Cloud",
        help="Drop points that lie unusually far from the others.",
    ),
]


def _resolution(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor auto") from None


ResolutionOption = Annotated[
    Any,
    typer.Option(
        metavar="N|auto",
        parser=_resolution,
        show_default="the preset's",
        rich_help_panel="Mesh",
        help="Cells of the meshing grid along each side; more cells, finer mesh. auto follows the detail of the field.",
    ),
]
LevelOption = Annotated[
    float,
    typer.Option(
        metavar="D",
        rich_help_panel="Mesh",
        help="Take the surface at this signed distance, in the cloud's units: above 0 is outside.",
    ),
]
SurfaceOption = Annotated[
    SurfaceKind,
    typer.Option(
        rich_help_panel="Mesh",
        help="Leave the mesh open where no points support it, or closed; auto opens it where the scan is an open one.",
    ),
]
ShellOption = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        show_default=False,
        rich_help_panel="Mesh",
        help="Make a closed wall, from that surface T inward, in the cloud's units: hollow, for 3D printing.",
    ),
]
TrimOption = Annotated[
    float | None,
    typer.Option(
        metavar="DISTANCE",
        show_default=False,
        rich_help_panel="Mesh",
        help="Cut away what is farther than this from every point, in the cloud's units, wherever that is.",
    ),
]
ComponentOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        show_default=False,
        rich_help_panel="Mesh",
        help="Drop separate parts with less than this share (0 to 1) of the largest one's area.",
    ),
]
FacesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        show_default=False,
        rich_help_panel="Mesh",
        help="Simplify the mesh to about this many faces.",
    ),
]
SharpOption = Annotated[
    bool,
    typer.Option(
        "--sharp",
        rich_help_panel="Mesh",
        help="Keep the creases of the cloud sharp, along edges of the mesh: for machined parts.",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        show_default=False,
        rich_help_panel="Results",
        help="Write settings, timings, losses and the quality of the mesh to this file.",
    ),
]
FieldOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.safetensors",
        show_default=False,
        rich_help_panel="Results",
        help="Write the signed distance field itself to this file.",
    ),
]
WorkDirOption = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        metavar="DIR",
        show_default=False,
        rich_help_panel="Fit",
        help="For clouds larger than memory: fit tile by tile in this folder, and go on there after a break.",
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel="Results", help="Print nothing but errors.")
]

app = typer.Typer(
    name="sdfserver",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

add_commands(app)
add_field_commands(app)


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
            return _fail(str(error), _exit_code(error))
        except Exception as error:  # the last line of defence: no traceback reaches a user
            if debug:
                raise
            return _fail(f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 for details)", 1)
    if code == INTERRUPTED:
        say("interrupted")
    return int(code or 0)


def _exit_code(error: SdfServerError) -> int:
    if isinstance(error, ServiceError):
        return 2 if error.problem is not None and error.problem.status in USER_STATUSES else 1
    return 2 if isinstance(error, USER_ERRORS) else 1


def _fail(message: str, code: int) -> int:
    say(f"error: {message}")
    return code


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
    cloud: CloudArgument,
    output: OutputOption,
    preset: PresetOption = "standard",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    normals: NormalsOption = "file",
    viewpoint: ViewpointOption = None,
    remove_outliers: OutliersOption = False,
    resolution: ResolutionOption = None,
    level: LevelOption = 0.0,
    shell: ShellOption = None,
    surface: SurfaceOption = "auto",
    trim: TrimOption = None,
    min_component: ComponentOption = None,
    faces: FacesOption = None,
    sharp: SharpOption = False,
    report: ReportOption = None,
    field: FieldOption = None,
    work_dir: WorkDirOption = None,
    quiet: QuietOption = False,
) -> None:
    """Reconstruct the surface of a point cloud and write it as a mesh.

    The points need normals that point outward, or --normals estimate.

    The mesh is closed unless the scan is an open one (see --surface), and keeps the cloud's units and position.
    """
    sensor = _sensor(viewpoint, normals)
    _check_seed(seed)
    mesh_config = _mesh_config(
        PRESETS[preset].mesh,
        resolution=resolution,
        level_world=level,
        shell_world=shell,
        surface=surface,
        trim_distance_world=trim,
        min_component_share=min_component,
        target_faces=faces,
        sharp=sharp,
    )
    _check_paths(cloud, output, report=report, field=field)
    if work_dir is not None and (remove_outliers or normals == "estimate"):
        raise ConfigError(
            "with --work-dir the cloud is never in memory as a whole: clean it first, and give it normals"
        )
    estimate = normals == "estimate"
    points, strays, outliers = None, 0, 0
    if work_dir is None:
        points, strays, outliers = _prepare(cloud, remove_outliers=remove_outliers, estimate=estimate, sensor=sensor)

    with progress_bar(quiet=quiet) as show:
        # Here, not above: torch takes seconds to load, and a mistake should not.
        from sdfserver.io import write_mesh
        from sdfserver.reconstruct import reconstruct as run
        from sdfserver.reconstruct import report_json

        on_progress = None if show is None else partial(_show_progress, show)
        settings: dict[str, Any] = {"preset": preset, "mesh": mesh_config, "device": device, "seed": seed}
        if work_dir is not None:
            from sdfserver.tiles import reconstruct_tiles

            result = reconstruct_tiles(cloud, work_dir, on_progress=on_progress, **settings)
        elif points is not None:
            result = run(points, on_progress=on_progress, **settings)
    write_mesh(result.mesh, output)
    if field is not None:
        result.field.save(field)
    result.report["cloud"]["outliers_removed"] = outliers
    result.report["cloud"]["strays_dropped"] += strays
    if report is not None:
        _write_report(report_json(result.report), report)
    if not quiet:
        _say_result(output, result.report)


@app.command()
def submit(
    cloud: CloudArgument,
    output: OutputOption,
    preset: PresetOption = "standard",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    normals: NormalsOption = "file",
    viewpoint: ViewpointOption = None,
    remove_outliers: OutliersOption = False,
    resolution: ResolutionOption = None,
    level: LevelOption = 0.0,
    shell: ShellOption = None,
    surface: SurfaceOption = "auto",
    trim: TrimOption = None,
    min_component: ComponentOption = None,
    faces: FacesOption = None,
    sharp: SharpOption = False,
    report: ReportOption = None,
    field: FieldOption = None,
    url: Annotated[
        str,
        typer.Option(metavar="URL", envvar="SDFSERVER_URL", rich_help_panel="Server", help="Where the server is."),
    ] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            rich_help_panel="Server",
            help=f"A file that holds the server's API key; else it is taken from {API_KEY} in the environment.",
        ),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=-10,
            max=10,
            rich_help_panel="Server",
            help="Larger runs first, -10 to 10; equals run in order of arrival.",
        ),
    ] = 0,
    quiet: QuietOption = False,
) -> None:
    """Have a server reconstruct the surface of a point cloud, and write it as a mesh.

    The same as reconstruct, on another machine: uploads the cloud, follows the job and downloads what it made.

    Interrupted with Ctrl-C, it cancels the job.
    """
    sensor = _sensor(viewpoint, normals)
    _check_seed(seed)
    api_key = _api_key(api_key_file)
    _check_paths(cloud, output, report=report, field=field)
    wanted: dict[str, Any] = {
        "device": device,
        "seed": seed,
        "normals": normals,
        "viewpoint": sensor,
        "remove_outliers": remove_outliers,
        "resolution": None if resolution == "auto" else resolution,
        "level": level,
        "shell": shell,
        "surface": surface,
        "trim": trim,
        "min_component": min_component,
        "faces": faces,
        "sharp": sharp,
        "priority": priority,
    }
    from sdfserver.client import Client

    with progress_bar(quiet=quiet) as show:
        on_retry = None if show is None else partial(_show_retry, show)
        with Client(url, api_key=api_key, on_retry=on_retry) as client:
            job = client.submit(
                cloud,
                preset=preset,
                on_upload=None if show is None else partial(_show_upload, show),
                **{name: value for name, value in wanted.items() if value is not None},
            )
            try:
                job.wait(None if show is None else partial(_show_job, show))
            except KeyboardInterrupt:
                _cancel(job)
                raise
            if show is not None:
                show("download", 1.0)
            result = job.report()
            job.download(output)
            if field is not None:
                job.download_field(field)
    if report is not None:
        _write_report(json.dumps(result, indent=2).encode() + b"\n", report)
    if not quiet:
        _say_result(output, result)


@app.command(rich_help_panel="Service")
def demo(
    cloud: Annotated[
        Path | None,
        typer.Argument(metavar="[CLOUD]", show_default="a bundled knot", help="The cloud to post."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MESH", help="Where the mesh goes.")] = Path(
        "demo.ply"
    ),
    preset: PresetOption = "draft",
    quiet: QuietOption = False,
) -> None:
    """Show the service at work: start a server, post a cloud, follow its job, download the mesh, and stop."""
    from sdfserver.samples import sample
    from sdfserver.server.demo import run_demo

    posted = sample("knot") if cloud is None else cloud
    _check_paths(posted, output, report=None, field=None)
    with progress_bar(quiet=quiet) as show:
        report = run_demo(
            posted,
            output,
            preset,
            say=lambda message: None if quiet else say(message),
            on_progress=None if show is None else partial(_show_job, show),
        )
    if not quiet:
        say(_summary(output, report))


@app.command()
def bench(
    clouds: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CLOUD", show_default="a bundled knot", help="Clouds to measure with."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(PRESETS),
            show_default="draft and standard",
            help="May be repeated. After another, [bold]paper[/] gets the seconds of that one's fit.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MESH", show_default=False, help="The true surface of the cloud, to measure errors by."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            show_default=False,
            help="Another program to run in turn, with {cloud} and {mesh} in its arguments. May be repeated.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="How often to run the programs in turn.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE.json", show_default=False, help="Also write all figures to this file."),
    ] = None,
) -> None:
    """Measure the stages of a reconstruction on this machine, each beside the least time that its arithmetic takes.

    That floor follows from the machine's own rate of matrix products, which is measured first.
    """
    from sdfserver.files import check_writable
    from sdfserver.samples import sample

    _check_seed(seed)
    others = dict(_named_command(text) for text in beside or [])
    for name in preset or []:
        preset_named(name)
    if reference is not None and len(clouds or []) > 1:
        raise ConfigError("--reference is the surface of one cloud; give one cloud with it")
    if output is not None:
        check_writable(output, ("json",))
    from sdfserver.bench import bench as run

    figures = run(
        clouds or [sample("knot")],
        preset or ["draft", "standard"],
        beside=others,
        reference=reference,
        runs=runs,
        seed=seed,
        device=device,
        say=typer.echo,
    )
    if output is not None:
        _write_report(json.dumps(figures, indent=1).encode() + b"\n", output)


@app.command()
def compare(
    cloud: CloudArgument,
    networks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            show_default="all of them",
            help="Which: siren, snake, sine, relu, leaky, tanh, softplus, swish, elu, selu, gelu; with +pe behind it a "
            "positional encoding goes before it, with +rotated one of rotated coordinates.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="1000", help="Give each network so many steps."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", show_default=False, help="Give each network as many steps as it takes in S seconds."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            show_default="that of the draft preset",
            help="Adam's rates to try: each network keeps the one with the least loss on samples held out of its fit.",
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(metavar="N", help="Units of a layer.")] = 96,
    layers: Annotated[int, typer.Option(metavar="N", help="Hidden layers.")] = 4,
    octaves: Annotated[int, typer.Option(metavar="N", help="Frequencies of the encodings, each twice the last.")] = 2,
    resolution: Annotated[int, typer.Option(metavar="N", help="Cells of the meshing grid along each side.")] = 128,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MESH", show_default=False, help="The true surface of the cloud, to measure errors by."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where index.html, compare.png and results.json go."),
    ] = Path("compare"),
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Fit the networks of the literature to one cloud in the same way, and show them side by side on one page.

    All get the same samples, losses and weights, those of the draft preset, and the same steps, or the same seconds.

    SIREN is the network of reconstruct, but stepped by automatic differentiation like the others.
    """
    from sdfserver.compare.choices import DEFAULT, Budget, Choice, choices_named
    from sdfserver.files import open_cloud

    _check_seed(seed)
    choices = choices_named(networks or DEFAULT)
    default_steps = PRESETS["draft"].fit.steps
    budget = Budget(steps=default_steps if steps is None and seconds is None else steps, seconds=seconds)
    tried = (PRESETS["draft"].fit.learning_rate,) if rates is None else _numbers(rates, "--rates")
    NetworkConfig(hidden=hidden, layers=layers)
    MeshConfig(resolution=resolution)
    open_cloud(cloud).close()
    _check_page_folder(out)
    with progress_bar(quiet=quiet) as show:
        # Here, not above: torch takes seconds to load.
        from sdfserver.bench import reference_mesh
        from sdfserver.compare.page import write_page
        from sdfserver.compare.run import Settings, table_text
        from sdfserver.compare.run import compare as run
        from sdfserver.compare.trainer import Look
        from sdfserver.io import read_cloud

        settings = Settings(
            budget=budget, hidden=hidden, layers=layers, octaves=octaves, resolution=resolution, seed=seed, rates=tried
        )
        truth = None if reference is None else reference_mesh(reference)

        def tell(i: int, choice: Choice, share: float, look: Look) -> None:
            if show is not None:
                details = f"{choice.written}  {i + 1}/{len(choices)}  step {look.step}  loss {look.loss:.3g}"
                show("fit", (i + share) / len(choices), details)

        found = run(read_cloud(cloud), choices, settings, name=cloud.stem, device=device, reference=truth, on_step=tell)
        out.mkdir(exist_ok=True)
        write_page(found, out)
    if not quiet:
        typer.echo(table_text(found))
        say(f"{out}: index.html, compare.png, results.json")


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; it must be numbers with commas between") from None


def _check_page_folder(path: Path) -> None:
    """The folder for a page. Raises OutputError now rather than after the fits, if it could not be written to."""
    from sdfserver.files import check_writable

    if path.is_dir():
        for name, kind in (("index.html", "html"), ("compare.png", "png"), ("results.json", "json")):
            check_writable(path / name, (kind,))
    elif path.exists():
        raise OutputError(f"{path} is a file; give a folder")
    else:
        check_writable(path.with_name(f"{path.name}.html"), ("html",))


def _named_command(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not (name and equals and "{cloud}" in command and "{mesh}" in command):
        raise ConfigError(f"--beside is {text!r}; it must be NAME=COMMAND, with {{cloud}} and {{mesh}} in the command")
    return name, command


def _cancel(job: "Job") -> None:
    try:
        job.cancel()
    except ServiceError as error:
        say(f"job {job.id} could not be cancelled and goes on: {error}")


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(API_KEY, "").strip() or None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the API key's file {path} cannot be read: {error}") from None


def _sensor(viewpoint: str | None, normals: str) -> tuple[float, float, float] | None:
    if viewpoint is None:
        return None
    if normals != "estimate":
        raise ConfigError("--viewpoint has no effect without --normals estimate; add that or leave it out")
    return _triple(viewpoint)


def _check_seed(seed: int) -> None:
    if seed >= 2**63:
        raise ConfigError(f"seed is {seed}; it must be below 2^63")


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
    from sdfserver.files import check_writable

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

    cloud = read_cloud(path)
    if not (remove_outliers or estimate):
        return cloud, 0, 0
    import numpy as np

    from sdfserver.normals import prepare

    viewpoint = None if sensor is None else np.array(sensor)
    return prepare(cloud, remove_strays_and_outliers=remove_outliers, estimate=estimate, viewpoint=viewpoint)


class Show(Protocol):
    """Draws a bar: what is going on, how much of it is done (0 to 1), and what else there is to say."""

    def __call__(self, stage: str, fraction: float, details: str = "") -> None: ...  # noqa: D102


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Show | None]:
    """Draws a bar on standard error; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(width=8)),
        BarColumn(bar_width=20, table_column=Column(width=20)),
        TaskProgressColumn(table_column=Column(width=4)),
        # What a narrow terminal has no room for is cut off here.
        TextColumn("{task.fields[details]}", style="dim", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("loading", total=1.0, details="")

        def show(stage: str, fraction: float, details: str = "") -> None:
            bar.update(task, completed=fraction, description=stage, details=details)

        yield show


def _show_progress(show: Show, progress: "Progress") -> None:
    tile = "" if progress.tile is None else f"tile {progress.tile}/{progress.tiles}  "
    show(progress.stage, progress.fraction, tile + _details(progress))


def _show_job(show: Show, job: "schemas.Job") -> None:
    queued = None if job.queue_position is None else f"place {job.queue_position} in the queue"
    show(job.stage or job.state, job.progress, queued or _details(job))


def _show_upload(show: Show, sent: int, total: int) -> None:
    show("upload", sent / max(total, 1), f"{sent / 1e6:.1f} of {total / 1e6:.1f} MB")


def _show_retry(show: Show, message: str) -> None:
    show("waiting", 0.0, message)


def _details(progress: "Progress | schemas.Job") -> str:
    parts = []
    if progress.eta_s is not None:
        minutes, seconds = divmod(round(progress.eta_s), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    if progress.step is not None and progress.steps is not None:
        parts.append(f"step {progress.step}/{progress.steps}")
    parts += [f"{name} {value:.2g}" for name, value in progress.losses.items()]
    return "  ".join(parts)


def _write_report(text: bytes, path: Path) -> None:
    from sdfserver.files import replacing

    with replacing(path) as stream:
        stream.write(text)


def _say_result(output: Path, report: dict[str, Any]) -> None:
    say(_summary(output, report))
    for warning in report.get("warnings", ()):  # a server of an earlier version has none
        say(f"warning: {warning}")


def _summary(output: Path, report: dict[str, Any]) -> str:
    mesh, distance, cloud = report["mesh"], report["input_to_mesh"], report["cloud"]
    surface = report.get("surface", {})  # a server of an earlier version does not say
    parts = f"{mesh['components']} parts, " if mesh["components"] != 1 else ""
    closed = f"watertight, genus {mesh['genus']}" if mesh["watertight"] else "open"
    hollow = mesh["watertight"] and mesh["volume"] < 0
    lost = {"outliers removed": cloud["outliers_removed"], "far strays left out": cloud["strays_dropped"]}
    return "; ".join(
        [
            f"{output}: {mesh['vertices']:,} vertices, {mesh['faces']:,} faces, {parts}{closed}",
            f"the points lie {distance['mean']:.3g} from it on average, {distance['max']:.3g} at most",
            *([f"left open: {surface['why']}"] if surface.get("kind") == "open" else []),
            *(["a hollow seen from inside, for the normals face it"] if hollow else []),
            *(f"{count:,} {what}" for what, count in lost.items() if count),
            f"{report['seconds']['total']:.1f} s",
        ]
    )
