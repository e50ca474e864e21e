"""Traces for OpenTelemetry: one a job, of the request that made it, its wait, the attempts at its steps, their stages.

On where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set; else nothing of OpenTelemetry is
imported. Between API and workers the context is in the job's row, as W3C writes it. A worker that is killed tells
nothing of the attempt it was at: the worker that finds it dead does, under an id that both can compute.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfserver.schemas import JobKind

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

    from sdfserver.server.store import Attempt, Row

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
DELAY_VARIABLE, DELAY_MS = "OTEL_BSP_SCHEDULE_DELAY", "1000"
"""How long spans that ended are kept before they are sent: what a kill costs."""
FLUSH_SECONDS = 3.0
"""How long a process that ends waits for the collector to take its last spans."""
TRACED = "/v1/"
"""Requests below it have spans: no probes, no figures, no files of the page."""

_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_next = threading.local()
_open: "dict[str, AttemptSpan]" = {}


def set_up(part: str) -> bool:
    """Begin to trace this process as `part` of the service (api, worker), if that is asked for; whether it is."""
    global _provider, _tracer
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return False
    os.environ.setdefault(DELAY_VARIABLE, DELAY_MS)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ImportError:
        log.warning("there are no traces: OpenTelemetry is not installed; pip install 'sdfserver[trace]'")
        return False

    class _Ids(RandomIdGenerator):
        """Random ones, but for spans whose id is known before."""

        def generate_span_id(self) -> int:
            chosen = getattr(_next, "span", None)
            return super().generate_span_id() if chosen is None else int(chosen)

    about = {"service.version": version("sdfserver")}
    if "service.name" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "") and "OTEL_SERVICE_NAME" not in os.environ:
        about["service.name"] = f"sdfserver-{part}"
    _provider = TracerProvider(resource=Resource.create(about), id_generator=_Ids(), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("sdfserver")
    return True


def shut_down() -> None:
    """Send what there is to send; attempts that have not ended go back into the queue."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is None:
        return
    for attempt in list(_open.values()):
        attempt.end("released")
    # A collector that does not answer must not hold the process up.
    sending = threading.Thread(target=provider.shutdown, daemon=True)
    sending.start()
    sending.join(FLUSH_SECONDS)


def traceparent() -> str | None:
    """The span that is under way here, for those who carry on elsewhere; None where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def made(job_id: str) -> None:
    """Note of the request under way that it made the job."""
    if _tracer is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attribute("sdfserver.job.id", job_id)


class AttemptSpan:
    """The span of an attempt at a step, and those of the stages within; nothing where `span` is None."""

    def __init__(self, job_id: str, span: "Span | None") -> None:
        self._job_id, self._span = job_id, span
        self._stage: Span | None = None
        self._stage_name = ""

    def stage(self, name: str) -> None:
        """A stage is under way; another one has ended by then."""
        if self._span is None or _tracer is None or name == self._stage_name:
            return
        from opentelemetry.trace import set_span_in_context

        if self._stage is not None:
            self._stage.end()
        self._stage = _tracer.start_span(name, set_span_in_context(self._span))
        self._stage_name = name

    def end(self, how: str, problem: str = "") -> None:
        """It has ended: done, failed (by which problem), died, lost, released."""
        if self._span is None:
            return
        _open.pop(self._job_id, None)
        if self._stage is not None:
            self._stage.end()
        _ended(self._span, how, problem)
        self._span.end()
        self._span = None


def attempt(row: "Row", held: "Attempt", step: str) -> AttemptSpan:
    """An attempt at a step of a job begins."""
    if _tracer is None or row.traceparent is None:
        return AttemptSpan(row.id, None)
    if (before := _open.get(row.id)) is not None:
        before.end("lost")
    context, now = _context({"traceparent": row.traceparent}), time.time_ns()
    if held.number == 1 and step == _first_step(row):
        wait = _tracer.start_span(
            "wait", context, attributes=_attributes(row), start_time=min(now, int(row.created_at * 1e9))
        )
        wait.end(now)
    span = _attempt_span(_tracer, row, step, held.number, held.worker, now)
    _open[row.id] = found = AttemptSpan(row.id, span)
    return found


def lost(row: "Row") -> None:
    """The worker of a job is dead: `row` is how it left it."""
    if _tracer is None or row.traceparent is None:
        return
    step = "mesh" if row.fitted is not None else _first_step(row)
    began = int((row.step_at or row.started_at or row.created_at) * 1e9)
    span = _attempt_span(_tracer, row, step, row.attempt, row.worker, began)
    _ended(span, "died", "")
    span.end(max(began, time.time_ns()))


def _first_step(row: "Row") -> str:
    return "mesh" if row.kind == JobKind.MESH else "fit"


def _attempt_span(tracer: "Tracer", row: "Row", step: str, number: int, worker: str, began_ns: int) -> "Span":
    from opentelemetry.trace import SpanKind

    known = hashlib.sha256(f"{row.id} {number} {step}".encode()).digest()
    _next.span = int.from_bytes(known[:8], "big") or 1
    try:
        return tracer.start_span(
            f"{step} attempt {number}",
            _context({"traceparent": row.traceparent}),
            kind=SpanKind.CONSUMER,
            attributes=_attributes(row) | {"sdfserver.attempt": number, "sdfserver.worker.id": worker},
            start_time=began_ns,
        )
    finally:
        _next.span = None


def _attributes(row: "Row") -> dict[str, Any]:
    found = {"sdfserver.job.id": row.id, "sdfserver.job.kind": row.kind, "sdfserver.preset": row.preset}
    return found if row.request_id is None else found | {"sdfserver.request.id": row.request_id}


def _ended(span: "Span", how: str, problem: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("sdfserver.end", how)
    if how in ("failed", "died"):
        span.set_attribute("error.type", problem or how)
        span.set_status(StatusCode.ERROR)


def _context(headers: Mapping[str, str]) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers, Context())


class Traced:
    """Gives every request of the interface a span, within the trace that its client names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        tracer = _tracer
        if tracer is None or scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode, use_span

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method = scope["method"]
        about = {"http.request.method": method, "url.path": scope["path"][:200]}
        span = tracer.start_span(method, _context(headers), kind=SpanKind.SERVER, attributes=about)

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                route, status = getattr(scope.get("route"), "path", None), message["status"]
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)
                request = dict(message.get("headers", [])).get(b"x-request-id", b"").decode("latin-1")
                span.set_attribute("sdfserver.request.id", request)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, seen)
        finally:
            span.end()
