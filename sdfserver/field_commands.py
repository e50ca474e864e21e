"""The commands that ask a saved field and export it: sdfserver field info, query, slice, grid, onnx.

Nothing heavy is imported before a command has checked what it was asked for; torch for the meshes of info alone.
"""

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from sdfserver.errors import CloudError, ConfigError, FieldFormatError, SdfServerError
from sdfserver.questions import MEANS, What
from sdfserver.terminal import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdfserver.asking import Answers
    from sdfserver.saved import SavedField

ONNX_TOLERANCE = 1e-4
"""Of the cube's half side: hundreds of times what single precision rounds."""

FieldArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FIELD", show_default=False, help="A field that --field has saved, or a server: .safetensors."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def add_field_commands(app: typer.Typer) -> None:
    """Add the commands about fields to the command line."""
    field = typer.Typer(help="Ask a saved field, and export it: query, slice, grid, onnx, info.", no_args_is_help=True)
    field.command("info")(info)
    field.command("query")(query)
    field.command("slice")(slice_)
    field.command("grid")(grid)
    field.command("onnx")(onnx)
    app.add_typer(field, name="field")


def info(
    field: FieldArgument,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what a field is: its networks and its frame, how far it is from a distance, volume and area.

    Volume and area are extrapolated from meshes of 96 and of 192 cells along each side; the tolerance is by how much.
    """
    read = _read(field)
    from sdfserver.asking import distance_error_of
    from sdfserver.errors import NoSurfaceError
    from sdfserver.field import SignedDistanceField
    from sdfserver.measures import measure

    first = read.coarse.layers[0][0].shape
    about: dict[str, Any] = {
        "layers": len(read.coarse.layers) - 1,
        "units": first[-1],
        "local_networks": [len(level.cells) for level in read.levels],
        "center": read.frame.center.tolist(),
        "side": 2 / read.frame.scale,
    }
    try:
        error = distance_error_of(read)
        found = measure(SignedDistanceField.load(field))
        about |= {"distance_error": None if error is None else asdict(error)}
        about |= {name: getattr(value, "tolist", lambda value=value: value)() for name, value in asdict(found).items()}
    except NoSurfaceError as nothing:
        about |= {"distance_error": None, "problem": str(nothing)}
    sys.stdout.write(json.dumps(about, indent=1) + "\n" if as_json else _told(about))


def query(
    field: FieldArgument,
    points: Annotated[
        Path,
        typer.Argument(
            metavar="POINTS", show_default=False, help="Where to ask: points in any format that reconstruct reads."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default="CSV to standard output",
            help="Where the answers go: .npz, or .csv with a column for each number.",
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            metavar="A,B,C",
            help=f"Which: {', '.join(MEANS)}. distance is the field's own value, a distance near the surface; "
            "true_distance is one everywhere, and takes longer.",
        ),
    ] = "distance,gradient",
    rays: Annotated[
        bool,
        typer.Option("--rays", help="Instead, where rays from the points along their normals first hit the surface."),
    ] = False,
    max_distance: Annotated[
        float | None,
        typer.Option(metavar="D", show_default=False, help="With --rays: hits farther than this do not count."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Ask a field about points: distances, gradients, closest points, curvature, inside or not; or cast rays.

    In the cloud's own units. The answer says how far the field is from being a distance near its surface.
    """
    asked = _questions(what)
    if max_distance is not None and not (rays and math.isfinite(max_distance) and max_distance > 0):
        raise ConfigError(f"--max-distance is {max_distance:g}; it must be above 0, and --rays given")
    if output is not None:
        _check_output(output, ("npz", "csv"), field, points)
    read = _read(field)
    import numpy as np

    from sdfserver.asking import ask, ask_rays, distance_error_of, error_arrays
    from sdfserver.io import read_cloud

    cloud = read_cloud(points)
    wrong = int((~np.isfinite(cloud.points)).any(axis=1).sum())
    if wrong:
        raise CloudError(f"{wrong:,} of {len(cloud.points):,} points are not finite; drop them")
    with np.errstate(all="ignore"):  # points may be anywhere
        if rays:
            if cloud.normals is None:
                raise CloudError("the points have no normals, along which rays would go; give points with normals")
            answers = ask_rays(read, cloud.points, _ways(cloud.normals), max_distance)
        else:
            answers = ask(read, cloud.points, asked)
        error = distance_error_of(read)
    if output is None:
        _write_csv(sys.stdout, cloud.points, answers)
    elif output.suffix.lower() == ".csv":
        import io

        text = io.StringIO(newline="")
        _write_csv(text, cloud.points, answers)
        _write(output, text.getvalue().encode())
    else:
        from sdfserver.files import replacing

        with replacing(output) as stream:
            np.savez(stream, points=cloud.points, **answers, **error_arrays(error))  # type: ignore[arg-type]
    if not quiet and error is not None:
        off = f"{error.mean:.1%} on average, by {error.p95:.1%} at 95 of 100 places"
        asked_of = f"{len(cloud.points):,} {'rays' if rays else 'points'}"
        say(f"{asked_of}; within {error.band:.3g} of the surface the field is off from a distance by {off}")


def slice_(
    field: FieldArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", show_default=False, help="Where it goes: .svg or .dxf."),
    ],
    axis: Annotated[
        Literal["x", "y", "z"] | None, typer.Option(show_default="z", help="Across which axis to cut.")
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(metavar="A", show_default="the middle", help="Where on that axis, in the cloud's units."),
    ] = None,
    normal: Annotated[
        str | None,
        typer.Option(metavar="X,Y,Z", show_default=False, help="Cut across this direction instead of an axis."),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(metavar="X,Y,Z", show_default="the middle", help="With --normal: a point of the plane."),
    ] = None,
    resolution: Annotated[
        int, typer.Option(metavar="N", help="Cells of the grid that finds the outlines, along its longer side.")
    ] = 256,
    quiet: QuietOption = False,
) -> None:
    """Cut a field's surface with a plane, and write the outlines as SVG or DXF, in the cloud's own units.

    Across an axis, the drawing's coordinates are the two others: (x, y), (x, z) or (y, z). Across any other direction
    they are relative to --origin, with z upwards. Holes run clockwise; an SVG far from the origin says by how much it
    is shifted.
    """
    if normal is not None and not (axis is None and at is None):
        raise ConfigError("--normal takes the place of --axis and --at; give one or the other")
    if origin is not None and normal is None:
        raise ConfigError("--origin has no effect without --normal; add that, or use --axis and --at")
    across = None if normal is None else _vector(normal, "--normal")
    through = None if origin is None else _vector(origin, "--origin")
    _check_output(output, ("svg", "dxf"), field)
    read = _read(field)
    from sdfserver.cloud import shown
    from sdfserver.export.slices import Plane, slice_field, to_dxf, to_svg

    middle = read.frame.center
    if across is not None:
        plane = Plane.through(middle if through is None else through, across)
    else:
        letter = axis or "z"
        plane = Plane.across(letter, float(middle["xyz".index(letter)]) if at is None else at)
    cut = slice_field(read, plane, resolution=resolution)
    if not cut.curves:
        low, high = middle - 1 / read.frame.scale, middle + 1 / read.frame.scale
        raise ConfigError(
            f"the plane does not meet the surface, which lies in the cube from {shown(low)} to {shown(high)}; move it"
        )
    _write(output, (to_svg(cut) if output.suffix.lower() == ".svg" else to_dxf(cut)).encode())
    if not quiet:
        count, ends = len(cut.curves), sum(not curve.closed for curve in cut.curves)
        kinds = "closed" if not ends else f"{ends} of them open"
        enclosed = "" if ends else f", around an area of {cut.area:.5g}"
        say(f"{output}: {count} outline{'s' * (count > 1)}, {kinds}, {cut.length:.5g} long{enclosed}")


def grid(
    field: FieldArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.npz", show_default=False, help="Where the grid goes.")
    ],
    resolution: Annotated[int, typer.Option(metavar="N", help="Nodes along the longest side.")] = 128,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y,Z,X,Y,Z",
            show_default="the cube that the field was fitted in",
            help="The low and the high corner, in the cloud's units.",
        ),
    ] = None,
    true_distances: Annotated[
        bool,
        typer.Option(
            "--true-distances",
            help="To the closest point of the surface, in place of the field's own values; takes far longer.",
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a field's values at the nodes of a grid, as NPZ.

    values (nx, ny, nz), float32: values[i, j, k] belongs to origin + spacing * (i, j, k). Negative inside.
    """
    corners = None if box is None else _vector(box, "--box", 6)
    _check_output(output, ("npz",), field)
    read = _read(field)
    from sdfserver.cli import progress_bar
    from sdfserver.export.grids import write_grid
    from sdfserver.files import replacing

    with progress_bar(quiet=quiet) as show, replacing(output) as stream:
        shape = write_grid(
            read,
            stream,
            resolution=resolution,
            box=None if corners is None else corners.reshape(2, 3),
            true_distances=true_distances,
            on_progress=None if show is None else lambda share: show("grid", share),
        )
    if not quiet:
        say(f"{output}: {shape[0]} x {shape[1]} x {shape[2]} values")


def onnx(
    field: FieldArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.onnx", show_default=False, help="Where the network goes.")
    ],
    quiet: QuietOption = False,
) -> None:
    """Write a field as ONNX: points (n, 3) float64 to sdf (n,) and gradient (n, 3), all in the cloud's own units.

    Where onnxruntime is installed, what it computes from the file is compared with the field before it is written.
    """
    _check_output(output, ("onnx",), field)
    read = _read(field)
    from sdfserver.errors import MissingDependencyError
    from sdfserver.export.network import onnx_difference, to_onnx

    model = to_onnx(read)
    try:
        off, _ = onnx_difference(model, read)
        checked = f"onnxruntime gives the field's values to within {off:.1g}"
    except MissingDependencyError as missing:
        off, checked = 0.0, f"not compared with the field: {missing}"
    if off > ONNX_TOLERANCE / read.frame.scale:
        raise SdfServerError(f"onnxruntime gives values up to {off:.3g} off the field's, so nothing was written")
    _write(output, model)
    if not quiet:
        say(f"{output}: {len(model) / 1e6:.2f} MB; {checked}")


# What they share


def _read(path: Path) -> "SavedField":
    from sdfserver.files import printable
    from sdfserver.saved import read_field

    try:
        return read_field(path)
    except FileNotFoundError:
        raise FieldFormatError(f"{printable(str(path))} does not exist; check the path") from None


def _check_output(path: Path, formats: tuple[str, ...], *inputs: Path) -> None:
    """Raise OutputError now, if a result could not be written or would replace what it is made of."""
    from sdfserver.errors import OutputError
    from sdfserver.files import check_writable

    check_writable(path, formats)
    if any(path.resolve() == given.resolve() for given in inputs):
        raise OutputError(f"{path} is read already; give the result another name")


def _write(path: Path, data: bytes) -> None:
    from sdfserver.files import replacing

    with replacing(path) as stream:
        stream.write(data)


def _questions(text: str) -> list[What]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in get_args(What):
            raise ConfigError(f"--what has {name!r}; use some of {', '.join(MEANS)}")
    return names  # type: ignore[return-value]


def _vector(text: str, option: str, count: int = 3) -> "NDArray[np.float64]":
    import numpy as np

    try:
        vector = np.array([float(part) for part in text.split(",")])
    except ValueError:
        vector = np.empty(0)
    if len(vector) != count:
        raise ConfigError(f"{option} is {text!r}; it must be {count} numbers with commas between")
    return vector


def _ways(normals: "NDArray[np.float64]") -> "NDArray[np.float64]":
    import numpy as np

    pointless = int((~(np.linalg.norm(normals, axis=1) > 0)).sum())
    if pointless:
        raise CloudError(f"{pointless:,} of {len(normals):,} normals point nowhere; rays go along normals")
    return normals


def _write_csv(stream: Any, points: "NDArray[np.float64]", answers: "Answers") -> None:
    """A row for each point: where it is, and each number of the answers."""
    names, columns = ["x", "y", "z"], [*points.T.tolist()]
    for name, array in answers.items():
        if array.ndim > 1:
            names += [f"{name}_{axis}" for axis in "xyz"]
            columns += array.T.tolist()
        else:
            names.append(name)
            columns.append(array.astype(int).tolist() if array.dtype == bool else array.tolist())
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*columns, strict=True))


def _told(about: dict[str, Any]) -> str:
    return "".join(f"{name:<16}{text}\n" for name, text in _lines(about))


def _lines(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from sdfserver.cloud import shown

    local = "".join(f", {count:,} local ones over it" for count in about["local_networks"])
    yield "network", f"{about['layers']} layers of {about['units']} sines{local}"
    yield "frame", f"a cube of {about['side']:.6g} around {shown(about['center'])}"
    if "problem" in about:
        yield "surface", str(about["problem"])
        return
    yield "surface", f"from {shown(about['low'])} to {shown(about['high'])}"
    yield "area", _within(about["area"], about["area_tolerance"])
    volume = about["volume"]
    yield "volume", "not closed" if volume is None else _within(volume, about["volume_tolerance"])
    if error := about["distance_error"]:
        shares = f"{error['mean']:.2%} on average, {error['p95']:.2%} at 95 of 100 places, {error['max']:.2%} at most"
        yield "distance error", f"{shares}, within {error['band']:.3g} of the surface"


def _within(value: float, tolerance: float) -> str:
    """A value with as many digits as its tolerance leaves."""
    digits = 7 if not tolerance or not value else max(1, math.ceil(math.log10(abs(value) / tolerance)) + 1)
    return f"{value:.{min(digits, 12)}g} +- {tolerance:.1g}"
