"""The client against a server on this machine that fails as it is told: what is repeated, what is not, what is said."""

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sdfserver import cli, client, schemas
from sdfserver.client import Client
from sdfserver.cloud import PointCloud
from sdfserver.errors import (
    ApiError,
    BusyError,
    CloudError,
    CloudFormatError,
    ConfigError,
    ConnectionFailed,
    JobCancelled,
    JobFailed,
    JobTimeout,
    NotFoundError,
    OutputError,
)
from sdfserver.formats.arrays import read_npz

REPORT = {
    "cloud": {"points": 9, "strays_dropped": 0, "outliers_removed": 0},
    "mesh": {"vertices": 4, "faces": 4, "watertight": True, "components": 1, "genus": 0, "volume": 1.0},
    "input_to_mesh": {"mean": 0.00123, "max": 0.5},
    "seconds": {"total": 1.0},
}
MESH = np.random.default_rng(0).bytes(300_000)


def job_of(job_id: str = "j1", state: str = "queued", **known: Any) -> schemas.Job:
    base = f"/v1/jobs/{job_id}"
    links = schemas.Links(self=base, events=f"{base}/events", cancel=f"{base}/cancel")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    known = {"kind": "reconstruction", "name": "knot.ply", "options": {}, "created_at": now, "links": links} | known
    return schemas.Job(id=job_id, state=state, **known)


def problem(status: int, detail: str, **headers: str) -> Response:
    body = {"type": "about:blank", "title": "T", "status": status, "detail": detail}
    return JSONResponse(body, status, headers, "application/problem+json")


async def lost(scope: Any, receive: Any, send: Any) -> None:
    """An answer that breaks off: what was asked for has been done."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b"{", "more_body": True})
    raise ConnectionAbortedError


class Service:
    """A server with a queue of fake jobs.

    refusals: answers given before anything was read or done; losses: answers given instead of the right one after it
    was done; both by request, in order. events: what a job goes through. cuts: after how many events, or bytes of a
    download, each connection breaks.
    """

    def __init__(self) -> None:
        self.refusals: dict[str, list[Any]] = defaultdict(list)
        self.losses: dict[str, list[Any]] = defaultdict(list)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.jobs: dict[str, schemas.Job] = {}
        self.clouds: list[tuple[str, bytes, dict[str, Any]]] = []
        self.queries: list[int] = []
        self.events: list[schemas.Job] = [job_of(state="succeeded", progress=1.0)]
        self.line_end = "\r\n"
        self.cuts: list[int] = []
        self.etag = '"one"'
        self.mesh = MESH
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        call = f"{request.method} {request.url.path}"
        self.requests.append((call, dict(request.headers)))
        if self.refusals[call]:
            await self.refusals[call].pop(0)(scope, receive, send)
            return
        try:
            answer = await self.answer(call, request)
        except ClientDisconnect:
            return
        if self.losses[call]:
            answer = self.losses[call].pop(0)
        await answer(scope, receive, send)

    async def answer(self, call: str, request: Request) -> Any:
        if call == "POST /v1/jobs":
            return await self.submitted(request)
        if call == "GET /v1/jobs":
            start = int(request.query_params.get("cursor", 0))
            end = start + int(request.query_params["limit"])
            jobs = [job_of(f"j{i}") for i in range(5)]
            page = schemas.JobPage(jobs=jobs[start:end], next=str(end) if end < 5 else None)
            return Response(page.model_dump_json())
        match = re.fullmatch(r"(\w+) /v1/jobs/(\w+)/?(\w*)", call)
        if match is None or match[2] == "none":
            return problem(404, "there is no such job")
        return await getattr(self, f"{match[1].lower()}_{match[3] or 'job'}")(request)

    async def submitted(self, request: Request) -> Response:
        key = request.headers["idempotency-key"]
        form = await request.form()
        assert list(form) == ["options", "cloud"]
        file = form["cloud"]
        if key not in self.jobs:
            self.clouds.append((file.filename, await file.read(), json.loads(form["options"])))
            self.jobs[key] = job_of(f"j{len(self.jobs) + 1}")
        await form.close()
        return Response(self.jobs[key].model_dump_json(), 202)

    async def get_job(self, request: Request) -> Response:
        return Response(self.events[0].model_dump_json() if self.events else b"?")

    async def get_events(self, request: Request) -> Response:
        start = int(request.headers.get("last-event-id", -1)) + 1
        cut = self.cuts.pop(0) if self.cuts else None

        async def stream() -> Any:
            yield f": hello{self.line_end * 2}"
            for index, event in list(enumerate(self.events))[start : None if cut is None else start + cut]:
                lines = [f"id: {index}", "event: progress", f"data: {event.model_dump_json()}", "", ""]
                yield self.line_end.join(lines)
            if cut is not None:
                raise ConnectionAbortedError

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def post_cancel(self, request: Request) -> Response:
        self.events = [job_of(state="cancelled")]
        return Response(self.events[0].model_dump_json())

    async def delete_job(self, request: Request) -> Response:
        return Response(status_code=204)

    async def get_report(self, request: Request) -> Response:
        return JSONResponse(REPORT)

    async def get_field(self, request: Request) -> Response:
        return Response(b"a field")

    async def get_mesh(self, request: Request) -> Response:
        start, etag, status = 0, self.etag, 200
        if "range" in request.headers and request.headers["if-range"] == etag:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", request.headers["range"])[1]), 206
        body, cut = self.mesh[start:], self.cuts.pop(0) if self.cuts else None
        headers = {"content-length": str(len(body)), "etag": etag}
        if status == 206:
            headers["content-range"] = f"bytes {start}-{len(self.mesh) - 1}/{len(self.mesh)}"

        async def stream() -> Any:
            yield body[:cut]
            if cut is not None:
                await asyncio.sleep(0.05)
                raise ConnectionAbortedError

        return StreamingResponse(stream(), status, headers)

    async def post_meshes(self, request: Request) -> Response:
        key = request.headers["idempotency-key"]
        options = schemas.MeshJobOptions.model_validate_json(await request.body())
        job = job_of("child", kind="mesh", parent_id="j1", options=options.model_dump())
        return Response(self.jobs.setdefault(key, job).model_dump_json(), 202)

    async def post_restart(self, request: Request) -> Response:
        changes = schemas.RestartOptions.model_validate_json(await request.body())
        job = job_of("again", options={"seed": 0} | changes.model_dump(exclude_unset=True))
        return Response(self.jobs.setdefault(request.headers["idempotency-key"], job).model_dump_json(), 202)

    async def post_sdf(self, request: Request) -> Response:
        asked = schemas.SdfRequest.model_validate_json(await request.body())
        self.queries.append(len(asked.points))
        found = schemas.SdfResponse(
            distances=[x for x, _, _ in asked.points], gradients=asked.points if asked.gradient else None
        )
        return Response(found.model_dump_json())

    def calls(self, call: str) -> list[dict[str, str]]:
        """The headers of each such request."""
        return [headers for name, headers in self.requests if name == call]


@contextmanager
def running(app: Any, listener: socket.socket) -> Iterator[None]:
    config = uvicorn.Config(app, log_level=60, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with running(service, listener):
            yield service


@pytest.fixture
def api(service: Service) -> Iterator[Client]:
    with Client(service.url, timeout_s=10, retry_s=5) as api:
        yield api


@pytest.fixture
def knot(data: Path) -> Path:
    return data / "knot.ply"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.05)
    for name in ("SDFSERVER_URL", "SDFSERVER_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert text.startswith("sdfserver: ")
    return text


# Submitting


def test_the_cloud_arrives_as_it_is_and_after_its_options(service: Service, api: Client, knot: Path) -> None:
    job = api.submit(knot, preset="draft", seed=7, normals="estimate", viewpoint=np.array([1, 2.5, 3]))
    assert (job.id, job.status.state) == ("j1", "queued")
    ((name, content, options),) = service.clouds
    assert (name, content) == ("knot.ply", knot.read_bytes())
    assert options == {"preset": "draft", "seed": 7, "normals": "estimate", "viewpoint": [1.0, 2.5, 3.0]}


@pytest.mark.parametrize("fault", [lost, problem(503, "starting"), problem(429, "full", **{"Retry-After": "0"})])
def test_a_submission_whose_answer_fails_is_not_made_twice(
    service: Service, api: Client, knot: Path, fault: Any
) -> None:
    service.losses["POST /v1/jobs"] = [fault, fault]
    assert api.submit(knot).id == "j1"
    assert len(service.clouds) == 1
    keys = {headers["idempotency-key"] for headers in service.calls("POST /v1/jobs")}
    assert (len(service.calls("POST /v1/jobs")), len(keys)) == (3, 1)


def test_a_repeated_upload_starts_at_the_beginning(service: Service, api: Client, tmp_path: Path) -> None:
    cloud = tmp_path / "large.xyz"
    cloud.write_bytes(b"0 0 0 0 0 1\n" * 100_000)
    service.refusals["POST /v1/jobs"] = [lost]
    api.submit(cloud)
    assert service.clouds[0][1] == cloud.read_bytes()


def test_two_submissions_are_two_jobs(api: Client, knot: Path) -> None:
    assert [api.submit(knot).id, api.submit(knot).id] == ["j1", "j2"]


def test_a_server_that_starts_late_is_waited_for(knot: Path) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    service = Service()
    found: list[str] = []
    with Client(f"http://127.0.0.1:{port}", on_retry=told.append) as api:
        thread = threading.Thread(target=lambda: found.append(api.submit(knot).id))
        thread.start()
        while not told:
            time.sleep(0.01)
        with socket.create_server(("127.0.0.1", port)) as listener, running(service, listener):
            thread.join(20)
    assert found == ["j1"]
    assert "Connection refused" in told[0]
    assert "trying again in" in told[0]


def test_nobody_there_is_an_error_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    start = time.monotonic()
    with Client(f"http://127.0.0.1:{port}", retry_s=0.2) as api, pytest.raises(ConnectionFailed, match=f":{port}"):
        api.options()
    assert 0.1 < time.monotonic() - start < 5


def test_a_long_retry_after_is_not_sat_out(service: Service, api: Client, knot: Path) -> None:
    service.refusals["POST /v1/jobs"] = [problem(429, "the queue is full", **{"Retry-After": "600"})]
    start = time.monotonic()
    with pytest.raises(BusyError, match="the queue is full") as caught:
        api.submit(knot)
    assert caught.value.problem.status == 429
    assert time.monotonic() - start < 3


def test_a_short_retry_after_is_kept(service: Service, api: Client) -> None:
    service.refusals["GET /v1/jobs/j1"] = [problem(503, "starting", **{"Retry-After": "1"})]
    start = time.monotonic()
    api.job("j1")
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    ("status", "kind"), [(400, ApiError), (401, ApiError), (404, NotFoundError), (410, NotFoundError), (422, ApiError)]
)
def test_a_refusal_carries_the_problem_and_is_not_repeated(
    service: Service, api: Client, knot: Path, status: int, kind: type[ApiError]
) -> None:
    service.refusals["POST /v1/jobs"] = [problem(status, "what is wrong\nand \x1b[31mwhat to do")]
    with pytest.raises(ApiError) as caught:
        api.submit(knot)
    assert type(caught.value) is kind
    assert str(caught.value) == "what is wrong and \\x1b[31mwhat to do"
    assert caught.value.problem.status == status
    assert len(service.calls("POST /v1/jobs")) == 1


def test_a_refusal_before_the_upload_ends_is_heard(service: Service, api: Client, tmp_path: Path) -> None:
    cloud = tmp_path / "large.xyz"
    cloud.write_bytes(b"0 0 0 0 0 1\n" * 2_000_000)
    service.refusals["POST /v1/jobs"] = [problem(413, "24000000 bytes are more than 1000")]
    with pytest.raises(ApiError, match="more than 1000"):
        api.submit(cloud)
    assert len(service.calls("POST /v1/jobs")) == 1


def test_an_answer_that_is_no_problem_is_described(service: Service, api: Client) -> None:
    service.refusals["GET /v1/jobs/j1"] = [Response("<html>", 500)]
    with pytest.raises(ApiError, match="/v1/jobs/j1 answered 500 Internal Server Error") as caught:
        api.job("j1")
    assert caught.value.problem.status == 500
    service.refusals["GET /v1/jobs/j1"] = [Response("<html>", 200)]
    with pytest.raises(ApiError, match="does not answer as sdfserver does"):
        api.job("j1")


def test_the_upload_is_counted(api: Client, knot: Path) -> None:
    seen: list[tuple[int, int]] = []
    api.submit(knot, on_upload=lambda sent, total: seen.append((sent, total)))
    size = knot.stat().st_size
    assert seen[-1] == (size, size)
    assert [sent for sent, _ in seen] == sorted(sent for sent, _ in seen)


POINTS = np.arange(12.0).reshape(4, 3)
NORMALS = np.eye(3)[[0, 1, 2, 0]].astype(np.float32)


@pytest.mark.parametrize(
    ("cloud", "normals"),
    [
        (POINTS, None),
        (POINTS.tolist(), None),
        (POINTS.astype(np.int32), None),
        ((POINTS, NORMALS), NORMALS),
        (np.hstack([POINTS, NORMALS]), NORMALS),
        (PointCloud(points=POINTS, normals=NORMALS.astype(np.float64)), NORMALS),
    ],
)
def test_arrays_arrive_as_a_cloud(service: Service, api: Client, cloud: Any, normals: Any) -> None:
    api.submit(cloud, normals="estimate")
    name, content, _ = service.clouds[0]
    read = read_npz(content)
    assert name == "cloud.npz"
    assert np.array_equal(read.points, POINTS)
    assert read.normals is None if normals is None else np.array_equal(read.normals, normals)


def test_colours_arrive_with_a_cloud(service: Service, api: Client) -> None:
    colors = np.arange(12, dtype=np.uint8).reshape(4, 3)
    api.submit(PointCloud(points=POINTS, normals=NORMALS.astype(np.float64), colors=colors))
    assert np.array_equal(read_npz(service.clouds[0][1]).colors, colors)
    with pytest.raises(CloudError, match=r"colours have shape \(3, 3\)"):
        api.submit(PointCloud(points=POINTS, colors=colors[:3]))


@pytest.mark.parametrize(
    ("cloud", "kind", "said"),
    [
        ("none.ply", CloudError, "does not exist"),
        (".", CloudError, "is a folder"),
        ("empty.ply", CloudFormatError, "empty"),
        (np.zeros((4, 2)), CloudError, r"shape \(4, 2\)"),
        ((POINTS, NORMALS[:2]), CloudError, r"shape \(2, 3\)"),
        ([["a", "b", "c"]], CloudError, "no array of numbers"),
    ],
)
def test_a_cloud_that_cannot_be_sent_is_not(
    service: Service, api: Client, tmp_path: Path, cloud: Any, kind: type[CloudError], said: str
) -> None:
    (tmp_path / "empty.ply").touch()
    with pytest.raises(kind, match=said):
        api.submit(tmp_path / cloud if isinstance(cloud, str) else cloud)
    assert service.requests == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 4}, "resolution is 4"),
        ({"resolutoin": 64}, "there is no option 'resolutoin'; use one of resolution, "),
        ({"viewpoint": [0, 0, 1]}, "without normals=estimate"),
        ({"preset": "best"}, "preset is 'best'"),
    ],
)
def test_an_option_out_of_range_is_not_sent(
    service: Service, api: Client, knot: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        api.submit(knot, **options)
    assert service.requests == []


def test_the_key_is_sent_and_never_shown(service: Service) -> None:
    with Client(service.url, api_key="secret") as api:
        job = api.job("j1")
        assert "secret" not in repr(api) + repr(job)
    assert service.requests[0][1]["authorization"] == "Bearer secret"
    with pytest.raises(ConfigError, match="visible ASCII") as caught:
        Client(service.url, api_key="sec\nret")
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:b"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        Client(url)


# Following

RUN = [
    job_of(state="queued", queue_position=1),
    *(job_of(state="running", stage="fit", progress=p, step=int(100 * p), steps=100) for p in (0.1, 0.4, 0.7)),
    job_of(state="succeeded", progress=1.0, name="a\u2028b \x85.ply"),
]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_every_event_is_seen_once_and_in_order(service: Service, api: Client, line_end: str) -> None:
    service.events, service.line_end = RUN, line_end
    seen: list[schemas.Job] = []
    job = api.job("j1")
    assert job.wait(seen.append) is job
    assert seen == RUN
    assert job.status.state.final


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_events_may_arrive_in_any_pieces(line_end: bytes, size: int) -> None:
    lines = [
        b": hello",
        b"id: 7",
        b"event: state",
        b"data: {",
        b"data:}",
        b"",
        b"",
        b"retry: 5",
        b"data: 2",
        b"",
        b"data: 3",
    ]
    text = line_end.join(lines)
    parser = client._EventParser()
    found = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
    assert found == [("7", b"{\n}"), ("7", b"2")]


def test_events_that_break_off_go_on_where_they_were(service: Service, api: Client) -> None:
    service.events, service.cuts = RUN, [2, 1, 1]
    job, seen = api.job("j1"), []
    service.get_job = lambda request: still(seen)  # type: ignore[method-assign]
    job.wait(seen.append)
    assert seen == RUN
    asked = [headers.get("last-event-id") for headers in service.calls("GET /v1/jobs/j1/events")]
    assert asked == [None, "1", "2", "3"]


def test_an_event_without_id_does_not_turn_back_the_clock(service: Service, api: Client) -> None:
    asked: list[str | None] = []

    async def events(request: Request) -> Response:
        asked.append(request.headers.get("last-event-id"))
        lines = {1: f"id: 5\ndata: {RUN[0].model_dump_json()}\n\n", 3: f"data: {RUN[-1].model_dump_json()}\n\n"}
        return Response(lines.get(len(asked), f"event: queue\ndata: {RUN[0].model_dump_json()}\n\n"))

    service.get_events = events  # type: ignore[method-assign]
    service.events = [job_of()]
    api.job("j1").wait()
    assert asked == [None, "5", "5"]


async def still(seen: list[schemas.Job]) -> Response:
    return Response(seen[-1].model_dump_json())


def test_a_job_without_events_is_asked_for_until_it_ends(service: Service, api: Client) -> None:
    service.refusals["GET /v1/jobs/j1/events"] = [problem(503, "no"), Response("no", 500), lost] * 10
    states = iter([job_of(), *RUN[1:]])

    async def get_job(request: Request) -> Response:
        return Response(next(states).model_dump_json())

    service.get_job = get_job  # type: ignore[method-assign]
    seen: list[schemas.Job] = []
    api.job("j1").wait(seen.append)
    assert seen == RUN[1:]


def test_a_server_that_restarts_is_waited_for(service: Service, api: Client) -> None:
    service.events, service.cuts = RUN, [2]
    job = api.job("j1")
    service.refusals["GET /v1/jobs/j1"] = [lost, problem(503, "starting"), problem(502, "a proxy")]
    assert job.wait().status.state == "succeeded"


def test_a_server_that_stays_away_is_an_error(service: Service) -> None:
    with Client(service.url, retry_s=0.1) as api:
        job = api.job("j1")
        service.cuts = [0]
        service.refusals["GET /v1/jobs/j1"] = [lost] * 1000
        job.status = job_of()
        with pytest.raises(ConnectionFailed):
            job.wait()


def test_a_failed_job_raises_its_problem(service: Service, api: Client) -> None:
    reason = schemas.Problem(title="T", status=422, detail="it has no normals; estimate them")
    service.events = [job_of(state="running"), job_of(state="failed", problem=reason)]
    job = api.job("j1")
    for _ in range(2):
        with pytest.raises(JobFailed, match="job j1 failed: it has no normals; estimate them") as caught:
            job.wait()
        assert caught.value.problem == reason


def test_a_cancelled_job_raises(service: Service, api: Client) -> None:
    service.events = [job_of(state="running")]
    job = api.job("j1")
    assert job.cancel() is job
    with pytest.raises(JobCancelled, match="job j1 was cancelled"):
        job.wait()


def test_cancelling_what_has_ended_changes_nothing(service: Service, api: Client) -> None:
    job = api.job("j1")
    service.refusals["POST /v1/jobs/j1/cancel"] = [problem(409, "it has ended")]
    assert job.cancel().status.state == "succeeded"
    service.events = [job_of(state="running")]
    service.refusals["POST /v1/jobs/j1/cancel"] = [problem(409, "not now")]
    with pytest.raises(ApiError, match="not now"):
        job.cancel()


@pytest.mark.parametrize("silent", [True, False])
def test_patience_ends_but_the_job_goes_on(service: Service, api: Client, silent: bool) -> None:
    service.events = [job_of(state="running")]
    job = api.job("j1")

    async def events(request: Request) -> Response:
        async def stream() -> Any:
            for _ in range(200):
                yield ": hello\n\n"
                await asyncio.sleep(1 if silent else 0.01)

        return StreamingResponse(stream())

    service.get_events = events  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises(JobTimeout, match=r"within 0.3 s and goes on"):
        job.wait(timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 2
    assert service.calls("POST /v1/jobs/j1/cancel") == []


def test_an_error_of_the_callback_reaches_the_caller(service: Service, api: Client) -> None:
    service.events = RUN
    job = api.job("j1")
    with pytest.raises(ZeroDivisionError):
        job.wait(lambda status: 1 // 0)


# Fetching


def test_the_mesh_arrives_whole(service: Service, api: Client, tmp_path: Path) -> None:
    assert api.job("j1").download(tmp_path / "mesh.glb") == tmp_path / "mesh.glb"
    assert (tmp_path / "mesh.glb").read_bytes() == MESH


def test_a_broken_download_goes_on_where_it_broke(service: Service, api: Client, tmp_path: Path) -> None:
    service.cuts = [100_000, 50_000, 0]
    api.job("j1").download(tmp_path / "mesh.ply")
    assert (tmp_path / "mesh.ply").read_bytes() == MESH
    asked = [(headers.get("range"), headers.get("if-range")) for headers in service.calls("GET /v1/jobs/j1/mesh")]
    assert asked[1:] == [("bytes=100000-", '"one"'), ("bytes=150000-", '"one"'), ("bytes=150000-", '"one"')]


def test_a_mesh_that_changed_is_fetched_from_the_start(service: Service, api: Client, tmp_path: Path) -> None:
    service.cuts = [100_000]
    serve = service.get_mesh

    async def changing(request: Request) -> Response:
        answer = await serve(request)
        service.etag, service.mesh = '"two"', b"another"
        return answer

    service.get_mesh = changing  # type: ignore[method-assign]
    api.job("j1").download(tmp_path / "mesh.ply")
    assert (tmp_path / "mesh.ply").read_bytes() == b"another"


def test_a_weak_tag_is_not_trusted(service: Service, api: Client, tmp_path: Path) -> None:
    service.etag, service.cuts = 'W/"one"', [100_000]
    api.job("j1").download(tmp_path / "mesh.ply")
    assert (tmp_path / "mesh.ply").read_bytes() == MESH
    assert ["range" in headers for headers in service.calls("GET /v1/jobs/j1/mesh")] == [False, False]


def test_a_download_that_fails_leaves_what_was_there(service: Service, tmp_path: Path) -> None:
    mesh = tmp_path / "mesh.ply"
    mesh.write_text("before")
    service.etag, service.cuts = 'W/"one"', [1000] * 1000
    with Client(service.url, retry_s=0.1) as api, pytest.raises(ConnectionFailed):
        api.job("j1").download(mesh)
    service.refusals["GET /v1/jobs/j1/mesh"] = [problem(409, "it has not succeeded")]
    with Client(service.url) as api, pytest.raises(ApiError, match="it has not succeeded"):
        api.job("j1").download(mesh)
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.ply"]
    assert mesh.read_text() == "before"


def test_a_format_nobody_knows_is_not_asked_for(service: Service, api: Client, tmp_path: Path) -> None:
    job = api.job("j1")
    with pytest.raises(OutputError, match=r"'\.doc' is not a known format"):
        job.download(tmp_path / "mesh.doc")
    job.download(tmp_path / "mesh.doc", format="stl")
    assert len(service.calls("GET /v1/jobs/j1/mesh")) == 1


def test_the_field_and_the_report_arrive(service: Service, api: Client, tmp_path: Path) -> None:
    job = api.job("j1")
    assert job.report() == REPORT
    assert job.download_field(tmp_path / "f.safetensors").read_bytes() == b"a field"


def test_distances_come_back_in_order_however_many(
    service: Service, api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "MAX_QUERY_POINTS", 100)
    points = np.random.default_rng(0).normal(size=(250, 3))
    job = api.job("j1")
    assert np.array_equal(job.sdf(points), points[:, 0])
    assert service.queries == [100, 100, 50]
    distances, gradients = job.sdf(points, gradient=True)
    assert np.array_equal(distances, points[:, 0])
    assert np.array_equal(gradients, points)
    assert job.sdf(np.empty((0, 3))).shape == (0,)
    for wrong, said in ((np.zeros(3), "shape"), ([[0, 0, np.nan]], "1 points are not finite")):
        with pytest.raises(ConfigError, match=said):
            job.sdf(wrong)


def test_another_mesh_is_a_job_of_its_own_and_made_once(service: Service, api: Client) -> None:
    service.losses["POST /v1/jobs/j1/meshes"] = [lost]
    child = api.job("j1").mesh(resolution=64, level=0.5)
    assert (child.id, child.status.parent_id) == ("child", "j1")
    assert child.status.options["resolution"] == 64
    assert len(service.jobs) == 1


def test_a_job_is_done_again_once_with_what_is_different(service: Service, api: Client) -> None:
    service.losses["POST /v1/jobs/j1/restart"] = [lost]
    again = api.job("j1").restart(normals="estimate")
    assert (again.id, again.status.options) == ("again", {"seed": 0, "normals": "estimate"})
    assert len(service.jobs) == 1
    with pytest.raises(ConfigError, match="colour"):
        api.job("j1").restart(colour="red")


def test_jobs_come_page_by_page(service: Service, api: Client) -> None:
    assert [job.id for job in api.jobs(page=2)] == ["j0", "j1", "j2", "j3", "j4"]
    assert len(service.calls("GET /v1/jobs")) == 3


def test_deleting_what_is_gone_is_no_error(service: Service, api: Client) -> None:
    job = api.job("j1")
    job.delete()
    service.refusals["DELETE /v1/jobs/j1"] = [lost, problem(410, "removed")]
    job.delete()
    service.refusals["DELETE /v1/jobs/j1"] = [problem(404, "not yours")]
    with pytest.raises(NotFoundError):
        job.delete()


def test_the_client_loads_nothing_heavy() -> None:
    heavy = {"torch", "scipy", "skimage", "trimesh", "open3d", "fastapi", "typer"}
    code = f"import sys, sdfserver.client; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# The command


def test_submit_writes_the_mesh_the_field_and_the_report(
    service: Service, knot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh, field, report = tmp_path / "a.glb", tmp_path / "a.safetensors", tmp_path / "a.json"
    call = ["submit", str(knot), "-o", str(mesh), "--field", str(field), "--report", str(report), "--url", service.url]
    assert cli.main(call) == 0
    assert (mesh.read_bytes(), field.read_bytes()) == (MESH, b"a field")
    assert json.loads(report.read_text()) == REPORT
    out, err = capsys.readouterr()
    assert out == ""
    assert "4 faces, watertight, genus 0; the points lie 0.00123 from it" in one_line(err)


def test_every_option_reaches_the_server(
    service: Service, knot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDFSERVER_URL", service.url)
    monkeypatch.setenv("SDFSERVER_API_KEY", "from-the-environment")
    options = (
        "--preset fine --device cpu --seed 7 --normals estimate --viewpoint 0,-2.5,1 --remove-outliers --resolution 64 "
        "--level -0.5 --trim 0.25 --min-component 0.1 --faces 9 --priority 3 --quiet"
    )
    assert cli.main(["submit", str(knot), "-o", str(tmp_path / "a.obj"), *options.split()]) == 0
    assert schemas.JobOptions(**service.clouds[0][2]) == schemas.JobOptions(
        preset="fine",
        device="cpu",
        seed=7,
        normals="estimate",
        viewpoint=[0, -2.5, 1],
        remove_outliers=True,
        resolution=64,
        level=-0.5,
        trim=0.25,
        min_component=0.1,
        faces=9,
        priority=3,
    )
    assert cli.main(["submit", str(knot), "-o", str(tmp_path / "a.obj"), "--sharp", "--quiet"]) == 0
    assert schemas.JobOptions(**service.clouds[1][2]) == schemas.JobOptions(sharp=True)
    assert {headers["authorization"] for _, headers in service.requests} == {"Bearer from-the-environment"}
    assert capsys.readouterr() == ("", "")


def test_a_shell_reaches_the_server(service: Service, knot: Path, tmp_path: Path) -> None:
    call = ["submit", str(knot), "-o", str(tmp_path / "a.stl"), "--url", service.url, "--shell", "0.5", "--quiet"]
    assert cli.main(call) == 0
    assert schemas.JobOptions(**service.clouds[0][2]).shell == 0.5


def test_the_key_may_come_from_a_file_and_not_from_an_option(
    service: Service, knot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    call = ["submit", str(knot), "-o", str(tmp_path / "a.ply"), "--url", service.url]
    assert cli.main([*call, "--api-key-file", str(tmp_path / "key")]) == 0
    assert {headers["authorization"] for _, headers in service.requests} == {"Bearer from-a-file"}
    assert cli.main([*call, "--api-key", "x"]) == 2


@pytest.mark.parametrize(
    ("refusal", "code"),
    [(problem(status, "what is wrong", **{"Retry-After": "999"} if status == 429 else {}), code)
     for status, code in ((400, 2), (401, 2), (403, 2), (413, 2), (415, 2), (422, 2), (404, 1), (429, 1), (500, 1))],
)  # fmt: skip
def test_a_refusal_is_one_line_and_its_code(
    service: Service, knot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Any, code: int
) -> None:
    service.refusals["POST /v1/jobs"] = [refusal]
    assert cli.main(["submit", str(knot), "-o", str(tmp_path / "a.ply"), "--url", service.url]) == code
    assert one_line(capsys.readouterr().err) == "sdfserver: error: what is wrong\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "code"), [(422, 2), (500, 1)])
def test_a_job_that_fails_exits_2_if_the_cloud_is_at_fault(
    service: Service, knot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    reason = schemas.Problem(title="T", status=status, detail="what went wrong")
    service.events = [job_of(state="failed", problem=reason)]
    assert cli.main(["submit", str(knot), "-o", str(tmp_path / "a.ply"), "--url", service.url]) == code
    assert one_line(capsys.readouterr().err) == "sdfserver: error: job j1 failed: what went wrong\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}/none.ply", "-o", "{out}"], "does not exist"),
        (["{knot}", "-o", "{folder}/mesh.doc"], "'.doc' is not a known format"),
        (["{knot}", "-o", "{out}", "--resolution", "4"], "resolution is 4"),
        (["{knot}", "-o", "{out}", "--seed", "9223372036854775808"], "below 2^63"),
        (["{knot}", "-o", "{out}", "--viewpoint", "1,2,3"], "--normals estimate"),
        (["{knot}", "-o", "{out}", "--priority", "11"], "--priority"),
        (["{knot}", "-o", "{out}", "--url", "here"], "it must be like http://127.0.0.1:8000"),
        (["{knot}", "-o", "{out}", "--api-key-file", "{folder}/none"], "cannot be read"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    service: Service,
    knot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("SDFSERVER_URL", service.url)
    places = {"knot": str(knot), "out": str(tmp_path / "mesh.ply"), "folder": str(tmp_path)}
    assert cli.main(["submit", *(argument.format(**places) for argument in arguments)]) == 2
    assert said in one_line(capsys.readouterr().err)
    assert service.requests == []
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_upload_the_queue_and_the_time_left(
    service: Service, knot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    shown: list[tuple[Any, ...]] = []
    bar = cli.progress_bar

    @contextmanager
    def watched(*, quiet: bool) -> Iterator[Callable[..., None]]:
        with bar(quiet=quiet) as show:
            yield lambda *details: (shown.append(details), show(*details))[0]

    monkeypatch.setattr(cli, "progress_bar", watched)
    service.refusals["POST /v1/jobs"] = [problem(503, "it is [bold]starting[/]")]
    service.events = [
        job_of(state="queued", queue_position=3),
        job_of(state="running", stage="fit", progress=0.5, step=120, steps=700, losses={"eikonal": 0.123}, eta_s=75.0),
        job_of(state="succeeded", progress=1.0),
    ]
    assert cli.main(["submit", str(knot), "-o", str(tmp_path / "a.ply"), "--url", service.url]) == 0
    size = knot.stat().st_size / 1e6
    text = "\n".join(" ".join(map(str, details)) for details in shown)
    for line in (
        f"upload 1.0 {size:.1f} of {size:.1f} MB",
        "waiting 0.0 it is [bold]starting[/]; trying again in",
        "queued 0.0 place 3 in the queue",
        "fit 0.5 1:15 left  step 120/700  eikonal 0.12",
        "download 1.0",
    ):
        assert line in text
    assert "watertight" in terminal.getvalue()


def test_an_interrupt_cancels_the_job_and_exits_130(service: Service, knot: Path, tmp_path: Path) -> None:
    service.events = [job_of(state="running")]

    async def endless(request: Request) -> Response:
        async def stream() -> Any:
            for _ in range(600):
                yield ": hello\n\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(stream())

    service.get_events = endless  # type: ignore[method-assign]
    command = [sys.executable, "-m", "sdfserver", "submit", str(knot), "-o", str(tmp_path / "a.ply")]
    with subprocess.Popen(
        [*command, "--url", service.url],
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        until = time.monotonic() + 60
        while not service.calls("GET /v1/jobs/j1/events") and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert one_line(process.communicate(timeout=30)[1]) == "sdfserver: interrupted\n"
    assert process.returncode == 130
    assert len(service.calls("POST /v1/jobs/j1/cancel")) == 1
    assert list(tmp_path.iterdir()) == []


def test_submitting_needs_no_torch(service: Service, knot: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sdfserver.cli import main; "
        f"code = main(['submit', {str(knot)!r}, '-o', {str(tmp_path / 'a.ply')!r}, '--url', {service.url!r}]); "
        "sys.exit(' '.join({'torch', 'scipy', 'trimesh', 'skimage'} & set(sys.modules)) or code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.ply").read_bytes() == MESH
