"""The HTTP application: endpoints, probes, metrics, and one table from exceptions to problems."""

import asyncio
import errno
import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import DatabaseError, OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdfserver.server import field_routes, page, tracing
from sdfserver.server.abuse import Bounded, Guesses
from sdfserver.server.artifacts import ArtifactError, open_artifacts
from sdfserver.server.following import Lookout
from sdfserver.server.liveness import living
from sdfserver.server.logs import STEP, about
from sdfserver.server.metrics import Measured, Metrics
from sdfserver.server.problems import ProblemError
from sdfserver.server.queue import JobQueue
from sdfserver.server.routes import Service, TheService, answers, invalid, problem_response, router
from sdfserver.server.settings import Settings
from sdfserver.server.storage import prepare_storage
from sdfserver.server.store import Store
from sdfserver.server.uploads import disk_full
from sdfserver.server.views import QueueView

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_HTTP_KINDS = {
    400: "malformed",
    401: "unauthorized",
    404: "not-found",
    405: "method",
    408: "slow",
    413: "too-large",
    416: "range",
}
_DESCRIPTION = """
From an oriented point cloud to its surface: upload a cloud, follow its job, download the mesh.

Every error is a problem as RFC 9457 has it (`application/problem+json`): its `type` is stable, its `detail` says what
to do.
"""


def create_app(settings: Settings) -> FastAPI:
    """The application, which opens its storage when it starts and closes it when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store, artifacts = Store(settings.database), open_artifacts(settings)
        await asyncio.to_thread(prepare_storage, settings, store, artifacts)
        queue = JobQueue(store)
        view = QueueView(store, settings.lease_seconds)
        app.state.service = Service(
            settings=settings,
            store=store,
            queue=queue,
            artifacts=artifacts,
            view=view,
            lookout=Lookout(store, view),
            converting=asyncio.Semaphore(1),
            receiving=CapacityLimiter(8),
            creating=CapacityLimiter(1),
            asking=CapacityLimiter(2),
            guesses=Guesses(),
        )
        yield
        queue.close()
        store.close()
        artifacts.close()
        await asyncio.to_thread(tracing.shut_down)

    app = FastAPIOffline(
        redoc_url=None,
        redirect_slashes=False,  # to where the Host header says
        title="sdfserver",
        summary="From an oriented point cloud to its surface",
        description=_DESCRIPTION,
        version=version("sdfserver"),
        lifespan=lifespan,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    metrics = Metrics()
    app.add_middleware(Bounded)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(_Identified)
    if tracing.set_up("api"):
        app.add_middleware(tracing.Traced)
    app.include_router(router)
    app.include_router(field_routes.router)
    app.include_router(page.router)
    _add_service_routes(app, metrics)
    _add_handlers(app)
    return app


def _add_service_routes(app: FastAPI, metrics: Metrics) -> None:
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
        return Response(metrics.text(service.store, service.settings.lease_seconds), media_type=CONTENT_TYPE_LATEST)


class _Identified:
    """Gives every request an id, the client's own if it sent a usable one: in the answer and in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request.encode())]
                log.log(STEP, "%s %s: %d", scope["method"], scope["path"][:200], message["status"])
            await send(message)

        with about(request=request):
            await self._app(scope, receive, answered)


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
            routers = (app, router, field_routes.router, page.router)
            routes = [route for one in routers for route in one.routes if isinstance(route, Route)]
            here = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            headers["Allow"] = ", ".join(sorted(set().union(*here)))
        return problem_response(ProblemError(kind, detail, headers=headers), request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, _error: ClientDisconnect) -> Response:
        return problem_response(ProblemError("malformed", "the request ended too early"), request.url.path)

    @app.exception_handler(OSError)
    async def _disk(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise error
        log.error("the data folder takes no more: %s", error)
        return problem_response(disk_full(), request.url.path)

    @app.exception_handler(OperationalError)
    async def _database(request: Request, error: OperationalError) -> Response:
        log.error("the database does not answer: %s", error.orig)
        if "disk is full" in str(error.orig) or "No space left" in str(error.orig):
            return problem_response(disk_full(), request.url.path)
        problem = ProblemError("not-ready", "the database does not answer; try again", headers={"Retry-After": "5"})
        return problem_response(problem, request.url.path)

    @app.exception_handler(ArtifactError)
    async def _artifacts(request: Request, error: ArtifactError) -> Response:
        log.error("%s", error)
        detail = "the store of clouds and meshes does not answer; try again"
        return problem_response(ProblemError("not-ready", detail, headers={"Retry-After": "5"}), request.url.path)

    @app.exception_handler(DatabaseError)
    async def _damaged(request: Request, error: DatabaseError) -> Response:
        if type(error) is not DatabaseError:  # a mistake of ours
            raise error
        log.error("the database cannot be used: %s", error.orig)
        problem = ProblemError("not-ready", "the database cannot be used; the server's log says why")
        return problem_response(problem, request.url.path)

    @app.exception_handler(Exception)
    async def _internal(request: Request, _error: Exception) -> Response:
        # The connection ends with this answer: the error goes on to the server, which logs it and hangs up.
        detail = "the server made a mistake; its log says which"
        problem = ProblemError("internal", detail, headers={"Connection": "close"})
        return problem_response(problem, request.url.path)
