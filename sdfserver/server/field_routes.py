"""The endpoints of /v1 that ask a field, and make something else of it than a mesh: no SQL, no torch."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, BinaryIO, TypeVar, get_args

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray

from sdfserver.asking import Answers, ask, ask_rays, distance_error_of, error_arrays
from sdfserver.errors import CloudFormatError, ConfigError, FieldFormatError, MissingDependencyError, NoSurfaceError
from sdfserver.export.grids import MAX_NODES, MIN_NODES, VoxelGrid
from sdfserver.export.slices import MIN_CELLS, Axis, Plane, slice_field, to_dxf, to_svg
from sdfserver.formats.arrays import read_rows
from sdfserver.queries import DistanceError
from sdfserver.questions import What
from sdfserver.saved import SavedField
from sdfserver.schemas import DistanceError as SaidError
from sdfserver.schemas import SdfRequest, SdfResponse, SliceFormat
from sdfserver.server.loading import load
from sdfserver.server.problems import ProblemError
from sdfserver.server.routes import (
    ABOUT_A_RESULT,
    FinishedJob,
    Service,
    TheService,
    answers,
    field_path,
    title_of,
)
from sdfserver.server.store import Row
from sdfserver.server.uploads import attachment, in_blocks

NPZ = "application/x-npz"
_SLICE_TYPES: dict[SliceFormat, str] = {"svg": "image/svg+xml", "dxf": "image/vnd.dxf"}
_VECTOR = r"^\s*[-+.\deE]+\s*,\s*[-+.\deE]+\s*,\s*[-+.\deE]+\s*$"
_MOST_CELLS = 1024
_QUICK = frozenset[What](("distance", "gradient", "inside"))
_BLOCK = 1 << 20
T = TypeVar("T")

router = APIRouter(prefix="/v1", tags=["field"])


# Questions


@router.post(
    "/jobs/{job_id}/sdf",
    response_model=SdfResponse,
    responses=ABOUT_A_RESULT | answers("malformed", "too-large", "no-surface", "damaged"),
)
async def query_field(service: TheService, row: FinishedJob, request: SdfRequest) -> Response:
    """Ask the field: distances, gradients, closest points, curvature, inside or not, of points; hits, of rays.

    In the cloud's own units. `distances` are the field's own values: near the surface they are distances, as far as
    `distance_error` says, which comes with every answer; `true_distances` are distances everywhere, and take longer.
    """
    # What is quick does not wait behind what is slow: the page asks while a slider moves.
    slow = request.origins is not None or not _QUICK.issuperset(request.what)
    return await to_thread.run_sync(
        partial(_json_answer, service, row, request), limiter=service.asking if slow else None
    )


def _json_answer(service: Service, row: Row, request: SdfRequest) -> Response:
    asked: list[What] = [*request.what]
    if request.gradient:
        asked.append("gradient")
    found, error = _answers(
        _field(service, row),
        _array(request.points),
        asked,
        _array(request.origins),
        _array(request.directions),
        request.max_distance,
    )
    told = {name: _plain(array) for name, array in found.items()}
    answer = SdfResponse(**told, distance_error=None if error is None else SaidError(**asdict(error)))
    # As bytes, made here: a long answer would else be made where all others wait for it.
    return Response(answer.model_dump_json(), media_type="application/json")


_NPZ_BODY = {
    "requestBody": {
        "required": True,
        "description": "What `numpy.savez` writes: `points` (n, 3), or `origins` and `directions` (n, 3), or all, "
        "of numbers. GET /v1/options tells how many rows they may have (`npz_query_points`).",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary", "minLength": 1}}},
    }
}


@router.post(
    "/jobs/{job_id}/sdf.npz",
    response_class=StreamingResponse,
    responses=ABOUT_A_RESULT
    | answers("malformed", "too-large", "no-surface", "damaged")
    | {
        200: {
            "description": "An NPZ with the arrays that the questions are answered by, and `distance_error_mean`, "
            "`_p95`, `_max`, `_band` and `_samples`; NaN where there is no answer",
            "content": {NPZ: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    openapi_extra=_NPZ_BODY,
)
async def query_field_npz(
    request: Request,
    service: TheService,
    row: FinishedJob,
    what: Annotated[
        list[What] | None, Query(max_length=len(get_args(What)), description="Of the points; by default distance.")
    ] = None,
    max_distance: Annotated[float | None, Query(gt=0, allow_inf_nan=False, description="As in JSON.")] = None,
) -> Response:
    """The same for many points, as NPZ: a million of them, in binary, in one call."""
    most = service.settings.max_npz_query_points
    with tempfile.TemporaryFile() as body:
        # Three arrays of float64, and what an archive adds.
        await _receive(request, body, 72 * most + 65_536, service.receiving)
        return await _thread(service, _npz_answer, service, row, body, what or ["distance"], max_distance)


def _npz_answer(
    service: Service, row: Row, body: BinaryIO, what: list[What], max_distance: float | None
) -> StreamingResponse:
    try:
        with np.errstate(all="ignore"):
            arrays = read_rows(body, ("points", "origins", "directions"), service.settings.max_npz_query_points)
    except CloudFormatError as unsound:
        raise ProblemError("malformed", f"the body cannot be used: {unsound}") from None
    for name, array in arrays.items():
        if bad := int((~np.isfinite(array)).any(axis=1).sum()):
            raise ProblemError("invalid", f"{name}: {bad:,} of {len(array):,} are not finite; drop them")
    origins, directions = arrays.get("origins"), arrays.get("directions")
    if "points" not in arrays and origins is None:
        raise ProblemError("invalid", "there is nothing to answer; give points, or origins and directions of rays")
    if (origins is None) != (directions is None):
        raise ProblemError("invalid", "rays need both origins and directions; give both")
    found, error = _answers(_field(service, row), arrays.get("points"), what, origins, directions, max_distance)
    answer = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has been sent
    try:
        np.savez(answer, **found, **error_arrays(error))  # type: ignore[arg-type]
        size = answer.tell()
        answer.seek(0)
    except BaseException:
        answer.close()
        raise
    return StreamingResponse(_sent(answer), media_type=NPZ, headers=_named(row, "-answers.npz", size))


def _answers(
    field: SavedField,
    points: NDArray[np.float64] | None,
    what: list[What],
    origins: NDArray[np.float64] | None,
    directions: NDArray[np.float64] | None,
    max_distance: float | None,
) -> tuple[Answers, DistanceError | None]:
    """What was asked, by name, and the field's error as a distance."""
    found: Answers = {}
    with np.errstate(all="ignore"):  # points may be anywhere
        try:
            if points is not None:
                found |= ask(field, points, what)
            if origins is not None and directions is not None:
                found |= ask_rays(field, origins, directions, max_distance)
        except NoSurfaceError as error:
            raise ProblemError("no-surface", str(error)) from None
        except ValueError as error:
            raise ProblemError("invalid", str(error)) from None
        for name in ("distances", "true_distances"):
            if not np.isfinite(found.get(name, 0.0)).all():
                raise ProblemError("invalid", "points: some are too far away for a distance; keep near the cloud")
        return found, distance_error_of(field)


def _array(rows: list[Any] | None) -> NDArray[np.float64] | None:
    return None if rows is None else np.array(rows, dtype=np.float64)


def _plain(array: NDArray[Any]) -> list[Any]:
    """As JSON has it: null for what is no number, or for a row with such."""
    values: list[Any] = array.tolist()
    if array.dtype != bool:
        for i in np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1)):
            values[i] = None
    return values


# Exports


@router.get(
    "/jobs/{job_id}/slice",
    response_class=Response,
    responses=ABOUT_A_RESULT
    | answers("damaged")
    | {
        200: {
            "description": "The drawing",
            "content": {kind: {"schema": {"type": "string"}} for kind in _SLICE_TYPES.values()},
        }
    },
)
def get_slice(
    service: TheService,
    row: FinishedJob,
    axis: Annotated[Axis, Query(description="Across which axis, unless `normal` is given.")] = "z",
    at: Annotated[
        float | None,
        Query(allow_inf_nan=False, description="Where on that axis; by default in the middle of the field's cube."),
    ] = None,
    share: Annotated[
        float | None, Query(ge=0, le=1, description="The same as a share of that cube, from its low face to its high.")
    ] = None,
    normal: Annotated[
        str | None, Query(pattern=_VECTOR, max_length=200, description="X,Y,Z: across this direction instead.")
    ] = None,
    origin: Annotated[
        str | None, Query(pattern=_VECTOR, max_length=200, description="X,Y,Z: through this point, for `normal`.")
    ] = None,
    resolution: Annotated[int, Query(ge=MIN_CELLS, le=_MOST_CELLS, description="Cells along the longer side.")] = 256,
    whole: Annotated[
        bool, Query(description="For SVG: show the whole cube's section, the same view wherever the plane is.")
    ] = False,
    format: Annotated[SliceFormat, Query()] = "svg",  # noqa: A002 - the name is the interface's
) -> Response:
    """Where a plane cuts the surface: polylines in world units, closed where the outline is.

    Across an axis, the drawing's coordinates are the other two, in their order: (x, y), (x, z), (y, z). Across any
    other direction they are relative to `origin`, which is the middle of the field's cube by default, with z upwards.
    """
    field = _field(service, row)
    middle, half = field.frame.center, 1 / field.frame.scale
    with _refusing(), np.errstate(all="ignore"):
        if normal is not None:
            plane = Plane.through(middle if origin is None else _vector("origin", origin), _vector("normal", normal))
        elif origin is not None:
            raise ConfigError("origin has no effect without normal; give that as well, or axis and at")
        else:
            along = (0.5 if share is None else share) * 2 - 1
            plane = Plane.across(axis, float(middle["xyz".index(axis)] + half * along) if at is None else at)
        cut = slice_field(field, plane, resolution=resolution)
        text = to_svg(cut, whole=whole) if format == "svg" else to_dxf(cut)
    return Response(text, media_type=_SLICE_TYPES[format], headers=_named(row, f"-slice.{format}"))


def _vector(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be three numbers, like 0,0,1") from None


@router.get(
    "/jobs/{job_id}/grid",
    response_class=StreamingResponse,
    responses=ABOUT_A_RESULT
    | answers("no-surface", "damaged")
    | {200: {"description": "The file", "content": {NPZ: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_grid(
    service: TheService,
    row: FinishedJob,
    resolution: Annotated[
        int | None,
        Query(ge=MIN_NODES, le=MAX_NODES, description="Nodes along each side; by default 128, or the most allowed."),
    ] = None,
    true_distances: Annotated[
        bool, Query(description="To the closest point of the surface, in place of the field's own values; slow.")
    ] = False,
) -> Response:
    """The field at the nodes of a grid over the cube that it was fitted in, as NPZ.

    `values` (nx, ny, nz) float32; `values[i, j, k]` belongs to `origin + spacing * (i, j, k)`; `distance_error_mean`
    and its like as with sdf.npz. It is sent while it is computed.
    """
    most = service.settings.max_grid_resolution
    resolution = min(128, most) if resolution is None else resolution
    if resolution > most:
        raise ProblemError("invalid", f"resolution is {resolution}; this server takes {most} at most")
    if true_distances and resolution**3 > service.settings.max_npz_query_points:
        finest = int(service.settings.max_npz_query_points ** (1 / 3) + 1e-9)
        raise ProblemError("invalid", f"resolution is {resolution}; for true distances take {finest} at most")
    parts = await _thread(service, _grid_parts, service, row, resolution, true_distances)
    return StreamingResponse(_computed(parts, service.asking), media_type=NPZ, headers=_named(row, "-grid.npz"))


def _grid_parts(service: Service, row: Row, resolution: int, true_distances: bool) -> Iterator[bytes]:
    with _refusing():
        grid = VoxelGrid(_field(service, row), resolution=resolution, true_distances=true_distances)
    return (part for _, part in grid.parts())


@router.get(
    "/jobs/{job_id}/onnx",
    response_class=Response,
    responses=ABOUT_A_RESULT
    | answers("missing", "damaged")
    | {
        200: {
            "description": "The file",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
def get_onnx(service: TheService, row: FinishedJob) -> Response:
    """The field as ONNX: `points` (n, 3) float64 to `sdf` (n,) and `gradient` (n, 3) float32, all in world units."""
    from sdfserver.export.network import to_onnx

    with _refusing():
        model = to_onnx(_field(service, row))
    return Response(model, media_type="application/octet-stream", headers=_named(row, ".onnx"))


# What they share


def _field(service: Service, row: Row) -> SavedField:
    try:
        return load(service.artifacts, field_path(service, row))
    except FileNotFoundError:
        raise ProblemError("gone", f"job {row.id} and its files have been removed; upload the cloud again") from None
    except FieldFormatError:
        raise ProblemError("damaged", "the field is damaged; run the job again") from None


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors of an export as problems."""
    try:
        yield
    except NoSurfaceError as error:
        raise ProblemError("no-surface", str(error)) from None
    except ConfigError as error:
        raise ProblemError("invalid", str(error)) from None
    except MissingDependencyError as error:
        raise ProblemError("missing", str(error)) from None


async def _thread(service: Service, function: Callable[..., T], *arguments: Any) -> T:
    """What `function` gives, computed beside the event loop; few at a time, for it takes memory."""
    return await to_thread.run_sync(partial(function, *arguments), limiter=service.asking)


async def _receive(request: Request, body: BinaryIO, most: int, threads: CapacityLimiter) -> None:
    """Bring the request's body to a file, up to a limit."""
    received = int(request.headers.get("content-length", "0"))

    def check(size: int) -> None:
        if size > most:
            raise ProblemError("too-large", f"the body has more than {most:,} bytes; send fewer points at a time")

    def write(data: bytes) -> None:
        body.write(data)
        check(body.tell())

    check(received)
    await in_blocks(request.stream(), write, threads)


def _sent(stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file that is closed after them."""
    with stream:
        while part := stream.read(_BLOCK):
            yield part


async def _computed(parts: Iterator[bytes], threads: CapacityLimiter) -> AsyncIterator[bytes]:
    """The parts, each computed when the one before has been taken."""

    def following() -> bytes | None:
        with np.errstate(all="ignore"):
            return next(parts, None)

    while (part := await to_thread.run_sync(following, limiter=threads)) is not None:
        yield part


def _named(row: Row, ending: str, size: int | None = None) -> dict[str, str]:
    """The headers of a file that is made when it is asked for."""
    length = {} if size is None else {"Content-Length": str(size)}
    return {"Content-Disposition": attachment(title_of(row) + ending), "Cache-Control": "private, no-cache", **length}
