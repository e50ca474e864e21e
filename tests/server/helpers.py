"""Servers for the tests: the application on a free port in a thread, and whole servers as processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from waiting import POSTGRES, QUICK, fresh_postgres, wait_until

from sdfserver.server.app import create_app
from sdfserver.server.artifacts import FIT_FILES, MESH_FILES, Artifacts, seal
from sdfserver.server.routes import Service
from sdfserver.server.settings import Settings
from sdfserver.server.store import Attempt, Store

XYZ = b"0 0 1 0 0 1\n0 1 0 0 1 0\n1 0 0 1 0 0\n"
CHECKOUT = re.escape(str(Path(__file__).resolve().parents[2]))
PATIENCE_S = 120.0


until = partial(wait_until, patience_s=PATIENCE_S, pause_s=0.05)


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a fresh database, which goes in the end; skips where there is no server."""
    with fresh_postgres() as url:
        if url is None:
            pytest.skip(f"no PostgreSQL at {POSTGRES}")
        yield url


@dataclass
class App:
    """The application as it runs in a thread of this process."""

    app: FastAPI
    url: str
    logged: list[str] = field(default_factory=list)

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def store(self) -> Store:
        return self.service.store

    @contextmanager
    def changed(self, **settings: Any) -> Iterator[None]:
        """The same application with other settings, for a while."""
        before = self.service
        self.app.state.service = replace(before, settings=before.settings.model_copy(update=settings))
        try:
            yield
        finally:
            self.app.state.service = before


@contextmanager
def running(settings: Settings, http: Any = "auto") -> Iterator[App]:
    """The application of `settings` on a free port."""
    app = create_app(settings)
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=http, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1
        )
    )
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield App(app=app, url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


class Api(httpx.Client):
    """A client with a key of its own, and what a worker would do, done by hand."""

    def __init__(self, app: App, max_jobs: int | None = None) -> None:
        self.app, self.store = app, app.store
        self.key_id, self.secret = app.store.create_key("a test's", max_jobs)
        super().__init__(base_url=app.url, headers={"Authorization": f"Bearer {self.secret}"}, timeout=PATIENCE_S)

    @property
    def artifacts(self) -> Artifacts:
        return self.app.service.artifacts

    def folders(self) -> set[str]:
        """The jobs that have files, whosever they are."""
        return {path.name for path in self.artifacts.jobs.iterdir()}

    def send_cloud(
        self, body: bytes = XYZ, name: str = "cloud.xyz", *, options: str | None = None, **headers: str
    ) -> httpx.Response:
        """POST /v1/jobs as a form."""
        parts: dict[str, Any] = {"cloud": (name, body)}
        if options is not None:
            parts["options"] = (None, options, "application/json")
        return self.post("/v1/jobs", files=parts, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def submit(self, options: str | None = None, **more: Any) -> dict[str, Any]:
        """A job that has been taken, as the answer shows it."""
        answer = self.send_cloud(options=options, **more)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/v1/jobs/{job_id}").raise_for_status().json()

    def begin(self, job_id: str, worker: str) -> Attempt:
        """Start a job, as a worker does."""
        attempt = self.store.begin_attempt(job_id, worker, 3, {}, 3600.0)
        assert attempt is not None
        return attempt

    def publish(self, job_id: str, worker: str, seconds: float = 1.0, keep_s: float = 3600.0) -> None:
        """Have a job succeed, its files being names of themselves."""
        attempt = self.begin(job_id, worker)
        for folder, names in (
            (self.artifacts.fit(job_id, attempt.number), FIT_FILES),
            (self.artifacts.mesh(job_id, attempt.number), MESH_FILES),
        ):
            folder.mkdir()
            for name in names:
                folder.joinpath(name).write_text(name)
            seal(folder)
        assert self.store.update(attempt, fitted=attempt.number, seconds={"fit": seconds})
        assert self.store.publish(attempt, {"mesh": seconds}, keep_s)


def end_jobs(api: Api) -> None:
    for row in api.store.list_jobs(api.key_id, limit=10_000):
        api.store.cancel(row.id, 3600.0)
    api.close()


def is_problem(answer: httpx.Response, status: int, kind: str, *said: str) -> None:
    """Assert that an answer is such a problem, and says so."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"urn:sdfserver:problem:{kind}", body
    assert body["status"] == status
    assert body["title"]
    for words in said:
        assert words in body["detail"], body
    assert not re.search(rf"Traceback|File \"|/tmp/|{CHECKOUT}|sqlite|SELECT|site-packages", answer.text), answer.text


# Whole servers


@dataclass
class Process:
    """`sdfserver serve` or `api`, as a process."""

    running: "subprocess.Popen[bytes]"
    log: Path
    folder: Path
    url: str = ""

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def process(command: str, folder: Path, **settings: Any) -> Iterator[Process]:
    """`sdfserver COMMAND` on a free port with `settings`, until it answers; stopped in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    environment = {f"SDFSERVER_{name.upper()}": str(value) for name, value in settings.items()}
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, log.open("wb") as stream:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        own_socket = command == "api"
        where = ["--fd", str(listener.fileno())] if own_socket else ["--port", "0"]
        if not own_socket:
            listener.close()
        child = subprocess.Popen(
            [sys.executable, "-m", "sdfserver", command, "--data-dir", str(folder / "data"), *where],
            env=os.environ | {"SDFSERVER_DRAIN_SECONDS": "0", "PYTHONPATH": QUICK} | environment,
            stdin=subprocess.DEVNULL,
            stderr=stream,
            pass_fds=[listener.fileno()] if own_socket else [],
        )
    started = Process(child, log, folder, url)

    def answers() -> bool:
        assert child.poll() is None, started.said()
        if not own_socket:
            found = re.search(r"serving on (http://\S+)", started.said())
            if found is None:
                return False
            started.url = found[1]
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{started.url}/health/live", timeout=PATIENCE_S).is_success
        return False

    try:
        until(answers)
        yield started
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(60)
        finally:
            child.kill()
            child.wait()


@dataclass
class Served:
    """A server with a key, and the job that it did."""

    server: Process
    api: httpx.Client
    secret: str
    job: dict[str, Any] = field(default_factory=dict)
    stream: str = ""
    """Its events, as they came."""
