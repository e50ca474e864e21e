"""The HTTP application: endpoints, probes, metrics, and one table from exceptions to problems."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfserver.schemas import JobState
from sdfserver.server import page
from sdfserver.server.artifacts import Artifacts
from sdfserver.server.liveness import living
from sdfserver.server.problems import ProblemError
from sdfserver.server.queue import JobQueue
from sdfserver.server.routes import MAX_JSON_BYTES, Service, TheService, answers, invalid, problem_response, router
from sdfserver.server.settings import Settings
from sdfserver.server.store import Store
from sdfserver.server.views import JOBS, QueueView
from sdfserver.server.worker import prepare_storage

log = logging.getLogger(__name__)

_HTTP_KINDS = {400: "malformed", 401: "unauthorized", 404: "not-found", 405: "method", 413: "too-large", 416: "range"}
_DESCRIPTION = """
From an oriented point cloud to its surface: upload a cloud, follow its job, download the mesh.

Every error is a problem as RFC 9457 has it (`application/problem+json`): its `type` is stable, its `detail` says what
to do.
"""


def create_app(settings: Settings) -> FastAPI:
    """The application, which opens its storage when it starts and closes it when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store, artifacts = Store(settings.database), Artifacts(settings.data_dir)
        await asyncio.to_thread(prepare_storage, settings, store, artifacts)
        queue = JobQueue(store)
        app.state.service = Service(
            settings=settings,
            store=store,
            queue=queue,
            artifacts=artifacts,
            view=QueueView(store, settings.lease_seconds),
            converting=asyncio.Semaphore(1),
            receiving=CapacityLimiter(8),
            creating=CapacityLimiter(1),
        )
        yield
        queue.close()
        store.close()

    app = FastAPIOffline(
        redoc_url=None,
        title="sdfserver",
        summary="From an oriented point cloud to its surface",
        description=_DESCRIPTION,
        version=version("sdfserver"),
        lifespan=lifespan,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    metrics = _Metrics()
    app.add_middleware(_Limited)
    app.add_middleware(_Measured, metrics=metrics)
    app.include_router(router)
    app.include_router(page.router)
    _add_service_routes(app, metrics)
    _add_handlers(app)
    return app


def _add_service_routes(app: FastAPI, metrics: "_Metrics") -> None:
    @app.get("/health/live", response_class=PlainTextResponse, tags=["service"])
    def live() -> str:
        """Whether the process answers."""
        return "live\n"

    @app.get("/health/ready", response_class=PlainTextResponse, responses=answers("not-ready"), tags=["service"])
    def ready(service: TheService) -> str:
        """Whether the database answers and a worker is there to take jobs."""
        service.store.check()
        if not living(service.store, service.settings.lease_seconds):
            raise ProblemError("not-ready", "no worker is running; start one with 'sdfserver worker'")
        return "ready\n"

    @app.get("/metrics", response_class=PlainTextResponse, tags=["service"])
    def prometheus(service: TheService) -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(service), media_type=CONTENT_TYPE_LATEST)


class _Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sdfserver_http_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "sdfserver_http_request_seconds", "Seconds to the first byte of an answer", ["route"],
            registry=self._registry,
        )  # fmt: skip
        self._jobs = Gauge("sdfserver_jobs", "Jobs by state", ["state"], registry=self._registry)
        self._workers = Gauge("sdfserver_workers", "Workers that are alive", registry=self._registry)

    def text(self, service: Service) -> bytes:
        counts = service.store.counts()
        for state in JobState:
            self._jobs.labels(state.value).set(counts.get(state.value, 0))
        self._workers.set(len(living(service.store, service.settings.lease_seconds)))
        return generate_latest(self._registry)


class _Measured:
    """Counts requests by route, and the seconds until their answers begin."""

    def __init__(self, app: ASGIApp, metrics: _Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = asyncio.get_running_loop().time()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The pattern, not the path: a label for every job would never end.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(scope["method"], route, message["status"]).inc()
                self._metrics.seconds.labels(route).observe(asyncio.get_running_loop().time() - start)
            await send(message)

        await self._app(scope, receive, observed)


class _Limited:
    """Holds bodies to MAX_JSON_BYTES, but for clouds, which have a limit of their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == JOBS:
            await self._app(scope, receive, send)
            return
        declared, received = int(dict(scope["headers"]).get(b"content-length", b"0")), 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if max(declared, received) > MAX_JSON_BYTES:
                raise HTTPException(413, f"the body has more than {MAX_JSON_BYTES:,} bytes; send less at a time")
            return message

        await self._app(scope, limited, send)


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return problem_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return problem_response(invalid(error.errors()), request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        kind = _HTTP_KINDS.get(error.status_code, "malformed")
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == 405:  # with the methods of all routes at this path, not of the first alone
            routes = [route for route in (*app.routes, *router.routes, *page.router.routes) if isinstance(route, Route)]
            here = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            headers["Allow"] = ", ".join(sorted(set().union(*here)))
        return problem_response(ProblemError(kind, detail, headers=headers), request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, _error: ClientDisconnect) -> Response:
        return problem_response(ProblemError("malformed", "the request ended too early"), request.url.path)

    @app.exception_handler(OperationalError)
    async def _database(request: Request, error: OperationalError) -> Response:
        log.error("the database does not answer: %s", error.orig)
        problem = ProblemError("not-ready", "the database does not answer; try again", headers={"Retry-After": "5"})
        return problem_response(problem, request.url.path)

    @app.exception_handler(Exception)
    async def _internal(request: Request, _error: Exception) -> Response:
        # The connection ends with this answer: the error goes on to the server, which logs it and hangs up.
        detail = "the server made a mistake; its log says which"
        problem = ProblemError("internal", detail, headers={"Connection": "close"})
        return problem_response(problem, request.url.path)
