"""Traces: what a collector is sent by a whole service, of a job that went well and of one whose worker was killed."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from faults.host import CLOUD, Host, fresh_host, until

from sdfserver.schemas import JobState
from sdfserver.server import tracing

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytestmark = pytest.mark.timeout(900)
ERROR = 2
"""Of the statuses of a span."""
SERVER, CONSUMER = 2, 5
"""Of its kinds."""
MOMENT_NS = 2_000_000
"""Of a clock that counts in milliseconds beside one that counts in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """As the collector has it."""

    trace: str
    id: str
    parent: str
    name: str
    kind: int
    service: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]


class Collector:
    """Takes what exporters send, as OTLP over HTTP has it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.url = ""

    def take(self, body: bytes) -> None:
        for of_process in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans:
            about = _plain(of_process.resource.attributes)
            for span in itertools.chain.from_iterable(scope.spans for scope in of_process.scope_spans):
                self.spans.append(
                    Span(
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        name=span.name,
                        kind=span.kind,
                        service=about["service.name"],
                        start=span.start_time_unix_nano,
                        end=span.end_time_unix_nano,
                        failed=span.status.code == ERROR,
                        attributes=_plain(span.attributes),
                    )
                )

    def of(self, trace: str) -> list[Span]:
        """The spans of a trace, by when they began."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()

    class _Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            collector.take(body)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(trace_service.ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collector.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as one:
        yield one


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, tmp_path: Path, collector: Collector) -> Iterator[Host]:
    """A service that traces; nothing runs yet."""
    with fresh_host(tmp_path, request.param) as host:
        host.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        yield host


ONE_POINT = b"0 0 1 0 0 1\n"
"""No cloud that could be reconstructed."""


def submit(host: Host, traceparent: str, cloud: bytes | None = None, name: str = "a.ply") -> str:
    """A job whose client is in the middle of a trace."""
    answer = httpx.post(
        f"{host.client.url}/v1/jobs",
        files={"cloud": (name, CLOUD.read_bytes() if cloud is None else cloud)},
        data={"options": '{"preset": "draft", "resolution": 32}'},
        headers={"traceparent": traceparent},
        timeout=60,
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def shape(spans: list[Span]) -> list[tuple[str, str, str]]:
    """Of each: the service, its name, and whose child it is."""
    names = {span.id: span.name for span in spans}
    assert len(names) == len(spans), "every span has an id of its own"
    return [(span.service, names.get(span.parent, span.parent), span.name) for span in spans]


STAGES = {"fit": ["prepare", "fit"], "mesh": ["mesh", "measure"]}
THE_CLIENTS = "00f067aa0ba902b7"
REQUEST = "POST /v1/jobs"


API, WORKER = "sdfserver-api", "sdfserver-worker"


def attempt(number: int, *steps: str) -> list[tuple[str, str, str]]:
    """The shape of an attempt at steps that it finished."""
    spans = []
    for step in steps:
        name = f"{step} attempt {number}"
        spans += [(WORKER, REQUEST, name), *((WORKER, name, stage) for stage in STAGES[step])]
    return spans


def are_nested(spans: list[Span]) -> None:
    """Every span lies within its parent, but for what outlasts the request that asked for it."""
    parents = {span.id: span for span in spans}
    for span in spans:
        assert span.start <= span.end
        parent = parents.get(span.parent)
        if parent is not None:
            assert span.start >= parent.start - MOMENT_NS
            if parent.name != REQUEST:
                assert span.end <= parent.end + MOMENT_NS


def test_a_job_whose_worker_is_killed_is_one_trace_with_both_attempts(host: Host, collector: Collector) -> None:
    host.serve()
    trace, failing, unasked = (f"{i:032x}" for i in range(1, 4))
    job = submit(host, f"00-{trace}-{THE_CLIENTS}-01")
    host.fitting(job)
    bad, unsampled = (
        submit(host, f"00-{other}-{THE_CLIENTS}-{flags}", ONE_POINT, "a.xyz")
        for other, flags in ((failing, "01"), (unasked, "00"))
    )
    until(lambda: any(span.trace == trace and span.name == "prepare" for span in collector.spans))  # a second at most
    killed = host.row(job).worker
    host.kill(host.process("worker"))
    row = host.succeeds(job)
    assert (row.attempt, row.deaths) == (2, 1)
    for other in (bad, unsampled):
        host.fails(other, "cloud")
    host.leaves_nothing_behind()

    spans = collector.of(trace)
    assert shape(spans) == [
        (API, THE_CLIENTS, REQUEST),
        (WORKER, REQUEST, "wait"),
        (WORKER, REQUEST, "fit attempt 1"),
        (WORKER, "fit attempt 1", "prepare"),  # the stage that was cut off has no end, and nobody to tell of it
        *attempt(2, "fit", "mesh"),
    ]
    are_nested(spans)
    by_name = {span.name: span for span in spans if span.name not in STAGES["fit"] + STAGES["mesh"]}
    request, died, second = by_name[REQUEST], by_name["fit attempt 1"], by_name["fit attempt 2"]
    assert (request.kind, died.kind, second.kind) == (SERVER, CONSUMER, CONSUMER)
    assert request.attributes["http.response.status_code"] == 202
    assert request.attributes["http.route"] == "/v1/jobs"
    assert request.attributes["sdfserver.request.id"] == row.request_id
    assert {span.attributes["sdfserver.job.id"] for span in by_name.values()} == {job}
    assert died.failed
    assert (died.attributes["sdfserver.end"], died.attributes["sdfserver.worker.id"]) == ("died", killed)
    assert died.end <= second.start + MOMENT_NS
    for done in (second, by_name["mesh attempt 2"]):
        expected = {"sdfserver.attempt": 2, "sdfserver.preset": "draft", "sdfserver.end": "done"}
        assert (expected | {"sdfserver.worker.id": row.worker}).items() <= done.attributes.items()
        assert not done.failed

    (failed,) = [span for span in collector.of(failing) if span.name == "fit attempt 1"]
    assert failed.failed
    assert (failed.attributes["sdfserver.end"], failed.attributes["error.type"]) == ("failed", "cloud")
    assert collector.of(unasked) == []
    # Nobody traces probes; other requests are traces of their own.
    assert all(span.name.partition(" ")[2].startswith("/v1/") for span in collector.spans if span.kind == SERVER)


@pytest.mark.slow
def test_a_job_that_goes_well_has_one_attempt_and_one_that_goes_back_says_so(host: Host, collector: Collector) -> None:
    serving = host.serve(drain_seconds=0)
    good, returning = f"{4:032x}", f"{5:032x}"
    first = submit(host, f"00-{good}-{THE_CLIENTS}-01")
    assert host.succeeds(first).attempt == 1
    back = submit(host, f"00-{returning}-{THE_CLIENTS}-01")
    host.fitting(back)
    host.stop(serving)
    assert host.row(back).state == JobState.QUEUED
    spans = collector.of(good)
    assert shape(spans) == [(API, THE_CLIENTS, REQUEST), (WORKER, REQUEST, "wait"), *attempt(1, "fit", "mesh")]
    are_nested(spans)
    assert not any(span.failed for span in spans)
    (released,) = [span for span in collector.of(returning) if span.name == "fit attempt 1"]
    assert (released.failed, released.attributes["sdfserver.end"]) == (False, "released")


@pytest.mark.slow
def test_a_collector_that_is_not_there_holds_nobody_up(host: Host, collector: Collector) -> None:
    host.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    serving = host.serve()
    host.fails(submit(host, f"00-{6:032x}-{THE_CLIENTS}-01", ONE_POINT, "a.xyz"), "cloud")
    host.stop(serving)
    assert not host.processes()
    assert "Traceback" not in host.said()
    assert len(host.said().splitlines()) < 20, "it is said, and not again and again"
    assert collector.spans == []


def test_nothing_is_imported_or_kept_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.set_up("api") is False
    assert tracing.traceparent() is None
