"""The endpoints of /v1: thin, with no SQL and no torch."""

import asyncio
import hashlib
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar, cast, get_args

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from sdfserver.config import PRESETS
from sdfserver.io import CLOUD_FORMATS
from sdfserver.samples import SUMMARIES, samples
from sdfserver.schemas import (
    MAX_QUERY_POINTS,
    IdempotencyKey,
    Job,
    JobKind,
    JobOptions,
    JobPage,
    JobState,
    MeshFormat,
    MeshJobOptions,
    MeshOptions,
    OptionsInfo,
    Preset,
    PresetInfo,
    RestartOptions,
    Sample,
    SampleList,
    ServerLimits,
)
from sdfserver.server import tracing
from sdfserver.server.abuse import Guesses, check_browser
from sdfserver.server.artifacts import FIELD, MESH, PICTURE, POINTS, PREVIEW, REPORT, Artifacts, DamagedError, Found
from sdfserver.server.following import Lookout, Sighting
from sdfserver.server.liveness import living
from sdfserver.server.logs import STEP, about, subject
from sdfserver.server.problems import KINDS, MEDIA_TYPE, ProblemError
from sdfserver.server.queue import JobQueue
from sdfserver.server.settings import Settings
from sdfserver.server.store import (
    ApiKey,
    IdempotencyConflictError,
    NewJob,
    QueueFullError,
    QuotaError,
    Row,
    Store,
    new_id,
)
from sdfserver.server.uploads import (
    MAX_NAME,
    Upload,
    attachment,
    disk_full,
    receive_form,
    receive_raw,
    safe_name,
    too_large,
)
from sdfserver.server.views import JOBS, QueueView, job_view

log = logging.getLogger(__name__)

RETRY_SECONDS = 10
_MEDIA_TYPES = {"ply": "application/octet-stream", "glb": "model/gltf-binary", "obj": "model/obj", "stl": "model/stl",
                "off": "text/plain"}  # fmt: skip


_Options = TypeVar("_Options", bound=MeshOptions)
_AS_IT_WAS = RestartOptions()


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the endpoints work with."""

    settings: Settings
    store: Store
    queue: JobQueue
    artifacts: Artifacts
    view: QueueView
    lookout: Lookout
    converting: asyncio.Semaphore
    receiving: CapacityLimiter
    """Threads for what uploads write: others' answers do not wait for those."""
    creating: CapacityLimiter
    """One thread: new jobs are made one after the other, whoever waits for whom."""
    asking: CapacityLimiter
    """Threads for what takes long and much memory of a field: whoever comes later waits."""
    guesses: Guesses


def service_of(request: Request) -> Service:
    """The running app's service."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]
_RANGES = re.compile(r"bytes=(\d{1,18}-\d{0,18}|-\d{1,18})(\s*,\s*(\d{1,18}-\d{0,18}|-\d{1,18}))*", re.ASCII)
_bearer = HTTPBearer(auto_error=False, description="An API key, where the server asks for one")


def owner_of(
    request: Request,
    service: TheService,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> ApiKey:
    """Who asks. Raises ProblemError where a key is needed and is not there, or a page of another site asks."""
    secret, address = credentials.credentials if credentials else None, request.client.host if request.client else ""
    if secret is not None:
        service.guesses.check(address, secret)
    key = service.store.authenticate(secret)
    if key == ApiKey():  # nobody needs one
        check_browser(service.settings, request.method, request.headers)
    elif secret is not None:
        service.guesses.tried(address, secret, right=key is not None)
    if key is None:
        raise ProblemError(
            "unauthorized",
            "the API key is not known; send it as 'Authorization: Bearer KEY'"
            if credentials
            else "this server asks for an API key; send it as 'Authorization: Bearer KEY'",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return key


Owner = Annotated[ApiKey, Depends(owner_of)]
_ID = re.compile("[0-9a-f]{32}")


def job_of(service: TheService, owner: Owner, job_id: str) -> Row:
    """The job of the path, if it is the asker's. Raises ProblemError."""
    row = service.store.job(job_id, owner.id) if _ID.fullmatch(job_id) else None
    if row is None:
        raise ProblemError("not-found", f"there is no job {job_id[:40]!r}")
    if row.gone_at is not None:
        raise ProblemError("gone", f"job {job_id} and its files have been removed; upload the cloud again")
    return row


TheJob = Annotated[Row, Depends(job_of)]


def finished_job_of(row: TheJob) -> Row:
    """The same, if it has succeeded. Raises ProblemError."""
    if row.state != JobState.SUCCEEDED:
        remedy = "wait until it has" if not JobState(row.state).final else "submit the cloud again"
        raise ProblemError("state", f"job {row.id} is {row.state}, not succeeded; {remedy}")
    return row


FinishedJob = Annotated[Row, Depends(finished_job_of)]


def answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Problems that an endpoint may answer, for the documentation."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        status, title = KINDS[kind]
        said = by_status[status]["description"] + "; or: " if status in by_status else ""
        content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        by_status[status] = {"description": said + title, "content": content}
    return by_status


def _file_of(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """What an endpoint with a file to download answers."""
    binary: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    content = {kind: {"schema": {"type": "object"}} if kind == "application/json" else binary for kind in media_types}
    parts: dict[str, Any] = {kind: {} for kind in (*media_types, "multipart/byteranges")}
    return {
        200: {"description": "The file", "content": content},
        206: {"description": "The part that Range asked for", "content": parts},
        304: {"description": "If-None-Match names what would be sent"},
        307: {"description": "Where the file can be had for a while, if it is kept elsewhere"},
        **ABOUT_A_RESULT,
        **answers("range", "damaged"),
    }


_ANY = answers("unauthorized", "forbidden", "guesses", "invalid", "not-ready")
_ABOUT_A_JOB = _ANY | answers("not-found", "gone")
ABOUT_A_RESULT = _ABOUT_A_JOB | answers("state")

router = APIRouter(prefix="/v1")


class UploadQuery(JobOptions):
    """The options of a raw upload, and what its form would have said of the file."""

    name: Annotated[str | None, Query(max_length=MAX_NAME, description="The file's name, for a raw upload.")] = None
    format: Annotated[
        str | None, Query(max_length=8, description="The file's format, for a raw upload whose name does not tell.")
    ] = None

    def options(self) -> JobOptions:
        """The options alone."""
        return JobOptions(**self.model_dump(exclude={"name", "format"}))


def _sphere_xyz(points: int) -> str:
    """A unit sphere as XYZ with normals: a spiral from pole to pole, which is about even."""
    z = np.linspace(1, -1, points)
    angle, radius = np.pi * (3 - np.sqrt(5)) * np.arange(points), np.sqrt(1 - z**2)
    sphere = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    return "".join(f"{x:.3f} {y:.3f} {z:.3f} {x:.3f} {y:.3f} {z:.3f}\n" for x, y, z in sphere)


_EXAMPLE_XYZ = _sphere_xyz(300)
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "description": "The cloud: as the part `cloud` of a form, or as the whole body with its options in the query.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["cloud"],
                    "additionalProperties": False,
                    "properties": {
                        "cloud": {
                            "type": "string",
                            "contentMediaType": "application/octet-stream",
                            "minLength": 1,
                            "description": "The file; its name's ending says the format.",
                        },
                        "options": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "description": "JSON of JobOptions",
                            "examples": ['{"preset": "draft"}'],
                        },
                    },
                },
                "encoding": {"options": {"contentType": "application/json"}},
            },
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary", "minLength": 1},
                "example": _EXAMPLE_XYZ,
            },
        },
    }
}


@router.post(
    "/jobs",
    status_code=202,
    response_model=Job,
    responses=_ANY
    | answers("malformed", "gone", "idempotency", "too-large", "format", "queue-full", "quota", "disk-full"),
    openapi_extra=_UPLOAD_BODY,
    tags=["jobs"],
)
async def submit_job(
    request: Request,
    response: Response,
    service: TheService,
    owner: Owner,
    query: Annotated[UploadQuery, Query()],
    idempotency_key: Annotated[IdempotencyKey | None, Header(description="Repeating it repeats no job.")] = None,
) -> Job:
    """Upload a cloud and queue its reconstruction."""
    settings = service.settings
    declared = int(request.headers.get("content-length", "0"))
    if declared > settings.max_upload_bytes + 2**20:
        raise too_large(settings.max_upload_bytes)
    job_id, options = new_id(), query.options()
    content_type = request.headers.get("content-type", "")
    with Upload(
        service.artifacts,
        job_id,
        max_bytes=settings.max_upload_bytes,
        min_free=settings.min_free_bytes,
        threads=service.receiving,
    ) as upload:
        upload.check_room(declared)
        if content_type.lower().startswith("multipart/form-data"):
            await receive_form(upload, request.stream(), content_type=content_type)
            if upload.options is not None:
                options = _options_of(upload.options, JobOptions)
            check_limits(options, options.preset, settings)
        else:
            check_limits(options, options.preset, settings)
            await receive_raw(
                upload, request.stream(), name=query.name or f"cloud.{query.format or ''}", extension=query.format
            )
        new = _new_job(
            options,
            options.preset,
            f"{upload.digest}\n{upload.format}",
            id=job_id,
            owner=owner.id,
            kind=JobKind.RECONSTRUCTION,
            name=upload.name,
            format=upload.format,
            idempotency_key=idempotency_key,
        )
        # Within the upload's context: its folder is not taken for a stray before the row is there.
        create = partial(_create, service, owner, new, response, upload_bytes=upload.size)
        return await to_thread.run_sync(create, limiter=service.creating)


def _new_job(options: JobOptions | MeshJobOptions, preset: str, source: str, **known: Any) -> NewJob:
    """A job with these options; `source` tells what they are applied to, so that equal requests have equal hashes."""
    plain = options.model_dump(mode="json")
    return NewJob(
        options=plain,
        preset=preset,
        resolution=_resolution(options, preset),
        priority=options.priority,
        request_id=subject("request"),
        traceparent=tracing.traceparent(),
        request_hash=hashlib.sha256(f"{source}\n{json.dumps(plain, sort_keys=True)}".encode()).hexdigest(),
        **known,
    )


def _resolution(options: MeshOptions, preset: str) -> int:
    """The resolution, or the most that an automatic one may be."""
    base = PRESETS[preset].mesh
    return replace(base, resolution=options.resolution or base.resolution).finest


def _create(service: Service, owner: ApiKey, new: NewJob, response: Response, *, upload_bytes: int = 0) -> Job:
    """The new job, or the one that the same request made before; its files are removed where it is not new."""
    settings = service.settings
    try:
        row, replayed = service.store.create_job(
            new,
            service.queue.enqueue,
            max_queue=settings.max_queue,
            max_jobs=settings.max_jobs_per_key if owner.max_jobs is None else owner.max_jobs,
            upload_bytes=upload_bytes,
        )
    except IdempotencyConflictError:
        raise ProblemError(
            "idempotency",
            f"the Idempotency-Key {new.idempotency_key!r} came with another request before; use a new one",
        ) from None
    except QuotaError as error:
        detail = f"{error.limit} of your jobs are unfinished, and no more are allowed; wait for one or cancel one"
        raise ProblemError("quota", detail, headers={"Retry-After": str(RETRY_SECONDS)}) from None
    except QueueFullError as error:
        detail = f"{error.limit} jobs are waiting, and no more are taken; try again later"
        raise ProblemError("queue-full", detail, headers={"Retry-After": str(RETRY_SECONDS)}) from None
    if replayed:
        service.artifacts.remove(new.id)
        response.headers["Idempotent-Replayed"] = "true"
        if row.gone_at is not None:
            raise ProblemError("gone", f"job {row.id}, which this key made, has been removed; use a new key")
    else:
        with about(job=row.id):
            log.log(STEP, "accepted: %s, %s, %d bytes", new.kind, new.preset, upload_bytes)
    tracing.made(row.id)
    response.headers["Location"] = f"{JOBS}/{row.id}"
    return job_view(row, service.view.turns(row))


def _options_of(text: bytes, model: type[_Options]) -> _Options:
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise invalid(error.errors()) from None


def invalid(found: Sequence[Mapping[str, Any]]) -> ProblemError:
    """The problem of values that the schema does not allow, or of text that is no JSON."""
    errors = [{"where": ".".join(str(part) for part in item["loc"]), "message": _message(item)} for item in found]
    detail = "; ".join(
        f"{item['where']}{_quoted(error)}: {item['message']}" if item["where"] else item["message"]
        for item, error in zip(errors, found, strict=True)
    )
    kind = "malformed" if any(item["type"] == "json_invalid" for item in found) else "invalid"
    return ProblemError(kind, detail[:1000], errors=errors[:20])


def _message(error: Mapping[str, Any]) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    reason = error.get("ctx", {}).get("error")
    return f"{message}: {reason}" if error["type"] == "json_invalid" and reason not in message else message


def _quoted(error: Mapping[str, Any]) -> str:
    """The value at fault, where that is one."""
    value = error["input"]
    if error["type"] in ("missing", "json_invalid") or isinstance(value, (dict, list, bytes)):
        return ""
    text = repr(value)
    return f" is {text if len(text) <= 60 else text[:57] + '...'}"


def check_limits(options: MeshOptions, preset: str, settings: Settings) -> None:
    """Raise ProblemError where the options ask for more than this server gives."""
    resolution = options.resolution
    if resolution is not None and resolution > settings.max_resolution:
        raise ProblemError(
            "invalid", f"resolution is {resolution}; this server takes {settings.max_resolution} at most"
        )
    if isinstance(options, JobOptions) and PRESETS[preset].fit.steps > settings.max_steps:
        steps = PRESETS[preset].fit.steps
        raise ProblemError("invalid", f"preset {preset!r} takes {steps} steps; this server allows {settings.max_steps}")


@router.get("/jobs", response_model=JobPage, responses=_ANY, tags=["jobs"])
def list_jobs(
    service: TheService,
    owner: Owner,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    cursor: Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="The `next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobPage:
    """Your jobs, newest first, a page at a time."""
    before = None if cursor is None else int(cursor)
    rows = service.store.list_jobs(owner.id, state=state, before=before, limit=limit + 1)
    more = len(rows) > limit
    page = rows[:limit]
    turns = service.view.turns(*page)
    return JobPage(jobs=[job_view(row, turns) for row in page], next=str(page[-1].seq) if more else None)


@router.get("/jobs/{job_id}", response_model=Job, responses=_ABOUT_A_JOB, tags=["jobs"])
def get_job(service: TheService, row: TheJob) -> Job:
    """A job as it stands."""
    return job_view(row, service.view.turns(row))


@router.get(
    "/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=_ABOUT_A_JOB,
    tags=["jobs"],
)
async def follow_job(
    service: TheService,
    row: TheJob,
    last_event_id: Annotated[
        str | None, Header(max_length=20, description="The id of the last event that you saw.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """The job as server-sent events, from the first or from the one after `Last-Event-ID`, to its end.

    Events are called `state` or `progress`; the data of each is the job as it stood. While it waits, `queue` events
    without an id tell of its place.
    """
    number = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    place: tuple[int | None, float | None] | None = None
    sighting: Sighting | None = None
    async with service.lookout.follow(row.id) as followed:
        while True:
            sighting = await followed.news(sighting)
            current, turns = sighting.row, sighting.turns
            if current is None or current.gone_at is not None:
                return
            while current.event > number:
                found = await run_in_threadpool(service.store.events_after, row.id, number)
                if not found:  # the job has just gone
                    break
                for event in found:
                    number = event.number
                    job = job_view(row, turns, event.body)
                    yield ServerSentEvent(raw_data=job.model_dump_json(), event=event.kind, id=str(number), retry=1000)
                    if job.state.final:
                        return
            if JobState(current.state).final:
                return
            if current.state == JobState.QUEUED and turns.place(row.id) != place:
                place = turns.place(row.id)
                job = job_view(current, turns)
                yield ServerSentEvent(raw_data=job.model_dump_json(), event="queue")


@router.post("/jobs/{job_id}/cancel", response_model=Job, responses=ABOUT_A_RESULT, tags=["jobs"])
def cancel_job(service: TheService, owner: Owner, row: TheJob) -> Job:
    """Stop a job, queued or running; stopping it twice is no error."""
    if not service.store.cancel(row.id, service.settings.retention_seconds) and row.state != JobState.CANCELLED:
        current = service.store.job(row.id)
        if current is None or current.state != JobState.CANCELLED:
            raise ProblemError(
                "state", f"job {row.id} is {current.state if current else 'removed'}: it has ended already"
            )
    return job_view(job_of(service, owner, row.id), service.view.turns())


@router.delete("/jobs/{job_id}", status_code=204, responses=_ABOUT_A_JOB, tags=["jobs"])
def delete_job(service: TheService, row: TheJob) -> None:
    """Remove a job and all its files, stopping it first if it runs. It answers 410 from then on."""
    service.store.cancel(row.id, service.settings.retention_seconds)
    service.store.remove(row.id)
    service.artifacts.remove(row.id)


@router.get(
    "/jobs/{job_id}/mesh", response_class=FileResponse, responses=_file_of(*_MEDIA_TYPES.values()), tags=["results"]
)
async def get_mesh(
    request: Request,
    service: TheService,
    row: FinishedJob,
    format: Annotated[MeshFormat, Query()] = "ply",  # noqa: A002 - the name is the interface's
) -> Response:
    """The mesh, in the format asked for."""
    path = service.artifacts.mesh(row.id, row.published) / f"mesh.{format}"
    if format != "ply" and not await _is_there(service, path):
        async with service.converting:
            if not await _is_there(service, path):
                await _convert(service, path.with_name(MESH), path, title_of(row))
    send = partial(_file, service, request, row, path, f".{format}", _MEDIA_TYPES[format])
    return await run_in_threadpool(send)


async def _is_there(service: Service, path: Path) -> bool:
    return await run_in_threadpool(service.artifacts.find, path) is not None


async def _convert(service: Service, mesh: Path, target: Path, title: str) -> None:
    with suppress(FileNotFoundError):  # then the target is gone as well
        async with contextmanager_in_threadpool(service.artifacts.at_hand(mesh)) as source:
            made = source.with_name(target.name)
            await _write_as(source, made)
            if made.exists():
                await run_in_threadpool(service.artifacts.add, made, target, title)


async def _write_as(source: Path, target: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sdfserver.server.convert", str(source), str(target), stderr=asyncio.subprocess.PIPE
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode and source.exists():
        reason = errors.decode(errors="replace").strip().rpartition("\n")[2].replace(f"{source.parent}/", "")
        log.error("a mesh could not be converted to %s: %s", target.suffix[1:], reason)
        raise ProblemError("internal", f"the mesh could not be written as {target.suffix[1:]}; take it as ply")


@router.get(
    "/jobs/{job_id}/report", response_class=FileResponse, responses=_file_of("application/json"), tags=["results"]
)
def get_report(request: Request, service: TheService, row: FinishedJob) -> Response:
    """The quality report: settings, timings, losses, distances from the points to the mesh, and more."""
    path = service.artifacts.mesh(row.id, row.published) / REPORT
    return _file(service, request, row, path, ".json", "application/json", linked=False)


@router.get(
    "/jobs/{job_id}/preview",
    response_class=FileResponse,
    responses=_file_of("application/octet-stream"),
    tags=["results"],
)
def get_preview(request: Request, service: TheService, row: TheJob) -> Response:
    """A light mesh to look at, as PLY: coarse while the surface forms, and in the end simplified if it is large.

    That of a job that has succeeded has a property `distance`: of each vertex to the nearest point of the cloud. It has
    colours and `confidence` where the mesh has them.
    """
    if row.state == JobState.SUCCEEDED:
        path = service.artifacts.mesh(row.id, row.published) / PREVIEW
        return _file(service, request, row, path, "-preview.ply", "application/octet-stream", linked=False)
    path = _fit_folder(service, row) / PREVIEW
    found = None if row.preview is None else service.artifacts.find(path)
    try:
        if found is None:
            raise FileNotFoundError
        # Read, not sent as a file: it is replaced when the next one is there.
        body = path.read_bytes() if found.path else b"".join(found.read(0, found.size))
    except FileNotFoundError:
        raise _not_there(row, "preview") from None
    tag = f'"{row.id}-{path.parent.name}-{found.version}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/octet-stream", headers=headers)


@router.get(
    "/jobs/{job_id}/points",
    response_class=FileResponse,
    responses=_file_of("application/octet-stream"),
    tags=["results"],
)
def get_points(request: Request, service: TheService, row: TheJob) -> Response:
    """Some of the points that the field is fitted to, with their normals, as PLY; there as soon as the fit begins."""
    path = _fit_folder(service, row) / POINTS
    if row.state != JobState.SUCCEEDED and service.artifacts.find(path) is None:
        raise _not_there(row, "points to show")
    return _file(service, request, row, path, "-points.ply", "application/octet-stream", linked=False)


@router.get("/jobs/{job_id}/picture", response_class=FileResponse, responses=_file_of("image/png"), tags=["results"])
def get_picture(request: Request, service: TheService, row: FinishedJob) -> Response:
    """A small picture of the mesh, as PNG."""
    path = service.artifacts.mesh(row.id, row.published) / PICTURE
    return _file(service, request, row, path, ".png", "image/png", linked=False)


@router.get(
    "/jobs/{job_id}/field",
    response_class=FileResponse,
    responses=_file_of("application/octet-stream"),
    tags=["results"],
)
def get_field(request: Request, service: TheService, row: FinishedJob) -> Response:
    """The signed distance field, as safetensors."""
    return _file(service, request, row, field_path(service, row), ".safetensors", "application/octet-stream")


def _not_there(row: Row, what: str) -> ProblemError:
    remedy = "run it again" if JobState(row.state).final else "wait a moment"
    return ProblemError("state", f"job {row.id} is {row.state} and has no {what}; {remedy}")


def _fit_folder(service: Service, row: Row) -> Path:
    """Where the job's field is, or will be if the attempt under way succeeds."""
    fitted = 0 if row.kind == JobKind.MESH else row.attempt if row.fitted is None else row.fitted
    return service.artifacts.fit(row.id, fitted)


def field_path(service: Service, row: Row) -> Path:
    """Where the field of a job that has succeeded is."""
    return _fit_folder(service, row) / FIELD


def title_of(row: Row) -> str:
    """What the job's downloads are called, without their ending."""
    return PurePosixPath(row.name).stem


def _file(
    service: Service, request: Request, row: Row, path: Path, ending: str, media_type: str, *, linked: bool = True
) -> Response:
    """A result as a download, or where it may be `linked` and the settings say so, the way to it in its store.

    What an attempt published never changes, so its name is its ETag.
    """
    etag = f'"{row.id}-{path.parent.name}-{path.name}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if _is_known(request, etag):
        return Response(status_code=304, headers=headers)
    found = service.artifacts.find(path)
    if found is None:
        raise ProblemError("gone", f"job {row.id} and its files have been removed; upload the cloud again")
    headers |= _digest(service, row, path, found)
    name = safe_name(title_of(row) + ending)
    if found.path is not None:
        _check_range(request, found.size, etag)
        return FileResponse(found.path, media_type=media_type, filename=name, headers=headers)
    # A page's script may not follow to another host, unless that says so.
    scripted = request.headers.get("sec-fetch-mode") in ("cors", "same-origin")
    if linked and service.settings.presigned_seconds and found.link is not None and not scripted:
        link = found.link(service.settings.presigned_seconds)
        return RedirectResponse(link, status_code=307, headers=headers | {"Cache-Control": "private, no-store"})
    _check_range(request, found.size, etag)
    return _streamed(request, found, media_type, headers | {"Content-Disposition": attachment(name)})


def _digest(service: Service, row: Row, path: Path, found: Found) -> dict[str, str]:
    """The header with the checksum of a published file. Raises ProblemError where it is not as it was."""
    if row.state != JobState.SUCCEEDED:  # it is not finished
        return {}
    try:
        made = service.artifacts.check(path, found)
    except DamagedError as error:
        log.error("%s of job %s is damaged: %s", path.name, row.id, error)
        raise ProblemError("damaged", f"the file is damaged: {error}; run the job again") from None
    return {} if made is None else {"Repr-Digest": made.header}


def _streamed(request: Request, found: Found, media_type: str, headers: dict[str, str]) -> Response:
    """The file in parts, or what one range asks for of it; several are answered with all of it, as they may be."""
    first, last = 0, found.size - 1
    asked = dict(request.scope["headers"]).get(b"range", b"").decode("latin-1")
    begin, _, end = asked.removeprefix("bytes=").partition("-")
    partial_answer = bool(begin or end) and "," not in end
    if partial_answer and begin:
        first, last = int(begin), min(int(end or last), last)
    elif partial_answer:
        first = max(0, found.size - int(end))
    headers |= {"Accept-Ranges": "bytes", "Content-Length": str(last + 1 - first)}
    if partial_answer:
        headers["Content-Range"] = f"bytes {first}-{last}/{found.size}"
    status = 206 if partial_answer else 200
    return StreamingResponse(found.read(first, last + 1), status_code=status, media_type=media_type, headers=headers)


def _is_known(request: Request, etag: str) -> bool:
    """Whether If-None-Match names what would be sent."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in known or known == ["*"]


def _check_range(request: Request, size: int, etag: str) -> None:
    """Drop a Range that is none, or is for another version, as RFC 9110 has it (13.1.5, 14.2).

    Raises ProblemError where it is not in the file.
    """
    asked = request.headers.get("range", "bytes=0-")
    proper = _RANGES.fullmatch(asked)
    parts = [part.strip().partition("-") for part in asked.removeprefix("bytes=").split(",")] if proper else []
    backwards = any(first and last and int(first) > int(last) for first, _, last in parts)
    if not proper or backwards or request.headers.get("if-range", etag) != etag:
        request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
    elif any(int(first) >= size if first else int(last) == 0 for first, _, last in parts):
        raise ProblemError(
            "range",
            f"the range is {asked[:60]!r}, and the file has {size} bytes; ask for some of those",
            headers={"Content-Range": f"bytes */{size}"},
        )


@router.post(
    "/jobs/{job_id}/meshes",
    status_code=202,
    response_model=Job,
    responses=ABOUT_A_RESULT
    | answers("malformed", "state", "idempotency", "too-large", "queue-full", "quota", "disk-full"),
    tags=["results"],
)
def mesh_again(
    response: Response,
    service: TheService,
    owner: Owner,
    row: FinishedJob,
    options: MeshJobOptions,
    idempotency_key: Annotated[IdempotencyKey | None, Header(description="Repeating it repeats no job.")] = None,
) -> Job:
    """Queue another mesh of the same field, without fitting again: a job of its own, whose parent this one is."""
    return _create_from(service, owner, row, options, response, kind=JobKind.MESH, parent_id=row.id,
                        idempotency_key=idempotency_key)  # fmt: skip


@router.post(
    "/jobs/{job_id}/restart",
    status_code=202,
    response_model=Job,
    responses=_ABOUT_A_JOB | answers("malformed", "idempotency", "too-large", "queue-full", "quota", "disk-full"),
    tags=["jobs"],
)
def restart_job(
    response: Response,
    service: TheService,
    owner: Owner,
    row: TheJob,
    changes: Annotated[RestartOptions, Body()] = _AS_IT_WAS,
    idempotency_key: Annotated[IdempotencyKey | None, Header(description="Repeating it repeats no job.")] = None,
) -> Job:
    """Queue the same job once more, as a job of its own, with other options if you like; nothing is uploaded again."""
    kind = JobKind(row.kind)
    wanted = json.dumps(row.options | changes.model_dump(mode="json", exclude_unset=True)).encode()
    options: JobOptions | MeshJobOptions
    if kind is JobKind.MESH:
        options = _options_of(wanted, MeshJobOptions)
    else:
        options = _options_of(wanted, JobOptions)
    return _create_from(service, owner, row, options, response, kind=kind, parent_id=row.parent_id,
                        idempotency_key=idempotency_key)  # fmt: skip


def _create_from(
    service: Service,
    owner: ApiKey,
    row: Row,
    options: JobOptions | MeshJobOptions,
    response: Response,
    *,
    kind: JobKind,
    **known: Any,
) -> Job:
    """A new job with the files of another: its cloud, or its field where only a mesh is to be made."""
    preset = options.preset if isinstance(options, JobOptions) else row.preset
    check_limits(options, preset, service.settings)
    if service.artifacts.free_bytes() < service.settings.min_free_bytes:
        raise disk_full()
    new = _new_job(
        options,
        preset,
        f"{kind} of {row.id}",
        id=new_id(),
        owner=owner.id,
        kind=kind,
        name=row.name,
        format=row.format,
        **known,
    )
    if kind is JobKind.MESH:
        files = service.artifacts.linking(row.id, row.fitted or 0, new.id)
    else:
        files = service.artifacts.copying(row.id, row.format, new.id)
    try:
        with files:
            return _create(service, owner, new, response)
    except FileNotFoundError:
        raise ProblemError("gone", f"job {row.id} and its files have been removed; upload the cloud again") from None


@router.get("/samples", response_model=SampleList, responses=_ANY, tags=["service"])
def list_samples(_owner: Owner) -> SampleList:
    """Clouds to try things on."""
    return SampleList(
        samples=[
            Sample(name=name, summary=SUMMARIES.get(name, ""), bytes=path.stat().st_size, link=f"/v1/samples/{name}")
            for name, path in samples().items()
        ]
    )


@router.get(
    "/samples/{name}",
    response_class=FileResponse,
    responses=_ANY
    | answers("not-found")
    | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
    tags=["service"],
)
def get_sample(_owner: Owner, name: str) -> Response:
    """One of them, as PLY."""
    path = samples().get(name)
    if path is None:
        raise ProblemError("not-found", f"there is no sample {name[:40]!r}; there are {', '.join(samples())}")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.get("/options", response_model=OptionsInfo, responses=_ANY, tags=["service"])
def get_options(service: TheService, _owner: Owner) -> OptionsInfo:
    """What may be asked for: presets, limits, formats, and the schemas of the options."""
    settings = service.settings
    return OptionsInfo(
        presets={
            cast(Preset, name): PresetInfo(
                summary=preset.summary, steps=preset.fit.steps, resolution=preset.mesh.resolution
            )
            for name, preset in PRESETS.items()
            if preset.fit.steps <= settings.max_steps
        },
        default_preset="standard",
        devices=sorted({worker.device for worker in living(service.store, service.settings.lease_seconds)}),
        limits=ServerLimits(
            upload_bytes=settings.max_upload_bytes,
            points=settings.max_points,
            resolution=settings.max_resolution,
            steps=settings.max_steps,
            queue_length=settings.max_queue,
            jobs_per_key=settings.max_jobs_per_key,
            job_seconds=settings.max_job_seconds,
            query_points=MAX_QUERY_POINTS,
            npz_query_points=settings.max_npz_query_points,
            grid_resolution=settings.max_grid_resolution,
            retention_seconds=settings.retention_seconds,
        ),
        cloud_formats=list(CLOUD_FORMATS),
        mesh_formats=list(get_args(MeshFormat)),
        job_options=JobOptions.model_json_schema(),
        mesh_options=MeshJobOptions.model_json_schema(),
    )


def problem_response(error: ProblemError, path: str) -> JSONResponse:
    """The problem as an answer."""
    body = error.problem.model_dump(exclude_none=True) | {"instance": path}
    return JSONResponse(body, status_code=error.problem.status, headers=error.headers, media_type=MEDIA_TYPE)
