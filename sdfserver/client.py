"""The client of an sdfserver: submit a cloud, follow the job, fetch what it made.

    with Client("http://127.0.0.1:8000") as client:
        client.submit("scan.ply", preset="draft").wait().download("scan.glb")

Lengths are in the cloud's own units; sdf < 0 inside. Every request may be repeated without harm: those that start a job
carry an Idempotency-Key, so that a repeated one finds the job of the first. Hence a broken connection, a restart of the
server and a full queue are waited out, up to `retry_s` seconds from the first failure on; then an error of
sdfserver.errors says why. Nothing here needs torch.
"""

import base64
import hashlib
import io
import ipaddress
import json
import os
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, TypeVar, get_args, overload
from urllib.parse import quote

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

import sdfserver
from sdfserver import schemas
from sdfserver.errors import (
    ApiError,
    BusyError,
    CloudError,
    ConfigError,
    ConnectionFailed,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFoundError,
    ServiceError,
)
from sdfserver.files import known_extension, open_cloud, printable, reason, replacing
from sdfserver.questions import MEANS, What
from sdfserver.schemas import JobState

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sdfserver.cloud import PointCloud

CONNECT_S = 10.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
LEAST_TRIES = 3
"""A try may take longer than all the time for retries: an upload that breaks late is still repeated."""

QUICK_ROWS, SLOW_ROWS = 1 << 18, 1 << 14
"""Points of a request whose answer takes seconds, on a slow server as well."""

_BUSY = (429, 503)
_GONE = (404, 410)
_PASSING = (*_BUSY, 502, 504)

Model = TypeVar("Model", bound=BaseModel)


class Client:
    """A server, and how patiently it is asked. Safe to share among threads.

    url: where the server is, like http://127.0.0.1:8000; a path in front of /v1 is kept.
    api_key: one of the server's keys, if it wants one.
    timeout_s: how long a connection may be silent; an upload or download that moves on may take any time.
    retry_s: how long failures that may pass are waited out; 0 gives up at the first.
    on_retry: told in one line why there is a pause, before each.

    Raises ConfigError for a url or key that cannot be one.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retry_s: float = 30.0,
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self.on_retry = on_retry
        headers = {"User-Agent": f"sdfserver/{sdfserver.__version__}"}
        if api_key is not None:
            if not re.fullmatch(r"[\x21-\x7e]+", api_key):
                raise ConfigError("the API key holds something else than visible ASCII characters; copy it again")
            headers["Authorization"] = f"Bearer {api_key}"
        host = _host(url)
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            trust_env=not _is_loopback(host),  # no proxy stands before this machine itself
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def close(self) -> None:
        """Close the connections; jobs go on."""
        self._http.close()

    def submit(
        self,
        cloud: "str | os.PathLike[str] | PointCloud | ArrayLike | tuple[ArrayLike, ArrayLike]",
        *,
        preset: schemas.Preset = "standard",
        name: str | None = None,
        on_upload: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> "Job":
        """Send a cloud and start its job.

        cloud: a file; or a PointCloud, an (n, 3) array of points, an (n, 6) array of points and normals, or the tuple
        (points, normals).
        name: what the job is called, if not like the file; its extension says the format.
        on_upload: told the bytes sent and their total.
        options: fields of schemas.JobOptions, like device, seed, normals, resolution, trim.

        A file is streamed, never held in memory. Raises CloudError where it cannot be read, ConfigError for an option
        that is unknown or out of range, ApiError where the server refuses.
        """
        body = _options(schemas.JobOptions, {"preset": preset, **options})
        with _upload(cloud) as (stream, own_name):
            size = os.fstat(stream.fileno()).st_size

            def build() -> dict[str, Any]:
                part = _Counted(stream, size, on_upload)
                return {
                    "files": [  # in this order: the server knows the options before the cloud arrives
                        ("options", (None, body, "application/json")),
                        ("cloud", (printable(name or own_name), part, "application/octet-stream")),
                    ]
                }

            response = self._request("POST", "/v1/jobs", build, headers=_submission())
        return Job(self, _parsed(schemas.Job, response))

    def job(self, job_id: str) -> "Job":
        """The job with this id, as it stands. Raises NotFoundError when there is none."""
        return Job(self, _parsed(schemas.Job, self._request("GET", _job_path(job_id))))

    def jobs(self, *, state: JobState | str | None = None, page: int = 100) -> Iterator["Job"]:
        """The jobs that this key may see, newest first, fetched `page` at a time."""
        wanted: dict[str, str | int] = {"limit": page}
        if state is not None:
            wanted["state"] = str(state)
        while True:
            found = _parsed(schemas.JobPage, self._request("GET", "/v1/jobs", params=dict(wanted)))
            yield from (Job(self, status) for status in found.jobs)
            if found.next is None:
                return
            wanted["cursor"] = found.next

    def options(self) -> schemas.OptionsInfo:
        """What the server offers: presets, limits, formats."""
        return _parsed(schemas.OptionsInfo, self._request("GET", "/v1/options"))

    def _request(
        self,
        method: str,
        path: str,
        build: Callable[[], dict[str, Any]] | None = None,
        *,
        deadline: float | None = None,
        **details: Any,
    ) -> httpx.Response:
        """The answer to a request that may be repeated; `build` makes what can be sent only once."""
        patience = _Patience(self, deadline)
        while True:
            timeout = self._timeout(deadline)
            try:
                response = self._http.request(
                    method, path, timeout=timeout, **details, **({} if build is None else build())
                )
            except httpx.RequestError as error:
                failure = self._no_answer(error)
            else:
                if response.is_success:
                    return response
                failure = _refusal(response)
            patience.wait(failure)

    def _timeout(self, deadline: float | None) -> httpx.Timeout:
        left = self.timeout_s if deadline is None else max(0.1, min(self.timeout_s, deadline - time.monotonic()))
        return httpx.Timeout(left, connect=min(CONNECT_S, left))

    def _no_answer(self, error: httpx.RequestError) -> "_Failure":
        text = reason(error)
        if isinstance(error, httpx.LocalProtocolError):
            return _Failure(ConnectionFailed(f"the request could not be sent ({text}); did the file change?"), False)
        message = f"no answer from {printable(self.url)} ({text}); check the address and that the server runs"
        passing = isinstance(error, httpx.TransportError) and "CERTIFICATE_VERIFY_FAILED" not in text
        return _Failure(ConnectionFailed(message), passing and not isinstance(error, httpx.UnsupportedProtocol))


class Job:
    """A job on a server: `id`, and `status` as it was last seen."""

    def __init__(self, client: Client, status: schemas.Job) -> None:
        self._client = client
        self.status = status

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.status.state}>"

    @property
    def id(self) -> str:
        """The server's name of the job."""
        return self.status.id

    def refresh(self) -> schemas.Job:
        """Ask where the job stands, and return it."""
        return self._refresh(None)

    def wait(
        self, on_progress: Callable[[schemas.Job], None] | None = None, *, timeout_s: float | None = None
    ) -> "Job":
        """Follow the job to its end; returns itself when it succeeded.

        on_progress: told the status at each change.

        Raises JobFailed, JobCancelled, and JobTimeout after `timeout_s` seconds. A server that restarts is waited for,
        as long as the client's `retry_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        patience = _Patience(self._client, deadline)
        last_event: str | None = None
        while not self.status.state.final:
            after_s = None
            try:
                with closing(self._events(last_event, deadline)) as events:
                    for event_id, self.status in events:
                        last_event = event_id or last_event  # some events have none
                        patience.reset()
                        if on_progress is not None:
                            on_progress(self.status)
                        if self.status.state.final:
                            return self._outcome()
            except _Cut as cut:
                after_s = cut.after_s
            if deadline is not None and time.monotonic() >= deadline:
                raise self._late(timeout_s)
            # Without its events the job is asked for: between two attempts at them, or each time if they never come.
            seen = self.status
            try:
                self._refresh(deadline)
            except (ConnectionFailed, BusyError) as error:
                if deadline is None or deadline - time.monotonic() > 2 * LONGEST_PAUSE_S:
                    raise
                raise self._late(timeout_s) from error
            if on_progress is not None and self.status != seen:
                on_progress(self.status)
            if not self.status.state.final:
                patience.pause(after_s)
        return self._outcome()

    def cancel(self) -> "Job":
        """Stop the job; one that has ended stays as it is. Returns itself."""
        try:
            self.status = _parsed(schemas.Job, self._client._request("POST", f"{_job_path(self.id)}/cancel"))
        except ApiError as error:
            if error.problem is None or error.problem.status != 409 or not self.refresh().state.final:
                raise
        return self

    def restart(self, **options: Any) -> "Job":
        """Start the same job once more, as another: `options` say what is different, and nothing is uploaded again."""
        return self._start("restart", schemas.RestartOptions, options)

    def delete(self) -> None:
        """Remove the job and its files from the server; no error if they are gone already."""
        try:
            self._client._request("DELETE", _job_path(self.id))
        except NotFoundError as error:
            if error.problem is None or error.problem.status != 410:
                raise

    def download(self, path: str | os.PathLike[str], format: schemas.MeshFormat | None = None) -> Path:  # noqa: A002
        """Write the mesh to `path`, in `format` or that of the extension: completely, or not at all.

        A download that breaks goes on where it broke. Raises OutputError where the file cannot be written.
        """
        chosen = known_extension(Path(path)) if format is None else format
        return self._download("mesh", path, {"format": chosen})

    def download_field(self, path: str | os.PathLike[str]) -> Path:
        """Write the field to `path`, for SignedDistanceField.load: completely, or not at all."""
        return self._download("field", path, {})

    def report(self) -> dict[str, Any]:
        """Settings, timings, losses and the quality of the mesh."""
        response = self._client._request("GET", f"{_job_path(self.id)}/report")
        report = _json(response)
        if not isinstance(report, dict):
            raise _stranger(response)
        return report

    def mesh(self, **options: Any) -> "Job":
        """Start a job for another mesh of this job's field; options are the fields of schemas.MeshJobOptions."""
        return self._start("meshes", schemas.MeshJobOptions, options)

    @overload
    def sdf(self, points: "ArrayLike", *, gradient: Literal[False] = ...) -> "NDArray[np.float64]": ...
    @overload
    def sdf(
        self, points: "ArrayLike", *, gradient: Literal[True]
    ) -> "tuple[NDArray[np.float64], NDArray[np.float64]]": ...
    def sdf(
        self, points: "ArrayLike", *, gradient: bool = False
    ) -> "NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]":
        """The signed distance at (n, 3) points, shape (n,), negative inside; with `gradient`, also that, shape (n, 3).

        Any number of points: they are sent in parts. Raises ConfigError unless they are finite.
        """
        where = _finite_rows(points, "points")
        distances, gradients = np.empty(len(where)), np.empty((len(where) if gradient else 0, 3))
        for start in range(0, len(where), schemas.MAX_QUERY_POINTS):
            part = slice(start, start + schemas.MAX_QUERY_POINTS)
            body = {"points": where[part].tolist(), "gradient": gradient}
            response = self._client._request("POST", f"{_job_path(self.id)}/sdf", json=body)
            answer = _parsed(schemas.SdfResponse, response)
            try:
                distances[part] = answer.distances or ()
                if gradient:
                    gradients[part] = answer.gradients or ()
            except (TypeError, ValueError):
                raise _stranger(response) from None
        return (distances, gradients) if gradient else distances

    def query(
        self, points: "ArrayLike", what: What | Collection[What] = ("distance", "gradient")
    ) -> "dict[str, NDArray[Any]]":
        """What the field says of (n, 3) points, in world units, by name; any number of them: they are sent in parts.

        what: one or more of the names in sdfserver.questions.MEANS, which says what comes of each.

        Beside that `distance_error_mean`, `_p95` and `_max` tell how far the field is from a distance within
        `distance_error_band` of its surface. Raises ConfigError unless the points are finite, ApiError where closest
        points are asked for and there is no surface.
        """
        wanted = [what] if isinstance(what, str) else list(what)
        for name in wanted:
            if name not in MEANS:
                raise ConfigError(f"a field cannot be asked for {name!r}; use one of {', '.join(MEANS)}")
        rows = QUICK_ROWS if set(wanted) <= {"distance", "gradient", "inside"} else SLOW_ROWS
        return self._ask({"points": _finite_rows(points, "points")}, {"what": wanted}, rows)

    def cast(
        self, origins: "ArrayLike", directions: "ArrayLike", *, max_distance: float | None = None
    ) -> "dict[str, NDArray[Any]]":
        """Where rays from (n, 3) origins along (n, 3) directions first cross the surface, as `query`.

        The arrays are those of sdfserver.questions.RAYS_MEAN; NaN where a ray does not hit.
        """
        arrays = {
            "origins": _finite_rows(origins, "origins"),
            "directions": _finite_rows(directions, "directions"),
        }
        if len(arrays["origins"]) != len(arrays["directions"]):
            counts = f"{len(arrays['origins'])} origins and {len(arrays['directions'])} directions"
            raise ConfigError(f"there are {counts}; give as many")
        params = {} if max_distance is None else {"max_distance": str(max_distance)}
        return self._ask(arrays, params, SLOW_ROWS)

    def download_slice(
        self,
        path: str | os.PathLike[str],
        *,
        axis: Literal["x", "y", "z"] = "z",
        at: float | None = None,
        normal: "ArrayLike | None" = None,
        origin: "ArrayLike | None" = None,
        resolution: int = 256,
    ) -> Path:
        """Write where a plane cuts the surface to `path`, as .svg or .dxf: completely, or not at all.

        The plane is axis = at, by default through the middle; or that across `normal` through `origin`.
        """
        params: dict[str, str] = {"format": known_extension(Path(path), get_args(schemas.SliceFormat))}
        params |= {"axis": axis, "resolution": str(resolution)}
        params |= {} if at is None else {"at": repr(float(at))}
        for name, vector in (("normal", normal), ("origin", origin)):
            if vector is not None:
                params[name] = ",".join(repr(float(value)) for value in np.ravel(np.asarray(vector)))
        return self._download("slice", path, params)

    def download_grid(
        self, path: str | os.PathLike[str], *, resolution: int = 128, true_distances: bool = False
    ) -> Path:
        """Write the field at the nodes of a grid to `path`, as NPZ (sdfserver.export.grids says what is in it)."""
        known_extension(Path(path), ("npz",))
        params = {"resolution": str(resolution), "true_distances": str(true_distances).lower()}
        return self._download("grid", path, params)

    def download_onnx(self, path: str | os.PathLike[str]) -> Path:
        """Write the field to `path` as ONNX: points (n, 3) float64 to sdf (n,) and gradient (n, 3), world units."""
        known_extension(Path(path), ("onnx",))
        return self._download("onnx", path, {})

    def _ask(
        self, arrays: "dict[str, NDArray[np.float64]]", params: Mapping[str, Any], rows: int
    ) -> "dict[str, NDArray[Any]]":
        """The answers to all rows of `arrays`, of which some are sent at a time."""
        count, found = len(next(iter(arrays.values()))), []
        for start in range(0, max(count, 1), rows):
            stream = io.BytesIO()
            part: dict[str, Any] = {name: array[start : start + rows] for name, array in arrays.items()}
            np.savez(stream, **part)
            headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
            response = self._client._request(
                "POST", f"{_job_path(self.id)}/sdf.npz", params=params, content=stream.getvalue(), headers=headers
            )
            found.append(_arrays_of(response, min(rows, count - start)))
        return {
            name: np.concatenate([part[name] for part in found]) if array.ndim else array
            for name, array in found[0].items()
        }

    def _refresh(self, deadline: float | None) -> schemas.Job:
        response = self._client._request("GET", _job_path(self.id), deadline=deadline)
        self.status = _parsed(schemas.Job, response)
        return self.status

    def _start(self, how: str, model: type[BaseModel], options: Mapping[str, Any]) -> "Job":
        """A new job made from this one."""
        headers = _submission() | {"Content-Type": "application/json"}
        path, body = f"{_job_path(self.id)}/{how}", _options(model, options)
        return Job(
            self._client, _parsed(schemas.Job, self._client._request("POST", path, content=body, headers=headers))
        )

    def _late(self, timeout_s: float | None) -> JobTimeout:
        name = printable(self.id)
        return JobTimeout(f"job {name} has not ended within {timeout_s} s and goes on; wait longer or cancel it")

    def _outcome(self) -> "Job":
        """The job itself, which succeeded, or its end as an error."""
        name, problem = printable(self.id), self.status.problem
        if self.status.state is JobState.FAILED:
            detail = _line(problem.detail) if problem else "the server does not say why"
            raise JobFailed(f"job {name} failed: {detail}", problem)
        if self.status.state is JobState.CANCELLED:
            raise JobCancelled(f"job {name} was cancelled", problem)
        return self

    def _events(
        self, last_event: str | None, deadline: float | None
    ) -> Generator[tuple[str | None, schemas.Job], None, None]:
        """The id and content of each event, from the one after `last_event` on. Raises _Cut, at the latest when due."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
        if last_event is not None:
            headers["Last-Event-ID"] = last_event
        parser, http, timeout = _EventParser(), self._client._http, self._client._timeout(deadline)
        try:
            with http.stream("GET", f"{_job_path(self.id)}/events", headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    failure = _refusal(response)
                    if failure.passing or response.status_code >= 500:
                        raise _Cut(failure.after_s)
                    raise failure.error
                for chunk in response.iter_bytes():
                    for event_id, data in parser.feed(chunk):
                        yield event_id, _validated(schemas.Job, data, response)
                    if deadline is not None and time.monotonic() >= deadline:
                        raise _Cut
        except httpx.RequestError:
            raise _Cut from None
        raise _Cut

    def _download(self, what: str, path: str | os.PathLike[str], params: Mapping[str, str]) -> Path:
        url = f"{_job_path(self.id)}/{what}"
        patience, client = _Patience(self._client, None), self._client
        etag: str | None = None
        furthest = 0
        with replacing(path) as stream:
            while True:
                have = stream.tell() if etag is not None else 0
                headers = {"Accept-Encoding": "identity"}
                if have and etag is not None:
                    headers |= {"Range": f"bytes={have}-", "If-Range": etag}
                try:
                    with client._http.stream(
                        "GET", url, params=params, headers=headers, follow_redirects=True
                    ) as response:
                        if response.status_code == 200 or _continues(response, have):
                            if response.status_code == 200:
                                _empty(stream)
                            etag = _strong_etag(response)
                            for chunk in response.iter_bytes():
                                stream.write(chunk)
                            if _is_whole(stream, response):
                                return Path(path)
                            etag, furthest = None, 0
                            message = f"the {what} of job {self.id} came damaged; ask for it again"
                            failure = _Failure(ServiceError(message), True)
                            patience.wait(failure)
                            continue
                        response.read()
                        failure = _refusal(response)
                        if response.status_code in (206, 416):  # not the part asked for: start again
                            etag, failure = None, _Failure(failure.error, True)
                except httpx.RequestError as error:
                    failure = client._no_answer(error)
                if stream.tell() > furthest:
                    furthest = stream.tell()
                    patience.reset()
                patience.wait(failure)


# Failures, and when to try again


class _Failure:
    """Why a try failed, whether another may do better, and in how many seconds at the earliest."""

    def __init__(self, error: ServiceError, passing: bool, after_s: float | None = None) -> None:
        self.error, self.passing, self.after_s = error, passing, after_s


class _Cut(Exception):  # noqa: N818 - never leaves this module
    """The events ended before the job did."""

    def __init__(self, after_s: float | None = None) -> None:
        super().__init__()
        self.after_s = after_s


class _Patience:
    """Growing pauses between tries, until the client's `retry_s` is over, or `deadline` by the monotonic clock."""

    def __init__(self, client: Client, deadline: float | None) -> None:
        self.client, self.deadline = client, deadline
        self.reset()

    def reset(self) -> None:
        """There was progress: failures count from here on."""
        self.tries, self.since, self.next_s = 0, 0.0, FIRST_PAUSE_S

    def wait(self, failure: _Failure) -> None:
        """Sleep before another try; raise the failure's error where none is left."""
        if not failure.passing:
            raise failure.error
        now = time.monotonic()
        self.tries += 1
        if self.tries == 1:
            self.since = now
        pause_s, limit_s = self._pause(failure.after_s), self.client.retry_s
        if pause_s > limit_s or (now + pause_s > self.since + limit_s and self.tries >= LEAST_TRIES):
            raise failure.error
        if self.deadline is not None and now + pause_s > self.deadline:
            raise failure.error
        if self.client.on_retry is not None:
            self.client.on_retry(f"{failure.error}; trying again in {pause_s:.1f} s")
        time.sleep(pause_s)

    def pause(self, after_s: float | None) -> None:
        """Sleep, however often, but never beyond the deadline."""
        pause_s = self._pause(after_s)
        if self.deadline is not None:
            pause_s = min(pause_s, max(0.0, self.deadline - time.monotonic()))
        time.sleep(pause_s)

    def _pause(self, after_s: float | None) -> float:
        pause_s = self.next_s * random.uniform(0.75, 1.25)  # noqa: S311 - keeps clients out of step
        self.next_s = min(2 * self.next_s, LONGEST_PAUSE_S)
        return max(pause_s, after_s or 0.0)


def _refusal(response: httpx.Response) -> _Failure:
    status = response.status_code
    try:
        problem = schemas.Problem.model_validate_json(response.content)
    except ValidationError:  # not ours: a proxy's page, perhaps
        told = f"{status} {response.reason_phrase}".strip()
        where = printable(str(response.request.url.copy_with(query=None)))
        hint = f"; use {printable(response.headers.get('location', 'another address'))}" if status < 400 else ""
        problem = schemas.Problem(title=told, status=status, detail=f"{where} answered {told}{hint}")
    kind = BusyError if status in _BUSY else NotFoundError if status in _GONE else ApiError
    after = response.headers.get("retry-after", "")
    after_s = float(after) if re.fullmatch(r"\d{1,9}", after) else None
    passing = status in _PASSING or (status >= 400 and after_s is not None)
    return _Failure(kind(_line(problem.detail), problem), passing, after_s)


def _stranger(response: httpx.Response) -> ApiError:
    where = printable(str(response.request.url.copy_with(query=None)))
    return ApiError(f"{where} does not answer as sdfserver does; check the address and the server's version")


def _line(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey."""
    return printable(" ".join(text.split()))


# What is sent


def _host(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"the url {url!r} cannot be read: {reason(error)}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"the url is {url!r}; it must be like http://127.0.0.1:8000")
    return parsed.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _submission() -> dict[str, str]:
    """One key for all tries at starting one job."""
    return {"Idempotency-Key": str(uuid.uuid4())}


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _options(model: type[BaseModel], given: Mapping[str, Any]) -> str:
    """The options as JSON: those that were given, so that the server's defaults hold for the others."""
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for name, value in given.items()
    }
    try:
        return model.model_validate(plain).model_dump_json(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"there is no option {where!r}; use one of {', '.join(model.model_fields)}") from None
        raise ConfigError(f"{where} is {first['input']!r}: {message}" if where else message) from None


@contextmanager
def _upload(cloud: Any) -> Iterator[tuple[BinaryIO, str]]:
    """The cloud as a file on disk, and the name it goes by."""
    if isinstance(cloud, str | os.PathLike):
        with open_cloud(cloud) as stream:
            yield stream, Path(cloud).name
        return
    arrays = _arrays(cloud)
    with tempfile.TemporaryFile() as stream:
        np.savez(stream, allow_pickle=False, **arrays)
        stream.flush()
        yield stream, "cloud.npz"


def _arrays(cloud: Any) -> "dict[str, NDArray[Any]]":
    """The arrays of an NPZ, by the names that the server knows."""
    if hasattr(cloud, "points"):
        pair = cloud.points, getattr(cloud, "normals", None)
    else:
        pair = cloud if isinstance(cloud, tuple) and len(cloud) == 2 else (cloud, None)
    points, normals = (None if array is None else _numbers(array) for array in pair)
    if points is not None and normals is None and points.ndim == 2 and points.shape[1] == 6:
        points, normals = points[:, :3], points[:, 3:]
    if points is None or points.ndim != 2 or points.shape[1] != 3:
        found = None if points is None else points.shape
        raise CloudError(f"the points have shape {found}; they must be (n, 3), or (n, 6) with normals")
    if normals is not None and normals.shape != points.shape:
        raise CloudError(f"the normals have shape {normals.shape}, the points {points.shape}; both are (n, 3)")
    colors = getattr(cloud, "colors", None)
    if colors is not None and np.shape(colors) != points.shape:
        raise CloudError(f"the colours have shape {np.shape(colors)}, the points {points.shape}; both are (n, 3)")
    known = {"points": points, "normals": normals, "colors": None if colors is None else _numbers(colors)}
    return {name: array for name, array in known.items() if array is not None}


def _numbers(array: Any) -> "NDArray[Any]":
    try:
        numbers = np.asarray(array)
        return numbers if numbers.dtype in (np.float32, np.float64) else numbers.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise CloudError(f"the cloud is no array of numbers ({reason(error)}); give (n, 3) points") from None


def _finite_rows(values: "ArrayLike", what: str) -> "NDArray[np.float64]":
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 3:
        raise ConfigError(f"the {what} have shape {rows.shape}; they must be (n, 3)")
    if not np.isfinite(rows).all():
        raise ConfigError(f"{np.count_nonzero(~np.isfinite(rows).all(axis=1))} {what} are not finite; drop them")
    return rows


class _Counted:
    """A file that says how much of it was read: what httpx needs of one, and no more."""

    def __init__(self, stream: BinaryIO, size: int, on_read: Callable[[int, int], None] | None) -> None:
        self.stream, self.size, self.on_read = stream, size, on_read

    def fileno(self) -> int:
        return self.stream.fileno()

    def seek(self, offset: int) -> int:
        return self.stream.seek(offset)

    def read(self, size: int = -1) -> bytes:
        try:
            chunk = self.stream.read(size)
        except OSError as error:
            raise CloudError(f"the cloud cannot be read: {reason(error)}") from None
        if self.on_read is not None:
            self.on_read(self.stream.tell(), self.size)
        return chunk


# What comes back


def _arrays_of(response: httpx.Response, rows: int) -> "dict[str, NDArray[Any]]":
    """The arrays of an answer: of so many rows, or single numbers."""
    try:
        with np.load(io.BytesIO(response.content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception:  # noqa: BLE001 - zipfile raises a dozen kinds
        raise _stranger(response) from None
    if any(array.ndim and len(array) != rows for array in arrays.values()):
        raise _stranger(response)
    return arrays


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError:
        raise _stranger(response) from None


def _parsed(model: type[Model], response: httpx.Response) -> Model:
    return _validated(model, response.content, response)


def _validated(model: type[Model], data: bytes, response: httpx.Response) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError:
        raise _stranger(response) from None


class _EventParser:
    """Server-sent events out of bytes (WHATWG HTML, 9.2.6): the id and the data of each that has data."""

    def __init__(self) -> None:
        self.rest = b""
        self.halved = False
        self.last_id: str | None = None
        self.data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[tuple[str | None, bytes]]:
        """The events that `chunk` completes."""
        if self.halved:  # the end of a line may come in two chunks
            chunk = chunk.removeprefix(b"\n")
        self.halved = chunk.endswith(b"\r")
        # Only these three end a line: str.splitlines would also cut at characters that JSON holds as they are.
        *lines, self.rest = re.split(rb"\r\n|\n|\r", self.rest + chunk)
        found = []
        for line in lines:
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if not line and self.data:
                found.append((self.last_id, b"\n".join(self.data)))
                self.data = []
            elif name == b"data":
                self.data.append(value)
            elif name == b"id" and b"\0" not in value:
                self.last_id = value.decode("latin-1")
        return found


def _strong_etag(response: httpx.Response) -> str | None:
    """The tag by which the download may go on, if it is of the very bytes."""
    etag: str | None = response.headers.get("etag")
    coded = response.headers.get("content-encoding", "identity") != "identity"
    return None if etag is None or etag.startswith("W/") or coded else etag


def _is_whole(stream: BinaryIO, response: httpx.Response) -> bool:
    """Whether the stream has what the server says its file has (RFC 9530), where it says so."""
    said = [answer.headers.get("repr-digest", "") for answer in (response, *response.history)]
    digest = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", " ".join(said))
    if digest is None:
        return True
    stream.seek(0)
    whole = hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]
    stream.seek(0, os.SEEK_END)
    return whole == base64.b64decode(digest[1])


def _continues(response: httpx.Response, have: int) -> bool:
    """Whether the answer is what comes after the first `have` bytes."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {have}-")


def _empty(stream: BinaryIO) -> None:
    stream.seek(0)
    stream.truncate()
